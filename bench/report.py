"""How results are told: one JSON, a Markdown page and a terminal table with the same columns, and two figures.

Ratios compare medians of one run on the same inputs; the share of copy bandwidth is the floor's bytes over the time,
over what a large copy moved in that run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

# One colour a contender, the same in every figure (Okabe and Ito's palette, readable without red or green).
COLOURS = {
    "eager": "#7F7F7F",
    "compile": "#E69F00",
    "diffusion-dpo": "#56B4E9",
    "triton": "#009E73",
    "stream": "#CC79A7",
    "native": "#D55E00",
}
FUSED = ("triton", "stream", "native")

# What the fused loss is held to on a calm CPU: (granularity, form of the reference, column) and the least ratio.
GOALS = {
    ("sample", "errors", "vs_eager"): 8.0,
    ("sample", "predictions", "vs_compile"): 1.0,
    ("element", "predictions", "vs_compile"): 5.0,
}


def best_time(entry: dict) -> float | None:
    """Seconds a call: of graph replay where it was measured, else of ordinary launches."""
    timing = entry.get("graph") or entry.get("time")
    return timing["median"] if timing else None


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def lines(result: dict) -> Iterator[dict]:
    """One flat mapping a (case, contender), ready for any table. `status` other than ok carries its reason; "withheld"
    is a figure that stays in the record and out of tables, ratios and plots."""
    on_gpu = result["environment"]["device_type"] == "cuda"
    for case in result["cases"]:
        if "skipped" in case:
            yield {"case": case["key"], "contender": "all", "status": "skipped", "reason": case["skipped"]}
            continue
        times = {name: best_time(entry) for name, entry in case["contenders"].items() if entry["status"] == "ok"}
        for name, entry in case["contenders"].items():
            line = {
                "case": case["key"],
                "contender": name,
                "status": "withheld" if "withheld" in entry else entry["status"],
                "reason": entry.get("withheld") or entry.get("reason", ""),
            }
            seconds = times.get(name)
            if seconds is not None and line["status"] == "withheld":
                line["reason"] += f"; it took {duration(seconds)}"
            elif seconds is not None:
                timing = entry.get("graph") or entry["time"]
                line |= {
                    "time": seconds,
                    "spread": timing["spread"],
                    "fastest": timing["fastest"],
                    "loss_error": entry["gate"]["loss_error"],
                    "vs_eager": times["eager"] / seconds if times.get("eager") else None,
                    "vs_compile": times["compile"] / seconds if times.get("compile") else None,
                    "of_copy": case["floor_bytes"] / seconds / result["copy"]["bytes_per_second"],
                    "extra": entry.get("peak_extra_bytes"),
                    "beyond_gradients": entry["peak_extra_bytes"] - case["gradient_bytes"],
                }
                if on_gpu:
                    line |= {
                        "launch_by_launch": entry["time"]["median"] if "time" in entry else None,
                        "host": entry.get("host_s"),
                        "launches": entry.get("launches"),
                    }
            yield line


def columns(result: dict) -> list[tuple[str, str]]:
    """(key, heading) of the table's columns."""
    on_gpu = result["environment"]["device_type"] == "cuda"
    first = [
        ("contender", "contender"),
        ("time", "device time" if on_gpu else "time"),
        ("spread", "spread"),
        ("fastest", "fastest"),
    ]
    device = [("launch_by_launch", "launch by launch"), ("host", "host"), ("launches", "launches")]
    last = [
        ("vs_eager", "vs eager"),
        ("vs_compile", "vs compile"),
        ("of_copy", "of copy"),
        ("beyond_gradients", "temporaries"),
        ("loss_error", "loss error"),
    ]
    return first + (device if on_gpu else []) + last


def cell(key: str, value) -> str:
    if value is None or value == "":
        return ""
    if key in ("time", "fastest", "launch_by_launch", "host"):
        return duration(value)
    if key in ("extra", "beyond_gradients"):
        return size(value)
    if key in ("vs_eager", "vs_compile"):
        return f"{value:.2f}×"
    if key == "loss_error":
        return f"{value:.0e}"
    if key in ("spread", "of_copy"):
        return f"{100 * value:.0f}%"
    return str(value)


