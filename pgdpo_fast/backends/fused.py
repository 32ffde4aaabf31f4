"""The fused operators as torch sees them: custom ops and the autograd functions over them.

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

from pgdpo_fast.backends import native, operands, triton
from pgdpo_fast.objectives import GroupErrors

_OPERANDS = (
    "Tensor policy, Tensor? policy_rejected, Tensor target, Tensor? target_rejected, Tensor? noise, "
    "Tensor? target_scale, Tensor? reference, Tensor? reference_rejected, Tensor? reference_scale, "
    "Tensor? reference_scale_rejected"
)
library = torch.library.Library("pgdpo_fast", "DEF")
library.define(
    f"pair_errors({_OPERANDS}, int reference_form, int groups, bool anchor, bool cross, str backend) -> Tensor")
library.define(
    f"pair_objective({_OPERANDS}, Tensor? reference_errors, Tensor? weight, Tensor? posterior_scale, "
    "int reference_form, int groups, bool anchor, bool cross, int kind, int flags, float[] parameters, str backend) "
    "-> (Tensor, Tensor, Tensor)")
library.define(
    f"pair_gradient({_OPERANDS}, Tensor coefficients, Tensor incoming, int reference_form, int groups, bool anchor, "
    "str backend) -> (Tensor, Tensor)")
library.define(
    f"pair_elements({_OPERANDS}, Tensor? weight, Tensor? posterior_scale, int reference_form, int kind, int flags, "
    "float[] parameters, bool outer, bool with_gradients, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
library.define(
    f"pair_elements_gradient({_OPERANDS}, Tensor? weight, Tensor? posterior_scale, Tensor means, Tensor incoming, "
    "Tensor(a!) chosen, Tensor(b!) rejected, int reference_form, int kind, int flags, float[] parameters, bool outer, "
    "bool speculative, str backend) -> ()")


_BACKENDS = {"triton": triton, "native": native}


def _pair_errors(*args):
    *tensors, reference_form, groups, anchor, cross, backend = args
    x, run = operands.gather(*tensors), _BACKENDS[backend]
    return run.statistics(x, reference_form, groups, anchor, cross)


def _pair_objective(*args):
    (*tensors, reference_errors, weight, posterior_scale,
     reference_form, groups, anchor, cross, kind, flags, parameters, backend) = args
    x, run = operands.gather(*tensors), _BACKENDS[backend]
    return run.objective(x, reference_form, groups, anchor, cross, reference_errors, weight, posterior_scale, kind,
                         flags, parameters)


def _pair_gradient(*args):
    *tensors, coefficients, incoming, reference_form, groups, anchor, backend = args
    x = operands.gather(*tensors)
    chosen, rejected = _like(tensors[0]), _like(tensors[1])
    _BACKENDS[backend].gradients(x, reference_form, groups, anchor, coefficients, incoming,
                                 *_halves(chosen, rejected))
    return chosen, rejected


def _pair_elements(*args):
    *tensors, weight, posterior_scale, reference_form, kind, flags, parameters, outer, with_gradients, backend = args
    x = operands.gather(*tensors)
    chosen, rejected = (_like(tensors[0]), _like(tensors[1])) if with_gradients else (torch.empty(0), torch.empty(0))
    outputs = _BACKENDS[backend].element_objective(
        x, reference_form, weight, posterior_scale, kind, flags, parameters, outer,
        _halves(chosen, rejected) if with_gradients else None)
    return *outputs, chosen, rejected


def _pair_elements_gradient(*args):
    (*tensors, weight, posterior_scale, means, incoming, chosen, rejected,
     reference_form, kind, flags, parameters, outer, speculative, backend) = args
    x = operands.gather(*tensors)
    _BACKENDS[backend].element_gradients(
        x, reference_form, weight, posterior_scale, kind, flags, parameters, outer, means, incoming,
        *_halves(chosen, rejected), speculative)


def _halves(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and rejected rows of a gradient that may be one stacked tensor."""
    return (chosen, rejected) if rejected.numel() else chosen.chunk(2)


def _like(x: Tensor | None) -> Tensor:
    """Where a gradient goes: contiguous, in the prediction's dtype; empty when chosen and rejected are one tensor."""
    if x is None:
        return torch.empty(0)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_statistics(policy, policy_rejected, planes, groups):
    pairs = policy.shape[0] // (2 if policy_rejected is None else 1)
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    return policy.new_empty((planes, pairs, groups), dtype=dtype)


