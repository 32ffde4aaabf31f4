"""What the examples here share: a small video denoiser, a frozen copy of it as reference, batches of made-up pairs.

Stands for your model and your loader; the examples show what is around it.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import pgdpo_fast as pf

VIDEO = (4, 3, 8, 8)
OBJECTIVE = pf.DPO(beta=50.0)


class Denoiser(nn.Module):
    """Velocity of `[N, 4, F, H, W]` latents at times `[N]` in [0, 1]."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.into = nn.Conv3d(4, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.out = nn.Conv3d(width, 4, 3, padding=1)

    def forward(self, latents, time):
        hidden = self.into(latents) + self.time(time[:, None])[..., None, None, None]
        return self.out(nn.functional.silu(hidden))


def policy_and_reference(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    policy = Denoiser()
    return policy, copy.deepcopy(policy).eval().requires_grad_(False)


def batch(step: int, pairs: int = 4):
    """Noised latents `[2B, ...]` (chosen half first), times `[2B]` and velocities `[2B, ...]`, the same for one `step`.

    Chosen clips are brighter than rejected ones; noise and time are shared by the pair.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    noise = torch.randn(pairs, *VIDEO, generator=generator).repeat(2, 1, 1, 1, 1)
    clean = 0.3 * torch.randn(2 * pairs, *VIDEO, generator=generator)
    clean[:pairs] += 0.5
    time = torch.rand(pairs, generator=generator).repeat(2)
    t = time.view(-1, 1, 1, 1, 1)
    return (1 - t) * clean + t * noise, time, noise - clean


def loss_of(policy, reference, noised, time, velocity) -> pf.PreferenceLossOutput:
    """The three lines an importer of the loss writes."""
    prediction = policy(noised, time)
    with torch.no_grad():
        baseline = reference(noised, time)
    return pf.preference_loss(prediction, velocity, baseline, objective=OBJECTIVE)


def report(first: pf.PreferenceLossOutput, last: pf.PreferenceLossOutput) -> None:
    """Prints how training went; fails if the loss did not fall or the margin did not grow."""
    before, after, margin = (float(x.detach()) for x in (first.loss, last.loss, last.metrics()["rewards/margins"]))
    print(f"{Path(sys.argv[0]).stem}: loss {before:.4f} -> {after:.4f}, margin {margin:.4f}")
    assert after < before and margin > 0
