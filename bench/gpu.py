"""Everything that needs a GPU, in one command and under ten minutes: correctness first, then speed.

Needs torch >= 2.11 and triton >= 3.6; parts whose packages are missing are skipped with the reason. Each section runs
in a process of its own with a time limit; results so far are on disk after each. The figure of a form or backend that
is red in the correctness part stays in the record and out of the tables.

    python bench/gpu.py [--out FOLDER] [--seconds 580] [--require triton native]
    python bench/gpu.py --part smoke     # or full, tuning, confirm: see NOTES.md
    python bench/gpu.py --only step --wheels .whl --seconds 300   # with diffusers and peft from a folder of wheels
    python bench/gpu.py --dry-run        # the whole harness on a CPU, tiny shapes; its figures mean nothing
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "pgdpo_fast" / "backends" / "launches.json"


@dataclass(frozen=True)
class Section:
    """A part and its time limit in seconds. Parts of one wave run side by side; a timed part is alone in its wave."""

    name: str
    seconds: float
    wave: int
    shards: int = 1


SECTIONS = (
    Section("environment", 90, 0),
    Section("facts", 20, 1),
    Section("parity", 115, 2, shards=8),
    Section("properties", 115, 2),
    Section("suites", 115, 2),
    Section("warm", 115, 2, shards=6),
    Section("alone", 40, 3),
    Section("memcheck", 60, 4),
    Section("racecheck", 60, 5),
    Section("traffic", 40, 6),
    Section("speed", 200, 7),
    Section("tuning", 55, 8),
    Section("cache", 25, 9),
    Section("step", 60, 10),
)
TIMED = ("speed", "tuning", "cache", "step")
# The same sections in four commands, for a device that is lent by the minute: name: (seconds, limit of each section).
# A section a part does not name is left out of it.
PARTS = {
    "smoke": (
        235,
        {
            "environment": 90,
            "facts": 20,
            "parity": 60,
            "properties": 70,
            "memcheck": 40,
            "traffic": 30,
            "cache": 20,
        },
    ),
    "full": (570, {section.name: section.seconds for section in SECTIONS if section.name not in ("facts", "traffic")}),
    "tuning": (410, {"environment": 60, "warm": 90, "racecheck": 60, "tuning": 240}),
    "confirm": (145, {"environment": 45, "parity": 30, "speed": 90}),
}
GRACE = 8.0  # seconds past its limit before a section is ended from outside
LEAST = 10.0  # seconds a section must have left to be started


def load(name: str, folder: Path):
    """Import a package from its folder."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_all() -> None:
    """This clone's pgdpo_fast and bench, installed or not. Its root and `bench/`, where this script lies, leave
    `sys.path`: `kernels/` and `report.py` would shadow packages of those names."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "bench")]
    load("pgdpo_fast", ROOT / "pgdpo_fast").kernels = load("pgdpo_fast.kernels", ROOT / "kernels")
    load("bench", ROOT / "bench")


def run_section(options: argparse.Namespace) -> int:
    """The inside of a section's process."""
    load_all()
    from bench import sections

    checks = json.loads(Path(options.checks).read_text()) if options.checks else []
    index, of = map(int, options.shard.split("/"))
    shard, wheels = (index, of), Path(options.wheels) if options.wheels else None
    run = sections.Run(
        Path(options.records), options.seconds, options.seed, shard, checks, options.dry_run, options.tables, wheels
    )
    sections.SECTIONS[options.section](run)
    run.add(kind="done")
    return 0


# -- the parent: imports nothing heavy, so that nothing in a section can take it down


def start(section: Section, shard: int, folder: Path, seconds: float, options, checks: Path | None):
    records = folder / f"{section.name}-{shard}.jsonl"
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--section",
        section.name,
        "--records",
        str(records),
        "--seconds",
        f"{seconds:.1f}",
        "--seed",
        str(options.seed),
        "--shard",
        f"{shard}/{section.shards}",
    ]
    command += ["--checks", str(checks)] if checks else []
    command += ["--dry-run"] if options.dry_run else []
    command += ["--wheels", str(options.wheels.resolve())] if options.wheels else []
    command += ["--tables", *map(str, options.tables)]
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.dry_run:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    else:
        variables.pop("TRITON_INTERPRET", None)
    log = (folder / f"{section.name}-{shard}.log").open("w")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=folder, start_new_session=True
    )
    return process, records, Path(log.name)


