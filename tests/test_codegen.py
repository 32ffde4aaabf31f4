"""The Triton kernels, compiled on any machine for three generations of GPU, spill nothing and load 128 bits at a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "codegen.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One entry a kernel, call and target; one process a target, without the interpreter."""
    folder = tmp_path_factory.mktemp("codegen")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {}
    for arch in ("80", "90", "100"):
        command = [sys.executable, SCRIPT, "--arch", arch, "--json", folder / arch, "--output", folder / f"{arch}.md"]
        processes[arch] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                           text=True)
    found = []
    for arch, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert (folder / arch).exists(), output
        found += json.loads((folder / arch).read_text())
    return found


def test_every_kernel_compiles_for_every_target(rows):
    kernels = {"pair_errors_kernel", "fold_kernel", "pair_gradient_kernel", "pair_elements_kernel",
               "fold_elements_kernel"}
    for arch in (80, 90, 100):
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels


def test_every_gate_passes(rows):
    """No local memory, few enough registers, no float64 in float32 builds, no atomics, no flushed denormals."""
    failed = [f"{row['kernel']} ({row['case']}) sm_{row['arch']}: {row['failures']}" for row in rows if row["failures"]]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("call,kernel,loads,stores", [
    ("predictions", "pair_errors_kernel", 6, 0),         # both predictions, targets and references, 8 bf16 each
    ("predictions", "pair_gradient_kernel", 4, 2),
    ("predictions, fp32", "pair_errors_kernel", 12, 0),
    ("cached errors, built target", "pair_errors_kernel", 5, 0),
    ("frames of 60x90", "pair_errors_kernel", 6, 0),     # frames start on multiples of 8 elements, not of 16
    ("frames of 60x90", "pair_gradient_kernel", 4, 2),
    ("elements", "pair_elements_kernel", 6, 2),
])
def test_main_loops_move_128_bits_at_a_time(rows, call, kernel, loads, stores):
    found = [row for row in rows if (row["case"], row["kernel"]) == (call, kernel)]
    assert {row["arch"] for row in found} == {80, 90, 100}
    for row in found:
        assert (row["loads_expected"], row["stores_expected"]) == (loads, stores)
        assert row["loads_128"] >= loads and row["stores_128"] >= stores


def test_the_counts_see_what_they_count(rows):
    """Rows of an odd length allow no wide access, and float64 builds do use float64."""
    odd = [row for row in rows if row["case"] == "odd video, one pair" and row["kernel"] == "pair_errors_kernel"]
    assert odd and all(row["loads_128"] == 0 and row["instructions"] > 200 for row in odd)
    double = [row for row in rows if row["float64"]]
    assert double and all(row["double"] > 10 for row in double)
