"""Clips from a model: the deterministic sampler (Euler for flow matching, DDIM for DDPM) in latents.

Noise comes from the same draws as training, so equal (seed, id) start equal clips whatever the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pgdpo_fast.diffusion import DiffusionProcess, FlowMatching, draw_noise
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelAdapter, NoisedBatch
from pgdpo_fast.preemption import check_stop

__all__ = ["sample", "sampling_times"]


def sampling_times(process: DiffusionProcess, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Process times [steps] a sampler visits, from pure noise on: shifted noise levels, or trailing step indices."""
    if steps < 1:
        raise ConfigError(f"steps={steps}: expected at least 1")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)[:-1]
    if isinstance(process, FlowMatching):
        return process.shift * even / (1 + (process.shift - 1) * even)
    return (even * process.num_timesteps).round().long().sub(1).clamp(min=0)


@torch.no_grad()
def sample(
    adapter: ModelAdapter,
    model: nn.Module,
    process: DiffusionProcess,
    conditioning: Sequence[Mapping[str, Tensor]],
    shape: Sequence[int],
    *,
    seed: int,
    ids: Sequence[str],
    steps: int = 32,
) -> Tensor:
    """Sample one clip per prompt.

    Args:
        conditioning: of N prompts, as `Example.conditioning` holds it.
        shape: (C, F, H, W) of the latents.
        ids: N names; with `seed` they decide the noise.

    Returns:
        Latents `[N, C, F, H, W]`, fp32, on the model's device.
    """
    device = next(model.parameters()).device
    given = {name: tensor.to(device) for name, tensor in adapter.collate(conditioning).items()}
    x = draw_noise(seed, ids, [0] * len(ids), tuple(shape), device)
    times = sampling_times(process, steps, device)
    for now, after in zip(times, [*times[1:], None], strict=True):
        check_stop()
        t = now.expand(len(ids))
        prediction = adapter.predict(model, NoisedBatch(x, process.model_timestep(t), given)).float()
        clean = process.clean_from_prediction(x, prediction, t)
        if after is None:
            return clean
        x = process.add_noise(clean, process.noise_from_prediction(x, prediction, t), after.expand(len(ids)))
