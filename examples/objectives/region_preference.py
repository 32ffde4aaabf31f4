"""A preference that is about a part of the picture (a hand, a face, a logo): errors, gaps and gradients count inside
the region alone, and the given first frame of image-to-video not at all.
Run: python examples/objectives/region_preference.py"""

import torch

import pgdpo_fast as pf


def region_preference(prediction, target, reference, region, beta, given_frames=1):
    """Loss `[]` of pairs `[2B, C, F, H, W]`; region: `[B, 1, F, H, W]`, 1 inside, 0 outside, in latent pixels."""
    weight = region.clone()
    weight[:, :, :given_frames] = 0  # what stands there is not even read as a number: it may be NaN
    return pf.preference_loss(prediction, target, reference, objective=pf.DPO(beta), latent_weight=weight).loss


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(4, 4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = reference.clone().requires_grad_()
    region = torch.zeros(2, 1, 3, 8, 8)
    region[..., 2:6, 2:6] = 1
    loss = region_preference(prediction, target, reference, region, beta=100.0)
    loss.backward()
    inside = prediction.grad[:, :, 1:, 2:6, 2:6].norm() / prediction.grad.norm()
    print(f"loss {loss.item():.6f}, share of the gradient inside the region {inside.item():.3f}")
