"""What a prediction is a prediction of: diffusion processes, timestep samplers, and the draw of timestep and noise.

Needs torch alone. Everything is a frozen dataclass or a pure function: there is no random-number state anywhere.
"""

from pgdpo_fast.diffusion.draw import Visit, draw_noise, draw_uniform
from pgdpo_fast.diffusion.process import DDPM, PROCESSES, DiffusionProcess, FlowMatching, process_from_name
from pgdpo_fast.diffusion.timesteps import (
    SAMPLERS,
    LogitNormal,
    Shifted,
    TimestepSampler,
    Uniform,
    sampler_from_name,
)

__all__ = [
    "DDPM",
    "PROCESSES",
    "SAMPLERS",
    "DiffusionProcess",
    "FlowMatching",
    "LogitNormal",
    "Shifted",
    "TimestepSampler",
    "Uniform",
    "Visit",
    "draw_noise",
    "draw_uniform",
    "process_from_name",
    "sampler_from_name",
]
