"""DenseDPO (arXiv 2506.03517) with labels per segment of a clip: 1 where the first clip is better, -1 where the second
is, 0 for a tie. Each frame is a comparison of its own, and inside it only what moves counts, by weights of its pixels.
Run: python examples/objectives/dense_segments.py"""

import torch

import pgdpo_fast as pf


def dense_segments(prediction, target, reference, labels, motion, beta):
    """Loss `[]` of pairs `[2B, C, F, H, W]`; labels: `[B, S]` of S equal segments, -1, 0 or 1; motion: `[B, 1, F,
    H, W]`, how much each latent pixel moves, >= 0: normalised to mean one over each frame."""
    frames = prediction.shape[2]
    of_frames = labels.repeat_interleave(-(-frames // labels.shape[1]), 1)[:, :frames]
    return pf.preference_loss(
        prediction,
        target,
        reference,
        objective=pf.DPO(beta),
        granularity="frame",
        frame_dim=2,
        frame_label=of_frames,
        latent_weight=motion,
    ).loss


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(4, 4, 6, 8, 8, generator=generator) for _ in range(2))
    prediction = reference.clone().requires_grad_()
    labels, motion = torch.tensor([[1, 0, -1], [1, 1, -1]]), torch.rand(2, 1, 6, 8, 8, generator=generator)
    loss = dense_segments(prediction, target, reference, labels, motion, beta=100.0)
    loss.backward()
    print(f"loss {loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")
