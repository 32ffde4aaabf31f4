"""What is measured, by name: quantities of a pair, metrics that are their means, and bins of the model's timestep.

Loss, trainer, displays and reports take every name from here, so that a number is called the same wherever it appears.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "ACCURACIES",
    "CHOSEN",
    "MARGINS",
    "MEANS",
    "METRICS",
    "PAIR_QUANTITIES",
    "REJECTED",
    "TIMESTEP_BINS",
    "timestep_bins",
]

CHOSEN, REJECTED, MARGINS, ACCURACIES = "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"

# Metric, under TRL's name where it has one -> the attribute of `PreferenceLossOutput` it is the mean of.
METRICS = {
    CHOSEN: "chosen_reward",
    REJECTED: "rejected_reward",
    MARGINS: "margin",
    ACCURACIES: "accuracy",
    "logits": "logits",
    "gradient_factor": "gradient_factor",
    "weights/alpha": "alpha",
    "weights/gamma": "gamma",
    "weights/importance": "importance",
    "errors/policy_chosen": "policy_chosen_error",
    "errors/policy_rejected": "policy_rejected_error",
    "errors/reference_chosen": "reference_chosen_error",
    "errors/reference_rejected": "reference_rejected_error",
}

# Quantity of a pair, under its name in a row of a metrics file -> the attribute of `PreferenceLossOutput`.
PAIR_QUANTITIES = {
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

# Metric of a row -> the quantity of its pairs that it is the mean of.
_QUANTITY = {attribute: quantity for quantity, attribute in PAIR_QUANTITIES.items()}
MEANS = {metric: _QUANTITY[attribute] for metric, attribute in METRICS.items() if attribute in _QUANTITY} | {
    "timestep": "timestep"
}

TIMESTEP_BINS = 5


def timestep_bins(
    rows: Iterable[Mapping[str, Any]], quantities: Sequence[str] = (), bins: int = TIMESTEP_BINS
) -> list[dict[str, Any]]:
    """The pairs of many rows in equal bins of the model's timestep over [0, 1000].

    Args:
        rows: of a metrics file, with "timestep" and "margin" of every pair, and `quantities`.

    Returns:
        For every bin: low, high, pairs, accuracy, and the means of `quantities`; NaN in a bin without pairs.
    """
    found: list[dict[str, list[float]]] = [{name: [] for name in {"margin", *quantities}} for _ in range(bins)]
    for row in rows:
        for index, timestep in enumerate(row["pairs"]["timestep"]):
            for name, values in found[min(int(timestep / 1000 * bins), bins - 1)].items():
                values.append(row["pairs"][name][index])

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values) if values else math.nan

    return [
        {
            "low": 1000 * place / bins,
            "high": 1000 * (place + 1) / bins,
            "pairs": len(inside["margin"]),
            "accuracy": mean([value > 0 for value in inside["margin"]]),
            **{name: mean(inside[name]) for name in quantities},
        }
        for place, inside in enumerate(found)
    ]
