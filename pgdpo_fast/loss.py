"""The one door to the loss: `preference_loss`, its module form, and the differentiable building block below it.

Arguments are checked here, once, and turned into the operands the backends share. Nothing below this file validates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgdpo_fast import backends
from pgdpo_fast.backends import eager, fused
from pgdpo_fast.backends.operands import PACK_BLOCK, gather
from pgdpo_fast.errors import NonFiniteError
from pgdpo_fast.metrics import METRICS
from pgdpo_fast.objectives import GroupErrors, Objective

GRANULARITIES = ("sample", "frame", "element")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ReferenceErrors:
    """The reference's mean squared errors, all a sample or frame objective needs of it: each `[B]` or `[B, F]`."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PackedReference:
    """Packed residuals q - y of the reference, read by the kernels as they are.

    Args:
        chosen, rejected: `[B, C, F, H, W]` bfloat16 residuals, or uint8 holding float8 (e4m3) bytes.
        chosen_scale, rejected_scale: `[B, ceil(C*F*H*W / 128)]` float32, one scale for 128 float8 values; else None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_scale: Tensor | None = None
    rejected_scale: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def pack(
        cls, reference, target, format: str = "bf16", *, backend: str = "auto", to_host: bool = False
    ) -> PackedReference:
        """Pack reference predictions against their targets, both in any form `preference_loss` takes.

        Args:
            format: "bf16", or "fp8": one byte an element, scaled so that a block's largest residual is 448 and its sum
                of squares is kept. Rounding to 4 bits loses 0.07% of it, which at the start of training is more than
                the gaps themselves; with it kept, sample and frame errors are those of the predictions.
            backend: "native" packs in one pass, "eager" in plain torch, to the same bytes; the others take the native
                pass where it is there.
            to_host: rows lie in host memory, complete on return; for CUDA predictions it is pinned and the native pass
                writes it itself.
        """
        if format not in ("bf16", "fp8"):
            raise ValueError(f"format={format!r}: expected 'bf16' or 'fp8'")
        tensors = _check(reference, target, None, "reference").tensors
        x, device = gather(*tensors), tensors[0].device
        pinned = to_host and device.type == "cuda"
        if backends.packs_natively(backend, device):
            from pgdpo_fast.backends import native

            place = {"device": "cpu" if pinned else device, "pin_memory": pinned}
            shape, dtype = x.policy.chosen.shape, torch.uint8 if format == "fp8" else torch.bfloat16
            rows = {name: torch.empty(shape, dtype=dtype, **place) for name in ("chosen", "rejected")}
            if format == "fp8":
                blocks = (x.pairs, -(-x.numel // PACK_BLOCK))
                rows |= {f"{name}_scale": torch.empty(blocks, dtype=torch.float32, **place) for name in rows}
            native.pack(tensors, rows)
            if pinned:
                torch.cuda.current_stream(device).synchronize()
            return cls(**rows)
        residuals = [(q.to(y.dtype) - y).float() for q, y in zip(x.policy, eager.targets(x), strict=True)]
        if format == "bf16":
            plain = [r.bfloat16() for r in residuals]
        else:
            rows, scales = zip(*(_quantise(r) for r in residuals), strict=True)
            plain = [*rows, *scales]
        return cls(*(r.cpu() if to_host else r for r in plain))


def _quantise(residual: Tensor) -> tuple[Tensor, Tensor]:
    flat = residual.flatten(1)
    blocks = nn.functional.pad(flat, (0, -flat.shape[1] % PACK_BLOCK)).unflatten(1, (-1, PACK_BLOCK))
    scale = (blocks.abs().amax(-1) * (1 / 448)).clamp(min=torch.finfo(torch.float32).tiny)
    blocks = (blocks / scale[..., None]).clamp(-448.0, 448.0)
    rows = blocks.to(torch.float8_e4m3fn)
    true, kept = (_pairwise_sum(x.square()) for x in (blocks, rows.float()))
    # torch's float32 square root is not rounded the same everywhere; through float64 it is.
    scale = scale * (true / kept).double().sqrt().float().where(kept != 0, 1.0)
    return rows.flatten(1)[:, : flat.shape[1]].contiguous().view(torch.uint8).view(residual.shape), scale


def _pairwise_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, neighbours first: the order that packs to the same bytes everywhere (csrc/cache.h)."""
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


