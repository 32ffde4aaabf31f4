"""The one door to the loss: `preference_loss`, its module form, and the differentiable building block below it.

Arguments are checked here, once, and turned into the operands the backends share. Nothing below this file validates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pgdpo_fast import backends
from pgdpo_fast.backends import eager, fused
from pgdpo_fast.backends.operands import (
    PACK_BLOCK,
    Call,
    Operands,
    PairNumbers,
    Reduction,
    ReferenceForm,
    Telemetry,
    pair_rows,
    segments_of,
)
from pgdpo_fast.errors import ConfigError, NonFiniteError
from pgdpo_fast.metrics import METRICS
from pgdpo_fast.objectives import GroupErrors, Objective, terms_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GRANULARITIES = ("sample", "frame", "element")
FRAME_DIM = 2  # of latents [B, C, F, H, W], as the stores and the networks of this package have them
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Latents of a batch of pairs: stacked `[2B, ...]`, chosen half first, or (chosen, rejected).
Latents: TypeAlias = Tensor | tuple[Tensor, Tensor]


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
        cls,
        reference: Latents,
        target: Latents | NoisedTarget,
        format: str = "bf16",
        *,
        backend: str = "auto",
        to_host: bool = False,
    ) -> PackedReference:
        """Pack reference predictions against their targets, both in any form `preference_loss` takes.

        Args:
            format: "bf16", or "fp8": one byte per element, scaled so that a block's largest residual is 448 and its sum
                of squares is kept. Rounding to 4 bits loses 0.07% of it, which at the start of training is more than
                the gaps themselves; with it kept, sample and frame errors are those of the predictions.
            backend: "native" packs in one pass, "eager" in plain torch, to the same bytes; the others take the native
                pass where it is there.
            to_host: rows lie in host memory, complete on return; for CUDA predictions it is pinned and the native pass
                writes it itself.
        """
        if format not in ("bf16", "fp8"):
            raise ValueError(f"format={format!r}: expected 'bf16' or 'fp8'")
        operands = _check(reference, target, name="reference", backend="eager").operands
        x, device = pair_rows(operands), operands.policy.device
        pinned = to_host and device.type == "cuda"
        if backends.packs_natively(backend, device):
            from pgdpo_fast.backends import native

            def place(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="cpu" if pinned else device, pin_memory=pinned)

            shape, dtype = x.policy.chosen.shape, torch.uint8 if format == "fp8" else torch.bfloat16
            rows = {name: place(shape, dtype) for name in ("chosen", "rejected")}
            if format == "fp8":
                blocks = (x.pairs, -(-x.numel // PACK_BLOCK))
                rows |= {f"{name}_scale": place(blocks, torch.float32) for name in rows}
            native.pack(operands, rows)
            if pinned:
                torch.cuda.current_stream(device).synchronize()
            return cls(**rows)
        residuals = [(q.to(y.dtype) - y).float() for q, y in zip(x.policy, eager.targets(x), strict=True)]
        if format == "bf16":
            plain = [r.bfloat16() for r in residuals]
        else:
            values, scales = zip(*(_quantise(r) for r in residuals), strict=True)
            plain = [*values, *scales]
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

    clean: Latents
    noise: Tensor
    noise_scale: Tensor
    clean_scale: Tensor


# What stands for the reference; `preference_loss` says which objectives and granularities take which.
Reference: TypeAlias = Latents | ReferenceErrors | PackedReference


class _Row:
    """A field of `Telemetry` as an attribute of the output."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.place = Telemetry._fields.index(name)

    def __get__(self, output: PreferenceLossOutput, owner: type | None = None) -> Tensor:
        return output.telemetry[self.place] if output.per_frame else output.telemetry[self.place, :, 0]


