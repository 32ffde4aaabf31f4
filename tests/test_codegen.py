"""The Triton kernels, compiled on any machine for three generations of GPU, spill nothing and load 128 bits a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "codegen.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")]


WIDE = {  # (call, kernel): 128-bit loads and stores of the main loop
    ("predictions", "pair_errors_kernel"): (6, 0),  # predictions, targets and references, 8 bf16 each
    ("predictions", "pair_gradient_kernel"): (4, 2),
    ("predictions, fp32", "pair_errors_kernel"): (12, 0),
    ("cached errors, built target", "pair_errors_kernel"): (5, 0),
    ("frames of 60x90", "pair_errors_kernel"): (6, 0),  # frames start on multiples of 8 elements, not of 16
    ("frames of 60x90", "pair_gradient_kernel"): (4, 2),
    ("elements", "pair_elements_kernel"): (6, 2),
    ("stream", "stream_kernel"): (10, 2),
    ("stream, cached errors, built target", "stream_kernel"): (10, 2),
}


CALLS = {call for call, _ in WIDE} | {"stream, frames of 60x90"}  # every kernel, in all that is asked of it below


def compile_for(architectures, folder, whole):
    """One entry a kernel, call and target; one process a target, without the interpreter. Of all calls for sm_90, and
    for the other targets where `whole`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {}
    for arch in architectures:
        command = [sys.executable, SCRIPT, "--arch", arch, "--json", folder / arch, "--output", folder / f"{arch}.md"]
        command += [] if whole or arch == "90" else ["--calls", *CALLS]
        processes[arch] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    rows = []
    for arch, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert (folder / arch).exists(), output
        rows += json.loads((folder / arch).read_text())
    return rows


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_every_kernel_passes_every_gate_on_every_target(tmp_path, whole):
    """No local memory, few registers, no float64 in float32 builds, atomics in the folds and the stream alone, no
    flushed denormals, wide loads, those of the stream with a hint, sums as in two passes, 120 instructions per element.
    """
    rows = compile_for(("80", "90", "100"), tmp_path, whole)
    kernels = {
        "pair_errors_kernel",
        "fold_kernel",
        "pair_gradient_kernel",
        "pair_elements_kernel",
        "fold_elements_kernel",
        "stream_kernel",
    }
    for arch in (80, 90, 100):
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels
    failed = [f"{row['kernel']} ({row['case']}) sm_{row['arch']}: {row['failures']}" for row in rows if row["failures"]]
    assert not failed, "\n".join(failed)

    for (call, kernel), (loads, stores) in WIDE.items():
        found = [row for row in rows if (row["case"], row["kernel"]) == (call, kernel)]
        assert {row["arch"] for row in found} == {80, 90, 100}
        assert max((row["loads_expected"], row["stores_expected"]) for row in found) == (loads, stores)
        assert all(row["loads_128"] >= loads and row["stores_128"] >= stores for row in found), (call, kernel)

    budgeted = [row for row in rows if row["budget"] is not None]
    assert {row["arch"] for row in budgeted} == {80, 90, 100}
    assert all(60 < row["per_element"] <= row["budget"] == 120 for row in budgeted)
    assert {row["atomics"] for row in rows if row["kernel"] == "fold_kernel"} == {1}

    for arch in (80, 90, 100):  # one order of every sum: what is added in which layout is the same in both forms
        sums = {(row["case"], row["kernel"]): set(row["reductions"]) for row in rows if row["arch"] == arch}
        passes = sums["predictions", "pair_errors_kernel"] | sums["predictions", "fold_kernel"]
        assert len(passes) >= 3 and sums["stream", "stream_kernel"] == passes
        passes = sums["frames of 60x90", "pair_errors_kernel"] | sums["frames of 60x90", "fold_kernel"]
        assert sums["stream, frames of 60x90", "stream_kernel"] == passes

    # The counts see what they count: odd rows allow no wide access, float64 builds use float64.
    odd = [row for row in rows if row["case"] == "odd video, one pair" and row["kernel"] == "pair_errors_kernel"]
    assert odd and all(row["loads_128"] == 0 and row["instructions"] > 200 for row in odd)
    double = [row for row in rows if row["float64"]]
    assert double and all(row["double"] > 10 for row in double)
