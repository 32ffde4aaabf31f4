"""Figures of the report as inline SVG whose colours are CSS variables, so one file serves light, dark and paper.

matplotlib draws with stand-in colours; `_to_inline` swaps them for `var(--...)`. Lines carry their names at their ends,
methods keep one colour throughout (Okabe-Ito hues, told apart with any colour vision), and axes state their units.
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import matplotlib

matplotlib.use("Agg")
from matplotlib import rc_context  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from pgdpo_fast.analysis.displacement import outcome  # noqa: E402
from pgdpo_fast.analysis.runs import RunRecord, finite, running_mean  # noqa: E402
from pgdpo_fast.analysis.verdict import join_words  # noqa: E402
from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, REJECTED, timestep_bins  # noqa: E402
from pgdpo_fast.preemption import check_stop  # noqa: E402

__all__ = ["Chart", "charts", "power_of_ten", "unit"]

# stand-in colour -> CSS; the stand-ins are only ever seen by `_to_inline`
INK, FAINT, GRID, PAPER, BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = tuple(f"#0a0a{number:02x}" for number in range(1, 7))
CSS = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    PAPER: "var(--card)",
    BAD: "var(--bad)",
    **{stand_in: f"var(--series-{number})" for number, stand_in in enumerate(SERIES, 1)},
}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # labels are text from outside, and one with a dollar sign is no formula
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": True,
    "axes.formatter.limits": (-4, 5),
}
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Chart:
    """One figure: a title that says what is shown, how to read it, and the picture; a wide one also in a small form."""

    key: str
    title: str
    reading: str
    svg: str
    small: str = ""

    @property
    def wide(self) -> bool:
        return bool(self.small)


def power_of_ten(values: Sequence[float]) -> int:
    """The exponent, a multiple of three, that brings the largest of `values` to between 1 and 1000."""
    largest = max(map(abs, finite(values)), default=0.0)
    return 3 * math.floor(math.log10(largest) / 3) if largest else 0


def unit(exponent: int) -> str:
    """'×10⁻³', or nothing for 0."""
    return f"×10{str(exponent).translate(SUPERSCRIPT)}" if exponent else ""


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Every figure the runs have data for, in the order of the report."""
    makers = (
        _chosen,
        _rejected,
        _margin,
        _accuracy,
        _alpha,
        _gamma,
        _advantage,
        _timestep_accuracy,
        _timestep_chosen,
        _loss,
        _seconds,
    )
    runs = [replace(run, label=label) for run, label in zip(runs, _short([run.label for run in runs]), strict=True)]
    colours = {run.label: SERIES[index % len(SERIES)] for index, run in enumerate(runs)}
    made = []
    for make in makers:
        check_stop()
        made.append(make(runs, colours))
    return [chart for chart in made if chart]


def _short(labels: Sequence[str], longest: int = 20) -> list[str]:
    """Labels that fit beside a line: the middle of a long one left out, and a number where two would then be equal."""
    half = longest // 2 - 1
    short = [label if len(label) <= longest else f"{label[:half]}…{label[-half:]}" for label in labels]
    return [label if short.count(label) == 1 else f"{label[: longest - 4]} #{n}" for n, label in enumerate(short, 1)]


# -- rewards over steps


def _source(runs: Sequence[RunRecord]) -> str:
    if all(run.held_out for run in runs):
        return "held-out pairs, the same draws at every step"
    return "training batches, smoothed (no held-out pairs)"


def _chosen(runs, colours):
    """All curves, and beside them those that the largest would press flat against zero."""
    curves, exponent = _reward_curves(runs, CHOSEN)
    if not curves:
        return None
    sizes = {label: max(map(abs, finite(values)), default=0.0) for label, (_, values) in curves.items()}
    flat = [label for label, size in sizes.items() if 0 < size < max(sizes.values()) / 6]

    def draw(figure):
        stacked = figure.get_figwidth() < 6
        if flat:
            first, *second = figure.subplots(2, 1) if stacked else figure.subplots(1, 2, width_ratios=(3, 2))
        else:
            first, second = figure.subplots(), []
        for axes, labels in ((first, list(curves)), *((axes, flat) for axes in second)):
            axes.axhline(0, color=FAINT, linewidth=1)
            _lines(axes, {label: curves[label] for label in labels}, colours, markers=runs[0].held_out)
            low, high = axes.get_ylim()
            for label in curves.keys() - labels:
                _leaving(axes, label, curves[label], colours[label])
            if low < 0:
                axes.axhspan(low, 0, color=BAD, alpha=0.07, linewidth=0, zorder=0)
            axes.set_ylim(low, high)
            _labels(
                axes, "optimizer step", f"reward {unit(exponent)}".strip() + (", close up" if axes in second else "")
            )
        if first.get_ylim()[0] < 0:
            text = "worse than the reference" if stacked else "below zero: worse than the reference at the chosen clips"
            first.annotate(text, (0.012, 0.03), xycoords="axes fraction", color=BAD, fontsize=9, va="bottom")

    reading = (
        f"How much better than the reference model the chosen clips are predicted, on {_source(runs)}. Below zero the "
        "model has become worse at the very clips people preferred: that is displacement."
    )
    return _chart("chosen", "Chosen reward", reading, draw, wide=True, small_height=5.4 if flat else 3.1)