@dataclass(frozen=True)
class NoisedTarget:
    """A target built inside the kernels: noise_scale * noise + clean_scale * clean, the noise read once for the pair.

    Args:
        clean: clean latents, `[2B, C, F, H, W]` or a (chosen, rejected) tuple.
        noise: `[B, C, F, H, W]`, shared by the pair.
        noise_scale, clean_scale: `[B]`; `process.target_coefficients(timestep)` gives both.
    """

    clean: Tensor | tuple[Tensor, Tensor]
    noise: Tensor
    noise_scale: Tensor
    clean_scale: Tensor


def _row(index: int) -> property:
    return property(lambda self: self.telemetry[index] if self.per_frame else self.telemetry[index, :, 0])


@dataclass(frozen=True, eq=False)
class PreferenceLossOutput:
    """Result of `preference_loss`. Everything but `loss` is detached, float32 (float64 for float64 predictions), and
    `[B]`, or `[B, F]` at frame granularity; at element granularity it is the mean over the video. Without a reference
    gaps and rewards are NaN. Reading a field never synchronizes with the device.

    Args:
        loss: `[]`, what to call backward on.
        telemetry: the nine fields below, `[9, B, F]` with `per_frame`, else `[9, B, 1]`.
        per_frame: whether the fields are `[B, F]`.
    """

    loss: Tensor
    telemetry: Tensor
    per_frame: bool

    per_pair_loss = _row(0)
    logits = _row(1)
    alpha = _row(2)
    gamma = _row(3)
    importance = _row(4)
    policy_chosen_error = _row(5)
    policy_rejected_error = _row(6)
    chosen_gap = _row(7)
    rejected_gap = _row(8)

    @property
    def chosen_reward(self) -> Tensor:
        return -self.chosen_gap

    @property
    def rejected_reward(self) -> Tensor:
        return -self.rejected_gap

    @property
    def margin(self) -> Tensor:
        return self.rejected_gap - self.chosen_gap

    @property
    def accuracy(self) -> Tensor:
        """1 where the margin is above zero, else 0; NaN without a reference."""
        return torch.where(self.margin.isnan(), torch.full_like(self.margin, float("nan")), self.margin > 0)

    @property
    def gradient_factor(self) -> Tensor:
        """sigmoid(-z), the size of the preference gradient: near 0 the pair is learnt, 1/2 it is undecided."""
        return torch.sigmoid(-self.logits)

    @property
    def reference_chosen_error(self) -> Tensor:
        return self.policy_chosen_error - self.chosen_gap

    @property
    def reference_rejected_error(self) -> Tensor:
        return self.policy_rejected_error - self.rejected_gap

    def metrics(self) -> dict[str, Tensor]:
        """Means over the batch as 0-d tensors, under TRL's names where those exist. No device sync."""
        return {name: getattr(self, attribute).mean() for name, attribute in METRICS.items()}

    def check_finite(self, pair_ids=None) -> None:
        """Raise `NonFiniteError` naming the pairs whose loss is NaN or infinite (by index, or by `pair_ids`). Syncs."""
        bad = (~torch.isfinite(self.per_pair_loss)).flatten(1 if self.per_pair_loss.ndim > 1 else 0)
        bad = (bad.any(1) if bad.ndim > 1 else bad).nonzero().flatten().tolist()
        if bad:
            names = [pair_ids[i] for i in bad] if pair_ids is not None else bad
            raise NonFiniteError(
                f"loss is NaN or infinite for pair(s) {', '.join(map(str, names))} of "
                f"{len(self.per_pair_loss)}; their predictions, targets or reference are not finite"
            )
        if not bool(torch.isfinite(self.loss)):
            raise NonFiniteError("loss is NaN or infinite, that of every pair is finite; the weights are not finite")


def _describe(x) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _pair(x, name: str) -> tuple[Tensor, Tensor | None]:
    """A stacked tensor as (tensor, None), a tuple as its two tensors; types, ranks and dtypes checked."""
    items = (x, None) if isinstance(x, Tensor) else x
    if items is x and not (isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(t, Tensor) for t in x)):
        raise ValueError(f"{name}: expected a tensor or a (chosen, rejected) tuple of tensors, got {_describe(x)}")
    first, second = items
    for t in items:
        if t is not None and (t.ndim < 2 or t.numel() == 0):
            raise ValueError(f"{name}: expected a non-empty batch of latents [B, C, F, H, W], got {_describe(t)}")
    if second is not None and (
        first.shape != second.shape or first.dtype != second.dtype or first.device != second.device
    ):
        raise ValueError(
            f"{name}: expected chosen and rejected of one shape, dtype and device, "
            f"got {_describe(first)} and {_describe(second)}"
        )
    return first, second


