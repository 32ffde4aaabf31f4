"""The examples run as their first line says, and train: each fails by itself where the loss does not fall."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
INTEGRATIONS = EXAMPLES / "integrations"
# Script -> the package it is about, where that is not torch itself.
NEEDS = {
    "accelerate_loop": "accelerate",
    "compile_step": None,
    "ddp_no_sync": None,
    "deepspeed_engine": "deepspeed",
    "grad_scaler": None,
    "lightning_module": "lightning",
}


def run(script: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_integration_is_run():
    assert {path.stem for path in INTEGRATIONS.glob("*.py")} == {*NEEDS, "tiny"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_an_integration_trains(name):
    package = NEEDS[name]
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    printed = run(INTEGRATIONS / f"{name}.py")
    before, after = map(float, re.search(rf"{name}: loss ([\d.]+) -> ([\d.]+), margin", printed).groups())
    assert before == pytest.approx(0.6931, abs=1e-4), "the policy starts as its reference: log 2"
    assert after < 0.3


def test_a_new_objective_in_ten_lines():
    assert re.search(r"loss 2\.75\d+, gradient norm", run(EXAMPLES / "new_objective.py"))