def _leaving(axes, label: str, curve: tuple[Sequence[float], Sequence[float]], colour: str) -> None:
    """A curve that does not fit: drawn as far as the axes go, its name where it leaves."""
    (low, high), (steps, values) = axes.get_ylim(), curve
    axes.plot(steps, values, color=colour)
    step, value = next(point for point in zip(steps, values, strict=True) if not low <= point[1] <= high)
    down = value < low
    axes.annotate(
        f"{label} {'↓' if down else '↑'}",
        (step, low if down else high),
        xytext=(6, 8 if down else -8),
        textcoords="offset points",
        color=colour,
        fontweight="bold",
        va="bottom" if down else "top",
    )


def _rejected(runs, colours):
    reading = (
        "The same for the rejected clips. Every objective may push it down; the question is what that costs above."
    )
    return _reward(runs, colours, "rejected", "Rejected reward", reading, REJECTED)


def _margin(runs, colours):
    reading = "Chosen minus rejected reward: the only thing DPO's loss looks at."
    return _reward(runs, colours, "margin", "Margin", reading, MARGINS)


def _reward(runs, colours, key: str, title: str, reading: str, metric: str) -> Chart | None:
    curves, exponent = _reward_curves(runs, metric)

    def draw(figure):
        axes = figure.subplots()
        axes.axhline(0, color=FAINT, linewidth=1)
        _lines(axes, curves, colours, markers=runs[0].held_out)
        _labels(axes, "optimizer step", f"reward {unit(exponent)}".strip())

    return _chart(key, title, reading, draw) if curves else None


def _reward_curves(runs, metric: str) -> tuple[dict[str, tuple[list[int], list[float]]], int]:
    """Curves by label, divided by a power of ten, and its exponent; no curve for a run without rewards."""
    curves = {run.label: run.smooth_curve(metric) for run in runs if finite(run.curve(metric)[1])}
    exponent = power_of_ten([value for _, values in curves.values() for value in values])
    scaled = {label: (steps, [value / 10**exponent for value in values]) for label, (steps, values) in curves.items()}
    return scaled, exponent


