"""Run directories as the trainer leaves them, read into plain rows, whether the run is finished or still going.

A last line cut short by a kill is left out; anything else that is missing or damaged is an error naming file and line.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgdpo_fast.errors import DataError
from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, REJECTED
from pgdpo_fast.objectives import label as objective_label
from pgdpo_fast.preemption import check_stop
from pgdpo_fast.printable import printable

__all__ = ["RunRecord", "finite", "identical_curves", "read_rows", "read_runs", "running_mean"]

Row = dict[str, Any]
METRICS_SHOWN = (CHOSEN, REJECTED, MARGINS, ACCURACIES)


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        label: what figures call it; unique among the runs read together.
        config: nested settings of config.yaml.
        metrics: one row per step. evaluations: rows on held-out pairs, possibly none.
        advantages: rows of `AdvantageProbe`, possibly none.
        environment: python, device, thread count and package versions; may be empty.
    """

    path: Path
    label: str
    config: Row
    metrics: list[Row]
    evaluations: list[Row]
    advantages: list[Row]
    environment: Row

    @property
    def objective(self) -> str:
        return self.config["objective"]["name"]

    @property
    def beta(self) -> float | None:
        """Of the loss; None where it has none."""
        settings = self.config["objective"]
        settings = settings.get("base", settings)
        unused = settings["name"] == "slic" and not settings.get("hinge")
        return None if unused else settings.get("beta")

    @property
    def held_out(self) -> bool:
        """Whether reward curves come from held-out pairs; otherwise they are those of the training batches."""
        return bool(self.evaluations)

    @property
    def step(self) -> int:
        """Steps made."""
        return self.metrics[-1]["step"]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric: held-out when there are evaluations, else of the training batches."""
        rows = self.evaluations or self.metrics
        return [row["step"] for row in rows], [row[key] for row in rows]

    def smooth_curve(self, key: str) -> tuple[list[int], list[float]]:
        """`curve`, with the noise of single training batches averaged out."""
        steps, values = self.curve(key)
        return steps, values if self.held_out else running_mean(values)

    def final(self, key: str) -> float:
        """The last held-out value of a metric, or its mean over the last tenth of the training steps."""
        return statistics.fmean(row[key] for row in self._last())

    def standard_error(self, name: str) -> float:
        """Of the mean of a per-pair quantity at the end, over pairs; NaN where it cannot be known."""
        by_pair: dict[str, list[float]] = {}
        for row in self._last():
            for pair, value in zip(row["pairs"]["id"], row["pairs"][name], strict=True):
                by_pair.setdefault(pair, []).append(value)
        means = [statistics.fmean(values) for values in by_pair.values()]
        if len(means) < 2 or len(finite(means)) < len(means):
            return math.nan
        return statistics.stdev(means) / math.sqrt(len(means))

    @property
    def last_pairs(self) -> int:
        """How many different pairs the final values are means over."""
        return len({pair for row in self._last() for pair in row["pairs"]["id"]})

    def _last(self) -> list[Row]:
        return self.evaluations[-1:] or self.metrics[-max(1, len(self.metrics) // 10) :]

    def pairs(self, name: str) -> list[tuple[int, list[float]]]:
        """(step, per-pair values) of a quantity of the training batches."""
        return [(row["step"], row["pairs"][name]) for row in self.metrics]


def read_runs(paths: Sequence[str | os.PathLike]) -> list[RunRecord]:
    """Read run directories, labelled by objective, and by folder too where two share one.

    Raises:
        DataError: a folder is no run, a file is damaged, or two runs cannot be told apart.
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise DataError("no run directory given; expected at least one, as written by: pgdpo-fast train")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("the same run directory is given twice; name each run once")
    configs = [_read_config(folder) for folder in folders]
    names = [objective_label(config["objective"]) for config in configs]
    labels = [
        name if names.count(name) == 1 else f"{name} ({printable(folder.resolve().name, 200)})"
        for name, folder in zip(names, folders, strict=True)
    ]
    labels = [label if labels.count(label) == 1 else f"{label} #{number}" for number, label in enumerate(labels, 1)]
    return [_read_run(*parts) for parts in zip(folders, labels, configs, strict=True)]


def _read_run(folder: Path, label: str, config: Row) -> RunRecord:
    metrics = read_rows(folder / "metrics.jsonl", ("step", "loss", "step_seconds", *METRICS_SHOWN, "pairs"))
    if not metrics:
        raise DataError(f"{folder / 'metrics.jsonl'}: no finished step yet; report again once the run has made one")
    evaluations, advantages = (
        read_rows(folder / f"{name}.jsonl", needed) if (folder / f"{name}.jsonl").exists() else []
        for name, needed in (
            ("evaluation", ("step", *METRICS_SHOWN, "pairs")),
            ("displacement", ("step", "advantage")),
        )
    )
    environment = folder / "environment.json"
    try:
        machine = json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {}
        if not isinstance(machine, dict) or not isinstance(machine.get("packages", {}), dict):
            raise ValueError("not the versions a run was made with")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{environment}: not valid JSON ({error}); delete it, the report can do without") from None
    return RunRecord(folder, label, config, metrics, evaluations, advantages, machine)


def _read_config(folder: Path) -> Row:
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(
            f"{folder}: no config.yaml in it, so no run directory; give a folder written by: pgdpo-fast train"
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["training"]["seed"]
        json.dumps(config, default=str)  # nothing that contains itself
        if not isinstance(config["objective"]["name"], str):
            raise TypeError
        objective_label(config["objective"])
    except (yaml.YAMLError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: damaged or without an objective ({type(error).__name__}); restore it, or start the run "
            "again with the same settings: it continues where it stood"
        ) from None
    return config


def read_rows(path: Path, needed: Sequence[str] = ("step",)) -> list[Row]:
    """Rows of a JSON-lines file in file order, without a last line that a kill cut short.

    Raises:
        DataError: the file is missing, or a line is no JSON object with the `needed` keys.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; expected the rows of a run, give a folder written by: pgdpo-fast train"
        ) from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # a whole line ends in a newline
        check_stop()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(key in row and _fits(key, row[key]) for key in needed):
            raise DataError(
                f"{path}, line {number}: expected a JSON object with {', '.join(needed)}; delete the lines from "
                "there on, or train again: a resumed run rewrites them"
            )
        rows.append(row)
    return rows


def _fits(key: str, value: Any) -> bool:
    """Whether an entry is as the trainer writes it: a step, lists of one length in "pairs", else a number or null."""
    if key == "step":
        return type(value) is int and value >= 0
    if key == "pairs":
        columns = list(value.values()) if isinstance(value, dict) else []
        return bool(columns) and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def identical_curves(runs: Sequence[RunRecord]) -> list[str]:
    """Labels of the runs whose chosen and rejected rewards are those of another run, number by number."""
    curves = {run.label: [run.curve(key) for key in (CHOSEN, REJECTED)] for run in runs if finite(run.curve(CHOSEN)[1])}
    return [label for label in curves if sum(curves[label] == other for other in curves.values()) > 1]


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred means over a twentieth of the values, fewer at the ends."""
    half = max(1, len(values) // 20) // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def finite(values: Sequence[float | None]) -> list[float]:
    """The numbers among `values` that are finite."""
    return [value for value in values if value is not None and math.isfinite(value)]
