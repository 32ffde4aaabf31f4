"""A new objective in ten lines. It runs on the fused passes of whatever backend serves the tensors: only the few
numbers per pair between them go through plain torch. Run: python examples/new_objective.py"""

from dataclasses import dataclass

import torch

import pgdpo_fast as pf


@dataclass(frozen=True)
class SquaredHinge(pf.Objective):
    """max(0, 1 - z)^2 with z = beta/2 (r_w - r_l)."""

    beta: float = 100.0

    def terms(self, errors, posterior_scale=None):
        logits = 0.5 * self.beta * (errors.gap_rejected - errors.gap_chosen)
        return self.result((1 - logits).clamp(min=0) ** 2, logits)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    prediction, target, reference = (torch.randn(4, 16, 5, 30, 52, generator=generator) for _ in range(3))
    prediction.requires_grad_()

    out = pf.preference_loss(prediction, target, reference, objective=SquaredHinge(beta=100.0))
    out.loss.backward()
    print(f"loss {out.loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")

    # Or without a class: the errors themselves, differentiable, [B, G].
    errors = pf.paired_errors(prediction, target, reference)
    (errors.gap_chosen - 0.5 * errors.gap_rejected).mean().backward()
