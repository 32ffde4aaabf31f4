"""The readable oracle: plain torch, any device, differentiable, float64-capable. Every kernel is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from pgdpo_fast.backends.operands import PACK_BLOCK, Operands, Side
from pgdpo_fast.objectives import GroupErrors


def targets(x: Operands) -> Side:
    """The two targets in the accumulation dtype, built from clean latents and noise when those were given."""
    chosen, rejected = (t.to(x.compute_dtype) for t in x.target)
    if x.noise is None:
        return Side(chosen, rejected)
    noise_scale, clean_scale = (s.view(-1, *[1] * (chosen.ndim - 1)) for s in x.target_scale.to(x.compute_dtype))
    noise = noise_scale * x.noise.to(x.compute_dtype)
    return Side(noise + clean_scale * chosen, noise + clean_scale * rejected)


def references(x: Operands, reference_form: int, y: Side) -> Side | None:
    """The reference's predictions q; packed operands hold q - y."""
    if x.reference is None:
        return None
    if reference_form == 1:
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


def group_errors(x: Operands, reference_form: int, granularity: str, anchor: bool, cross: bool) -> GroupErrors:
    """Statistics `[B, G]` of every group (G: 1, frames or elements), differentiable but for `cross`."""

    def mean(values: Tensor) -> Tensor:
        if granularity == "sample":
            return values.flatten(1).mean(1, keepdim=True)
        if granularity == "frame":
            return values.mean((1, 3, 4))
        return values.flatten(1)

    p = Side(*(t.to(x.compute_dtype) for t in x.policy))
    y = targets(x)
    q = references(x, reference_form, y)
    gaps = (None, None)
    if q is not None:
        gaps = tuple(mean((a - b) * ((a - t) + (b - t))) for a, b, t in zip(p, q, y, strict=True))
    return GroupErrors(
        mean((p.chosen - y.chosen) ** 2),
        mean((p.rejected - y.rejected) ** 2),
        *gaps,
        mean((p.chosen - q.chosen) ** 2) if anchor else None,
        mean((p.chosen - y.chosen) * (p.rejected - y.rejected)).detach() if cross else None,
    )
