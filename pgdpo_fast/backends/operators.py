"""The operators of the fused backends as torch sees them: one set of schemas, a namespace for each backend.

Launches of Triton kernels implement `pgdpo_fast_triton` (triton.py), the libraries of csrc/ `pgdpo_fast_native` once
they are loaded (native.py). An operator is written down once, below, as a function of bundles (the NamedTuples of
operands.py) and single arguments: its parameters are the schema, in which a bundle stands for its fields one after
another, and its body makes empty results of the right shapes and dtypes, which is all that tracing needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pgdpo_fast.backends.operands import (
    Coefficients,
    ElementMeans,
    Operands,
    PairNumbers,
    Reduction,
    ReferenceForm,
    Telemetry,
)
from pgdpo_fast.objectives import Epilogue, GroupErrors

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    ReferenceForm: "int",
    tuple[float, ...]: "float[]",
    list[Tensor]: "Tensor[]",
    list[int]: "int[]",
    str: "str",
}
_BUNDLES = (Operands, PairNumbers, Reduction, Epilogue)


class Written(NamedTuple):
    """Marks a tensor that an operator writes into, `Annotated[Tensor, Written("a")]`: its alias set in the schema."""

    alias: str


def _parameters(function: Callable) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    return {name: hints[name] for name in inspect.signature(function).parameters}


def _type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        kind, written = get_args(hint)
        plain = _TYPES[kind]
        return f"Tensor({written.alias}!){plain.removeprefix('Tensor')}"
    return _TYPES[hint]


def schema(function: Callable) -> str:
    """The schema of an operator declared as `function`: "pair_errors(Tensor policy, ...) -> Tensor"."""
    arguments = []
    for name, hint in _parameters(function).items():
        fields = get_type_hints(hint) if hint in _BUNDLES else {name: hint}
        arguments += [f"{_type(kind)} {field}" for field, kind in fields.items()]
    returned = get_type_hints(function)["return"]
    results = get_args(returned) if get_origin(returned) is tuple else () if returned is type(None) else (returned,)
    result = _TYPES[results[0]] if len(results) == 1 else f"({', '.join(_TYPES[kind] for kind in results)})"
    return f"{function.__name__}({', '.join(arguments)}) -> {result}"


def with_bundles(function: Callable) -> Callable:
    """`function` as an operator is called: with the fields of its bundles one after another."""
    hints = list(_parameters(function).values())
    bundles = [(hint, len(hint._fields)) if hint in _BUNDLES else None for hint in hints]

    def flat(*arguments: Any) -> Any:
        rest = iter(arguments)
        return function(*(next(rest) if b is None else b[0]._make(islice(rest, b[1])) for b in bundles))

    return flat


def gradients_like(x: Operands, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Where both gradients go: contiguous, in the prediction's dtype and on its device; the second empty when chosen
    and rejected are one tensor, both empty when they are not wanted."""
    chosen, rejected = (
        x.policy.new_empty(0) if t is None or not wanted else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (x.policy, x.policy_rejected)
    )
    return chosen, rejected


def _planes(x: Operands, planes: type[NamedTuple], groups: int) -> Tensor:
    """One `[B, G]` for every field of `planes`."""
    return x.policy.new_empty((len(planes._fields), x.pairs, groups), dtype=x.compute_dtype)


def pair_errors(operands: Operands, reduction: Reduction) -> Tensor:
    """Means over each group, `[7, B, G]`: the fields of `GroupErrors`."""
    return _planes(operands, GroupErrors, reduction.groups)


