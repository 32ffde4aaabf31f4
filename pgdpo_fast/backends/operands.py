"""A checked call of the loss, and what goes into and comes out of the operators: every place has its name here.

An operand tensor, a number per pair or a setting of the passes is one field of one of these; the operators' schemas
(operators.py) and the order of their arguments follow from them. `kernels/` and `csrc/` mirror the names.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceForm(IntEnum):
    """What the `reference` operand holds."""

    NONE = 0
    PREDICTION = 1
    BFLOAT16 = 2  # residuals q - y
    FLOAT8 = 3  # the same as e4m3 bytes, with one scale per PACK_BLOCK elements of a row


class Operands(NamedTuple):
    """The tensors of latents. Each is stacked `[2B, ...]`, chosen half first, or the chosen rows `[B, ...]` with the
    rejected ones beside it; a target `[B, ...]` without rejected rows is shared by the pair."""

    policy: Tensor
    policy_rejected: Tensor | None
    target: Tensor  # clean latents where there is noise
    target_rejected: Tensor | None
    noise: Tensor | None  # [B, ...]: the target is noise_scale * noise + clean_scale * clean
    target_scale: Tensor | None  # [2, B] in the compute dtype: noise_scale and clean_scale
    reference: Tensor | None
    reference_rejected: Tensor | None
    reference_scale: Tensor | None  # [B, ceil(C*F*H*W / PACK_BLOCK)] float32, with ReferenceForm.FLOAT8
    reference_scale_rejected: Tensor | None
    latent_weight: Tensor | None = None  # [B, R, M] in the compute dtype: one for each element of [R, N / (R * M), M]

    @property
    def pairs(self) -> int:
        return self.policy.shape[0] // (2 if self.policy_rejected is None else 1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 predictions are accumulated in float64, everything else in float32."""
        return torch.float64 if self.policy.dtype == torch.float64 else torch.float32


class PairNumbers(NamedTuple):
    """Numbers of every pair, contiguous and in the compute dtype; groups are those of the `Reduction`."""

    weight: Tensor | None = None  # [B, G], multiplies the losses
    posterior_scale: Tensor | None = None  # [B, 1], c_t of importance-weighted objectives
    beta_scale: Tensor | None = None  # [B, G], multiplies beta wherever it stands


class Reduction(NamedTuple):
    """Everything of the passes over the latents that is not a tensor."""

    reference_form: ReferenceForm
    groups: int  # 1 at element granularity, whose passes need none
    length: int  # of the segments a video is cut into, see `segments_of`
    anchor: bool  # whether the sums of these statistics are wanted
    cross: bool
    anchor_rejected: bool = False
    consecutive: int = 1  # segments in a row that belong to one group


class Call(NamedTuple):
    """A checked call of the loss: nothing is reshaped, converted or validated after it."""

    operands: Operands
    numbers: PairNumbers
    reference_errors: Tensor | None  # [2, B, G] in the compute dtype: chosen and rejected
    reduction: Reduction
    granularity: str
    frame_dim: int | None  # at frame granularity
    backend: str

    @property
    def has_gaps(self) -> bool:
        return self.reduction.reference_form != ReferenceForm.NONE or self.reference_errors is not None


class Telemetry(NamedTuple):
    """What is told of every group: `[B, G]` each, or in this order the rows of one tensor `[9, B, G]`."""

    per_pair_loss: Tensor
    logits: Tensor
    alpha: Tensor
    gamma: Tensor
    importance: Tensor
    policy_chosen_error: Tensor
    policy_rejected_error: Tensor
    chosen_gap: Tensor
    rejected_gap: Tensor


class Coefficients(NamedTuple):
    """What the differences at an element are multiplied with for its gradient, `[B, G]` each or stacked `[4, B, G]`."""

    chosen: Tensor  # of p_w - y_w
    rejected: Tensor  # of p_l - y_l
    anchor: Tensor  # of p_w - q_w
    anchor_rejected: Tensor  # of p_l - q_l


class ElementMeans(NamedTuple):
    """Means over a video that PG-DPO's combine="outer" multiplies, `[B]` each or stacked `[4, B]`."""

    gamma: Tensor
    preference: Tensor
    complement: Tensor  # of 1 - gamma
    implicit: Tensor


class Side(NamedTuple):
    """The chosen and the rejected rows of one operand, each `[B, ...]` with every row contiguous.

    The distance between rows is free (halves of a stacked tensor, a batch-expanded target); a tensor whose rows are
    not contiguous is copied once, here.
    """

    chosen: Tensor
    rejected: Tensor


class PairRows(NamedTuple):
    """The operands as rows of videos that a kernel can address without copies; fields as in `Operands`."""

    policy: Side
    target: Side
    reference: Side | None
    reference_scale: Side | None
    noise: Tensor | None
    target_scale: Tensor | None
    latent_weight: Tensor | None

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
        return torch.float64 if self.policy.chosen.dtype == torch.float64 else torch.float32


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if each row `x[b]` is contiguous, else a contiguous copy."""
    return x if x.is_contiguous() or x[0].is_contiguous() else x.contiguous()


def side(tensor: Tensor, rejected: Tensor | None, pairs: int) -> Side:
    """An operand as passed to an operator: stacked `[2B, ...]`, shared `[B, ...]`, or chosen and `rejected`."""
    rows = rows_contiguous(tensor)
    if rejected is not None:
        return Side(rows, rows_contiguous(rejected))
    return Side(*rows.chunk(2)) if rows.shape[0] == 2 * pairs else Side(rows, rows)


def pair_rows(x: Operands) -> PairRows:
    """The operands, split into chosen and rejected rows."""
    scale = x.reference_scale
    return PairRows(
        policy=side(x.policy, x.policy_rejected, x.pairs),
        target=side(x.target, x.target_rejected, x.pairs),
        reference=None if x.reference is None else side(x.reference, x.reference_rejected, x.pairs),
        reference_scale=None if scale is None else side(scale, x.reference_scale_rejected, x.pairs),
        noise=None if x.noise is None else rows_contiguous(x.noise),
        target_scale=x.target_scale,
        latent_weight=x.latent_weight,
    )


PACK_BLOCK = 128  # elements of a row that share one float8 scale
MIN_SEGMENT = 4096
MAX_SEGMENTS = 512


def segment_length(shape: torch.Size) -> int:
    """Elements of the segments that one video of `shape` is cut into where it is one group, the last may be short.
    Depends on nothing but the shape."""
    numel = shape.numel()
    length = MIN_SEGMENT
    while length * MAX_SEGMENTS < numel:
        length *= 2
    return min(length, numel)


def segments_of(shape: torch.Size, frame_axis: int | None) -> tuple[int, int]:
    """The segments one video of `shape` is cut into: their length, and how many in a row belong to one group.

    With `frame_axis` (an axis of `shape`) segment s belongs to frame s // consecutive % frames: what lies inside a
    frame is cut along its outermost axes into segments of MIN_SEGMENT elements or more. `[C, F, H, W]` has segments
    of H*W, `[F, C, H, W]` the same, C of them in a row.
    """
    if frame_axis is None or shape[frame_axis] == 1:
        return segment_length(shape), 1
    inside = shape[frame_axis + 1 :].numel()
    length = inside
    for size in shape[frame_axis + 1 :]:
        if length // size < MIN_SEGMENT:
            break
        length //= size
    return length, inside // length
