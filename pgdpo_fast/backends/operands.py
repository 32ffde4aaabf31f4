"""The tensors of one loss call, split into chosen and rejected rows that a kernel can address without copies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """The chosen and the rejected rows of one operand, each `[B, ...]` with every row contiguous.

    The distance between rows is free (halves of a stacked tensor, a batch-expanded target); a tensor whose rows are
    not contiguous is copied once, here.
    """

    chosen: Tensor
    rejected: Tensor


class Operands(NamedTuple):
    """What the kernels read. `target` holds clean latents when `noise` is given: the target is then
    noise_scale * noise + clean_scale * clean, with `target_scale` `[2, B]` the two scales."""

    policy: Side
    target: Side
    reference: Side | None
    reference_scale: Side | None
    noise: Tensor | None
    target_scale: Tensor | None

    @property
    def pairs(self) -> int:
        return self.policy.chosen.shape[0]

    @property
    def numel(self) -> int:
        """Latent elements of one video."""
        return self.policy.chosen.shape[1:].numel()

    @property
    def shared_target(self) -> bool:
        return self.target.chosen is self.target.rejected

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 predictions are accumulated in float64, everything else in float32."""
        return torch.float64 if self.policy.chosen.dtype == torch.float64 else torch.float32


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if each row `x[b]` is contiguous, else a contiguous copy."""
    return x if x.is_contiguous() or x[0].is_contiguous() else x.contiguous()


def side(tensor: Tensor | None, rejected: Tensor | None, pairs: int) -> Side | None:
    """An operand as passed to an operator: stacked `[2B, ...]`, shared `[B, ...]`, or chosen and `rejected`."""
    if tensor is None:
        return None
    rows = rows_contiguous(tensor)
    if rejected is not None:
        return Side(rows, rows_contiguous(rejected))
    return Side(*rows.chunk(2)) if rows.shape[0] == 2 * pairs else Side(rows, rows)


def gather(
    policy,
    policy_rejected,
    target,
    target_rejected,
    noise,
    target_scale,
    reference,
    reference_rejected,
    reference_scale,
    reference_scale_rejected,
) -> Operands:
    """The tensor arguments shared by all operators, in their order, as `Operands`."""
    pairs = policy.shape[0] // (2 if policy_rejected is None else 1)
    return Operands(
        side(policy, policy_rejected, pairs),
        side(target, target_rejected, pairs),
        side(reference, reference_rejected, pairs),
        side(reference_scale, reference_scale_rejected, pairs),
        None if noise is None else rows_contiguous(noise),
        target_scale,
    )


PACK_BLOCK = 128  # elements of a row that share one float8 scale
MIN_CHUNK = 4096
MAX_CHUNKS = 512


def segment_length(shape: torch.Size, groups: int) -> int:
    """Elements of the runs that one video `[C, F, H, W]` (any shape when groups == 1) is cut into, the last may be
    short; run s belongs to group s % groups. Depends on nothing but the shape."""
    numel = shape.numel()
    if groups > 1:
        return shape[2:].numel()
    length = MIN_CHUNK
    while length * MAX_CHUNKS < numel:
        length *= 2
    return min(length, numel)
