"""Loss and gradients on this machine's CPU, timed by pytest-benchmark: `pytest bench --benchmark-only`.

Groups are cases, so that pytest-benchmark's table compares contenders. Each is compared with float64 before timing.
"""

from __future__ import annotations

import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import backends, objectives

from .contenders import CONTENDERS, Inputs, make_inputs
from .harness import check, input_sets, peak_extra_bytes
from .shapes import SHAPES, Case

CPU = torch.device("cpu")
CASES = tuple(
    Case(SHAPES[name], 1, granularity, form)
    for name in ("videocrafter2", "wan2.1-480p")
    for granularity, form in (
        ("sample", "errors"),
        ("sample", "predictions"),
        ("frame", "errors"),
        ("element", "predictions"),
    )
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.key)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def inputs(case):
    return [make_inputs(case, CPU, seed) for seed in range(input_sets(case, CPU))]


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_loss_and_gradients(benchmark, contender, case, inputs):
    reason = contender.refuses(case, CPU)
    if reason:
        pytest.skip(reason)
    call = contender.prepare(case)
    gate = check(case, inputs[0], contender, *call(inputs[0]))
    assert gate.green, f"not timed: {gate}"
    turn = 0

    def next_set():
        nonlocal turn
        turn += 1
        return (inputs[turn % len(inputs)],), {}

    benchmark.group = case.key
    benchmark.pedantic(call, setup=next_set, rounds=15, warmup_rounds=2)
    benchmark.extra_info |= {
        "floor_bytes": case.floor_bytes,
        "threads": torch.get_num_threads(),
        "temporaries_bytes": peak_extra_bytes(lambda i: call(inputs[i % len(inputs)]), CPU) - case.gradient_bytes,
    }


@pytest.mark.parametrize("granularity", ["sample", "element"])
@pytest.mark.parametrize("name", objectives.NAMES)
def test_objectives(benchmark, name, granularity):
    """Every objective that has a name, by the backend `auto` takes here."""
    case = Case(SHAPES["videocrafter2"], 1, granularity, "predictions")
    x = make_inputs(case, CPU, 0)
    objective = objectives.from_name(name)
    backend = "native" if backends.unavailable("native", CPU) is None else "eager"

    def call(x, backend=backend):
        out = pf.preference_loss(
            x.prediction, x.target, x.reference, objective=objective, granularity=granularity, backend=backend,
            posterior_scale=torch.ones(case.pairs),
        )  # fmt: skip
        return out.loss.detach(), *torch.autograd.grad(out.loss, x.prediction)

    wide = Inputs(x.prediction.detach().double().requires_grad_(), x.target.double(), x.reference.double())
    torch.testing.assert_close(call(x)[0].double(), call(wide, "eager")[0], rtol=2e-4, atol=1e-6)
    benchmark.group = f"objectives, {case.key}"
    benchmark.pedantic(call, args=(x,), rounds=15, warmup_rounds=2)
