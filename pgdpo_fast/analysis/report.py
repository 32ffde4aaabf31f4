"""One self-contained HTML page, and the same numbers as JSON, about any run or several runs compared.

Every sentence is written from the figures of the runs: where an effect does not show, the page says that it does not.
"""

from __future__ import annotations

import base64
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgdpo_fast import __version__
from pgdpo_fast.analysis.displacement import Outcome, outcome
from pgdpo_fast.analysis.figures import charts, power_of_ten, unit
from pgdpo_fast.analysis.runs import RunRecord, identical_curves, read_runs
from pgdpo_fast.analysis.verdict import FEWEST_PAIRS, Verdict, headline
from pgdpo_fast.data.video import write_video
from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, METRICS, REJECTED
from pgdpo_fast.objectives import label as objective_label
from pgdpo_fast.printable import printable
from pgdpo_fast.storage import atomic_file

__all__ = ["Clip", "ClipRow", "Report", "render_report"]

CLIP_SIDE = 192  # pixels; smaller clips are enlarged by whole factors, every pixel staying visible
PRINTED_FRAMES = 5


@dataclass(frozen=True)
class Clip:
    """A clip under a column heading: uint8 frames [F, H, W, 3]."""

    label: str
    frames: Tensor


@dataclass(frozen=True)
class ClipRow:
    """Clips of one prompt, shown side by side."""

    prompt: str
    clips: Sequence[Clip]


@dataclass(frozen=True)
class Report:
    """What was written, and the numbers in it by the runs' labels."""

    html: Path
    summary: Path
    headline: str
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)