@dataclass(frozen=True, eq=False)
class PreferenceLossOutput:
    """Result of `preference_loss`. Everything but `loss` is detached, float32 (float64 for float64 predictions), and
    `[B]`, or `[B, F]` at frame granularity; at element granularity it is the mean over the video. Without a reference
    gaps and rewards are NaN. Reading a field never synchronizes with the device.

    Args:
        loss: `[]`, what to call backward on.
        telemetry: the nine fields below, those of `Telemetry`, `[9, B, F]` with `per_frame`, else `[9, B, 1]`.
        per_frame: whether the fields are `[B, F]`.
    """

    loss: Tensor
    telemetry: Tensor
    per_frame: bool

    per_pair_loss = _Row()
    logits = _Row()
    alpha = _Row()
    gamma = _Row()
    importance = _Row()
    policy_chosen_error = _Row()
    policy_rejected_error = _Row()
    chosen_gap = _Row()
    rejected_gap = _Row()

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

    def check_finite(self, pair_ids: Sequence[object] | None = None) -> None:
        """Raise `NonFiniteError` naming the pairs whose loss is NaN or infinite (by index, or by `pair_ids`), and
        `KernelTimeout` where the stream kernel gave up a wait. Syncs."""
        wrong = ~torch.isfinite(self.per_pair_loss)
        bad = (wrong.any(1) if wrong.ndim > 1 else wrong).nonzero().flatten().tolist()
        fused.check_waits(self.loss.device)
        if bad:
            names = [pair_ids[i] for i in bad] if pair_ids is not None else bad
            raise NonFiniteError(
                f"loss is NaN or infinite for pair(s) {', '.join(map(str, names))} of "
                f"{len(self.per_pair_loss)}; their predictions, targets or reference are not finite"
            )
        if not bool(torch.isfinite(self.loss)):
            raise NonFiniteError("loss is NaN or infinite, that of every pair is finite; the weights are not finite")


def _describe(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _pair(x: object, name: str) -> tuple[Tensor, Tensor | None]:
    """A stacked tensor as (tensor, None), a tuple as its two tensors; types, ranks and dtypes checked."""
    first: Tensor
    second: Tensor | None
    if isinstance(x, Tensor):
        first, second = x, None
    elif isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(t, Tensor) for t in x):
        first, second = x
    else:
        raise ValueError(f"{name}: expected a tensor or a (chosen, rejected) tuple of tensors, got {_describe(x)}")
    for t in (first, second):
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