def title(result: dict) -> str:
    facts = result["environment"]
    where = f"{facts['device']}, {facts['threads']} threads" if facts["device_type"] == "cpu" else facts["device"]
    return f"Fused preference loss on {where}"


def notes(result: dict) -> list[str]:
    """What the figures rest on, a line each."""
    facts, copy = result["environment"], result["copy"]
    text = [
        f"torch {facts['torch']}, triton {facts['triton'] or 'not installed'}, Python {facts['python']}, "
        f"{facts['time']}",
        f"load average at the start {facts['load_average'][0]:.2f}; copy moved "
        f"{copy['bytes_per_second'] / 1e9:.1f} GB/s (read plus written, {size(copy['bytes'])}, spread "
        f"{100 * copy['time']['spread']:.0f}%)",
        "a call makes the loss and the gradients of both predictions; time is the median, spread the interquartile "
        "range over it; on a CPU contenders take turns call by call, in a changing order; inputs rotate over more than "
        "three times the last-level cache",
        "of copy: bytes of the floor (each input read once, each gradient written once) over the time, over the copy's "
        "rate",
        "every contender shown with a time agreed with float64 on the timed input first: a fused backend to the "
        "rounding of its result, the others to 2e-3; temporaries is memory beyond the gradients at the call's peak",
    ]
    if facts["device_type"] == "cuda":
        text.append(
            "device time is one replay of a CUDA graph; launch by launch is what a loop without graphs sees; "
            "host is the CPU's time to issue one call"
        )
    return text


def goals(result: dict) -> list[str]:
    """Of each case with a goal, whether the native backend held it; empty on a GPU."""
    if result["environment"]["device_type"] != "cpu":
        return []
    kinds = {case["key"]: (case["granularity"], case["reference_form"]) for case in result["cases"]}
    told = []
    for line in lines(result):
        for (*kind, column), least in GOALS.items():
            if line["contender"] == "native" and line.get(column) and kinds[line["case"]] == tuple(kind):
                verdict = "held" if line[column] >= least else "missed"
                ratio = f"{line[column]:.2f}× as fast as {column.removeprefix('vs_')}"
                told.append(f"{line['case']}: native is {ratio}, aimed at {least:g}×: {verdict}")
    return told


def warning(result: dict) -> str | None:
    """What makes this run's figures worth less, or None."""
    facts = result["environment"]
    load = facts["load_average"][0]
    if facts["device_type"] == "cpu" and load > 0.5 * facts["threads"]:
        return (
            f"the machine was busy (load {load:.1f} before the first timing, {facts['threads']} threads): medians "
            f"are those of a busy machine, fastest is nearer to a calm one"
        )
    return None