def _expect_floating(dtype: torch.dtype, name: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected bfloat16, float16, float32 or float64, got {dtype}")


def _expect(x: Tensor, name: str, shapes: tuple, device: torch.device) -> None:
    if not isinstance(x, Tensor) or tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {_describe(x)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the prediction, got {_describe(x)}")


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


class _Call(NamedTuple):
    """A checked call: the ten operand tensors of `backends.operands.gather`, and what is known about them."""

    tensors: tuple
    reference_form: int
    reference_errors: ReferenceErrors | None
    pairs: int
    video: tuple

    def groups(self, granularity: str) -> int:
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(map(repr, GRANULARITIES))}")
        if granularity == "sample":
            return 1
        if granularity == "element":
            return torch.Size(self.video).numel()
        if len(self.video) != 4:
            raise ValueError(f"granularity='frame': expected latents [B, C, F, H, W], got videos of shape {self.video}")
        return self.video[1]


def _check(prediction, target, reference, name: str = "prediction") -> _Call:
    policy, policy_rejected = _pair(prediction, name)
    _expect_floating(policy.dtype, name)
    if policy_rejected is None and policy.shape[0] % 2:
        raise ValueError(f"{name}: expected [2B, ...], chosen half first; got an odd batch, {_describe(policy)}")
    pairs = policy.shape[0] // (2 if policy_rejected is None else 1)
    video, device = tuple(policy.shape[1:]), policy.device
    stacked, single = (2 * pairs, *video), (pairs, *video)

    def operand(x, name, allow_shared=False, dtypes=DTYPES):
        first, second = _pair(x, name)
        for t in (first, second):
            if t is not None:
                _expect(
                    t,
                    name,
                    (single,) if second is not None else (stacked, single) if allow_shared else (stacked,),
                    device,
                )
                if t.dtype not in dtypes:
                    raise ValueError(f"{name}: expected {', '.join(str(d) for d in dtypes)}, got {t.dtype}")
        return _detached(first), None if second is None else _detached(second)

    noise = target_scale = None
    if isinstance(target, NoisedTarget):
        clean = operand(target.clean, "target.clean")
        _expect(target.noise, "target.noise", (single,), device)
        _expect_floating(target.noise.dtype, "target.noise")
        scales = [target.noise_scale, target.clean_scale]
        for scale, name in zip(scales, ("target.noise_scale", "target.clean_scale"), strict=True):
            _expect(scale, name, ((pairs,),), device)
        compute = torch.float64 if policy.dtype == torch.float64 else torch.float32
        targets, noise, target_scale = clean, target.noise.detach(), torch.stack(scales).detach().to(compute)
    else:
        targets = operand(target, "target", allow_shared=True)

    form, rows, row_scales, errors = 0, (None, None), (None, None), None
    if isinstance(reference, ReferenceErrors):
        errors = reference
    elif isinstance(reference, PackedReference):
        form = 2 if reference.chosen_scale is None else 3
        rows = operand(
            (reference.chosen, reference.rejected),
            "reference",
            dtypes=(torch.bfloat16,) if form == 2 else (torch.uint8,),
        )
        if form == 3:
            blocks = -(-torch.Size(video).numel() // PACK_BLOCK)
            row_scales = (reference.chosen_scale, reference.rejected_scale)
            for scale in row_scales:
                _expect(scale, "reference scale", ((pairs, blocks),), device)
                if scale.dtype != torch.float32:
                    raise ValueError(f"reference scale: expected torch.float32, got {scale.dtype}")
    elif reference is not None:
        form, rows = 1, operand(reference, "reference")
    tensors = (policy, policy_rejected, *targets, noise, target_scale, *rows, *row_scales)
    return _Call(tensors, form, errors, pairs, video)


def _check_objective(objective, call: _Call, granularity: str, posterior_scale) -> None:
    if not isinstance(objective, Objective):
        raise ValueError(f"objective: expected an instance such as pf.PGDPO(), got {objective!r}")
    name = type(objective).__name__
    if objective.needs_reference and call.reference_form == 0 and call.reference_errors is None:
        raise ValueError(f"reference: {name} needs the reference's predictions or errors, got None")
    if objective.needs_anchor and call.reference_form == 0:
        raise ValueError(
            f"reference: {name} with ipr='anchor' needs the reference's predictions or a PackedReference, "
            f"got ReferenceErrors; use ipr='reward' or pass predictions"
        )
    if granularity == "element" and call.reference_errors is not None:
        raise ValueError(
            "reference: granularity='element' needs the reference's predictions or a PackedReference, "
            "got ReferenceErrors"
        )
    if objective.needs_posterior_scale and posterior_scale is None:
        raise ValueError(f"posterior_scale: {name} needs [B] values, see process.posterior_scale(timestep)")


def _group_errors(call: _Call, granularity: str, anchor: bool, cross: bool, backend: str) -> GroupErrors:
    """Differentiable statistics `[B, G]` from the backend, with cached reference errors worked in."""
    if backend == "eager" or granularity == "element":
        errors = eager.group_errors(gather(*call.tensors), call.reference_form, granularity, anchor, cross)
    else:
        errors = fused.group_errors(
            call.tensors,
            fused.plan(call.tensors, call.reference_form, call.groups(granularity), anchor, cross, backend),
        )
    if call.reference_errors is not None:
        chosen, rejected = _reference_errors(call, call.groups(granularity), errors.policy_chosen.dtype)
        errors = errors._replace(
            gap_chosen=errors.policy_chosen - chosen, gap_rejected=errors.policy_rejected - rejected
        )
    return errors


def _reference_errors(call: _Call, groups: int, dtype: torch.dtype) -> Tensor:
    """Cached reference errors as `[2, B, G]`."""
    shapes = ((call.pairs,), (call.pairs, 1)) if groups == 1 else ((call.pairs, groups),)
    for name in ("chosen", "rejected"):
        _expect(getattr(call.reference_errors, name), f"reference.{name}", shapes, call.tensors[0].device)
    pair = (call.reference_errors.chosen, call.reference_errors.rejected)
    return torch.stack([x.detach().to(dtype).view(call.pairs, groups) for x in pair])


def paired_errors(
    prediction,
    target,
    reference=None,
    *,
    granularity: str = "sample",
    anchor: bool = False,
    cross: bool = False,
    backend: str = "auto",
) -> GroupErrors:
    """Errors and gaps of every group, differentiable by the predictions: the block to build new objectives on.

    One fused pass computes all statistics and one fused pass, in backward, both gradients; what happens between on
    `[B, G]` tensors is plain torch.

    Args:
        prediction, target, reference, granularity, backend: as in `preference_loss`.
        anchor: also mean (p_w - q_w)^2, which needs the reference's predictions.
        cross: also mean (p_w - y_w)(p_l - y_l), without a gradient.

    Returns:
        `GroupErrors` of `[B, G]` float32 (float64 for float64 predictions); gaps are None without a reference.
    """
    call = _check(prediction, target, reference)
    call.groups(granularity)
    if anchor and call.reference_form == 0:
        raise ValueError("anchor: needs the reference's predictions or a PackedReference")
    return _group_errors(call, granularity, anchor, cross, backends.select(backend, call.tensors[0].device))


@torch.no_grad()
def reference_errors(prediction, target, *, granularity: str = "sample", backend: str = "auto") -> ReferenceErrors:
    """The reference model's errors, ready to be cached or passed as `reference`: each `[B]`, or `[B, F]` per frame.

    They come from the same kernel as the policy's, so a policy that equals the reference has gaps of exactly zero.
    """
    if granularity == "element":
        raise ValueError("granularity='element': errors per element are the video's size; use PackedReference.pack")
    errors = paired_errors(prediction, target, granularity=granularity, backend=backend)
    values = errors.policy_chosen, errors.policy_rejected
    return ReferenceErrors(*(x.squeeze(1) if granularity == "sample" else x for x in values))


def preference_loss(
    prediction,
    target,
    reference=None,
    *,
    objective: Objective,
    granularity: str = "sample",
    pair_weight: Tensor | None = None,
    frame_weight: Tensor | None = None,
    frame_label: Tensor | None = None,
    posterior_scale: Tensor | None = None,
    backend: str = "auto",
    process_group=None,
) -> PreferenceLossOutput:
    """Any diffusion preference objective on a batch of pairs; `out.loss.backward()` gives the fused gradients.

    Args:
        prediction: the policy's output, `[2B, C, F, H, W]` with the chosen half first, or a (chosen, rejected) tuple;
            bfloat16, float16, float32 or float64, any strides (rows that are not contiguous are copied once).
        target: what it should output; same layout, `[B, ...]` when the pair shares it, or a `NoisedTarget`.
        reference: the reference's predictions in the prediction's layout, `ReferenceErrors`, a `PackedReference`, or
            None for objectives that need none. No gradient flows to target or reference.
        objective: e.g. `pf.PGDPO(beta=100.0)`.
        granularity: what one scalar reward covers: "sample", "frame" (one latent frame) or "element".
        pair_weight: `[B]`, multiplies each pair's loss (VideoDPO weights, importance weights); no gradient.
        frame_weight: `[B, F]` >= 0 at frame granularity: a pair's loss is the weighted mean over its frames.
        frame_label: `[B, F]` at frame granularity, segment labels as in DenseDPO (arXiv 2506.03517): 1 the chosen
            video is better here, -1 the rejected one is, 0 a tie that counts for nothing. "Chosen" in the output then
            means the video preferred at that frame.
        posterior_scale: `[B]`, c_t of `process.posterior_scale(timestep)`, for SDPO and DPOClipMask.
        backend: "auto", "triton", "native" or "eager". An explicit choice never falls back.
        process_group: latents are sharded over its ranks (context parallel): errors are averaged over them, every
            rank gets the whole loss and its own shard's gradient. All shards must be of one size; at frame granularity
            shard height or width, not frames.

    Returns:
        `PreferenceLossOutput`. loss = mean over pairs of pair_weight times the mean over groups.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        BackendUnavailable: the backend asked for cannot run here.
    """
    call = _check(prediction, target, reference)
    groups = call.groups(granularity)
    _check_objective(objective, call, granularity, posterior_scale)
    device = call.tensors[0].device
    for value, name in ((pair_weight, "pair_weight"), (posterior_scale, "posterior_scale")):
        if value is not None:
            _expect(value, name, ((call.pairs,),), device)
    backend = backends.select(backend, device)
    compute = torch.float64 if call.tensors[0].dtype == torch.float64 else torch.float32
    weight = None if pair_weight is None else pair_weight.detach().to(compute).contiguous()[:, None]
    if frame_weight is not None or frame_label is not None:
        per_frame = _frame_weights(call, granularity, objective, frame_weight, frame_label, compute)
        weight = per_frame if weight is None else weight * per_frame
    if posterior_scale is not None:
        posterior_scale = posterior_scale.detach().to(compute).contiguous()

    epilogue = objective.epilogue()
    outer = groups > 1 and objective.outer
    scalar_epilogue = epilogue is not None and process_group is None and frame_label is None
    if backend != "eager" and scalar_epilogue and (granularity == "element" or not outer):
        plan = fused.plan(
            call.tensors,
            call.reference_form,
            1 if granularity == "element" else groups,
            objective.needs_anchor,
            objective.needs_cross,
            backend,
        )
        if granularity == "element":
            row_weight = None if weight is None else weight[:, 0]
            loss, telemetry = fused.elements(call.tensors, plan, epilogue, outer, row_weight, posterior_scale)
        else:
            cached = None if call.reference_errors is None else _reference_errors(call, groups, compute)
            row_weight = None if weight is None else weight.expand(-1, groups).contiguous()
            loss, telemetry = fused.objective(call.tensors, plan, epilogue, cached, row_weight, posterior_scale)
        return PreferenceLossOutput(loss, telemetry, granularity == "frame")

    errors = _group_errors(call, granularity, objective.needs_anchor, objective.needs_cross, backend)
    if process_group is not None:
        errors = _all_reduce_mean(errors, granularity, process_group)
    if frame_label is not None:
        errors = _relabel(errors, frame_label)
    scale = None if posterior_scale is None else posterior_scale[:, None]
    terms = objective.terms(errors, scale)
    loss = (terms.loss if weight is None else weight * terms.loss).mean()
    nan = torch.full_like(terms.loss, float("nan"))
    with torch.no_grad():
        telemetry = torch.stack(
            [
                terms.loss,
                terms.logits,
                terms.alpha,
                terms.gamma,
                terms.importance,
                errors.policy_chosen,
                errors.policy_rejected,
                nan if errors.gap_chosen is None else errors.gap_chosen,
                nan if errors.gap_rejected is None else errors.gap_rejected,
            ]
        )
        if granularity == "element":
            telemetry = telemetry.mean(-1, keepdim=True)
    return PreferenceLossOutput(loss, telemetry, granularity == "frame")


def _frame_weights(call: _Call, granularity: str, objective, weight, label, dtype) -> Tensor:
    """`[B, F]` weights that average to one over each pair's frames, zero where the label is a tie."""
    if granularity != "frame":
        raise ValueError(f"frame_weight, frame_label: need granularity='frame', got {granularity!r}")
    shape = (call.pairs, call.groups("frame"))
    for value, name in ((weight, "frame_weight"), (label, "frame_label")):
        if value is not None:
            _expect(value, name, (shape,), call.tensors[0].device)
    if label is not None and objective.needs_anchor:
        raise ValueError("frame_label: the anchor regularizer is defined on the chosen video alone; use ipr='reward'")
    weight = torch.ones(shape, device=call.tensors[0].device) if weight is None else weight.detach()
    weight = weight.to(dtype)
    if label is not None:
        weight = weight * (label != 0)
    total = weight.sum(1, keepdim=True)
    return weight * (shape[1] / total.masked_fill(total == 0, 1.0))


def _relabel(errors: GroupErrors, label: Tensor) -> GroupErrors:
    """Chosen and rejected exchanged in the frames where the rejected video is the better one."""
    flip = label < 0

    def exchanged(chosen, rejected):
        if chosen is None:
            return None, None
        return torch.where(flip, rejected, chosen), torch.where(flip, chosen, rejected)

    return GroupErrors(
        *exchanged(errors.policy_chosen, errors.policy_rejected),
        *exchanged(errors.gap_chosen, errors.gap_rejected),
        errors.anchor,
        errors.cross,
    )


class _MeanOverRanks(torch.autograd.Function):
    """All-reduce of per-shard means. Every rank holds the whole loss, so a shard's share of the gradient is 1/world."""

    @staticmethod
    def forward(ctx, statistics, group):
        ctx.world = torch.distributed.get_world_size(group)
        total = statistics.clone()
        torch.distributed.all_reduce(total, group=group)
        return total / ctx.world

    @staticmethod
    def backward(ctx, incoming):
        return incoming / ctx.world, None


def _all_reduce_mean(errors: GroupErrors, granularity: str, group) -> GroupErrors:
    if granularity == "element":
        raise ValueError(
            "process_group: needs granularity 'sample' or 'frame', got 'element', which has no sums to "
            "reduce over ranks; average the losses of the shards instead"
        )
    present = [x for x in errors if x is not None]
    reduced = iter(_MeanOverRanks.apply(torch.stack(present), group))
    return GroupErrors(*(None if x is None else next(reduced) for x in errors))


class PreferenceLoss(nn.Module):
    """`preference_loss` with its settings fixed, as a module.

    Args:
        objective, granularity, backend, process_group: as in `preference_loss`.
    """

    def __init__(self, objective: Objective, *, granularity: str = "sample", backend: str = "auto", process_group=None):
        super().__init__()
        if not isinstance(objective, Objective):
            raise ValueError(f"objective: expected an instance such as pf.PGDPO(), got {objective!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(map(repr, GRANULARITIES))}")
        if backend not in ("auto", *backends.NAMES):
            raise ValueError(f"backend={backend!r}: expected 'auto', {', '.join(map(repr, backends.NAMES))}")
        self.objective, self.granularity, self.backend = objective, granularity, backend
        self.process_group = process_group

    def forward(
        self,
        prediction,
        target,
        reference=None,
        *,
        pair_weight=None,
        frame_weight=None,
        frame_label=None,
        posterior_scale=None,
    ):
        return preference_loss(
            prediction,
            target,
            reference,
            objective=self.objective,
            granularity=self.granularity,
            pair_weight=pair_weight,
            frame_weight=frame_weight,
            frame_label=frame_label,
            posterior_scale=posterior_scale,
            backend=self.backend,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, granularity={self.granularity!r}, backend={self.backend!r}"
