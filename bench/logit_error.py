"""How many digits of the logit survive when training starts, where the policy is its reference up to a small step s:
by the Diffusion-DPO recipe in the weights' dtype, the recipe after `.float()`, and this package.

Run: python -m pgdpo_fast.bench.logit_error. The truth is the float64 result on the same rounded inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pgdpo_fast as pf

BETA = 5000.0
CASES = ((torch.bfloat16, 1e-3), (torch.bfloat16, 1e-4), (torch.float16, 1e-3), (torch.float32, 1e-4))
CONTENDERS = ("recipe in this dtype", "recipe after .float()", "ours", "ours, cached errors")


def recipe(prediction: Tensor, target: Tensor, reference: Tensor) -> Tensor:
    """Logits `[B]` as the usual scripts have them: mean squared errors, then their differences."""
    dims = tuple(range(1, prediction.ndim))
    chosen, rejected = (prediction - target).pow(2).mean(dims).chunk(2)
    reference_chosen, reference_rejected = (reference - target).pow(2).mean(dims).chunk(2)
    return -0.5 * BETA * ((chosen - rejected) - (reference_chosen - reference_rejected))


def make_inputs(dtype: torch.dtype, s: float, shape: tuple[int, ...], pairs: int, seed: int) -> tuple[Tensor, ...]:
    """Prediction, target and reference `[2B, ...]`: the reference's errors are 0.25, the policy has gone the share s of
    the way to the target on the chosen clips and half of it on the rejected ones, with noise of the size s on top."""
    generator = torch.Generator().manual_seed(seed)
    target, residual, noise = (torch.randn(2 * pairs, *shape, generator=generator) for _ in range(3))
    residual *= 0.5
    share = s * torch.tensor([1.0, 0.5]).repeat_interleave(pairs).view(-1, *[1] * len(shape))
    reference = target + residual
    return (reference - share * residual + s * noise).to(dtype), target.to(dtype), reference.to(dtype)


def logit_errors(
    dtype: torch.dtype, s: float, shape: tuple[int, ...] = (16, 21, 60, 104), pairs: int = 8, seed: int = 0
) -> dict[str, float]:
    """Contender -> root mean square error of the logits over their root mean square, over the pairs."""
    inputs = make_inputs(dtype, s, shape, pairs, seed)
    prediction, target, reference = inputs
    truth = recipe(*(x.double() for x in inputs))
    objective = pf.DPO(BETA)
    cached = pf.reference_errors(reference, target)
    logits = (
        recipe(*inputs),
        recipe(*(x.float() for x in inputs)),
        pf.preference_loss(prediction, target, reference, objective=objective).logits,
        pf.preference_loss(prediction, target, cached, objective=objective).logits,
    )
    return {name: float((z.double() - truth).norm() / truth.norm()) for name, z in zip(CONTENDERS, logits, strict=True)}


def main() -> None:
    print("| dtype, s |", " | ".join(CONTENDERS), "|")
    print("|---" * (1 + len(CONTENDERS)) + "|")
    for dtype, s in CASES:
        cells = (f"{value:.2g}" if value > 0.1 else f"{value:.0e}" for value in logit_errors(dtype, s).values())
        print(f"| {str(dtype).removeprefix('torch.')}, {s:.0e} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
