"""One chosen clip against N rejected ones, as in RealDPO: the chosen clip runs forward once and its errors are computed
once. Run: python examples/objectives/one_to_many.py"""

import torch

import pgdpo_fast as pf


def one_to_many(prediction, target, reference, beta):
    """Loss `[]` of clips `[1 + N, C, F, H, W]`, the chosen one first; the mean over the N pairs."""
    gap = pf.sample_errors(prediction, target, reference).gap[:, 0]
    return torch.nn.functional.softplus(0.5 * beta * (gap[0] - gap[1:])).mean()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    target, reference = (torch.randn(4, 4, 3, 8, 8, generator=generator) for _ in range(2))
    prediction = reference.clone().requires_grad_()
    loss = one_to_many(prediction, target, reference, beta=100.0)
    loss.backward()
    print(f"loss {loss.item():.6f}, gradient norm {prediction.grad.norm().item():.3e}")
