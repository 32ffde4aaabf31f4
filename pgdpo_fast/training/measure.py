"""From the loss's telemetry on the device to one metrics row on the host, with a single wait for the device."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgdpo_fast.errors import NonFiniteError
from pgdpo_fast.loss import PreferenceLossOutput
from pgdpo_fast.metrics import ACCURACIES, MEANS, PAIR_QUANTITIES
from pgdpo_fast.preemption import check_stop
from pgdpo_fast.storage import atomic_file
from pgdpo_fast.training.batches import Batch, Visit

__all__ = ["Measured", "check_finite", "check_weights", "on_device", "to_row"]

Measured = tuple[tuple[Visit, ...], Tensor, Tensor]


def on_device(batch: Batch, out: PreferenceLossOutput) -> Measured:
    """The visits of one forward, its loss, its quantities per pair `[len(PAIR_QUANTITIES) + 1, B]`; nothing waits."""
    fields = [getattr(out, name).detach() for name in PAIR_QUANTITIES.values()]
    fields = [field.mean(-1) if field.ndim == 2 else field for field in fields]  # frame granularity: mean over frames
    timestep = batch.model_timestep[: len(batch.visits)].to(fields[0].dtype)
    return batch.visits, out.loss.detach(), torch.stack([*fields, timestep])


def to_row(measured: Sequence[Measured], norm: Tensor | None = None) -> dict[str, Any]:
    """Means over all pairs, the gradient norm if given, and the quantities of every pair under "pairs"."""
    losses = torch.stack([loss for _, loss, _ in measured])
    norm = losses.new_zeros(1) if norm is None else norm.reshape(1).to(losses.dtype)
    flat = torch.cat([losses, norm, *(fields.flatten() for *_, fields in measured)]).tolist()
    count = len(measured)
    pairs: dict[str, list] = {"id": [], "draw": [], **{name: [] for name in (*PAIR_QUANTITIES, "timestep")}}
    place = count + 1
    for visits, _, _ in measured:
        pairs["id"] += [visit.id for visit in visits]
        pairs["draw"] += [visit.draw for visit in visits]
        for name in (*PAIR_QUANTITIES, "timestep"):
            pairs[name] += flat[place : place + len(visits)]
            place += len(visits)
    row = {"loss": math.fsum(flat[:count]) if all(map(math.isfinite, flat[:count])) else math.nan}
    row |= {metric: statistics.fmean(pairs[name]) for metric, name in MEANS.items()}
    row[ACCURACIES] = statistics.fmean(margin > 0 for margin in pairs["margin"])
    return row | {"grad_norm": flat[count], "pairs": pairs}


def check_weights(parameters: Iterable[tuple[str, Tensor]], when: str) -> None:
    """Raise NonFiniteError naming the first of the weights (name, tensor) that holds a NaN or an infinity. Syncs."""
    bad = []
    for name, values in parameters:
        check_stop()
        if not bool(torch.isfinite(values).all()):
            bad.append(name)
    if bad:
        raise NonFiniteError(
            f"{len(bad)} of the network's weights hold NaN or infinite numbers {when}, first: {bad[0]}; restore the "
            "file they came from, or lower training.learning_rate and go on from an older checkpoint"
        )


def check_finite(row: Mapping[str, Any], step: int, seed: int, folder: Path) -> None:
    """Raise when the loss or the gradient of a step is not finite, before any weight has changed.

    Everything needed to repeat the step alone (seed, ids, draws, timesteps, losses) goes to a file in `folder`.

    Raises:
        NonFiniteError: naming the pairs.
    """
    pairs = row["pairs"]
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        return
    bad = [pair for pair, loss in zip(pairs["id"], pairs["loss"], strict=True) if not math.isfinite(loss)]
    path = folder / f"nonfinite_step_{step + 1:08d}.json"
    content = {"step": step + 1, "seed": seed, "loss": row["loss"], "grad_norm": row["grad_norm"], "pairs": pairs}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(_printable(content), indent=1), encoding="utf-8")
    what = (
        f"the loss of pair(s) {', '.join(bad)} is not finite"
        if bad
        else f"the gradient norm is {row['grad_norm']} with finite losses, pairs {', '.join(pairs['id'])}"
    )
    raise NonFiniteError(
        f"step {step + 1}: {what}; no weight was changed. Details in {path}; look at these clips' latents, "
        f"lower training.learning_rate or objective.beta, then resume"
    )


def _printable(value: Any) -> Any:
    """JSON has no NaN or infinity: those become text."""
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
