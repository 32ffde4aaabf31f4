"""Which cases a table measures, and the run over them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from pgdpo_fast.preemption import check_stop

from .harness import DEFAULT_BUDGET, Budget, environment, measure, measure_copy
from .shapes import BATCHES, SHAPES, Case

# Reference forms a table shows by default; the packed ones are asked for by name.
QUICK = tuple(
    Case(SHAPES["wan2.1-480p"], 1, granularity, reference_form)
    for granularity, reference_form in (("element", "predictions"), ("sample", "predictions"), ("sample", "errors"))
)


def cases(
    shapes: Iterable[str] = tuple(SHAPES),
    batches: Iterable[int] = BATCHES,
    granularities: Iterable[str] = ("sample", "element"),
    reference_forms: Iterable[str] = ("predictions", "errors"),
    target_forms: Iterable[str] = ("stacked",),
    dtypes: Iterable[str] = ("bfloat16",),
) -> list[Case]:
    """Every possible combination, small batches first."""
    combinations = (
        Case(SHAPES[s], b, g, r, t, d)
        for b in batches
        for s in shapes
        for g in granularities
        for r in reference_forms
        for t in target_forms
        for d in dtypes
    )
    return [case for case in combinations if case.possible]


def run(
    chosen: Iterable[Case],
    device: torch.device,
    *,
    seed: int,
    budget: Budget = DEFAULT_BUDGET,
    progress: Callable[[str], None] = lambda _: None,
    **options,
) -> dict:
    """Measure the copy, then every case; a JSON-ready result. `options` go to `harness.measure`."""
    started = time.perf_counter()
    result = {"environment": environment(device), "seed": seed, "copy": None, "cases": []}
    progress("copy bandwidth")
    result["copy"] = measure_copy(device, min(2.0, budget.seconds))
    for case in chosen:
        check_stop()
        result["cases"].append(measure(case, device, seed=seed, budget=budget, progress=progress, **options))
    result["seconds"] = time.perf_counter() - started
    return result