def markdown(result: dict, changes: list[dict] | None = None) -> str:
    """The whole result as a Markdown page."""
    out = [f"# {title(result)}", "", *(f"* {note}" for note in notes(result)), ""]
    if warning(result):
        out += [f"**Warning: {warning(result)}.**", ""]
    shown = columns(result)
    by_case: dict[str, list[dict]] = {}
    for line in lines(result):
        by_case.setdefault(line["case"], []).append(line)
    floors = {case["key"]: case["floor_bytes"] for case in result["cases"]}
    for key, entries in by_case.items():
        out += [
            f"## {key}",
            "",
            f"Floor {size(floors[key])}.",
            "",
            "| " + " | ".join(heading for _, heading in shown) + " |",
            "| --- " + "| ---: " * (len(shown) - 1) + "|",
        ]
        out += [
            "| " + " | ".join(cell(column, line.get(column)) for column, _ in shown) + " |"
            for line in entries
            if line["status"] == "ok"
        ]
        out += [
            "",
            *(
                f"* {line['contender']} {line['status']}: {line['reason']}"
                for line in entries
                if line["status"] != "ok"
            ),
            "",
        ]
    if goals(result):
        out += ["## Goals", "", *(f"* {line}" for line in goals(result)), ""]
    if changes is not None:
        out += [
            "## Against the previous results",
            "",
            "| case | contender | before | now | change | |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]
        out += [
            f"| {c['case']} | {c['contender']} | {duration(c['before'])} | {duration(c['now'])} | "
            f"{100 * c['change']:+.0f}% | {c['verdict']} |"
            for c in changes
        ]
    return "\n".join(out).rstrip() + "\n"


def show(result: dict, changes: list[dict] | None = None) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(f"[bold]{escape(title(result))}[/]")
    for note in notes(result)[:2]:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    if warning(result):
        console.print(f"[yellow]{escape(warning(result))}[/]", soft_wrap=True)
    shown = columns(result)
    tables, missing = {}, {}
    for line in lines(result):
        if line["status"] != "ok":
            missing.setdefault((line["contender"], line["status"], line["reason"]), []).append(line["case"])
            continue
        if line["case"] not in tables:
            table = tables[line["case"]] = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
            for key, heading in shown:
                first = key == "contender"
                table.add_column(heading, justify="left" if first else "right", min_width=13 if first else 9)
        fused = line["contender"] in FUSED
        tables[line["case"]].add_row(
            *(escape(cell(key, line.get(key))) for key, _ in shown), style="bold" if fused else ""
        )
    for key, table in tables.items():
        console.print(f"\n[bold cyan]{escape(key)}[/]", soft_wrap=True)
        console.print(table)
    console.print()
    for (contender, status, reason), cases in missing.items():
        colour = "dim" if status == "skipped" else "red"
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        console.print(f"[{colour}]{escape(f'{contender} {status} on {where}: {reason}')}[/]", soft_wrap=True)
    for line in goals(result):
        console.print(escape(line), soft_wrap=True)
    for c in changes or ():
        console.print(
            escape(
                f"{c['case']} {c['contender']}: {duration(c['before'])} → {duration(c['now'])} "
                f"({100 * c['change']:+.0f}%, {c['verdict']})"
            ),
            soft_wrap=True,
        )


def compare(previous: dict, result: dict) -> list[dict]:
    """Change of every figure both results hold, called a change only where it is larger than 5% and both spreads."""
    before = {(line["case"], line["contender"]): line for line in lines(previous) if "time" in line}
    changes = []
    for line in lines(result):
        old = before.get((line["case"], line["contender"]))
        if old is None or "time" not in line:
            continue
        change = line["time"] / old["time"] - 1
        noise = max(0.05, line["spread"], old["spread"])
        verdict = "within noise" if abs(change) <= noise else "slower" if change > 0 else "faster"
        changes.append(
            {
                "case": line["case"],
                "contender": line["contender"],
                "before": old["time"],
                "now": line["time"],
                "change": change,
                "verdict": verdict,
            }
        )
    return changes


def write(result: dict, folder: Path, name: str, changes: list[dict] | None = None) -> list[Path]:
    """Write `name`.json, `name`.md and the figures; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        replace(folder / f"{name}.json", json.dumps(result, indent=1) + "\n"),
        replace(folder / f"{name}.md", markdown(result, changes)),
    ]
    if any(line["status"] == "ok" for line in lines(result)):
        written += [roofline(result, folder / f"{name}-roofline.png"), speedup(result, folder / f"{name}-speedup.png")]
    return written


def replace(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)
    return path


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _shown(case: dict, name: str) -> bool:
    entry = case["contenders"].get(name, {})
    return entry.get("status") == "ok" and "withheld" not in entry


def roofline(result: dict, path: Path) -> Path:
    """Floor bytes over time against the floor's bytes, under the copy of as many bytes."""
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(8, 5)
    cases = [case for case in result["cases"] if "copy" in case]
    roof: dict[int, float] = {}
    for case in cases:
        rate = case["floor_bytes"] / case["copy"]["median"] / 1e9
        roof[case["floor_bytes"]] = max(rate, roof.get(case["floor_bytes"], 0.0))
    axes.plot(
        *zip(*sorted(roof.items()), strict=True),
        color="black",
        linewidth=1 if len(roof) > 4 else 0,
        marker="_",
        markersize=14,
        label="copy of as many bytes",
    )
    axes.axhline(
        result["copy"]["bytes_per_second"] / 1e9,
        color="black",
        linestyle="--",
        linewidth=1,
        label=f"large copy, {result['copy']['bytes_per_second'] / 1e9:.0f} GB/s",
    )
    markers = {"sample": "o", "frame": "s", "element": "^"}
    used = set()
    for name, colour in COLOURS.items():
        for granularity, marker in markers.items():
            points = [
                (case["floor_bytes"], case["floor_bytes"] / best_time(case["contenders"][name]) / 1e9)
                for case in cases
                if case["granularity"] == granularity and _shown(case, name)
            ]
            if points:
                used.add(granularity)
                axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=45, zorder=3, label=None)
        if any(_shown(case, name) for case in cases):
            axes.scatter([], [], color=colour, marker="o", label=name)
    for granularity in markers:
        if granularity in used:
            axes.scatter([], [], facecolor="none", edgecolor="black", marker=markers[granularity], label=granularity)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(min(roof) / 2, 2 * max(roof)),
        ylabel="floor bytes over time [GB/s]",
        xlabel="bytes of the floor: inputs read once, gradients written once",
        title=title(result) + ": how close to a copy",
    )
    for which in ("major", "minor") if max(roof) < 20 * min(roof) else ("major",):
        getattr(axes.xaxis, f"set_{which}_formatter")(EngFormatter(unit="B"))
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.legend(fontsize=8, ncols=5, loc="outside lower center", frameon=False)
    return _save(figure, path)


