"""The readable oracle: plain torch, any device, differentiable, float64-capable. Every kernel is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from pgdpo_fast.backends.operands import PACK_BLOCK, Call, PairRows, ReferenceForm, Side, pair_rows
from pgdpo_fast.objectives import GroupErrors


def targets(x: PairRows) -> Side:
    """The two targets in the accumulation dtype, built from clean latents and noise when those were given."""
    chosen, rejected = (t.to(x.compute_dtype) for t in x.target)
    if x.noise is None or x.target_scale is None:
        return Side(chosen, rejected)
    noise_scale, clean_scale = (s.view(-1, *[1] * (chosen.ndim - 1)) for s in x.target_scale.to(x.compute_dtype))
    noise = noise_scale * x.noise.to(x.compute_dtype)
    return Side(noise + clean_scale * chosen, noise + clean_scale * rejected)


def references(x: PairRows, form: ReferenceForm, y: Side) -> Side | None:
    """The reference's predictions q; packed operands hold q - y."""
    if x.reference is None:
        return None
    if form == ReferenceForm.PREDICTION:
        return Side(*(q.to(x.compute_dtype) for q in x.reference))
    scales = x.reference_scale or (None, None)
    return Side(
        *(
            target + unpack(q, scale).to(x.compute_dtype).view_as(target)
            for q, scale, target in zip(x.reference, scales, y, strict=True)
        )
    )


def unpack(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Packed residuals `[B, ...]` as numbers: bfloat16 as they are, float8 bytes times the scale of their block."""
    if scale is None:
        return rows
    flat = rows.flatten(1).view(torch.float8_e4m3fn).float()
    return (flat * scale.repeat_interleave(PACK_BLOCK, 1)[:, : flat.shape[1]]).view(rows.shape)


def latent_weights(x: PairRows) -> Tensor | None:
    """The weights of all elements of a pair's videos, `[B, ...]`."""
    if x.latent_weight is None:
        return None
    pairs, spans, length = x.latent_weight.shape
    wide = x.latent_weight[:, :, None].expand(-1, -1, x.numel // (spans * length), -1)
    return wide.reshape(x.policy.chosen.shape)


def group_errors(call: Call) -> GroupErrors:
    """Statistics `[B, G]` of every group (G: 1, frames or elements), differentiable but for `cross`."""

    x = pair_rows(call.operands)
    weight = latent_weights(x)

    def counted(difference: Tensor) -> Tensor:
        return difference if weight is None else torch.where(weight == 0, 0.0, difference)

    def mean(values: Tensor) -> Tensor:
        if call.granularity == "element":
            return values.flatten(1)
        if weight is not None:
            values = weight * values
        if call.frame_dim is None:
            return values.flatten(1).mean(1, keepdim=True)
        others = [dim for dim in range(1, values.ndim) if dim != call.frame_dim]
        return values.mean(others) if others else values

    p = Side(*(t.to(x.compute_dtype) for t in x.policy))
    y = targets(x)
    q = references(x, call.reduction.reference_form, y)
    gaps: tuple[Tensor | None, ...] = (None, None)
    if q is not None:
        gaps = tuple(mean(counted(a - b) * counted((a - t) + (b - t))) for a, b, t in zip(p, q, y, strict=True))
    gap_chosen, gap_rejected = gaps
    return GroupErrors(
        policy_chosen=mean(counted(p.chosen - y.chosen) ** 2),
        policy_rejected=mean(counted(p.rejected - y.rejected) ** 2),
        gap_chosen=gap_chosen,
        gap_rejected=gap_rejected,
        anchor=mean(counted(p.chosen - q.chosen) ** 2) if call.reduction.anchor and q is not None else None,
        cross=mean(counted(p.chosen - y.chosen) * counted(p.rejected - y.rejected)).detach()
        if call.reduction.cross
        else None,
        anchor_rejected=mean(counted(p.rejected - q.rejected) ** 2)
        if call.reduction.anchor_rejected and q is not None
        else None,
    )
