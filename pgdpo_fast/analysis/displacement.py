"""Likelihood displacement, measured: the one-step advantage over DPO, and what the rewards of a run add up to.

Log-likelihoods are stood in for by log p = -e/2, e the mean squared prediction error of a clip at a fixed draw. The
one-step advantage is how much more a step of an objective raises log p of the chosen clips than a step of DPO from the
same parameters, batch and learning rate would; below zero, the objective displaces more than DPO does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgdpo_fast.analysis.runs import RunRecord, finite
from pgdpo_fast.analysis.verdict import Verdict, judge
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.loss import paired_errors, preference_loss
from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, REJECTED
from pgdpo_fast.objectives import Objective

__all__ = ["FILE", "Outcome", "OneStepAdvantage", "one_step_advantage", "outcome"]

FILE = "displacement.jsonl"  # of a run directory, one row per probed step


@dataclass(frozen=True)
class OneStepAdvantage:
    """Result of `one_step_advantage`, in nats per element, means over the batch.

    Attributes:
        first_order: -lr grad log p_w . (grad L - grad L_baseline).
        exact: log p_w after the objective's step minus log p_w after the baseline's; None when not asked for.
        objective_change, baseline_change: change of log p_w by each step alone; None when not asked for.
    """

    first_order: float
    exact: float | None = None
    objective_change: float | None = None
    baseline_change: float | None = None


@torch.enable_grad()  # a trainer evaluates without
def one_step_advantage(
    predict: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    target: Any,
    reference: Any,
    *,
    objective: Objective,
    baseline: Objective,
    learning_rate: float,
    exact: bool = True,
    granularity: str = "sample",
    frame_dim: int | None = None,
    backend: str = "auto",
    posterior_scale: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> OneStepAdvantage:
    """The one-step advantage of `objective` over `baseline` on one batch: plain gradient steps of `learning_rate`.

    Args:
        predict: the network's prediction `[2B, C, F, H, W]`, chosen half first, at the parameters' current values,
            always of the same noised latents.
        parameters: the trained ones. They come back bit for bit, and their `.grad` is not touched.
        target, reference, granularity, frame_dim, backend, posterior_scale, pair_weight: as in `pf.preference_loss`.
        exact: also take both steps; two more forwards. Needs fp32 parameters, coarser ones would swallow the step.

    Raises:
        ConfigError: `exact` with a parameter that is not fp32 or fp64.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if exact and (coarse := {p.dtype for p in parameters} - {torch.float32, torch.float64}):
        raise ConfigError(
            f"exact=True with {coarse.pop()} parameters, whose rounding swallows a step; expected float32: "
            "use exact=False"
        )
    prediction = predict()
    options = {
        "granularity": granularity,
        "frame_dim": frame_dim,
        "backend": backend,
        "posterior_scale": posterior_scale,
        "pair_weight": pair_weight,
    }

    def towards(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, leaf)[0]

    # Gradients with respect to the prediction are cheap; the network is walked back only for what is asked.
    leaf = prediction.detach().requires_grad_(True)
    output_gradients = [
        towards(preference_loss(leaf, target, reference, objective=o, **options).loss) for o in (objective, baseline)
    ]
    likelihood_gradient = towards(_log_likelihood(leaf, target, backend))

    def walk(output_gradient: Tensor, more: bool) -> list[Tensor]:
        found = torch.autograd.grad(prediction, parameters, output_gradient, retain_graph=more, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    if not exact:
        ascent = walk(likelihood_gradient, True)
        difference = walk(output_gradients[0] - output_gradients[1], False)
        return OneStepAdvantage(-learning_rate * _dot(ascent, difference))

    ascent, *gradients = (
        walk(g, more) for g, more in zip((likelihood_gradient, *output_gradients), (1, 1, 0), strict=True)
    )
    first_order = -learning_rate * (_dot(ascent, gradients[0]) - _dot(ascent, gradients[1]))
    with torch.no_grad():
        before = float(_log_likelihood(predict(), target, backend))
        changes = []
        kept = [parameter.clone() for parameter in parameters]
        try:
            for gradient in gradients:
                for parameter, start, slope in zip(parameters, kept, gradient, strict=True):
                    parameter.copy_(start - learning_rate * slope)
                changes.append(float(_log_likelihood(predict(), target, backend)) - before)
        finally:
            for parameter, start in zip(parameters, kept, strict=True):
                parameter.copy_(start)
    return OneStepAdvantage(first_order, changes[0] - changes[1], *changes)


def _log_likelihood(prediction: Tensor, target: Any, backend: str) -> Tensor:
    """-e/2 of the chosen clips, mean over the batch, 0-d."""
    return -0.5 * paired_errors(prediction, target, backend=backend).policy_chosen.mean()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What a run came to: rewards are means over pairs, on held-out pairs where the run had any.

    Attributes:
        verdict: what the figures allow one to say.
        chosen_error, margin_error: standard errors of chosen reward and margin over pairs; NaN where unknown.
        pairs: how many different pairs the rewards are means over.
        lowest_chosen: the lowest chosen reward along the way.
        gamma_positive_share: share of probed steps with a one-step advantage above zero; None without probes, and for
            DPO itself, whose advantage over itself is zero.
    """

    verdict: Verdict
    chosen_reward: float
    rejected_reward: float
    margin: float
    accuracy: float
    chosen_error: float
    margin_error: float
    pairs: int
    lowest_chosen: float
    gamma_positive_share: float | None
    step_seconds: float

    @property
    def kind(self) -> str:
        return self.verdict.kind


def outcome(run: RunRecord) -> Outcome:
    """The figures of a run at its last step, and the verdict on them."""
    chosen, rejected, margin, accuracy = (run.final(metric) for metric in (CHOSEN, REJECTED, MARGINS, ACCURACIES))
    chosen_error, margin_error = run.standard_error("chosen"), run.standard_error("margin")
    measured = bool(finite(run.curve(MARGINS)[1]))
    verdict = judge(
        chosen, chosen_error, margin, margin_error, pairs=run.last_pairs, held_out=run.held_out, measured=measured
    )
    probes = finite([row["advantage"] for row in run.advantages])
    share = sum(value > 0 for value in probes) / len(probes) if probes and run.objective != "dpo" else None
    lowest = min(finite(run.smooth_curve(CHOSEN)[1]), default=math.nan)
    return Outcome(
        verdict=verdict,
        chosen_reward=chosen,
        rejected_reward=rejected,
        margin=margin,
        accuracy=accuracy if math.isfinite(margin) else math.nan,
        chosen_error=chosen_error,
        margin_error=margin_error,
        pairs=run.last_pairs,
        lowest_chosen=lowest,
        gamma_positive_share=share,
        step_seconds=statistics.median(row["step_seconds"] for row in run.metrics),
    )
