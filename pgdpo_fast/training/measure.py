"""From the loss's telemetry on the device to one metrics row on the host, with a single wait for the device."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgdpo_fast.errors import NonFiniteError
from pgdpo_fast.loss import PreferenceLossOutput
from pgdpo_fast.storage import atomic_file
from pgdpo_fast.training.batches import Batch, Draw

__all__ = ["PAIR_FIELDS", "Measured", "check_finite", "on_device", "timestep_bins", "to_row"]

# Per-pair quantities of the loss by the name they have in a row.
PAIR_FIELDS = {
    "loss": "per_pair_loss",
    "chosen": "chosen_reward",
    "rejected": "rejected_reward",
    "margin": "margin",
    "logits": "logits",
    "gradient_factor": "gradient_factor",
    "alpha": "alpha",
    "gamma": "gamma",
    "policy_chosen_error": "policy_chosen_error",
    "policy_rejected_error": "policy_rejected_error",
    "reference_chosen_error": "reference_chosen_error",
    "reference_rejected_error": "reference_rejected_error",
}
# Metrics that are their means, under TRL's names where those exist.
MEANS = {
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "rewards/margins": "margin",
    "logits": "logits",
    "gradient_factor": "gradient_factor",
    "weights/alpha": "alpha",
    "weights/gamma": "gamma",
    "errors/policy_chosen": "policy_chosen_error",
    "errors/policy_rejected": "policy_rejected_error",
    "errors/reference_chosen": "reference_chosen_error",
    "errors/reference_rejected": "reference_rejected_error",
    "timestep": "timestep",
}

Measured = tuple[tuple[Draw, ...], Tensor, Tensor]


def on_device(batch: Batch, out: PreferenceLossOutput) -> Measured:
    """The visits of one forward, its loss, and its per-pair quantities `[len(PAIR_FIELDS) + 1, B]`; nothing waits."""
    fields = [getattr(out, name).detach() for name in PAIR_FIELDS.values()]
    fields = [field.mean(-1) if field.ndim == 2 else field for field in fields]  # frame granularity: mean over frames
    timestep = batch.model_timestep[: len(batch.draws)].to(fields[0].dtype)
    return batch.draws, out.loss.detach(), torch.stack([*fields, timestep])


def to_row(measured: Sequence[Measured], norm: Tensor | None = None) -> dict[str, Any]:
    """Means over all pairs, the gradient norm if given, and the quantities of every pair under "pairs"."""
    losses = torch.stack([loss for _, loss, _ in measured])
    norm = losses.new_zeros(1) if norm is None else norm.reshape(1).to(losses.dtype)
    flat = torch.cat([losses, norm, *(fields.flatten() for *_, fields in measured)]).tolist()
    count = len(measured)
    pairs: dict[str, list] = {"id": [], "draw": [], **{name: [] for name in (*PAIR_FIELDS, "timestep")}}
    place = count + 1
    for draws, _, _ in measured:
        pairs["id"] += [draw.id for draw in draws]
        pairs["draw"] += [draw.draw for draw in draws]
        for name in (*PAIR_FIELDS, "timestep"):
            pairs[name] += flat[place : place + len(draws)]
            place += len(draws)
    row = {"loss": math.fsum(flat[:count]) if all(map(math.isfinite, flat[:count])) else math.nan}
    row |= {metric: statistics.fmean(pairs[name]) for metric, name in MEANS.items()}
    row["rewards/accuracies"] = statistics.fmean(margin > 0 for margin in pairs["margin"])
    return row | {"grad_norm": flat[count], "pairs": pairs}


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


def timestep_bins(row: Mapping[str, Any], bins: int = 5) -> list[dict[str, Any]]:
    """Rewards by equal bins of the model's timestep over [0, 1000]; empty bins are left out."""
    pairs, found = row["pairs"], []
    for place in range(bins):
        low, high = 1000 * place / bins, 1000 * (place + 1) / bins
        inside = [i for i, t in enumerate(pairs["timestep"]) if low <= t < high or (t >= 1000 and place == bins - 1)]
        if inside:
            entry = {"low": low, "high": high, "pairs": len(inside)}
            for metric, name in (
                ("rewards/chosen", "chosen"),
                ("rewards/rejected", "rejected"),
                ("rewards/margins", "margin"),
            ):
                entry[metric] = statistics.fmean(pairs[name][i] for i in inside)
            entry["rewards/accuracies"] = statistics.fmean(pairs["margin"][i] > 0 for i in inside)
            found.append(entry)
    return found


def _printable(value: Any) -> Any:
    """JSON has no NaN or infinity: those become text."""
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