def speedup(result: dict, path: Path) -> Path:
    """Time of the formula in eager torch over each contender's, a group of bars a case."""
    rows = [line for line in lines(result) if line.get("vs_eager")]
    keys = list(dict.fromkeys(line["case"] for line in rows))
    names = [name for name in COLOURS if any(line["contender"] == name for line in rows)]
    figure, axes = _figure(9, 1.3 + len(rows) * 0.22 + len(keys) * 0.15)
    position, ticks = 0.0, []
    for key in keys:
        group = [line for line in rows if line["case"] == key]
        group.sort(key=lambda line: names.index(line["contender"]))
        ticks.append(position + (len(group) - 1) / 2)
        for line in group:
            axes.barh(position, line["vs_eager"], color=COLOURS[line["contender"]], height=0.85)
            axes.text(
                line["vs_eager"],
                position,
                f" {line['vs_eager']:.1f}×  {duration(line['time'])}",
                va="center",
                fontsize=8,
            )
            position += 1
        position += 0.7
    for name in names:
        axes.barh(0, 0, color=COLOURS[name], label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(ticks, keys, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max((line["vs_eager"] for line in rows), default=1.0))
    axes.set(xlabel="times as fast as eager (loss and gradients)", title=title(result))
    figure.legend(fontsize=8, ncols=len(names), loc="outside lower center", frameon=False)
    return _save(figure, path)


def headline(result: dict, limit: int = 11_000) -> str:
    """A line for each case and fused backend, at most `limit` characters: what must be in the end of a long log."""
    rows = ["case | backend | time | spread | vs eager | vs compile | of copy | host | temporaries"]
    keys = ("time", "spread", "vs_eager", "vs_compile", "of_copy", "host", "beyond_gradients")
    for line in lines(result):
        if line["contender"] in FUSED:
            cells = [cell(key, line.get(key)) for key in keys] if line["status"] == "ok" else [line["reason"][:120]]
            rows.append(" | ".join([line["case"], line["contender"], *cells]))
    rows.append(summary(result))
    text = "\n".join(rows)
    return text if len(text) <= limit else text[: limit - 40] + "\n... cut; all of it is in the report"


def summary(result: dict) -> str:
    """One line: the fused backends' range of speed-ups over eager and over torch.compile."""
    parts = []
    for name in FUSED:
        mine = [line for line in lines(result) if line["contender"] == name and "time" in line]
        for against in ("vs_eager", "vs_compile"):
            ratios = [line[against] for line in mine if line[against]]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                parts.append(f"{name} {min(ratios):.1f}–{max(ratios):.1f}× {against[3:]} (geometric mean {mean:.1f}×)")
    return "; ".join(parts) or "no fused backend was timed"
