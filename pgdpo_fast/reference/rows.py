"""What the reference cache keeps of one (pair, draw), and the two functions between it and the loss.

`pack` turns a reference prediction into rows, `gather` copies the rows of a batch out of the tables they lie in, and
`as_reference` hands them to `preference_loss` as they are: nothing is ever unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from pgdpo_fast.backends import native
from pgdpo_fast.backends.operands import PACK_BLOCK
from pgdpo_fast.diffusion import Visit
from pgdpo_fast.errors import NonFiniteError
from pgdpo_fast.loss import FRAME_DIM, NoisedTarget, PackedReference, ReferenceErrors, reference_errors

__all__ = ["FORMATS", "Rows", "as_reference", "bring", "check_finite", "gather", "pack", "row_tensors"]

FORMATS = ("errors", "predictions", "bf16", "fp8")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Name -> [B, ...] tensor: "chosen" and "rejected", and for fp8 "chosen_scale" and "rejected_scale".
Rows = dict[str, Tensor]


def row_tensors(
    format: str, granularity: str, shape: Sequence[int], dtype: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of one row, for latents of `shape` [C, F, H, W].

    errors: two float32, or two [F] float32 per frame. predictions: two [C, F, H, W] in the network's `dtype`, exact.
    bf16: two residuals q - y. fp8: two uint8 [C, F, H, W] holding float8 (e4m3) bytes, each with
    [ceil(C*F*H*W / 128)] float32 scales.
    """
    if format == "errors":
        kept = ((shape[1],) if granularity == "frame" else (), torch.float32)
        return {"chosen": kept, "rejected": kept}
    kept = (tuple(shape), {"predictions": DTYPES[dtype], "bf16": torch.bfloat16, "fp8": torch.uint8}[format])
    tensors = {"chosen": kept, "rejected": kept}
    if format == "fp8":
        scale = ((-(-prod(shape) // PACK_BLOCK),), torch.float32)
        tensors |= {"chosen_scale": scale, "rejected_scale": scale}
    return tensors


@torch.no_grad()
def pack(
    prediction: Tensor, target: Tensor | NoisedTarget, format: str, granularity: str = "sample", backend: str = "auto"
) -> Rows:
    """Rows of a batch of reference predictions; packed ones in host memory, others on the predictions' device.

    Args:
        prediction: `[2B, C, F, H, W]`, chosen half first.
        target: what it should have been, in any form `preference_loss` takes.
        format: one of `FORMATS`.
        granularity: of the errors; the other formats serve any.
        backend: as in `preference_loss` and `PackedReference.pack`.
    """
    if format == "errors":
        errors = reference_errors(prediction, target, granularity=granularity, frame_dim=FRAME_DIM, backend=backend)
        return {"chosen": errors.chosen.float(), "rejected": errors.rejected.float()}
    if format == "predictions":
        pairs = prediction.shape[0] // 2
        return {"chosen": prediction[:pairs], "rejected": prediction[pairs:]}
    packed = PackedReference.pack(prediction, target, format, backend=backend, to_host=True)
    return {name: rows for name, rows in vars(packed).items() if rows is not None}


def check_finite(rows: Rows, visits: Sequence[Visit]) -> None:
    """Raise NonFiniteError naming the (pair, draw) of rows made from NaN or infinite predictions. Waits for the device.

    float8 has no infinity to look for, but a block's scale is its largest residual and is not finite either.
    """
    bad = set()
    for values in rows.values():
        if values.dtype != torch.uint8:
            bad.update(
                (~torch.isfinite(values))
                .flatten(1 if values.ndim > 1 else 0)
                .view(len(values), -1)
                .any(1)
                .nonzero()
                .flatten()
                .tolist()
            )
    if bad:
        names = ", ".join(f"{visits[i].id} (draw {visits[i].draw})" for i in sorted(bad))
        raise NonFiniteError(
            f"the reference's prediction is NaN or infinite for pair {names}; look at these clips' "
            f"latents, or set model.dtype=fp32"
        )


def gather(tables: Sequence[Mapping[str, Tensor]], places: Sequence[tuple[int, int]], out: Rows | None = None) -> Rows:
    """Rows of a batch, `[B, ...]` each, copied from where they lie.

    Args:
        tables: one mapping of name to `[rows, ...]` a shard; memory-mapped, in host memory or on a device.
        places: (shard, row) of each of the B rows.
        out: buffers of at least B rows to write into, e.g. pinned ones; new tensors otherwise.
    """
    first = tables[places[0][0]]
    if len({shard for shard, _ in places}) == 1 and out is None:
        index = torch.tensor([row for _, row in places]).to(next(iter(first.values())).device, non_blocking=True)
        return {name: table.index_select(0, index) for name, table in first.items()}
    into = {name: None if out is None else out[name][: len(places)] for name in first}
    return {name: torch.stack([tables[shard][name][row] for shard, row in places], out=into[name]) for name in first}


def bring(tables: Mapping[str, Tensor], rows: Sequence[int], device: torch.device) -> Rows:
    """Rows of a batch on `device`, `[B, ...]` each, complete once its current stream has come that far.

    One launch where the CUDA kernels can be had, a copy a row by torch otherwise.

    Args:
        tables: `[rows, ...]` contiguous, on the device or in pinned host memory, which may be written again once an
            event recorded after this call is over.
        rows: which row of the tables each of the B is.
    """
    if device.type == "cuda" and native.rows_unavailable(device) is None:
        out = {
            name: torch.empty((len(rows), *table.shape[1:]), dtype=table.dtype, device=device)
            for name, table in tables.items()
        }
        native.gather_rows(list(tables.values()), rows, list(out.values()))
        return out
    return {
        name: torch.stack([table[row].to(device, non_blocking=True) for row in rows]) for name, table in tables.items()
    }


def as_reference(rows: Rows, format: str) -> ReferenceErrors | tuple[Tensor, Tensor] | PackedReference:
    """Rows as the `reference` argument of `preference_loss`."""
    if format == "errors":
        return ReferenceErrors(**rows)
    return (rows["chosen"], rows["rejected"]) if format == "predictions" else PackedReference(**rows)
