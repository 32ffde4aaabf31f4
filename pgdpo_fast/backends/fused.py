"""The autograd functions over the fused operators, whichever backend runs them.

Sample and frame groups: `pair_objective` makes the loss in two launches (errors, then fold and objective) and
`pair_gradient` both gradients in one, when backward runs, with the incoming gradient folded into the coefficient.
Doing it then costs no pass over the gradients for loss scaling or accumulation, keeps small float16 gradients from
vanishing before they are scaled, and allocates nothing in forward.

Elements: the native `pair_elements` makes loss and gradients in one pass, betting on an incoming gradient of 1;
`pair_elements_gradient` has nothing to do when the bet was right and writes them again when it was not.

Triton's `pair_stream` does so at every granularity, elements always, and bets on the incoming gradient that the device
saw last: right from the second step on, whatever scales or accumulates the loss. `pair_stream_gradient` checks on the
device. What Triton leaves to `pair_elements` makes no gradients in forward: combine="outer", and calls without any.

Only the predictions have gradients, so each function takes them as arguments of their own; `call` holds them too.
First derivatives in reverse mode are all there is: every other one is refused, never answered with a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from pgdpo_fast.backends import operators, triton  # noqa: F401  (triton.py implements its operators)
from pgdpo_fast.backends.operands import Call, Coefficients, Operands, PairNumbers, ReferenceForm
from pgdpo_fast.errors import DerivativeError
from pgdpo_fast.objectives import Epilogue, GroupErrors

check_waits = triton.check_waits
_OPERATORS = {"triton": torch.ops.pgdpo_fast_triton, "native": torch.ops.pgdpo_fast_native}


def _first_derivative(backward: Callable) -> Callable:
    """`backward`, refusing to be differentiated itself: gradients are enabled in it with create_graph=True alone."""
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *incoming):
        if not torch.is_grad_enabled():  # as it nearly always is
            return backward(ctx, *incoming)
        if not torch.compiler.is_compiling():
            raise DerivativeError(
                f"create_graph=True: the gradients of backend={ctx.backend!r} cannot be differentiated again; for a "
                'gradient penalty or any second derivative pass backend="eager"'
            )
        return once(ctx, *incoming)

    return checked


def _apply(function: type[torch.autograd.Function], policy: Tensor, rejected: Tensor | None, *rest: Any) -> Any:
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # `Function.apply` asks it too, and speaks of setup_context
            raise DerivativeError(
                "torch.func: grad, vmap, jvp and their kin do not see into the fused backends; pass "
                'backend="eager", or take gradients with loss.backward() or torch.autograd.grad'
            )
        if forward_ad._current_level >= 0 and any(_is_dual(x) for x in (policy, rejected)):
            raise DerivativeError('forward-mode derivatives: the fused backends have none; pass backend="eager"')
    return function.apply(policy, rejected, *rest)


def _is_dual(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _numbers_and_operands(saved: Sequence[Tensor | None]) -> tuple[PairNumbers, Operands]:
    """The bundles of a call whose fields were saved for backward one after another."""
    count = len(PairNumbers._fields)
    return PairNumbers._make(saved[:count]), Operands._make(saved[count:])


def _by_inputs(operands: Operands, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients by `policy` and `policy_rejected`, which may be one stacked tensor."""
    return chosen, None if operands.policy_rejected is None else rejected


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, policy_rejected, call: Call, epilogue: Epilogue):
        loss, telemetry, coefficients = _OPERATORS[call.backend].pair_objective.default(
            *call.operands, call.reference_errors, *call.numbers, *call.reduction, *epilogue
        )
        ctx.reduction, ctx.backend = call.reduction, call.backend
        ctx.save_for_backward(coefficients, *call.operands)
        ctx.mark_non_differentiable(telemetry)
        return loss, telemetry

    @staticmethod
    @_first_derivative
    def backward(ctx, incoming, _):
        coefficients, *operands = ctx.saved_tensors
        return *_input_gradients(ctx, Operands._make(operands), coefficients, incoming), None, None


class _Elements(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, policy_rejected, call: Call, epilogue: Epilogue, outer: bool):
        bet = not outer and any(ctx.needs_input_grad)
        loss, telemetry, means, chosen, rejected = _OPERATORS[call.backend].pair_elements.default(
            *call.operands, *call.numbers, *call.reduction, *epilogue, outer, bet
        )
        ctx.reduction, ctx.backend, ctx.epilogue, ctx.outer, ctx.bet = (
            call.reduction,
            call.backend,
            epilogue,
            outer,
            bet,
        )
        ctx.save_for_backward(means, chosen, rejected, *call.numbers, *call.operands)
        ctx.mark_non_differentiable(telemetry)
        return loss, telemetry

    @staticmethod
    @_first_derivative
    def backward(ctx, incoming, _):
        means, chosen, rejected, *call = ctx.saved_tensors
        numbers, operands = _numbers_and_operands(call)
        bet, ctx.bet = ctx.bet, False  # a second backward must not write over gradients already handed out
        if not bet:
            chosen, rejected = operators.gradients_like(operands)
        _OPERATORS[ctx.backend].pair_elements_gradient.default(
            *operands, *numbers, means, incoming, chosen, rejected, *ctx.reduction, *ctx.epilogue, ctx.outer, bet
        )
        return *_by_inputs(operands, chosen, rejected), None, None, None


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, policy_rejected, call: Call, epilogue: Epilogue, elements: bool):
        loss, telemetry, coefficients, bets, chosen, rejected = _OPERATORS[call.backend].pair_stream.default(
            *call.operands, call.reference_errors, *call.numbers, *call.reduction, *epilogue, elements
        )
        ctx.reduction, ctx.backend, ctx.epilogue, ctx.elements, ctx.bet = (
            call.reduction,
            call.backend,
            epilogue,
            elements,
            True,
        )
        ctx.save_for_backward(coefficients, bets, chosen, rejected, *call.numbers, *call.operands)
        ctx.mark_non_differentiable(telemetry)
        return loss, telemetry

    @staticmethod
    @_first_derivative
    def backward(ctx, incoming, _):
        coefficients, bets, chosen, rejected, *call = ctx.saved_tensors
        numbers, operands = _numbers_and_operands(call)
        if not ctx.bet:  # a second backward must not write over gradients already handed out
            bets, (chosen, rejected) = None, operators.gradients_like(operands)
        ctx.bet = False
        _OPERATORS[ctx.backend].pair_stream_gradient.default(
            *operands,
            *numbers,
            coefficients,
            bets,
            incoming,
            chosen,
            rejected,
            *ctx.reduction,
            *ctx.epilogue,
            ctx.elements,
        )
        return *_by_inputs(operands, chosen, rejected), None, None, None


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, policy_rejected, call: Call):
        statistics = _OPERATORS[call.backend].pair_errors.default(*call.operands, *call.reduction)
        ctx.reduction, ctx.backend, ctx.samples = call.reduction, call.backend, policy.shape[0]
        ctx.save_for_backward(*call.operands)
        return statistics

    @staticmethod
    @_first_derivative
    def backward(ctx, incoming):
        return *_error_gradients(ctx, incoming), None


