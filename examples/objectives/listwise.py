"""A whole ranking instead of pairs: the Plackett-Luce likelihood of K clips of one prompt, best first. With K = 2 it is
DPO. Run: python examples/objectives/listwise.py"""

import torch

import pgdpo_fast as pf


def listwise(prediction, target, reference, prompts, beta):
    """Loss `[]` of `prompts` rankings of K clips, `[prompts * K, C, F, H, W]`, each ranking best first."""
    reward = -0.5 * beta * pf.sample_errors(prediction, target, reference).gap.view(prompts, -1)
    rest = reward.flip(1).logcumsumexp(1).flip(1)  # of each clip and all that are worse
    return (rest - reward)[:, :-1].sum(1).mean()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(6, 4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = reference.clone().requires_grad_()
    loss = listwise(prediction, target, reference, prompts=2, beta=10.0)
    loss.backward()
    print(f"loss {loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")
