"""Diffusion-KTO on clips that are liked or not, one label each and no pairs: 1 - sigmoid(+-beta (reward - baseline)),
the baseline the batch's mean reward where that is positive. Run: python examples/objectives/kto.py"""

import torch

import pgdpo_fast as pf


def kto(prediction, target, reference, liked, beta):
    """Loss `[]` of clips `[N, C, F, H, W]`, any N; liked: `[N]`, 1 or 0."""
    reward = -pf.sample_errors(prediction, target, reference).gap[:, 0]
    baseline = reward.mean().clamp(min=0).detach()  # over ranks: all_reduce it
    sign = 2.0 * liked - 1.0
    return (1 - torch.sigmoid(sign * beta * (reward - baseline))).mean()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(5, 4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = reference.clone().requires_grad_()
    loss = kto(prediction, target, reference, torch.tensor([1, 0, 1, 1, 0]), beta=10.0)
    loss.backward()
    print(f"loss {loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")
