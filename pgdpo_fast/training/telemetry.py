"""What a run tells while it runs: metric files, one live line, and a panel on the health of the preference.

Everything here works on numbers already on the host; nothing looks at the device. Health is a pure function of the
metric rows, so a resumed run rebuilds it from its own file.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, REJECTED, timestep_bins
from pgdpo_fast.storage import append_line, atomic_file, fsync_path, set_aside

__all__ = ["Display", "MetricsFile", "PreferenceHealth", "RunLog", "TensorBoard", "open_display"]

WINDOW = 40  # steps the health looks back on; its two halves are compared


class MetricsFile:
    """One JSON object per line, ordered by `step`, on which a resumed run continues exactly where it stood."""

    def __init__(self, path: Path, numbers: Sequence[str] = (), pair_numbers: Sequence[str] = ()):
        """`numbers` and `pair_numbers` name what every row and the pairs of every row must hold."""
        self.path, self.numbers, self.pair_numbers = path, numbers, pair_numbers

    def keep_until(self, step: int, note: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
        """Drop rows after `step`, and a last line a kill cut short; returns the rows kept.

        A line that is no row of this file is damage: the file as it is is set aside, every whole row is kept, and
        `note` is told both.
        """
        rows, damaged, last = [], [], -1
        lines = (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # a whole line ends in a newline
            row = self._row(line)
            if row is None or row["step"] <= last:
                damaged.append(number)
                continue
            last = row["step"]
            if last <= step:
                rows.append((line, row))
        if damaged:
            kept = set_aside(self.path)
            shown = f"{', '.join(map(str, damaged[:5]))}{', ...' * (len(damaged) > 5)}"
            note(
                f"{self.path}: damaged in line {shown}; set aside as {kept.name}, the {len(rows)} whole rows "
                f"up to step {step} are kept"
            )
        with atomic_file(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line, _ in rows))
        return [row for _, row in rows]

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """The row in a line; None where it is none."""
        try:
            row = json.loads(line)
            numbers = [row["step"], *(row[name] for name in self.numbers)]
            pairs = {name: list(values) for name, values in row["pairs"].items()}
            numbers += [value for name in self.pair_numbers for value in pairs[name]]
            whole = len({len(values) for values in pairs.values()}) == 1 and pairs["id"] and type(row["step"]) is int
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None
        return row if whole and all(type(number) in (int, float) for number in numbers) else None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is out of this process when the call returns."""
        append_line(self.path, json.dumps(row))

    def sync(self) -> None:
        """Make the rows survive a loss of power."""
        if self.path.exists():
            fsync_path(self.path)


