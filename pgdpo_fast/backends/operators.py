"""The operators of the fused backends as torch sees them: one set of schemas, a namespace for each backend.

Launches of Triton kernels implement `pgdpo_fast_triton` (triton.py), the libraries of csrc/ `pgdpo_fast_native` once
they are loaded (native.py). The first ten tensors are those of `operands.gather`; `length` is `segment_length`.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPERANDS = (
    "Tensor policy, Tensor? policy_rejected, Tensor target, Tensor? target_rejected, Tensor? noise, "
    "Tensor? target_scale, Tensor? reference, Tensor? reference_rejected, Tensor? reference_scale, "
    "Tensor? reference_scale_rejected"
)
_NUMBERS = "Tensor? reference_errors, Tensor? weight, Tensor? posterior_scale"
_SETTINGS = (
    "int reference_form, int groups, int length, bool anchor, bool cross, int kind, int flags, float[] parameters"
)
_ELEMENT_SETTINGS = "int reference_form, int length, int kind, int flags, float[] parameters, bool outer"


def gradient_like(x: Tensor | None) -> Tensor:
    """Where a gradient goes: contiguous, in the prediction's dtype; empty when chosen and rejected are one tensor."""
    return torch.empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _statistics_like(policy, policy_rejected, planes, groups):
    pairs = policy.shape[0] // (2 if policy_rejected is None else 1)
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    return policy.new_empty((planes, pairs, groups), dtype=dtype)


def _fake_errors(*args):
    return _statistics_like(*args[:2], 6, args[11])


def _fake_objective(*args):
    groups = args[14]
    telemetry = _statistics_like(*args[:2], 9, groups)
    return telemetry.new_empty(()), telemetry, _statistics_like(*args[:2], 3, groups)


def _fake_gradient(*args):
    return gradient_like(args[0]), gradient_like(args[1])


def _fake_elements(*args):
    telemetry, with_gradients = _statistics_like(*args[:2], 9, 1), args[-1]
    gradients = _fake_gradient(*args) if with_gradients else (torch.empty(0), torch.empty(0))
    return telemetry.new_empty(()), telemetry, telemetry.new_empty((4, telemetry.shape[1])), *gradients


# Schema: the function that makes empty results of the right shapes and dtypes, which is all that tracing needs.
FUSED = {
    # means of all statistics over each group, [6, B, G]
    f"pair_errors({OPERANDS}, int reference_form, int groups, int length, bool anchor, bool cross) "
    "-> Tensor": _fake_errors,
    # loss [], telemetry [9, B, G] and gradient coefficients [3, B, G]; reference_errors [2, B, G], weight [B, G] and
    # posterior_scale [B] in the accumulation dtype
    f"pair_objective({OPERANDS}, {_NUMBERS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)": _fake_objective,
    # the gradients by both predictions, times `incoming` []; the second empty where those are one stacked tensor
    f"pair_gradient({OPERANDS}, Tensor coefficients, Tensor incoming, int reference_form, int groups, int length, "
    "bool anchor) -> (Tensor, Tensor)": _fake_gradient,
    # every element its own group: loss [], telemetry [9, B, 1], means of gamma, P, 1 - gamma and I [4, B], and with
    # `with_gradients` both gradients for an incoming gradient of 1, in the same pass; weight [B]
    f"pair_elements({OPERANDS}, Tensor? weight, Tensor? posterior_scale, {_ELEMENT_SETTINGS}, bool with_gradients) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)": _fake_elements,
    # writes both gradients; with `speculative` they are already there for an incoming gradient of 1
    f"pair_elements_gradient({OPERANDS}, Tensor? weight, Tensor? posterior_scale, Tensor means, Tensor incoming, "
    f"Tensor(a!) chosen, Tensor(b!) rejected, {_ELEMENT_SETTINGS}, bool speculative) -> ()": lambda *_: None,
}
# What csrc/ has besides; called by native.py alone.
ROWS = {
    # writes rows of the reference cache; the reference's mean squared errors [2, B]
    f"pack({OPERANDS}, Tensor(a!) chosen, Tensor(b!) rejected, Tensor(c!)? chosen_scale, "
    "Tensor(d!)? rejected_scale, int length) -> Tensor": lambda *args: _statistics_like(*args[:2], 2, 1)[..., 0],
    # tables[k][rows] into out[k]; for CUDA outputs
    "gather_rows(Tensor[] tables, int[] rows, Tensor(a!)[] out) -> ()": lambda *_: None,
}


def define(namespace: str, operators: dict) -> torch.library.Library:
    """Define `operators` as `torch.ops.<namespace>.*`, for as long as the returned library is kept."""
    library = torch.library.Library(namespace, "DEF")
    for schema, fake in operators.items():
        name = library.define(schema)
        if fake is not None:
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


triton_library = define("pgdpo_fast_triton", FUSED)
native_library = define("pgdpo_fast_native", FUSED | ROWS | {"instruction_set() -> str": None})