def _expect(x: object, name: str, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if not isinstance(x, Tensor) or tuple(x.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {_describe(x)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the prediction, got {_describe(x)}")


def _without_graph(x: Tensor, name: str) -> Tensor:
    if not x.requires_grad:
        return x
    backends.warn_once(
        f"{name}: carries a graph, whose activations stay in memory until the step ends, and no gradient ever flows to "
        "it; compute it under torch.no_grad()"
    )
    return x.detach()


def _frame_dim(granularity: str, frame_dim: int | None, video: torch.Size) -> int | None:
    """The axis of the frames at frame granularity, else None."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(map(repr, GRANULARITIES))}")
    if granularity != "frame":
        return None
    if frame_dim is not None:
        if isinstance(frame_dim, bool) or not isinstance(frame_dim, int) or not 1 <= frame_dim <= len(video):
            raise ValueError(
                f"frame_dim={frame_dim!r}: expected the axis of the frames, 1 to {len(video)} for latents of "
                f"{len(video) + 1} axes"
            )
        return frame_dim
    if len(video) != 4:
        raise ValueError(
            f"granularity='frame': expected latents [B, C, F, H, W], got videos of shape {tuple(video)}; with another "
            "layout say which axis holds the frames, frame_dim=1 for [B, F, ...]"
        )
    if video[1] % 4 == 0 or video[1] == 3:
        backends.warn_once(
            f"granularity='frame' takes axis 2 of [B, {', '.join(map(str, video))}] as {video[1]} frames, which may as "
            "well be channels: pass frame_dim=2 if they are frames, frame_dim=1 for latents [B, F, C, H, W]"
        )
    return FRAME_DIM


def _stacked(errors: ReferenceErrors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`[2, B, G]`; every operator on so small a tensor is 3 to 10 µs of a call, so none is called for nothing."""
    chosen, rejected = errors.chosen, errors.rejected
    if chosen.ndim != rejected.ndim:
        chosen, rejected = chosen.view(shape), rejected.view(shape)
    stacked = torch.stack((chosen, rejected)).view(2, *shape)
    if stacked.requires_grad:
        stacked = stacked.detach()
    return stacked if stacked.dtype == dtype else stacked.to(dtype)


def _latent_weights(
    weight: Tensor,
    normalize: bool,
    frame_dim: int | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    process_group: ProcessGroup | None,
) -> Tensor:
    """`[B, R, M]` weights of latents of `shape`, see `Operands`: the first axes the weights are constant over stay out
    of memory."""
    described = f"latent_weight: expected a tensor that broadcasts to {tuple(shape)} with an axis for each of its own"
    if not isinstance(weight, Tensor) or weight.ndim != len(shape):
        raise ValueError(f"{described}, got {_describe(weight)}")
    if any(size not in (1, full) for size, full in zip(weight.shape, shape, strict=True)):
        raise ValueError(f"{described}, got {_describe(weight)}")
    if weight.device != device:
        raise ValueError(f"latent_weight: expected a tensor on {device} like the prediction, got {_describe(weight)}")
    values = weight.detach().to(dtype)
    if normalize:  # the mean over a group is that over the values given: each stands for equally many elements
        others = [dim for dim in range(1, len(shape)) if dim != frame_dim]
        total = values.mean(others, keepdim=True) if others else values.clone()
        if process_group is not None:
            torch.distributed.all_reduce(total, group=process_group)
            total = total / torch.distributed.get_world_size(process_group)
        values = values / total.masked_fill(total == 0, 1.0)
    first = last = next((d for d in range(1, len(shape)) if values.shape[d] == 1), 1)
    while last < len(shape) and values.shape[last] == 1:
        last += 1
    outer, inner = shape[1:first], shape[last:]
    values = values.expand(-1, *outer, *values.shape[first:last], *inner)
    rows = values.reshape(values.shape[0], math.prod(outer), math.prod(inner))
    return rows.expand(shape[0], -1, -1)


def _check(
    prediction: Latents,
    target: Latents | NoisedTarget,
    reference: Reference | None = None,
    *,
    name: str = "prediction",
    granularity: str = "sample",
    frame_dim: int | None = None,
    objective: Objective | None = None,
    anchor: bool = False,
    cross: bool = False,
    latent_weight: Tensor | None = None,
    normalize_latent_weight: bool = True,
    process_group: ProcessGroup | None = None,
    pair_weight: Tensor | None = None,
    frame_weight: Tensor | None = None,
    frame_label: Tensor | None = None,
    posterior_scale: Tensor | None = None,
    beta_scale: Tensor | None = None,
    backend: str = "auto",
) -> Call:
    """The arguments of the public functions as a checked call; `objective` decides anchor and cross where given."""
    policy, policy_rejected = _pair(prediction, name)
    _expect_floating(policy.dtype, name)
    if policy_rejected is None and policy.shape[0] % 2:
        raise ValueError(f"{name}: expected [2B, ...], chosen half first; got an odd batch, {_describe(policy)}")
    pairs = policy.shape[0] // (2 if policy_rejected is None else 1)
    video, device = policy.shape[1:], policy.device
    stacked, single = (2 * pairs, *video), (pairs, *video)
    compute = torch.float64 if policy.dtype == torch.float64 else torch.float32
    frame_dim = _frame_dim(granularity, frame_dim, video)
    groups = 1 if frame_dim is None else video[frame_dim - 1]

    def operand(
        x: object, name: str, allow_shared: bool = False, dtypes: Sequence[torch.dtype] = DTYPES
    ) -> tuple[Tensor, Tensor | None]:
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
        return _without_graph(first, name), None if second is None else _without_graph(second, name)

    def number(x: Tensor | None, name: str) -> Tensor | None:
        if x is None:
            return None
        _expect(x, name, ((pairs,),), device)
        return x.detach().to(compute).contiguous()[:, None]

    def number_of_groups(x: Tensor, name: str) -> Tensor:
        _expect(x, name, ((pairs,), (pairs, groups)) if granularity == "frame" else ((pairs,),), device)
        return (x if x.ndim == 2 else x[:, None]).detach().to(compute).expand(-1, groups).contiguous()

    noise = target_scale = None
    if isinstance(target, NoisedTarget):
        clean, clean_rejected = operand(target.clean, "target.clean")
        _expect(target.noise, "target.noise", (single,), device)
        _expect_floating(target.noise.dtype, "target.noise")
        scales = [target.noise_scale, target.clean_scale]
        for scale, scale_name in zip(scales, ("target.noise_scale", "target.clean_scale"), strict=True):
            _expect(scale, scale_name, ((pairs,),), device)
        noise = _without_graph(target.noise, "target.noise")
        target_scale = torch.stack(scales).detach().to(compute)
    else:
        clean, clean_rejected = operand(target, "target", allow_shared=True)

    form = ReferenceForm.NONE
    rows = rows_rejected = row_scale = row_scale_rejected = None
    if isinstance(reference, PackedReference):
        form = ReferenceForm.BFLOAT16 if reference.chosen_scale is None else ReferenceForm.FLOAT8
        rows, rows_rejected = operand(
            (reference.chosen, reference.rejected),
            "reference",
            dtypes=(torch.bfloat16,) if form == ReferenceForm.BFLOAT16 else (torch.uint8,),
        )
        if form == ReferenceForm.FLOAT8:
            blocks = -(-video.numel() // PACK_BLOCK)
            row_scale, row_scale_rejected = reference.chosen_scale, reference.rejected_scale
            for block_scale in (row_scale, row_scale_rejected):
                _expect(block_scale, "reference scale", ((pairs, blocks),), device)
                if block_scale is not None and block_scale.dtype != torch.float32:
                    raise ValueError(f"reference scale: expected torch.float32, got {block_scale.dtype}")
    elif reference is not None and not isinstance(reference, ReferenceErrors):
        form = ReferenceForm.PREDICTION
        rows, rows_rejected = operand(reference, "reference")

    if objective is not None:
        _check_objective(objective, form, reference, posterior_scale, beta_scale)
        anchor, cross = objective.needs_anchor, objective.needs_cross
        if latent_weight is not None and granularity == "element" and objective.outer:
            raise ValueError(
                f"latent_weight: {type(objective).__name__} with combine='outer' multiplies plain means over the "
                "elements; use granularity='sample' or 'frame', or combine='pointwise'"
            )
    elif anchor and form == ReferenceForm.NONE:
        raise ValueError("anchor: needs the reference's predictions or a PackedReference")

    errors = None
    if isinstance(reference, ReferenceErrors):
        if granularity == "element":
            raise ValueError(
                "reference: granularity='element' needs the reference's predictions or a PackedReference, "
                "got ReferenceErrors"
            )
        shapes = ((pairs,), (pairs, 1)) if groups == 1 else ((pairs, groups),)
        for value, value_name in ((reference.chosen, "chosen"), (reference.rejected, "rejected")):
            _expect(value, f"reference.{value_name}", shapes, device)
        errors = _stacked(reference, (pairs, groups), compute)

    weights = None
    if latent_weight is not None:
        of_group = process_group if normalize_latent_weight else None
        weights = _latent_weights(latent_weight, normalize_latent_weight, frame_dim, single, compute, device, of_group)

    weight = number(pair_weight, "pair_weight")
    if frame_weight is not None or frame_label is not None:
        if granularity != "frame":
            raise ValueError(f"frame_weight, frame_label: need granularity='frame', got {granularity!r}")
        for of_frames, value_name in ((frame_weight, "frame_weight"), (frame_label, "frame_label")):
            if of_frames is not None:
                _expect(of_frames, value_name, ((pairs, groups),), device)
        if frame_label is not None and anchor:
            raise ValueError(
                "frame_label: the anchor regularizer is defined on the chosen video alone; use ipr='reward'"
            )
        per_frame = _frame_weights(frame_weight, frame_label, (pairs, groups), device, compute)
        weight = per_frame if weight is None else weight * per_frame
    elif weight is not None and groups > 1:
        weight = weight.expand(-1, groups).contiguous()

    length, consecutive = segments_of(video, None if frame_dim is None else frame_dim - 1)
    return Call(
        operands=Operands(
            policy=policy,
            policy_rejected=policy_rejected,
            target=clean,
            target_rejected=clean_rejected,
            noise=noise,
            target_scale=target_scale,
            reference=rows,
            reference_rejected=rows_rejected,
            reference_scale=row_scale,
            reference_scale_rejected=row_scale_rejected,
            latent_weight=weights,
        ),
        numbers=PairNumbers(
            weight=weight,
            posterior_scale=number(posterior_scale, "posterior_scale"),
            beta_scale=None if beta_scale is None else number_of_groups(beta_scale, "beta_scale"),
        ),
        reference_errors=errors,
        reduction=Reduction(
            reference_form=form,
            groups=groups,
            length=length,
            anchor=anchor,
            cross=cross,
            anchor_rejected=anchor and objective is None,
            consecutive=consecutive,
        ),
        granularity=granularity,
        frame_dim=frame_dim,
        backend=backends.select(backend, device),
    )


def _check_objective(
    objective: Objective,
    form: ReferenceForm,
    reference: Reference | None,
    posterior_scale: Tensor | None,
    beta_scale: Tensor | None,
) -> None:
    if not isinstance(objective, Objective):
        raise ValueError(f"objective: expected an instance such as pf.PGDPO(), got {objective!r}")
    name = type(objective).__name__
    if objective.needs_reference and reference is None:
        raise ValueError(f"reference: {name} needs the reference's predictions or errors, got None")
    if objective.needs_anchor and form == ReferenceForm.NONE:
        raise ValueError(
            f"reference: {name} with ipr='anchor' needs the reference's predictions or a PackedReference, "
            f"got ReferenceErrors; use ipr='reward' or pass predictions"
        )
    if objective.needs_posterior_scale and posterior_scale is None:
        raise ValueError(f"posterior_scale: {name} needs [B] values, see process.posterior_scale(timestep)")
    if beta_scale is not None and not objective.takes_beta_scale:
        raise ConfigError(
            f"beta_scale: {name}.terms does not take it; add the argument beta_scale=None, [B, 1] or [B, G] where "
            f"given, and multiply beta by it"
        )


def _frame_weights(
    weight: Tensor | None, label: Tensor | None, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`[B, F]` weights that average to one over each pair's frames, zero where the label is a tie."""
    values = (torch.ones(shape, device=device) if weight is None else weight.detach()).to(dtype)
    if label is not None:
        values = values * (label != 0)
    total = values.sum(1, keepdim=True)
    return values * (shape[1] / total.masked_fill(total == 0, 1.0))


def _group_errors(call: Call, samples: Tensor | None = None) -> GroupErrors:
    """Differentiable statistics `[B, G]` from the backend, with cached reference errors worked in; `samples` as in
    `fused.group_errors`."""
    plain = call.backend == "eager" or call.granularity == "element"
    errors = eager.group_errors(call) if plain else fused.group_errors(call, samples)
    if call.reference_errors is None:
        return errors
    chosen, rejected = call.reference_errors
    return errors._replace(gap_chosen=errors.policy_chosen - chosen, gap_rejected=errors.policy_rejected - rejected)


def paired_errors(
    prediction: Latents,
    target: Latents | NoisedTarget,
    reference: Reference | None = None,
    *,
    granularity: str = "sample",
    frame_dim: int | None = None,
    anchor: bool = False,
    cross: bool = False,
    latent_weight: Tensor | None = None,
    normalize_latent_weight: bool = True,
    backend: str = "auto",
) -> GroupErrors:
    """Errors and gaps of every group, differentiable by the predictions: the block to build new objectives on.

    One fused pass computes all statistics and one fused pass, in backward, both gradients; what happens between on
    `[B, G]` tensors is plain torch.

    Args:
        prediction, target, reference, granularity, frame_dim, latent_weight, normalize_latent_weight, backend: as in
            `preference_loss`. At element granularity a weight of zero makes an element's errors zero; other weights
            have no mean to stand in.
        anchor: also mean (p_w - q_w)^2 and mean (p_l - q_l)^2, which need the reference's predictions.
        cross: also mean (p_w - y_w)(p_l - y_l), without a gradient.

    Returns:
        `GroupErrors` of `[B, G]` float32 (float64 for float64 predictions); gaps are None without a reference.
    """
    call = _check(
        prediction,
        target,
        reference,
        granularity=granularity,
        frame_dim=frame_dim,
        anchor=anchor,
        cross=cross,
        latent_weight=latent_weight,
        normalize_latent_weight=normalize_latent_weight,
        backend=backend,
    )
    return _group_errors(call)


class SampleErrors(NamedTuple):
    """What `sample_errors` returns: `[N, G]` each, float32 (float64 for float64 predictions)."""

    error: Tensor  # mean (p - y)^2
    gap: Tensor | None  # error minus the reference's, with a reference
    anchor: Tensor | None  # mean (p - q)^2, where asked for


def sample_errors(
    prediction: Tensor,
    target: Tensor | NoisedTarget,
    reference: Tensor | PackedReference | None = None,
    *,
    granularity: str = "sample",
    frame_dim: int | None = None,
    anchor: bool = False,
    latent_weight: Tensor | None = None,
    normalize_latent_weight: bool = True,
    backend: str = "auto",
) -> SampleErrors:
    """Errors and gaps of samples that are no pairs: labelled one by one, ranked, in groups, N rejected for one chosen.

    The passes of `paired_errors` over the samples as two halves, which share the middle sample where N is odd; no
    input is copied. What an objective makes of the `[N, G]` numbers is plain torch.

    Args:
        prediction: `[N, ...]`, any N >= 1.
        target: `[N, ...]`, or a `NoisedTarget` whose noise and numbers are one for each sample too.
        reference: predictions `[N, ...]`, a `PackedReference` that holds the first half of the samples as chosen (N
            even), or None. With kept errors of the reference, subtract them: they are `sample_errors` of its
            predictions.
        anchor: also mean (p - q)^2, which needs the reference's predictions.
        granularity, frame_dim, normalize_latent_weight, backend: as in `preference_loss`.
        latent_weight: as in `preference_loss`, broadcastable to `[N, ...]`. Weights that differ between samples, and a
            `NoisedTarget`, write twice the gradient.

    Raises:
        ValueError, BackendUnavailable: as `preference_loss`.
    """
    if not isinstance(prediction, Tensor) or prediction.ndim < 2 or prediction.numel() == 0:
        raise ValueError(f"prediction: expected samples [N, ...], got {_describe(prediction)}")
    samples = prediction.shape[0]
    shape = tuple(prediction.shape)
    for x, name in ((target, "target"), (reference, "reference")):
        if isinstance(x, Tensor):
            _expect(x, name, (shape,), prediction.device)
        elif x is not None and not isinstance(x, NoisedTarget if name == "target" else PackedReference):
            raise ValueError(f"{name}: expected a tensor {shape}, got {_describe(x)}")
    # Noise and weights are one for a pair: samples that have their own are paired with themselves.
    alone = isinstance(target, NoisedTarget) or (
        isinstance(latent_weight, Tensor) and latent_weight.ndim > 0 and latent_weight.shape[0] != 1
    )
    half = samples if alone else (samples + 1) // 2
    if isinstance(reference, PackedReference) and (alone or samples % 2):
        raise ValueError(
            "reference: a PackedReference holds pairs; it needs an even number of samples, weights shared by them and "
            "a target that is a tensor"
        )

    def sides(x: Any) -> Any:
        if not isinstance(x, Tensor) or 2 * half == samples:
            return x
        return x[:half], x[samples - half :]

    targets: Latents | NoisedTarget
    if isinstance(target, NoisedTarget):
        clean = (target.clean, target.clean) if isinstance(target.clean, Tensor) else target.clean
        targets = NoisedTarget(clean, target.noise, target.noise_scale, target.clean_scale)
    else:
        targets = target if alone else sides(target)
    call = _check(
        sides(prediction),
        targets,
        sides(reference),
        granularity=granularity,
        frame_dim=frame_dim,
        anchor=anchor,
        latent_weight=latent_weight,
        normalize_latent_weight=normalize_latent_weight,
        backend=backend,
    )
    errors = _group_errors(call, prediction)

    def joined(first: Tensor, second: Tensor) -> Tensor:
        return first if alone else torch.cat([first, second[samples % 2 :]])

    def joined_if_there(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else joined(first, second)

    return SampleErrors(
        error=joined(errors.policy_chosen, errors.policy_rejected),
        gap=joined_if_there(errors.gap_chosen, errors.gap_rejected),
        anchor=joined_if_there(errors.anchor, errors.anchor_rejected),
    )


@torch.no_grad()
def reference_errors(
    prediction: Latents,
    target: Latents | NoisedTarget,
    *,
    granularity: str = "sample",
    frame_dim: int | None = None,
    latent_weight: Tensor | None = None,
    normalize_latent_weight: bool = True,
    backend: str = "auto",
) -> ReferenceErrors:
    """The reference model's errors, ready to be cached or passed as `reference`: each `[B]`, or `[B, F]` per frame.

    They come from the same kernel as the policy's, so a policy that equals the reference has gaps of exactly zero.
    Errors made with weights belong to calls with the same weights: a gap is a difference of two means of one kind.
    """
    if granularity == "element":
        raise ValueError("granularity='element': errors per element are the video's size; use PackedReference.pack")
    errors = paired_errors(
        prediction,
        target,
        granularity=granularity,
        frame_dim=frame_dim,
        latent_weight=latent_weight,
        normalize_latent_weight=normalize_latent_weight,
        backend=backend,
    )
    values = errors.policy_chosen, errors.policy_rejected
    return ReferenceErrors(*(x.squeeze(1) if granularity == "sample" else x for x in values))


def preference_loss(
    prediction: Latents,
    target: Latents | NoisedTarget,
    reference: Reference | None = None,
    *,
    objective: Objective,
    granularity: str = "sample",
    frame_dim: int | None = None,
    latent_weight: Tensor | None = None,
    normalize_latent_weight: bool = True,
    pair_weight: Tensor | None = None,
    frame_weight: Tensor | None = None,
    frame_label: Tensor | None = None,
    posterior_scale: Tensor | None = None,
    beta_scale: Tensor | None = None,
    backend: str = "auto",
    process_group: ProcessGroup | None = None,
) -> PreferenceLossOutput:
    """Any diffusion preference objective on a batch of pairs; `out.loss.backward()` gives the fused gradients.

    Args:
        prediction: the policy's output, `[2B, C, F, H, W]` with the chosen half first, or a (chosen, rejected) tuple;
            bfloat16, float16, float32 or float64, any strides (rows that are not contiguous are copied once).
        target: what it should output; same layout, `[B, ...]` when the pair shares it, or a `NoisedTarget`.
        reference: the reference's predictions in the prediction's layout, `ReferenceErrors`, a `PackedReference`, or
            None for objectives that need none. No gradient flows to target or reference.
        objective: e.g. `pf.PGDPO(beta=100.0)`.
        granularity: what one scalar reward covers: "sample", "frame" (one latent frame) or "element". Samples and
            elements are latents of any rank >= 2: packed tokens `[2B, L, D]`, images `[2B, C, H, W]`.
        frame_dim: at frame granularity, the axis of the frames: 2 for `[2B, C, F, H, W]`, which is what None takes
            latents of five axes for (told once where axis 2 could as well be channels), 1 for CogVideoX's
            `[2B, F, C, H, W]` or tokens by frame `[2B, F, L, D]`.
        latent_weight: weights >= 0 of the latents' positions, shared by the pair, broadcastable to the latents `[B,
            ...]` with as many axes: per frame `[B, 1, F, 1, 1]`, per region `[B, 1, F, H, W]`. Every squared difference
            (error, gap, anchor, cross) and gradient is multiplied by its own; where it is zero nothing counts, not
            even NaN. Axes of length one after the batch stay so in memory. At element granularity each element is a
            group of its own: the weights make a weighted mean of its elements' losses, as `frame_weight` does of
            frames'. Kept reference errors have to be made with the same weights. No gradient.
        normalize_latent_weight: scale the weights to a mean of one over each group (sum w d^2 / sum w; over the video
            at element granularity; over all ranks of `process_group`). A group of zeros alone keeps them, its errors
            are zero. False takes them as they are: mean w d^2.
        pair_weight: `[B]`, multiplies each pair's loss (VideoDPO weights, importance weights); no gradient.
        frame_weight: `[B, F]` >= 0 at frame granularity: a pair's loss is the weighted mean over its frames.
        frame_label: `[B, F]` at frame granularity, segment labels as in DenseDPO (arXiv 2506.03517): 1 the chosen
            video is better here, -1 the rejected one is, 0 a tie that counts for nothing. "Chosen" in the output then
            means the video preferred at that frame.
        posterior_scale: `[B]`, c_t of `process.posterior_scale(timestep)`, for SDPO and DPOClipMask.
        beta_scale: `[B]`, or `[B, F]` at frame granularity: beta times this wherever beta stands, for a beta that
            depends on the timestep, the signal-to-noise ratio or the confidence in a label; no gradient. Expected
            above zero, which is not checked, for that would wait for the device.
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
    call = _check(
        prediction,
        target,
        reference,
        granularity=granularity,
        frame_dim=frame_dim,
        objective=objective,
        latent_weight=latent_weight,
        normalize_latent_weight=normalize_latent_weight,
        process_group=process_group,
        pair_weight=pair_weight,
        frame_weight=frame_weight,
        frame_label=frame_label,
        posterior_scale=posterior_scale,
        beta_scale=beta_scale,
        backend=backend,
    )
    per_frame = granularity == "frame"
    epilogue = objective.epilogue()
    if call.backend != "eager" and epilogue is not None and process_group is None and frame_label is None:
        if granularity == "element" and not objective.whole_batch:
            outer = objective.outer and call.operands.policy.shape[1:].numel() > 1
            return PreferenceLossOutput(*fused.elements(call, epilogue, outer), per_frame)
        if granularity != "element" and (call.reduction.groups == 1 or not objective.outer):
            return PreferenceLossOutput(*fused.objective(call, epilogue), per_frame)

    errors = _group_errors(call)
    weights = eager.latent_weights(pair_rows(call.operands)) if granularity == "element" else None
    of_elements = None if weights is None else weights.flatten(1)
    if process_group is not None:
        errors = _all_reduce_mean(errors, granularity, process_group)
    if frame_label is not None:
        errors = _relabel(errors, frame_label)
    terms = terms_of(objective, errors, call.numbers.posterior_scale, call.numbers.beta_scale)
    losses = terms.loss if of_elements is None else of_elements * terms.loss
    loss = (losses if call.numbers.weight is None else call.numbers.weight * losses).mean()
    nan = torch.full_like(terms.loss, float("nan"))
    with torch.no_grad():
        telemetry = torch.stack(
            Telemetry(
                per_pair_loss=terms.loss,
                logits=terms.logits,
                alpha=terms.alpha,
                gamma=terms.gamma,
                importance=terms.importance,
                policy_chosen_error=errors.policy_chosen,
                policy_rejected_error=errors.policy_rejected,
                chosen_gap=nan if errors.gap_chosen is None else errors.gap_chosen,
                rejected_gap=nan if errors.gap_rejected is None else errors.gap_rejected,
            )
        )
        if granularity == "element":
            telemetry = (telemetry if of_elements is None else of_elements * telemetry).mean(-1, keepdim=True)
    return PreferenceLossOutput(loss, telemetry, per_frame)


def _relabel(errors: GroupErrors, label: Tensor) -> GroupErrors:
    """Chosen and rejected exchanged in the frames where the rejected video is the better one."""
    flip = label < 0

    def exchanged(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(flip, rejected, chosen), torch.where(flip, chosen, rejected)

    policy_chosen, policy_rejected = exchanged(errors.policy_chosen, errors.policy_rejected)
    errors = errors._replace(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    if errors.gap_chosen is not None and errors.gap_rejected is not None:
        gap_chosen, gap_rejected = exchanged(errors.gap_chosen, errors.gap_rejected)
        errors = errors._replace(gap_chosen=gap_chosen, gap_rejected=gap_rejected)
    return errors


class _MeanOverRanks(torch.autograd.Function):
    """All-reduce of per-shard means. Every rank holds the whole loss, so a shard's share of the gradient is 1/world."""

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, group: ProcessGroup) -> Tensor:
        ctx.world = torch.distributed.get_world_size(group)
        total = statistics.clone()
        torch.distributed.all_reduce(total, group=group)
        return total / ctx.world

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return incoming / ctx.world, None


def _all_reduce_mean(errors: GroupErrors, granularity: str, group: ProcessGroup) -> GroupErrors:
    if granularity == "element":
        raise ValueError(
            "process_group: needs granularity 'sample' or 'frame', got 'element', which has no sums to "
            "reduce over ranks; average the losses of the shards instead"
        )
    present = {name: x for name, x in errors._asdict().items() if x is not None}
    reduced = _MeanOverRanks.apply(torch.stack(list(present.values())), group)
    return errors._replace(**dict(zip(present, reduced, strict=True)))


class PreferenceLoss(nn.Module):
    """`preference_loss` with its settings fixed, as a module.

    Args:
        objective, granularity, frame_dim, backend, process_group: as in `preference_loss`.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        granularity: str = "sample",
        frame_dim: int | None = None,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise ValueError(f"objective: expected an instance such as pf.PGDPO(), got {objective!r}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(map(repr, GRANULARITIES))}")
        if backend not in ("auto", *backends.NAMES):
            raise ValueError(f"backend={backend!r}: expected 'auto', {', '.join(map(repr, backends.NAMES))}")
        self.objective, self.granularity, self.backend = objective, granularity, backend
        self.frame_dim, self.process_group = frame_dim, process_group

    def forward(
        self,
        prediction: Latents,
        target: Latents | NoisedTarget,
        reference: Reference | None = None,
        *,
        latent_weight: Tensor | None = None,
        normalize_latent_weight: bool = True,
        pair_weight: Tensor | None = None,
        frame_weight: Tensor | None = None,
        frame_label: Tensor | None = None,
        posterior_scale: Tensor | None = None,
        beta_scale: Tensor | None = None,
    ) -> PreferenceLossOutput:
        return preference_loss(
            prediction,
            target,
            reference,
            objective=self.objective,
            granularity=self.granularity,
            frame_dim=self.frame_dim,
            latent_weight=latent_weight,
            normalize_latent_weight=normalize_latent_weight,
            pair_weight=pair_weight,
            frame_weight=frame_weight,
            frame_label=frame_label,
            posterior_scale=posterior_scale,
            beta_scale=beta_scale,
            backend=self.backend,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, granularity={self.granularity!r}, backend={self.backend!r}"