class TensorBoard:
    """TensorBoard events of the scalar metrics; silent when the package is missing."""

    def __init__(self, directory: Path, enabled: bool, purge_step: int):
        self.writer = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, row: Mapping[str, Any], prefix: str) -> None:
        if self.writer is not None:
            for key, value in row.items():
                if isinstance(value, float) and key != "time":
                    self.writer.add_scalar(f"{prefix}/{key}", value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class RunLog:
    """`log.txt`: every note of the run with its time, and tracebacks that the terminal is spared."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, text: str) -> None:
        append_line(self.path, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")


class PreferenceHealth:
    """Whether the preference is being learnt, or only won: displacement, saturation, alpha, gamma, suggested beta."""

    NUMBERS = (CHOSEN, MARGINS, "gradient_factor", "logits")  # what it looks at of a row, and of the row's pairs
    PAIR_NUMBERS = ("margin", "timestep", "alpha", "gamma")

    def __init__(self, beta: float | None, window: int = WINDOW):
        self.beta = beta
        self.rows: deque[Mapping[str, Any]] = deque(maxlen=window)

    def update(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def alarms(self) -> list[str]:
        """Names of what is wrong now: "displacement", "saturation", "flat"; none before the window is full."""
        if len(self.rows) < self.rows.maxlen:
            return []
        found = []
        if self._change(CHOSEN) < -2 and self._change(MARGINS) > 2:
            found.append("displacement")
        factor = self.mean("gradient_factor")
        if factor < 0.05:
            found.append("saturation")
        if abs(factor - 0.5) < 0.005 and self._spread("logits") < 0.02:
            found.append("flat")
        return found

    def advice(self) -> list[str]:
        """One sentence for each alarm."""
        beta = self.suggested_beta()
        hint = f"; a beta near {beta:.3g} would put typical logits at 1" if beta else ""
        sentences = {
            "displacement": "DISPLACEMENT: the chosen reward falls while the margin grows; use the pgdpo objective, "
            "a smaller learning rate or fewer steps",
            "saturation": f"saturated: the gradient factor is {self.mean('gradient_factor'):.3f}, most pairs give no "
            f"gradient{hint}",
            "flat": f"flat: logits stay at 0, the loss at its start{hint}",
        }
        return [sentences[name] for name in self.alarms()]

    def suggested_beta(self) -> float | None:
        """The beta at which the median |margin| of the window's pairs gives |logit| 1; None without margins."""
        sizes = [abs(margin) for row in self.rows for margin in row["pairs"]["margin"] if math.isfinite(margin)]
        middle = statistics.median(sizes) if sizes else 0.0
        return 2.0 / middle if self.beta is not None and middle > 0 else None

    def by_timestep(self) -> list[tuple[float, float, int, float]]:
        """(low, high, pairs, accuracy) for equal bins of the model's timestep over [0, 1000], over the window."""
        return [(item["low"], item["high"], item["pairs"], item["accuracy"]) for item in timestep_bins(self.rows)]

    def quantiles(self, name: str) -> tuple[float, float, float]:
        """10%, 50% and 90% points of a per-pair quantity over the window."""
        values = sorted(value for row in self.rows for value in row["pairs"][name])
        return tuple(values[min(int(share * len(values)), len(values) - 1)] for share in (0.1, 0.5, 0.9))

    def mean(self, key: str) -> float:
        """Mean of a metric over the window."""
        return statistics.fmean(row[key] for row in self.rows)

    def _spread(self, key: str) -> float:
        return statistics.pstdev([row[key] for row in self.rows])

    def _change(self, key: str) -> float:
        """Later half minus earlier half, in standard errors."""
        values = [row[key] for row in self.rows]
        half = len(values) // 2
        before, after = values[:half], values[half:]
        error = math.sqrt(statistics.variance(before) / len(before) + statistics.variance(after) / len(after))
        change = statistics.fmean(after) - statistics.fmean(before)
        return change / error if error else math.copysign(math.inf, change) if change else 0.0


class Display(Protocol):
    """Where a person watches."""

    def note(self, text: str) -> None: ...

    def step(self, row: Mapping[str, Any], last: int, health: PreferenceHealth) -> None: ...

    def close(self) -> None: ...


class SilentDisplay:
    """Shows nothing."""

    def note(self, text: str) -> None:
        pass

    def step(self, row: Mapping[str, Any], last: int, health: PreferenceHealth) -> None:
        pass

    def close(self) -> None:
        pass


class PlainDisplay(SilentDisplay):
    """One line every `every` steps: for pipes, files and schedulers."""

    def __init__(self, every: int, stream: TextIO | None = None):
        self.every, self.stream = every, stream or sys.stdout
        self.rates: deque[float] = deque(maxlen=50)
        self.alarms: list[str] = []

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def step(self, row, last, health):
        self.rates.append(row["step_seconds"])
        if row["step"] % self.every == 0 or row["step"] in (1, last):
            self.note(format_line(row, last, self.rates))
        if (alarms := health.alarms()) != self.alarms:
            self.alarms = alarms
            for sentence in health.advice():
                self.note(f"  {sentence}")


class LiveDisplay(SilentDisplay):
    """One line that stays in place, with the health of the preference below it."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live

        self.live = Live(console=Console(), refresh_per_second=4, transient=False)
        self.live.start()
        self.rates: deque[float] = deque(maxlen=50)

    def note(self, text: str) -> None:
        self.live.console.print(text, markup=False, highlight=False)

    def step(self, row, last, health):
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        self.rates.append(row["step_seconds"])
        alarms = bool(health.alarms())
        body = "\n".join(format_health(health))
        self.live.update(
            Group(
                Text(format_line(row, last, self.rates)),
                Panel(Text(body), title="preference", border_style="red" if alarms else "green"),
            )
        )

    def close(self) -> None:
        self.live.stop()


def open_display(kind: str, every: int) -> Display:
    """ "auto" (live on a terminal, else plain), "live", "plain" or "none"."""
    if kind == "none":
        return SilentDisplay()
    if kind == "live" or (kind == "auto" and sys.stdout.isatty()):
        return LiveDisplay()
    return PlainDisplay(every)


def format_line(row: Mapping[str, Any], last: int, rates: Sequence[float]) -> str:
    """The numbers of one step for a person."""
    seconds = statistics.median(rates)
    wait = 100 * row["data_wait_seconds"] / max(row["step_seconds"], 1e-9)
    return (
        f"step {row['step']}/{last}  loss {row['loss']:.4f}  accuracy {row[ACCURACIES]:.2f}  "
        f"margin {row[MARGINS]:+.2e}  chosen {row[CHOSEN]:+.2e}  "
        f"rejected {row[REJECTED]:+.2e}  |g| {row['grad_norm']:.2e}  {seconds:.2f} s/step  "
        f"data {wait:.0f}%  {row['peak_memory_gib']:.1f} GiB  ETA {format_seconds(seconds * (last - row['step']))}"
    )


def format_health(health: PreferenceHealth) -> list[str]:
    """The health panel, line by line."""
    alpha, gamma = health.quantiles("alpha"), health.quantiles("gamma")
    beta = health.suggested_beta()
    lines = [
        f"gradient factor {health.mean('gradient_factor'):.3f}   "
        f"alpha {alpha[1]:.2f} [{alpha[0]:.2f}, {alpha[2]:.2f}]   "
        f"gamma {gamma[1]:.2f} [{gamma[0]:.2f}, {gamma[2]:.2f}]   "
        f"beta {health.beta if health.beta is not None else '-'}, suggested {f'{beta:.3g}' if beta else '-'}",
        "accuracy by timestep "
        + "  ".join(
            f"{low:.0f}-{high:.0f}: {accuracy:.2f}" if count else f"{low:.0f}-{high:.0f}: -"
            for low, high, count, accuracy in health.by_timestep()
        ),
    ]
    return lines + (health.advice() or ["no alarm"])


def format_seconds(seconds: float) -> str:
    """'42s', '12m05s', '3h07m', '2d04h'."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
