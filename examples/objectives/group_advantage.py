"""Groups of clips of one prompt with a score each, as in GRPO: advantages are scores standardised in the group, and
each clip's implicit reward is raised or lowered by its own, its ratio to the policy that drew it clipped.
Run: python examples/objectives/group_advantage.py"""

import torch

import pgdpo_fast as pf


def group_advantage(prediction, target, behaviour, scores, beta, clip=0.2):
    """Loss `[]` of P prompts of K clips, `[P * K, C, F, H, W]`; behaviour: predictions of the policy that drew them (or
    of the reference); scores: `[P, K]`."""
    advantage = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
    ratio = torch.exp(-0.5 * beta * pf.sample_errors(prediction, target, behaviour).gap).view_as(scores)
    return -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, behaviour = (torch.randn(6, 4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = behaviour.clone().requires_grad_()
    loss = group_advantage(prediction, target, behaviour, torch.rand(2, 3, generator=generator), beta=10.0)
    loss.backward()
    print(f"loss {loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")