def stop(process: subprocess.Popen) -> None:
    """End a section's process and those it started, also when it ended before them: a sanitizer's child, say, that
    would compute on while speed is measured."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def computing() -> list[str]:
    """Processes that nvidia-smi sees computing on the devices, `pid, name` each."""
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def alone_on_device(patience: float = 10.0) -> dict:
    """A check that nothing computes on the device before speed is measured; what was just ended may take a moment."""
    until = time.monotonic() + patience
    while (others := computing()) and time.monotonic() < until:
        time.sleep(0.5)
    record = {"check": "nothing else computes", "backend": ""}
    return record | {"status": "red" if others else "ok", "detail": "; ".join(others)}


def finish(process, records: Path, log: Path, until: float) -> tuple[list[dict], str]:
    """Wait for a section's process; its records and how it ended ('ok', or what went wrong)."""
    try:
        process.wait(max(0.1, until - time.monotonic()))
        ended = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        ended = "time limit"
    stop(process)
    found = []
    for line in records.read_text().splitlines() if records.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line of a process that was ended
            continue
    if ended != "ok":
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-5:]
        ended += ": " + " | ".join(tail)[-600:] if tail else ""
    return [record for record in found if record.get("kind") != "done"], ended


def run_waves(options, folder: Path, save) -> dict:
    """All sections, wave by wave; `save(result)` after each."""
    begin = time.monotonic()
    deadline = begin + options.seconds
    result = {
        "dry_run": options.dry_run,
        "seed": options.seed,
        "sections": {},
        "environment": None,
        "copy": None,
        "checks": [],
        "cases": [],
        "launches": [],
        "experiments": [],
        "traffic": [],
        "cache": [],
        "step": [],
        "left_out": [],
    }
    places = {
        "check": "checks",
        "case": "cases",
        "launch": "launches",
        "experiment": "experiments",
        "traffic": "traffic",
        "cache": "cache",
        "step": "step",
        "left_out": "left_out",
    }
    chosen = [s for s in SECTIONS if not options.only or s.name in options.only or s.name == "environment"]
    if options.part:
        limits = PARTS[options.part][1]
        chosen = [replace(section, seconds=limits[section.name]) for section in SECTIONS if section.name in limits]
    elif options.only:  # the whole time for what was asked for
        chosen = [
            replace(section, seconds=options.seconds) if section.name != "environment" else section
            for section in chosen
        ]
    if options.dry_run:  # its times mean nothing, so timed parts may share the machine
        chosen = [replace(section, wave=min(section.wave, 3), shards=1) for section in chosen]
    for wave in sorted({section.wave for section in chosen}):
        if any(section.name in TIMED for section in chosen if section.wave == wave) and not options.dry_run:
            result["checks"].append(alone_on_device())
        checks = folder / "checks.json"
        checks.write_text(json.dumps(result["checks"]))
        running = []
        try:
            for section in (s for s in chosen if s.wave == wave):
                seconds = min(section.seconds, deadline - time.monotonic() - GRACE)
                if seconds < LEAST:
                    result["sections"][section.name] = {"ended": "not started: no time left"}
                    continue
                until = time.monotonic() + seconds + GRACE
                running += [
                    (section, until, start(section, shard, folder, seconds, options, checks))
                    for shard in range(section.shards)
                ]
            wave_begin = time.monotonic()
            for section, until, (process, records, log) in running:
                found, ended = finish(process, records, log, until)
                entry = result["sections"].setdefault(section.name, {"ended": "ok"})
                entry["seconds"] = time.monotonic() - wave_begin
                if ended != "ok":
                    entry["ended"] = ended
                    if found and found[-1]["kind"] == "begin":  # this check took the process down, or hung
                        cut = ended.startswith("time limit")
                        found[-1] |= {"kind": "check", "status": "skipped" if cut else "red", "detail": ended}
                for record in found:
                    kind = record.pop("kind")
                    if kind in places:
                        result[places[kind]].append(record)
                    elif kind in ("environment", "copy"):
                        result[kind] = (result[kind] or {}) | record
        finally:
            for _, _, (process, _, _) in running:
                stop(process)
        if wave == 0:
            missing = (result["environment"] or {}).get("missing", {})
            for name in set(options.require) & set(missing):
                detail = f"required, but {missing[name]}"
                result["checks"].append({"check": "required", "backend": name, "status": "red", "detail": detail})
        result["seconds"] = time.monotonic() - begin
        save(result)
        if wave == 0 and result["environment"] is None:
            break  # no device: nothing else can say more
    return result


def keep_records(scratch: Path, file: Path, every: float = 5.0) -> None:
    """Copy all sections' records to `file` again and again, so that a command killed between two saves loses little."""

    def work():
        while scratch.exists():
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".part")
                partial.write_text("".join(path.read_text() for path in sorted(scratch.glob("*.jsonl"))))
                os.replace(partial, file)
            time.sleep(every)

    threading.Thread(target=work, daemon=True).start()


