"""DPO with an anchor on both videos, as in SimpleTuner: the policy is held near its reference on the chosen and on the
rejected clip, from the same two passes as the rest. Run: python examples/objectives/both_anchors.py"""

import torch

import pgdpo_fast as pf


def both_anchors(prediction, target, reference, beta, alpha):
    """Loss `[]` of pairs `[2B, C, F, H, W]`, chosen half first: DPO and alpha / 2 mean (p - q)^2 of both videos."""
    errors = pf.paired_errors(prediction, target, reference, anchor=True)
    logits = 0.5 * beta * (errors.gap_rejected - errors.gap_chosen)
    anchor = 0.5 * alpha * (errors.anchor + errors.anchor_rejected)
    return (torch.nn.functional.softplus(-logits) + anchor).mean()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(4, 4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = (reference + 0.1).requires_grad_()
    loss = both_anchors(prediction, target, reference, beta=100.0, alpha=0.5)
    loss.backward()
    print(f"loss {loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")
