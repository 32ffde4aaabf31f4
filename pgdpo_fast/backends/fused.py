"""The autograd functions over the fused operators, whichever backend runs them.

Sample and frame groups: `pair_objective` makes the loss in two launches (errors, then fold and objective) and
`pair_gradient` both gradients in one, when backward runs, with the incoming gradient folded into the coefficient.
Doing it then costs no pass over the gradients for loss scaling or accumulation, keeps small float16 gradients from
vanishing before they are scaled, and allocates nothing in forward.

Elements: `pair_elements` makes loss and gradients in one pass, betting on an incoming gradient of 1;
`pair_elements_gradient` has nothing to do when the bet was right and writes them again when it was not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pgdpo_fast.backends import operators, triton  # noqa: F401  (triton.py implements its operators)
from pgdpo_fast.backends.operands import segment_length
from pgdpo_fast.objectives import GroupErrors

_OPERATORS = {"triton": torch.ops.pgdpo_fast_triton, "native": torch.ops.pgdpo_fast_native}


class Plan(NamedTuple):
    """Everything of a call that is not a tensor."""

    reference_form: int
    groups: int
    length: int
    anchor: bool
    cross: bool
    backend: str


def plan(tensors, reference_form: int, groups: int, anchor: bool, cross: bool, backend: str) -> Plan:
    """The plan for operands `tensors`, in `groups` groups (1 at element granularity, whose passes need none)."""
    return Plan(reference_form, groups, segment_length(tensors[0].shape[1:], groups), anchor, cross, backend)


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, kind, flags, parameters, reference_errors, weight, posterior_scale, *tensors):
        loss, telemetry, coefficients = _OPERATORS[plan.backend].pair_objective.default(
            *tensors, reference_errors, weight, posterior_scale, *plan[:-1], kind, flags, parameters
        )
        ctx.plan = plan
        ctx.save_for_backward(coefficients, *tensors)
        ctx.mark_non_differentiable(telemetry)
        return loss, telemetry

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming, _):
        coefficients, *tensors = ctx.saved_tensors
        return (None,) * 7 + _input_gradients(ctx.plan, tensors, coefficients, incoming)


class _Elements(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, kind, flags, parameters, outer, weight, posterior_scale, *tensors):
        settings = (plan.reference_form, plan.length, kind, flags, parameters, outer)
        bet = not outer and any(ctx.needs_input_grad[7:9])
        loss, telemetry, means, chosen, rejected = _OPERATORS[plan.backend].pair_elements.default(
            *tensors, weight, posterior_scale, *settings, bet
        )
        ctx.settings, ctx.backend, ctx.bet = settings, plan.backend, bet
        ctx.save_for_backward(weight, posterior_scale, means, chosen, rejected, *tensors)
        ctx.mark_non_differentiable(telemetry)
        return loss, telemetry

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming, _):
        weight, posterior_scale, means, chosen, rejected, *tensors = ctx.saved_tensors
        bet, ctx.bet = ctx.bet, False  # a second backward must not write over gradients already handed out
        if not bet:
            chosen, rejected = map(operators.gradient_like, tensors[:2])
        _OPERATORS[ctx.backend].pair_elements_gradient.default(
            *tensors, weight, posterior_scale, means, incoming, chosen, rejected, *ctx.settings, bet
        )
        return (None,) * 7 + (chosen, None if tensors[1] is None else rejected) + (None,) * (len(tensors) - 2)


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *tensors):
        statistics = _OPERATORS[plan.backend].pair_errors.default(*tensors, *plan[:-1])
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        tensors = ctx.saved_tensors
        e_w, e_l, d_w, d_l, anchor, _ = incoming
        numel = tensors[0][0].numel() // ctx.plan.groups
        coefficients = torch.stack((e_w + d_w, e_l + d_l, anchor)) * (2.0 / numel)
        return (None,) + _input_gradients(ctx.plan, tensors, coefficients, coefficients.new_ones(()))


def _input_gradients(plan: Plan, tensors, coefficients: Tensor, incoming: Tensor) -> tuple:
    chosen, rejected = _OPERATORS[plan.backend].pair_gradient.default(
        *tensors, coefficients, incoming, plan.reference_form, plan.groups, plan.length, plan.anchor
    )
    return (chosen, None if tensors[1] is None else rejected) + (None,) * (len(tensors) - 2)


def objective(
    tensors,
    plan: Plan,
    epilogue,
    reference_errors: Tensor | None,
    weight: Tensor | None,
    posterior_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss `[]` (differentiable by the predictions) and telemetry `[9, B, G]`, with the objective's kernel epilogue."""
    return _Objective.apply(
        plan,
        epilogue.kind,
        epilogue.flags,
        list(epilogue.parameters),
        reference_errors,
        weight,
        posterior_scale,
        *tensors,
    )


def elements(
    tensors, plan: Plan, epilogue, outer: bool, weight: Tensor | None, posterior_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same at element granularity: loss `[]` and telemetry `[9, B, 1]`, means over each video.

    Args:
        weight: `[B]`.
        outer: PG-DPO's combine="outer".
    """
    if not torch.is_grad_enabled():  # else a prediction that requires a gradient would have one written for nothing
        tensors = (*(None if t is None else t.detach() for t in tensors[:2]), *tensors[2:])
    return _Elements.apply(
        plan, epilogue.kind, epilogue.flags, list(epilogue.parameters), outer, weight, posterior_scale, *tensors
    )


def group_errors(tensors, plan: Plan) -> GroupErrors:
    """Statistics `[B, G]`, differentiable by the predictions (the cross term is not): two launches, one in backward."""
    e_w, e_l, d_w, d_l, anchor, cross = _Errors.apply(plan, *tensors)
    gaps = plan.reference_form != 0
    return GroupErrors(
        e_w,
        e_l,
        d_w if gaps else None,
        d_l if gaps else None,
        anchor if plan.anchor else None,
        cross.detach() if plan.cross else None,
    )