def render_report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    title: str = "Preference optimization report",
    introduction: str = "",
    clips: Sequence[ClipRow] = (),
    clips_note: str = "",
    fps: float = 8,
    facts: Mapping[str, Any] | None = None,
    inconclusive: str = "",
) -> Report:
    """Write `out/report.html` and `out/summary.json` about run directories.

    Args:
        introduction: a paragraph under the title. clips: sample clips, played side by side in step; fps: their rate.
        facts: settings that are in no run's configuration, for page and summary.
        inconclusive: why these runs cannot show an effect whatever their figures; takes the place of every verdict.

    Raises:
        DataError: a run directory is missing or damaged.
    """
    import jinja2

    records = read_runs(runs)
    outcomes = {run.label: outcome(run) for run in records}
    if inconclusive:
        outcomes = {
            label: replace(found, verdict=Verdict.unknown(inconclusive, found.verdict.chosen))
            for label, found in outcomes.items()
        }
    out = Path(out)
    common, differing = _settings(records)
    environment = next((run.environment for run in records if run.environment), {})
    exponent = power_of_ten(
        [value for found in outcomes.values() for value in (found.chosen_reward, found.rejected_reward, found.margin)]
    )
    title_sentence = _headline(records, outcomes)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("pgdpo_fast.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value, longest=1 << 40) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html").render(
        title=title,
        introduction=introduction,
        headline=title_sentence,
        methods=[_method(number, run, outcomes[run.label], exponent) for number, run in enumerate(records)],
        reward_unit=unit(exponent),
        charts=charts(records),
        clip_rows=[_embedded(row, fps) for row in clips],
        clips_note=clips_note,
        facts=facts or {},
        common=common,
        differing=differing,
        labels=list(outcomes),
        environment=environment,
        version=__version__,
        created=time.strftime("%Y-%m-%d %H:%M"),
    )
    summary = {
        "title": title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "headline": title_sentence,
        "methods": {run.label: _summary(run, outcomes[run.label]) for run in records},
        "seed": records[0].config["training"]["seed"]
        if "training.seed" in common
        else {run.label: run.config["training"]["seed"] for run in records},
        "settings": {**(facts or {}), **common},
        "differing_settings": differing,
        "versions": {"pgdpo_fast": __version__, "python": environment.get("python"), **environment.get("packages", {})},
    }
    report = Report(out / "report.html", out / "summary.json", title_sentence, outcomes)
    with atomic_file(report.html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_file(report.summary) as temporary:
        temporary.write_text(json.dumps(_finite(summary), indent=1, allow_nan=False), encoding="utf-8")
    return report


# -- words


def _headline(runs: Sequence[RunRecord], outcomes: Mapping[str, Outcome]) -> str:
    said = headline(
        {label: found.verdict for label, found in outcomes.items()},
        baseline=next((run.label for run in runs if run.objective == "dpo"), None),
        identical=identical_curves(runs),
    )
    return f"{said} {beta_note(runs)}".strip()


def beta_note(runs: Sequence[RunRecord]) -> str:
    """A sentence where objectives are compared at different betas, which mean the same in all of them; else ""."""
    betas = {run.label: run.beta for run in runs if run.beta is not None}
    if len(set(betas.values())) < 2 or len({objective_label(run.config["objective"]) for run in runs}) < 2:
        return ""
    said = ", ".join(f"{label} {beta:g}" for label, beta in betas.items())
    return f"β differs between the objectives ({said}), so this is no comparison of the objectives alone."


def sentence(found: Outcome, exponent: int) -> str:
    """What a verdict means, with its figures in units of 10**exponent."""
    verdict, accuracy = found.verdict, _percent(found.accuracy)
    if verdict.kind == "unmeasured":
        return "Trained without a reference model: no rewards."
    if verdict.kind == "unknown":
        return (
            f"Nothing can be said: {verdict.reason}."
            if found.pairs >= FEWEST_PAIRS
            else f"The rewards are means over {found.pairs} pair{'s' * (found.pairs != 1)}, {verdict.reason} to tell "
            "an effect from chance; raise data.evaluation_pairs."
        )
    chosen = {
        "below": "worse at the chosen clips than the model it started from",
        "zero": "as good at the chosen clips as the model it started from, within two standard errors",
        "above": "better at the chosen clips than the model it started from",
    }[verdict.chosen]
    if verdict.kind == "unlearnt":
        return (
            f"The margin is within two standard errors of zero (±{_plain(2 * found.margin_error, exponent)}), accuracy "
            f"{accuracy}: it takes more steps or a larger learning rate. It is {chosen}."
        )
    if verdict.kind == "reversed":
        return (
            f"The margin is below zero by more than two standard errors (±{_plain(2 * found.margin_error, exponent)}), "
            f"accuracy {accuracy}: it prefers the rejected clips more than the model it started from did. It is "
            f"{chosen}. Look for exchanged columns, or a learning rate that is too large."
        )
    if verdict.kind == "displaced":
        return (
            f"Right about {accuracy} of the draws, yet {chosen}. The rejected reward fell further, and the margin "
            "hides that."
        )
    dip = ""
    if found.lowest_chosen < -2 * found.chosen_error:
        dip = f" On the way there it was as low as {_scaled(found.lowest_chosen, exponent)}."
    return f"Right about {accuracy} of the draws, and {chosen}.{dip}"


def _method(number: int, run: RunRecord, found: Outcome, exponent: int) -> dict[str, Any]:
    share = found.gamma_positive_share
    options = ", ".join(
        f"{key} {value}"
        for key, value in run.config["objective"].items()
        if key in ("beta", "k1", "k2", "ratio", "ipr")
    )
    return {
        "label": run.label,
        "series": number % 6 + 1,
        "tone": found.verdict.tone,
        "badge": found.verdict.badge,
        "verdict": sentence(found, exponent),
        "options": options,
        "step": run.step,
        "held_out": run.held_out,
        "chosen": _scaled(found.chosen_reward, exponent),
        "rejected": _scaled(found.rejected_reward, exponent),
        "margin": _scaled(found.margin, exponent),
        "error": _plain(found.chosen_error, exponent) if math.isfinite(found.chosen_error) else None,
        "chosen_sign": {"below": "down", "above": "up"}.get(found.verdict.chosen, ""),
        "accuracy": _percent(found.accuracy),
        "share": "–" if share is None else f"{100 * share:.0f}%",
        "milliseconds": f"{1000 * found.step_seconds:,.0f} ms",
    }


def _scaled(value: float, exponent: int) -> str:
    """Three significant digits with a sign, in units of 10**exponent."""
    if not math.isfinite(value):
        return "–"
    value /= 10**exponent
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if abs(value) >= 1 else 2
    return f"{value:+.{digits}f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if math.isfinite(share) else "–"


def _plain(value: float, exponent: int) -> str:
    return _scaled(value, exponent).lstrip("+")


# -- numbers


def _summary(run: RunRecord, found: Outcome) -> dict[str, Any]:
    curves = {
        METRICS[metric]: list(zip(*run.curve(metric), strict=True))
        for metric in (CHOSEN, REJECTED, MARGINS, ACCURACIES)
    }
    return {
        "kind": found.kind,
        **asdict(found),
        "objective": run.config["objective"],
        "steps": run.step,
        "run": str(run.path),
        "rewards_from": "held-out pairs" if run.held_out else "training batches",
        "curves": curves,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: what was not measured becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(runs: Sequence[RunRecord]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings all runs share, by dotted key, and the others by key and run."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    common = {
        key: flat[0][key] for key in keys if all(key in settings and settings[key] == flat[0][key] for settings in flat)
    }
    differing = {
        key: {run.label: settings.get(key) for run, settings in zip(runs, flat, strict=True)}
        for key in keys
        if key not in common
    }
    return common, differing


def _leaves(values: Mapping[str, Any], prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# -- clips


def _embedded(row: ClipRow, fps: float) -> dict[str, Any]:
    return {
        "prompt": row.prompt,
        "clips": [
            {"label": clip.label, "video": _video_uri(clip.frames, fps), "strip": _strip_uri(clip.frames)}
            for clip in row.clips
        ],
    }


def _enlarged(frames: Tensor, side: int) -> Tensor:
    factor = max(1, side // max(frames.shape[1:3]))
    return frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _video_uri(frames: Tensor, fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = write_video(Path(folder) / "clip.mp4", _enlarged(frames, CLIP_SIDE), fps).read_bytes()
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def _strip_uri(frames: Tensor) -> str:
    """Some frames next to each other as PNG, for paper."""
    import io

    from matplotlib import image

    picks = torch.linspace(0, len(frames) - 1, min(PRINTED_FRAMES, len(frames))).round().long()
    strip = torch.cat(list(frames[picks]), dim=1)
    buffer = io.BytesIO()
    image.imsave(buffer, strip.numpy(), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
