"""Bytes that a call really moves between a device's memory and its second-level cache, counted by Nsight Compute."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from .contenders import TRITON, forced, make_inputs
from .shapes import SHAPES, Case

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MARK = "spin_kernel"  # torch's sleep, launched before every call to tell them apart
# (case, form): the forms where their bytes differ most from one another, and from the floor.
CALLS = tuple(
    (Case(SHAPES[shape], pairs, "sample", reference), form)
    for shape, pairs, reference in (
        ("wan2.1-480p", 1, "errors"),
        ("wan2.1-480p", 16, "errors"),
        ("wan2.1-720p", 4, "predictions"),
        ("hunyuanvideo-720p", 4, "errors"),
    )
    for form in ("two-pass", "stream")
) + ((Case(SHAPES["wan2.1-480p"], 16, "element", "predictions"), ""),)


def command(rest: Sequence[str], log: Path) -> list[str] | None:
    """The profiler over the command `rest`, or None where it is not installed. Caches and clocks are left as they are:
    a pass finds what the one before it left in the cache."""
    found = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if found is None:
        return None
    return [
        found,
        "--csv",
        "--log-file",
        str(log),
        "--metrics",
        ",".join(COUNTERS),
        "--print-units",
        "base",
        "--profile-from-start",
        "off",
        "--cache-control",
        "none",
        "--clock-control",
        "none",
        *rest,
    ]


def make_calls(device: torch.device, seed: int, tell) -> None:
    """What the profiler watches: every call once, warm, after a mark; `tell` names it first."""
    start, stop = (torch.cuda.cudart().cudaProfilerStart, torch.cuda.cudart().cudaProfilerStop)
    for case, form in CALLS:
        x = make_inputs(case, device, seed)
        with forced(form) if form else nullcontext():
            call = TRITON.prepare(case)
            for _ in range(2):
                call(x)
            torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # nothing of the inputs is left in the cache
            torch.cuda.synchronize()
            tell(case, form)
            start()
            torch.cuda._sleep(1)
            call(x)
            torch.cuda.synchronize()
            stop()
        del x, call
        torch.cuda.empty_cache()


def read(log: str) -> list[tuple[int, int, list[str]]]:
    """Bytes read, bytes written and kernels of every marked call, in order, of the profiler's table."""
    lines = log.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    calls, last = [], None
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        if MARK in row["Kernel Name"]:
            if row["ID"] != last:
                calls.append([0, 0, []])
        elif calls:
            if row["ID"] != last:
                calls[-1][2].append(row["Kernel Name"].split("(")[0])
            calls[-1][COUNTERS.index(row["Metric Name"])] += int(float(row["Metric Value"].replace(",", "")))
        last = row["ID"]
    return [tuple(call) for call in calls]


def run(rest: Sequence[str], log: Path, seconds: float) -> tuple[list[tuple[int, int, list[str]]], str]:
    """The bytes of every call that `rest` makes, or none and why."""
    asked = command(rest, log)
    if asked is None:
        return [], "ncu is not installed"
    try:
        done = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
        output, ended = done.stdout, f"exit code {done.returncode}, no kernel was seen"
    except subprocess.TimeoutExpired:
        output, ended = "", "did not end within this section's time"
    text = log.read_text(errors="replace") if log.exists() else ""
    said = [line for line in (text + output).splitlines() if "==ERROR==" in line]
    calls = read(text)
    return calls, "" if calls else (said[-1] if said else ended)[:300]