def _fake_pair_errors(*args):
    return _fake_statistics(*args[:2], 6, args[11])


def _fake_pair_objective(*args):
    groups = args[14]
    telemetry = _fake_statistics(*args[:2], 9, groups)
    return telemetry.new_empty(()), telemetry, _fake_statistics(*args[:2], 3, groups)


def _fake_pair_gradient(*args):
    return _like(args[0]), _like(args[1])


def _fake_pair_elements(*args):
    telemetry = _fake_statistics(*args[:2], 9, 1)
    gradients = (_like(args[0]), _like(args[1])) if args[17] else (torch.empty(0), torch.empty(0))
    return telemetry.new_empty(()), telemetry, telemetry.new_empty((4, telemetry.shape[1])), *gradients


def _fake_pair_elements_gradient(*args):
    return None


for _name, _run, _fake in (("pair_errors", _pair_errors, _fake_pair_errors),
                           ("pair_objective", _pair_objective, _fake_pair_objective),
                           ("pair_gradient", _pair_gradient, _fake_pair_gradient),
                           ("pair_elements", _pair_elements, _fake_pair_elements),
                           ("pair_elements_gradient", _pair_elements_gradient, _fake_pair_elements_gradient)):
    library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pgdpo_fast::{_name}", _fake, lib=library)
_ops = torch.ops.pgdpo_fast


class Plan(NamedTuple):
    """Everything of a call that is not a tensor."""

    reference_form: int
    groups: int
    anchor: bool
    cross: bool
    backend: str


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, kind, flags, parameters, reference_errors, weight, posterior_scale, *tensors):
        loss, telemetry, coefficients = _ops.pair_objective(
            *tensors, reference_errors, weight, posterior_scale, plan.reference_form, plan.groups, plan.anchor,
            plan.cross, kind, flags, parameters, plan.backend)
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
        settings = (plan.reference_form, kind, flags, parameters, outer)
        bet = not outer and any(ctx.needs_input_grad[7:9])
        loss, telemetry, means, chosen, rejected = _ops.pair_elements(
            *tensors, weight, posterior_scale, *settings, bet, plan.backend)
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
            chosen, rejected = _like(tensors[0]), _like(tensors[1])
        _ops.pair_elements_gradient(*tensors, weight, posterior_scale, means, incoming, chosen, rejected,
                                    *ctx.settings, bet, ctx.backend)
        return (None,) * 7 + (chosen, None if tensors[1] is None else rejected) + (None,) * (len(tensors) - 2)


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *tensors):
        statistics = _ops.pair_errors(*tensors, *plan)
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
    chosen, rejected = _ops.pair_gradient(*tensors, coefficients, incoming.contiguous(), plan.reference_form,
                                          plan.groups, plan.anchor, plan.backend)
    return (chosen, None if tensors[1] is None else rejected) + (None,) * (len(tensors) - 2)


def objective(tensors, plan: Plan, epilogue, reference_errors: Tensor | None, weight: Tensor | None,
              posterior_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss `[]` (differentiable by the predictions) and telemetry `[9, B, G]`, with the objective's kernel epilogue."""
    return _Objective.apply(plan, epilogue.kind, epilogue.flags, list(epilogue.parameters), reference_errors, weight,
                            posterior_scale, *tensors)


def elements(tensors, plan: Plan, epilogue, outer: bool, weight: Tensor | None,
             posterior_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same at element granularity: loss `[]` and telemetry `[9, B, 1]`, means over each video.

    Args:
        weight: `[B]`.
        outer: PG-DPO's combine="outer".
    """
    if not torch.is_grad_enabled():  # else a prediction that requires a gradient would have one written for nothing
        tensors = (*(None if t is None else t.detach() for t in tensors[:2]), *tensors[2:])
    return _Elements.apply(plan, epilogue.kind, epilogue.flags, list(epilogue.parameters), outer, weight,
                           posterior_scale, *tensors)


def group_errors(tensors, plan: Plan) -> GroupErrors:
    """Statistics `[B, G]`, differentiable by the predictions (the cross term is not): two launches, one in backward."""
    e_w, e_l, d_w, d_l, anchor, cross = _Errors.apply(plan, *tensors)
    gaps = plan.reference_form != 0
    return GroupErrors(e_w, e_l, d_w if gaps else None, d_l if gaps else None, anchor if plan.anchor else None,
                       cross.detach() if plan.cross else None)