def pair_objective(
    operands: Operands, reference_errors: Tensor | None, numbers: PairNumbers, reduction: Reduction, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[]`, `Telemetry` `[9, B, G]` and `Coefficients` `[4, B, G]`; reference errors `[2, B, G]`."""
    telemetry = _planes(operands, Telemetry, reduction.groups)
    return telemetry.new_empty(()), telemetry, _planes(operands, Coefficients, reduction.groups)


def pair_gradient(
    operands: Operands, coefficients: Tensor, incoming: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """The gradients by both predictions, times `incoming` []; the second empty where those are one stacked tensor."""
    return gradients_like(operands)


def pair_elements(
    operands: Operands,
    numbers: PairNumbers,
    reduction: Reduction,
    epilogue: Epilogue,
    outer: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every element its own group: loss `[]`, `Telemetry` `[9, B, 1]`, `ElementMeans` `[4, B]`, and with
    `with_gradients` both gradients for an incoming gradient of 1, in the same pass."""
    telemetry = _planes(operands, Telemetry, 1)
    gradients = gradients_like(operands, with_gradients)
    return telemetry.new_empty(()), telemetry, _planes(operands, ElementMeans, 1)[..., 0], *gradients


def pair_elements_gradient(
    operands: Operands,
    numbers: PairNumbers,
    means: Tensor,
    incoming: Tensor,
    chosen: Annotated[Tensor, Written("a")],
    rejected: Annotated[Tensor, Written("b")],
    reduction: Reduction,
    epilogue: Epilogue,
    outer: bool,
    bet: bool,
) -> None:
    """Writes both gradients; with `bet` they are already there for an incoming gradient of 1."""


# What Triton has besides: gradients in forward, for the incoming gradient that was seen last on the device.


def pair_stream(
    operands: Operands,
    reference_errors: Tensor | None,
    numbers: PairNumbers,
    reduction: Reduction,
    epilogue: Epilogue,
    elements: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss `[]`, `Telemetry` `[9, B, G]`, `Coefficients` `[4, B, G]` (empty with `elements`, every element its own
    group), the incoming gradients that were bet on, `[B, 1]` or one for each segment, and both gradients."""
    telemetry = _planes(operands, Telemetry, reduction.groups)
    coefficients = telemetry.new_empty(0) if elements else _planes(operands, Coefficients, reduction.groups)
    segments = -(-operands.policy[0].numel() // reduction.length) if elements else 1
    bets = telemetry.new_empty((operands.pairs, segments))
    return telemetry.new_empty(()), telemetry, coefficients, bets, *gradients_like(operands)


def pair_stream_gradient(
    operands: Operands,
    numbers: PairNumbers,
    coefficients: Tensor,
    bets: Tensor | None,
    incoming: Tensor,
    chosen: Annotated[Tensor, Written("a")],
    rejected: Annotated[Tensor, Written("b")],
    reduction: Reduction,
    epilogue: Epilogue,
    elements: bool,
) -> None:
    """Writes both gradients where they are not there already for `incoming`; without `bets` everywhere."""


# What csrc/ has besides; called by native.py alone.


def pack(
    operands: Operands,
    chosen: Annotated[Tensor, Written("a")],
    rejected: Annotated[Tensor, Written("b")],
    chosen_scale: Annotated[Tensor | None, Written("c")],
    rejected_scale: Annotated[Tensor | None, Written("d")],
    length: int,
) -> None:
    """Writes rows of the reference cache."""


def gather_rows(tables: list[Tensor], rows: list[int], out: Annotated[list[Tensor], Written("a")]) -> None:
    """Copies `tables[k][rows]` into `out[k]`; for CUDA outputs."""


def instruction_set() -> str:
    """What the CPU library loaded was compiled for."""
    raise NotImplementedError  # never traced


FUSED = (pair_errors, pair_objective, pair_gradient, pair_elements, pair_elements_gradient)
STREAM = (pair_stream, pair_stream_gradient)
ROWS = (pack, gather_rows)


def define(namespace: str, operators: tuple[Callable, ...]) -> torch.library.Library:
    """Define `operators` as `torch.ops.<namespace>.*`, for as long as the returned library is kept."""
    library = torch.library.Library(namespace, "DEF")
    for operator in operators:
        name = library.define(schema(operator))
        torch.library.register_fake(f"{namespace}::{name}", with_bundles(operator), lib=library)
    return library


triton_library = define("pgdpo_fast_triton", (*FUSED, *STREAM))
native_library = define("pgdpo_fast_native", (*FUSED, *ROWS, instruction_set))