def _accuracy(runs, colours):
    curves = {run.label: run.smooth_curve(ACCURACIES) for run in runs}

    def draw(figure):
        axes = figure.subplots()
        axes.axhline(50, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate("chance", (0.012, 50), xycoords=("axes fraction", "data"), color=FAINT, fontsize=9, va="bottom")
        # before the first step every margin is exactly zero: neither right nor wrong
        lines = {
            label: tuple(zip(*[(step, 100 * value) for step, value in zip(*curve, strict=True) if step], strict=True))
            for label, curve in curves.items()
            if any(curve[0])
        }
        _lines(axes, lines, colours, markers=runs[0].held_out)
        axes.set_ylim(min(40, *(min(values) for _, values in lines.values())) - 3, 103)
        _labels(axes, "optimizer step", "accuracy (%)")

    reading = (
        "Share of draws with a margin above zero. A model can be right about every pair and have forgotten the chosen "
        "clips, so read it together with the chosen reward."
    )
    return _chart("accuracy", "Accuracy", reading, draw) if any(any(steps) for steps, _ in curves.values()) else None


# -- weights


def _alpha(runs, colours):
    return _weights(
        runs,
        colours,
        "alpha",
        "α, the weight of the rejected reward",
        "Below 1, PG-DPO holds back the push on the rejected clip. Line: median over the pairs of neighbouring steps; "
        "bands: middle 50% and 80%; right: all values of the run.",
    )


def _gamma(runs, colours):
    return _weights(
        runs,
        colours,
        "gamma",
        "γ, the switch to regularization",
        "At 1 only the preference counts; towards 0 the loss turns into raising the chosen reward itself. Line, bands "
        "and histogram as for α.",
    )


def _weights(runs, colours, name: str, title: str, reading: str) -> Chart | None:
    varying = [run for run in runs if any(value != 1.0 for _, values in run.pairs(name) for value in values)]
    if not varying:
        return None

    def draw(figure):
        axes, side = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
        for run in varying:
            rows = run.pairs(name)
            window = max(1, len(rows) // 25)
            steps, bands = [], []
            for start in range(0, len(rows), window):
                part = rows[start : start + window]
                steps.append(statistics.fmean(step for step, _ in part))
                bands.append(_quantiles([value for _, values in part for value in values]))
            low, lower, middle, upper, high = zip(*bands, strict=True)
            colour = colours[run.label]
            axes.fill_between(steps, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.fill_between(steps, lower, upper, color=colour, alpha=0.24, linewidth=0)
            axes.plot(steps, middle, color=colour)
            everything = [value for _, values in rows for value in values]
            side.hist(
                everything,
                bins=[i / 24 for i in range(25)],
                orientation="horizontal",
                color=colour,
                alpha=0.75,
                density=True,
            )
        if len(varying) > 1:
            ends = [(run.label, statistics.median(run.pairs(name)[-1][1])) for run in varying]
            _end_labels(axes, ends, colours, run_end=max(run.step for run in varying))
        axes.set_ylim(-0.03, 1.03)
        side.set_xticks([])
        side.grid(False)
        side.spines["bottom"].set_visible(False)
        _labels(axes, "optimizer step", {"alpha": "α", "gamma": "γ"}[name])

    shown = (
        ""
        if len(varying) == len(runs)
        else f" {join_words([run.label for run in runs if run not in varying])}: fixed at 1."
    )
    return _chart(name, title, reading + shown, draw)


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    ordered = sorted(values)
    return tuple(ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.1, 0.25, 0.5, 0.75, 0.9))


# -- one-step advantage


def _advantage(runs, colours):
    probed = [run for run in runs if run.advantages and run.objective != "dpo"]
    if not probed:
        return None
    everything = finite([row["advantage"] for run in probed for row in run.advantages])
    sizes = sorted(abs(value) for value in everything if value)
    if not sizes:
        return None
    middle = sizes[len(sizes) // 2]
    skewed = sizes[-1] > 20 * middle  # a few noise levels weigh thousands of times more than others
    exponent = power_of_ten([middle if skewed else sizes[-1]])

    def draw(figure):
        axes = figure.subplots()
        axes.axhline(0, color=FAINT, linewidth=1)
        if skewed:
            axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(middle)) / 10**exponent)
            axes.minorticks_off()
        for run in probed:
            steps = [row["step"] for row in run.advantages]
            values = [row["advantage"] / 10**exponent for row in run.advantages]
            faces = [colours[run.label] if value > 0 else PAPER for value in values]
            axes.vlines(steps, 0, values, color=colours[run.label], linewidth=1.2, alpha=0.6)
            axes.scatter(steps, values, s=30, color=faces, edgecolors=colours[run.label], linewidths=1.4, zorder=3)
            axes.plot([], [], "o", color=colours[run.label], label=run.label)
        if len(probed) > 1:
            axes.legend(frameon=False, ncols=len(probed), loc="upper right", fontsize=9)
        scale = " · logarithmic scale" if skewed else ""
        _labels(axes, "optimizer step", " ".join(["Γ", *filter(None, [unit(exponent)]), f"(nats per element){scale}"]))

    shares = join_words(
        [
            f"{run.label} {100 * share:.0f}%"
            for run in probed
            if (share := outcome(run).gamma_positive_share) is not None
        ]
    )
    return _chart(
        "advantage",
        "Γ, the one-step advantage over DPO",
        "At each probe, one step of the method and one of DPO from the same weights, batch and learning rate: how much "
        f"more log-likelihood the chosen clips gain. Filled: above zero. Share of positive steps: {shares}.",
        draw,
    )


# -- timesteps, loss, time


def _late(run: RunRecord) -> list:
    """The last third of the training steps, all at once: the model near its final state."""
    return run.metrics[-max(1, len(run.metrics) // 3) :]


def _by_timestep(run: RunRecord) -> list:
    quantities = ("chosen", "rejected", "margin", "alpha", "gamma")
    return [item for item in timestep_bins(_late(run), quantities) if item["pairs"]]


def _timestep_lines(runs, colours, key, title, reading, quantity, scale, label, floor=None):
    tables = {run.label: _by_timestep(run) for run in runs}

    def draw(figure):
        axes = figure.subplots()
        axes.axhline(0 if floor is None else floor, color=FAINT, linewidth=1)
        lines = {
            name: ([(row["low"] + row["high"]) / 2 for row in table], [row[quantity] * scale for row in table])
            for name, table in tables.items()
        }
        _lines(axes, lines, colours, markers=True)
        axes.set_xticks([0, 200, 400, 600, 800, 1000])
        axes.set_xlim(0, axes.get_xlim()[1])
        _labels(axes, "timestep (0 clean – 1000 noise)", label)

    return _chart(key, title, reading, draw)


def _timestep_accuracy(runs, colours):
    return _timestep_lines(
        runs,
        colours,
        "timestep-accuracy",
        "Accuracy by timestep",
        "Training pairs of the last third of the run, in five bins of the noise level: where the preference is learnt.",
        "accuracy",
        100,
        "accuracy (%)",
        floor=50,
    )


def _timestep_chosen(runs, colours):
    values = [row["chosen"] for run in runs for row in _by_timestep(run)]
    exponent = power_of_ten(values)
    return _timestep_lines(
        runs,
        colours,
        "timestep-chosen",
        "Chosen reward by timestep",
        "The same pairs: at which noise levels the chosen clips are gained or lost.",
        "chosen",
        10.0**-exponent,
        f"reward {unit(exponent)}".strip(),
    )


def _loss(runs, colours):
    def draw(figure):
        axes = figure.subplots()
        lines = {}
        for run in runs:
            steps, values = [row["step"] for row in run.metrics], [row["loss"] for row in run.metrics]
            axes.plot(steps, values, color=colours[run.label], linewidth=0.7, alpha=0.35)
            lines[run.label] = (steps, running_mean(values))
        _lines(axes, lines, colours)
        _labels(axes, "optimizer step", "loss")

    return _chart(
        "loss",
        "Training loss",
        "Each step, and a running mean. Losses of different objectives are on different scales.",
        draw,
    )


def _seconds(runs, colours):
    times = {run.label: [1000 * row["step_seconds"] for row in run.metrics[1:] or run.metrics] for run in runs}

    def draw(figure):
        axes = figure.subplots()
        for place, (label, values) in enumerate(reversed(times.items())):
            low, lower, middle, upper, high = _quantiles(values)
            axes.hlines(place, low, high, color=colours[label], linewidth=2, alpha=0.45)
            axes.hlines(place, lower, upper, color=colours[label], linewidth=9, alpha=0.45)
            axes.plot([middle], [place], "o", color=colours[label], markersize=8, markeredgecolor=PAPER)
            axes.annotate(
                f"{label} · {middle:,.0f} ms",
                (middle, place),
                xytext=(0, 13),
                textcoords="offset points",
                ha="center",
                color=colours[label],
                fontsize=10,
                fontweight="bold",
            )
        axes.set_ylim(-0.7, len(times) - 0.2)
        axes.set_xlim(0, 1.12 * max(_quantiles(values)[4] for values in times.values()))
        axes.set_yticks([])
        axes.grid(True, axis="x")
        _labels(axes, "milliseconds a step", "")

    return _chart(
        "seconds",
        "Step time",
        "Median, middle 50% and middle 80% of the steps, reference and data included.",
        draw,
    )


# -- drawing


def _lines(axes, lines: dict[str, tuple[Sequence[float], Sequence[float]]], colours, markers: bool = False) -> None:
    for label, (steps, values) in lines.items():
        axes.plot(
            steps, values, color=colours[label], marker="o" if markers and len(steps) <= 40 else None, markersize=3.5
        )
    ends = [(label, values[-1]) for label, (_, values) in lines.items() if math.isfinite(values[-1])]
    _end_labels(axes, ends, colours, max(steps[-1] for steps, _ in lines.values()))


def _end_labels(axes, ends: Sequence[tuple[str, float]], colours, run_end: float) -> None:
    """Names beside the last points, moved apart where they would touch."""
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    room = (high - low) * 0.085
    places: list[float] = []
    for label, value in sorted(ends, key=lambda item: item[1]):
        places.append(max(value, places[-1] + room) if places else value)
        axes.annotate(
            label,
            (run_end, places[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            color=colours[label],
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )
    axes.set_ylim(low, high)


def _labels(axes, x: str, y: str) -> None:
    axes.set_xlabel(x, loc="right")
    axes.set_title(y, loc="left", fontsize=9.5, color=FAINT, pad=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True)) if not axes.get_xticks(minor=True).size else None


def _chart(
    key: str, title: str, reading: str, draw: Callable[[Figure], None], wide: bool = False, small_height: float = 3.1
) -> Chart:
    def picture(name: str, size: tuple[float, float]) -> str:
        with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
            # letters the plot font lacks are drawn by the reader's fonts: the SVG holds text, not outlines
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _to_inline(buffer.getvalue(), name, title)

    small = picture(key if not wide else f"{key}-small", (4.9, small_height))
    return Chart(key, title, reading, picture(key, (9.2, 3.6)), small) if wide else Chart(key, title, reading, small)


def _to_inline(svg: str, key: str, title: str) -> str:
    """An `<svg>` element for the page: CSS colours and font, ids of its own, scaled by its container."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for stand_in, css in CSS.items():
        svg = svg.replace(stand_in, css)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px)[^;\"]*", r"font: \1\2 var(--font)", svg)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
