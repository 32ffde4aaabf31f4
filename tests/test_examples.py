"""The examples run as their first line says, and train: each fails by itself where the loss does not fall."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.commands import run_scripts

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
INTEGRATIONS = EXAMPLES / "integrations"
OBJECTIVES = EXAMPLES / "objectives"
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


def test_a_new_objective_in_ten_lines(tmp_path):
    assert re.search(r"loss 2\.75\d+, gradient norm", run_scripts(tmp_path, [EXAMPLES / "new_objective.py"])[0])


# Objectives: each example against its formula, written out over whole clips in plain torch.


def clips(count, frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = count, 2, frames, 3, 5
    y, q, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return (q + 0.2 * noise).requires_grad_(), y, q


def gaps(p, y, q, weight=1.0, dims=(1, 2, 3, 4)):
    return (weight * ((p - y) ** 2 - (q - y) ** 2)).mean(dims)


def kto():
    p, y, q = clips(5)
    liked = torch.tensor([1, 0, 1, 1, 0])
    r = -gaps(p, y, q)
    k = max(0.0, r.mean().item())
    losses = [1 - torch.sigmoid(3.0 * (x - k) if good else 3.0 * (k - x)) for x, good in zip(r, liked, strict=True)]
    return (p, y, q, liked, 3.0), sum(losses) / 5


def group_advantage():
    p, y, q = clips(6)
    scores = torch.tensor([[0.1, 0.9, 0.4], [0.7, 0.2, 0.3]], dtype=torch.float64)
    total = 0.0
    for of_prompt, gap in zip(scores, gaps(p, y, q).view(2, 3), strict=True):
        for score, d in zip(of_prompt, gap, strict=True):
            advantage = (score - of_prompt.mean()) / (of_prompt.std() + 1e-6)
            ratio = torch.exp(-d)
            total = total - torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
    return (p, y, q, scores, 2.0), total / 6


def listwise():
    p, y, q = clips(8)
    total = 0.0
    for r in (-5.0 * gaps(p, y, q)).view(2, 4):
        for place in range(3):
            total = total - (r[place] - torch.logsumexp(r[place:], 0))
    return (p, y, q, 2, 10.0), total / 2


def one_to_many():
    p, y, q = clips(4)
    d = gaps(p, y, q)
    return (p, y, q, 10.0), -sum(logsigmoid(-5.0 * (d[0] - d[i])) for i in (1, 2, 3)) / 3


def both_anchors():
    p, y, q = clips(4)
    d, anchor = gaps(p, y, q), ((p - q) ** 2).mean((1, 2, 3, 4))
    loss = -logsigmoid(-5.0 * (d[:2] - d[2:])) + 0.25 * (anchor[:2] + anchor[2:])
    return (p, y, q, 10.0, 0.5), loss.mean()


def region_preference():
    p, y, q = clips(4)
    region = torch.zeros(2, 1, 3, 3, 5, dtype=torch.float64)
    region[..., 1:, 2:4] = 1
    inside = (slice(None), slice(None), slice(1, None), slice(1, None), slice(2, 4))
    d = gaps(p[inside], y[inside], q[inside])
    return (p, y, q, region, 10.0), -logsigmoid(-5.0 * (d[:2] - d[2:])).mean()


def dense_segments():
    p, y, q = clips(4, frames=6)
    labels = torch.tensor([[1, 0, -1], [1, 1, -1]])
    motion = torch.rand(2, 1, 6, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = motion / motion.mean((1, 3, 4), keepdim=True)
    d = gaps(p, y, q, torch.cat([weight, weight]), (1, 3, 4))
    pairs = []
    for pair in range(2):
        better = [(f, labels[pair, f // 2].item()) for f in range(6) if labels[pair, f // 2] != 0]
        pairs.append(sum(-logsigmoid(-5.0 * sign * (d[pair, f] - d[2 + pair, f])) for f, sign in better) / len(better))
    return (p, y, q, labels, motion, 10.0), sum(pairs) / 2


FORMULAS = (kto, group_advantage, listwise, one_to_many, both_anchors, region_preference, dense_segments)


def test_every_objective_has_its_formula_here():
    assert {path.stem for path in OBJECTIVES.glob("*.py")} == {formula.__name__ for formula in FORMULAS}


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_an_objective_of_the_examples_is_its_formula(formula):
    """Loss and gradient in float64."""
    name = formula.__name__
    spec = importlib.util.spec_from_file_location(f"example_{name}", OBJECTIVES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments, expected = formula()
    loss = getattr(module, name)(*arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(x, arguments[0])[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
def test_an_objective_of_the_examples_runs_as_its_first_line_says(formula, tmp_path):
    assert re.search(r"loss -?\d", run_scripts(tmp_path, [OBJECTIVES / f"{formula.__name__}.py"])[0])