class _SampleErrors(_Errors):
    """`_Errors` of samples that stand for themselves, `policy` all of them and `call` made of views of it."""

    @staticmethod
    @_first_derivative
    def backward(ctx, incoming):
        chosen, rejected = _error_gradients(ctx, incoming)
        if rejected is not None and len(chosen) < ctx.samples:  # halves that have one sample in common
            chosen = torch.cat([chosen, rejected[1:]])
        return chosen, None, None


def _error_gradients(ctx: Any, incoming: Tensor):
    """The gradients by `policy` and `policy_rejected` from those by the statistics."""
    operands, by = Operands._make(ctx.saved_tensors), dict(zip(GroupErrors._fields, incoming, strict=True))
    numel = operands.policy[0].numel() // ctx.reduction.groups
    coefficients = torch.stack(
        Coefficients(
            chosen=by["policy_chosen"] + by["gap_chosen"],
            rejected=by["policy_rejected"] + by["gap_rejected"],
            anchor=by["anchor"],
            anchor_rejected=by["anchor_rejected"],
        )
    ) * (2.0 / numel)
    return _input_gradients(ctx, operands, coefficients, coefficients.new_ones(()))


def _input_gradients(
    ctx: Any, operands: Operands, coefficients: Tensor, incoming: Tensor
) -> tuple[Tensor, Tensor | None]:
    gradients = _OPERATORS[ctx.backend].pair_gradient.default(*operands, coefficients, incoming, *ctx.reduction)
    return _by_inputs(operands, *gradients)


def _wants_gradients(x: Operands) -> bool:
    rejected = x.policy_rejected
    return torch.is_grad_enabled() and (x.policy.requires_grad or rejected is not None and rejected.requires_grad)


def objective(call: Call, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    """Loss `[]` (differentiable by the predictions) and `Telemetry` `[9, B, G]`, by the objective's kernel epilogue."""
    if call.backend == "triton" and _wants_gradients(call.operands) and triton.streams(call, epilogue):
        return _apply(_Stream, call.operands.policy, call.operands.policy_rejected, call, epilogue, False)
    return _apply(_Objective, call.operands.policy, call.operands.policy_rejected, call, epilogue)


def elements(call: Call, epilogue: Epilogue, outer: bool) -> tuple[Tensor, Tensor]:
    """The same at element granularity: loss `[]` and `Telemetry` `[9, B, 1]`, means over each video.

    Args:
        outer: PG-DPO's combine="outer".
    """
    chosen, rejected = call.operands.policy, call.operands.policy_rejected
    if call.backend == "triton" and not outer and _wants_gradients(call.operands):
        return _apply(_Stream, chosen, rejected, call, epilogue, True)
    if not torch.is_grad_enabled():  # else a prediction that requires a gradient would have one written for nothing
        chosen, rejected = chosen.detach(), None if rejected is None else rejected.detach()
    return _apply(_Elements, chosen, rejected, call, epilogue, outer)


def group_errors(call: Call, samples: Tensor | None = None) -> GroupErrors:
    """Statistics `[B, G]`, differentiable by the predictions (the cross term is not): two launches, one in backward.

    Those without operands to make them from, or that are not asked for, are None. With `samples` the
    predictions of `call` are views of it, and the gradient is made whole: both halves (chosen and rejected), halves
    that have their middle sample in common, or all samples twice, of which the rejected ones are nobody's.
    """
    if samples is None:
        statistics = _apply(_Errors, call.operands.policy, call.operands.policy_rejected, call)
    else:
        statistics = _apply(_SampleErrors, samples, None, call)
    errors = GroupErrors._make(statistics)
    gaps = call.reduction.reference_form != ReferenceForm.NONE
    return GroupErrors(
        policy_chosen=errors.policy_chosen,
        policy_rejected=errors.policy_rejected,
        gap_chosen=errors.gap_chosen if gaps else None,
        gap_rejected=errors.gap_rejected if gaps else None,
        anchor=errors.anchor if call.reduction.anchor else None,
        cross=errors.cross.detach() if errors.cross is not None and call.reduction.cross else None,
        anchor_rejected=errors.anchor_rejected if call.reduction.anchor_rejected else None,
    )
