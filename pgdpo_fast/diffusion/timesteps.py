"""Timestep samplers as inverse distribution functions: one uniform in (0, 1) gives one time in (0, 1).

Pure functions of their input, in float64, so a timestep is reproducible from (seed, pair id, draw) alone. Time runs
from 0 (clean) to 1 (noise); the process turns it into a noise level or a step index.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pgdpo_fast.options import build, number, wrong

__all__ = [
    "SAMPLERS",
    "LogitNormal",
    "Shifted",
    "TimestepSampler",
    "Uniform",
    "sampler_from_name",
    "shift_time",
    "stratify",
]


Time = TypeVar("Time", float, Tensor)


def shift_time(time: Time, shift: float) -> Time:
    """s t / (1 + (s - 1) t): moves times in [0, 1] towards noise for s > 1. Its inverse is the shift 1 / s.

    The resolution-dependent shift of Stable Diffusion 3 (arXiv 2403.03206, Eq. 23), used by Wan, HunyuanVideo, LTX.
    """
    # Written so that rounding cannot leave [0, 1], where the logit of a sampler would be NaN.
    shifted = shift * time
    return shifted / ((1 - time) + shifted)


class TimestepSampler:
    """A distribution of times on (0, 1), given by its inverse distribution function."""

    def quantile(self, u: Tensor) -> Tensor:
        """Times, float64 in (0, 1), of the probabilities `u`, float64 in (0, 1)."""
        raise NotImplementedError

    def cdf(self, time: Tensor) -> Tensor:
        """Probability, float64, of a time below `time`, float64 in [0, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(TimestepSampler):
    """Every time equally likely."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def cdf(self, time: Tensor) -> Tensor:
        return time


@dataclass(frozen=True)
class LogitNormal(TimestepSampler):
    """logit(t) ~ Normal(mean, std): favours the middle times (arXiv 2403.03206, Eq. 19).

    Raises ConfigError for a mean that is not finite or a std that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        mean = number("LogitNormal.mean", self.mean)
        std = number("LogitNormal.std", self.std, 0, open_low=True)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, time: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(time) - self.mean) / self.std)


@dataclass(frozen=True)
class Shifted(TimestepSampler):
    """Uniform times moved by `shift_time`: towards noise for shift > 1. Raises ConfigError unless shift > 0."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        shift = number("Shifted.shift", self.shift, 0, open_low=True)
        object.__setattr__(self, "shift", shift)

    def quantile(self, u: Tensor) -> Tensor:
        return shift_time(u, self.shift)

    def cdf(self, time: Tensor) -> Tensor:
        return shift_time(time, 1 / self.shift)


SAMPLERS: dict[str, tuple[type[TimestepSampler], dict[str, Any]]] = {
    "uniform": (Uniform, {}),
    "logit-normal": (LogitNormal, {}),
    "shifted": (Shifted, {}),
}


def sampler_from_name(name: str, **options: Any) -> TimestepSampler:
    """The sampler called `name` ("uniform", "logit-normal", "shifted") with its options; ConfigError if unknown."""
    return build("timestep_sampler", SAMPLERS, name, options)


def as_sampler(value: object) -> TimestepSampler:
    """A sampler from itself, its name, or a mapping {"name": ..., option: value}, as a configuration file gives it."""
    if isinstance(value, TimestepSampler) and dataclasses.is_dataclass(value):
        return value
    if isinstance(value, str):
        return sampler_from_name(value)
    if isinstance(value, dict) and "name" in value:
        return sampler_from_name(**value)
    expected = f"a name ({', '.join(SAMPLERS)}), a mapping with the key 'name', or a TimestepSampler"
    raise wrong("timestep_sampler", value, expected)


def stratify(u: Tensor, draws: Tensor, rotation: Tensor, strata: int) -> Tensor:
    """Uniforms [B] rearranged so that each run of `strata` draws of a pair visits every 1/strata of (0, 1) once.

    `u` and `rotation` are float64 [B] in (0, 1), `draws` int64 [B]. `rotation` must be the same for the draws
    k·strata .. k·strata + strata - 1 of a pair; being uniform itself, it leaves every single result uniform.
    """
    stratum = (draws + (rotation * strata).long()) % strata
    return (stratum + u) / strata