def markdown(result: dict) -> str:
    """The whole result as a Markdown page."""
    facts = result["environment"] or {}
    out = [f"# GPU run on {facts.get('device', 'no device')}", ""]
    if result["dry_run"]:
        out += ["**DRY RUN on a CPU with tiny shapes: it tests the harness, its figures mean nothing.**", ""]
    if facts:
        out += [
            f"* torch {facts['torch']}, triton {facts['triton']}, {facts['time']}, seed {result['seed']}, "
            f"{result['seconds']:.0f} s in all",
            f"* {facts.get('nvidia_smi', '')}".rstrip("* "),
            *(f"* backend {name} not run: {why}" for name, why in facts.get("backends_unavailable", {}).items()),
        ]
    if result["copy"]:
        out.append(f"* device-to-device copy {result['copy']['bytes_per_second'] / 1e12:.2f} TB/s, read plus written")
    if "kernel_in_graph_s" in facts:
        out.append(
            f"* copy inside the cache {facts['cache_copy_bytes_per_second'] / 1e12:.2f} TB/s; one more kernel in a "
            f"graph {1e6 * facts['kernel_in_graph_s']:.2f} µs"
        )
    if "flag_latency_s" in facts:
        out.append(
            f"* from a flag's release to its sight {1e6 * facts['flag_latency_s']:.2f} µs, "
            f"{facts['flag_looks']:.1f} looks"
        )
    out += [f"* {name} ended by {e['ended']}" for name, e in result["sections"].items() if e["ended"] != "ok"]
    out += [f"* {entry['check']}: {entry['count']} of {entry['of']} left out, no time" for entry in result["left_out"]]

    out += [
        "",
        "## Correctness",
        "",
        "| check | backend | ok | red | skipped | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    groups: dict[tuple[str, str], list[dict]] = {}
    done = {(c["check"], c["backend"], c.get("key")) for c in result["checks"] if c["status"] != "retried alone"}
    for check in result["checks"]:
        if check["status"] == "retried alone" and (check["check"], check["backend"], check.get("key")) in done:
            continue
        groups.setdefault((check["check"], check["backend"]), []).append(check)
    for (name, backend), found in sorted(groups.items()):
        count = {s: sum(c["status"] == s for c in found) for s in ("ok", "red")}
        count["skipped"] = len(found) - sum(count.values())  # one to be retried alone that was not is one of these
        said = [c["detail"] for c in found if c["status"] != "ok"] or [found[0]["detail"] if len(found) == 1 else ""]
        out.append(
            f"| {name} | {backend} | {count['ok']} | {count['red']} | {count['skipped']} | "
            f"{said[0].replace('|', '/')} |"
        )
    red = [check for check in result["checks"] if check["status"] == "red"]
    out += ["", *(f"* red: {c['check']} {c['backend']} {c.get('key', '')} {c['detail']}" for c in red[:40])]

    if result["launches"]:
        out += [
            "",
            "## Launches",
            "",
            "Time over the default's, which is two passes; what is at least 3% lower beyond both spreads is taken.",
            "",
            "| case | default | candidates | taken | ratio |",
            "| --- | ---: | --- | --- | ---: |",
        ]
        for entry in result["launches"]:
            tried = ", ".join(
                f"{name} {c['ratio']:.3f} (expected {c['expected']:.2f})" if "ratio" in c else f"{name} {c['status']}"
                for name, c in entry["candidates"].items()
            )
            median = f"{1e6 * entry['default']['median']:.1f} µs" if "default" in entry else ""
            ratio = f"{entry['ratio']:.3f}" if "ratio" in entry else ""
            said = entry["verdict"] + (f": {entry['detail']}" if "detail" in entry else "")
            out.append(f"| {entry['case']} | {median} | {tried or entry.get('stream', '')} | {said} | {ratio} |")
    if result["traffic"]:
        out += ["", "## Bytes moved", "", "| case | form | read | written | over the floor |", "| --- " * 5 + "|"]
        out += [
            f"| {t['case']} | {t['form'] or 'one pass'} | {t['read'] / 1e6:.1f} MB | {t['written'] / 1e6:.1f} MB | "
            f"{t['ratio']:.2f} |"
            for t in result["traffic"]
            if t["status"] == "ok"
        ]
        out += ["", *(f"* skipped: {t['detail']}" for t in result["traffic"] if t["status"] != "ok")]
    if result["experiments"]:
        out += [
            "",
            "## Tuning",
            "",
            "| experiment | backend | expected | measured | verdict |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        for e in result["experiments"]:
            measured = f"{e['ratio']:.3f}" if e.get("ratio") else ""
            out.append(
                f"| {e['name']} | {e['backend']} | {e['expected_ratio']:.2f} | {measured} | "
                f"{e['verdict']} {e.get('detail', '')} |"
            )
    if result["cache"]:
        out += [
            "",
            "## Reference cache",
            "",
            "| rows | bytes | pack | copy out | gather | copy in |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        out += [
            f"| {c['form']} | {c['bytes'] / 1e6:.1f} MB | "
            + " | ".join(f"{1e3 * c[k]:.2f} ms" for k in ("pack_s", "copy_out_s", "gather_s", "copy_in_s"))
            + " |"
            for c in result["cache"]
        ]
    if result["step"]:
        out += [
            "",
            "## Training step",
            "",
            "| model | frames | reference | loss | step | peak memory |",
            "| --- | ---: | --- | --- | ---: | ---: |",
        ]
        for s in result["step"]:
            if s["status"] == "ok":
                peak = f"{s['peak_bytes'] / 2**30:.1f} GiB" if s["peak_bytes"] else ""
                out.append(
                    f"| {s['model']} | {s['frames']} | {s['reference']} | {s['backend']} | "
                    f"{s['seconds']:.3f} s | {peak} |"
                )
        out += ["", *(f"* skipped: {s['detail']}" for s in result["step"] if s["status"] == "skipped")]
    return "\n".join(out).rstrip() + "\n"


def save_in(folder: Path, name: str, result: dict, plots: bool) -> None:
    """Write `name`.json and `name`.md, with the speed tables and figures when there are any."""
    from bench import report

    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    if result["cases"] and result["copy"] and result["environment"]:
        text += "\n" + report.markdown(result).replace("\n## ", "\n### ").replace("# Fused", "## Fused", 1)
        if plots and importlib.util.find_spec("matplotlib"):
            report.roofline(result, folder / f"{name}-roofline.png")
            report.speedup(result, folder / f"{name}-speedup.png")
    report.replace(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    report.replace(folder / f"{name}.md", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; $OUT, or bench/results/<device>")
    parser.add_argument("--seconds", type=float, default=None, help="time for everything, 580 by default")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random inputs; a fresh one by default")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        choices=[section.name for section in SECTIONS],
        help="run these sections alone (and environment)",
    )
    parser.add_argument("--part", choices=PARTS, help="one of four commands that together are the whole")
    parser.add_argument("--dry-run", action="store_true", help="exercise the harness on a CPU with tiny shapes")
    parser.add_argument(
        "--require", nargs="*", default=[], choices=("triton", "native"), help="backends whose absence is red"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels for the step, installed offline: see NOTES.md")
    for inner in ("--section", "--records", "--checks"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    options.seconds = options.seconds or (PARTS[options.part][0] if options.part else 580.0)
    if options.section:
        return run_section(options)

    load("bench", ROOT / "bench")
    name = "dry-run" if options.dry_run else f"gpu-{options.part}" if options.part else "gpu"
    out = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    out = out or (ROOT / "out" / "gpu-dry-run" if options.dry_run else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    # Where the table of launches goes as it grows: to its place, but for a dry run, and to the results.
    options.tables = [TABLE] * (not options.dry_run) + ([out.resolve() / TABLE.name] if out else [])
    with tempfile.TemporaryDirectory(prefix="pgdpo-gpu-") as scratch:

        def save(result, plots=False):
            facts = result["environment"]
            if facts:
                place = out or ROOT / "bench" / "results" / facts["slug"]
                save_in(place, name, result, plots)
                if out:  # one log of all sections, beside the results
                    logs = sorted(Path(scratch).glob("*.log"))
                    text = "".join(f"==== {log.stem}\n{log.read_text(errors='replace')[-20000:]}\n" for log in logs)
                    (place / f"{name}.log").write_text(text)
            done = [f"{n} {'ok' if e['ended'] == 'ok' else 'FAILED'}" for n, e in result["sections"].items()]
            print(f"[{result['seconds']:5.0f} s] {', '.join(done)}", flush=True)

        if out:
            keep_records(Path(scratch), out / f"{name}.jsonl")
        result = run_waves(options, Path(scratch), save)
        if result["environment"]:
            save(result, plots=True)
    if result["environment"] is None:
        print(f"no device could be used: {result['sections']['environment']['ended']}", file=sys.stderr)
        return 2
    print(markdown(result))
    from bench import report

    if result["cases"] and result["copy"]:
        print(report.headline(result))
    return 1 if any(check["status"] == "red" for check in result["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
