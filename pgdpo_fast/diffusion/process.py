"""Diffusion processes: how latents are noised, and what the network's prediction is a prediction of.

Every process is linear: x_t = a·clean + b·noise and target = c·clean + d·noise, with a, b, c, d functions of time.
A process states these four in float64; noising, targets and their inverse follow, in float32 whatever the input dtype.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgdpo_fast.diffusion.timesteps import TimestepSampler, as_sampler, shift_time
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.options import build, choice, flag, integer, number, wrong

__all__ = ["DDPM", "PROCESSES", "DiffusionProcess", "FlowMatching", "process_from_name"]


class _Coefficients(NamedTuple):
    """x_t = clean·clean_x + noise·noise_x, target = clean·clean_y + noise·noise_y; float64 [B] (or [steps])."""

    clean_x: Tensor
    noise_x: Tensor
    clean_y: Tensor
    noise_y: Tensor


class DiffusionProcess:
    """What FlowMatching and DDPM share. Process time `t` is a [B] tensor: float noise levels or integer step indices.

    Latents are [B, ...] of any floating dtype, on any device; coefficients are computed in float64 from `t`, rounded
    once to float32, and moved to the latents. Shapes that do not match raise ValueError, wrong dtypes TypeError.
    """

    def timestep(self, u: Tensor) -> Tensor:
        """Process time [B], on u's device, of uniforms `u`: float32 or float64 [B] in (0, 1), one time per uniform."""
        raise NotImplementedError

    def model_timestep(self, t: Tensor) -> Tensor:
        """What the network is called with [B]: float32 for flow matching, int64 for DDPM."""
        raise NotImplementedError

    def posterior_scale(self, t: Tensor) -> Tensor:
        """c_t, float32 [B]: a denoising step loses c_t nats per dimension per unit of mean squared prediction error."""
        raise NotImplementedError

    def _coefficients(self, t: Tensor) -> _Coefficients:
        raise NotImplementedError

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, float32 [B, ...]: the latents `clean` with `noise` (same shape) at process time `t`."""
        at = self._coefficients(t)
        return _combine(clean, at.clean_x, noise, at.noise_x)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output at `t`, float32 [B, ...]: noise_scale·noise + clean_scale·clean."""
        at = self._coefficients(t)
        return _combine(clean, at.clean_y, noise, at.noise_y)

    def target_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(noise_scale, clean_scale), float32 [B] on t's device: target = noise_scale·noise + clean_scale·clean."""
        at = self._coefficients(t)
        return at.noise_y.float(), at.clean_y.float()

    def clean_from_prediction(self, noised: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents a prediction at `noised` (x_t) implies, float32 [B, ...]; exact for the exact target."""
        at = self._coefficients(t)
        determinant = at.clean_x * at.noise_y - at.noise_x * at.clean_y
        return _combine(noised, at.noise_y / determinant, prediction, -at.noise_x / determinant)

    def noise_from_prediction(self, noised: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The noise a prediction at `noised` (x_t) implies, float32 [B, ...]; exact for the exact target.

        With `clean_from_prediction`, `add_noise(clean, noise, t_next)` is a deterministic sampling step (DDIM, or Euler
        for flow matching).
        """
        at = self._coefficients(t)
        determinant = at.clean_x * at.noise_y - at.noise_x * at.clean_y
        return _combine(noised, -at.clean_y / determinant, prediction, at.clean_x / determinant)


@dataclass(frozen=True)
class FlowMatching(DiffusionProcess):
    """Rectified flow: x_t = (1 - σ)·clean + σ·noise, target = noise - clean (Wan, HunyuanVideo, LTX).

    Process time is σ in [0, 1], float64 from `timestep`; the network is called with 1000·σ.

    shift: s of σ' = sσ / (1 + (s - 1)σ), applied to the sampled time (Wan: 3 at 480p, 5 at 720p; HunyuanVideo: 7).
    timestep_sampler: "uniform", "logit-normal", "shifted", {"name": ..., options} or a TimestepSampler.
    timestep_range: σ is drawn from this part of [0, 1] only, as the sampler's conditional distribution
        (an expert that serves part of the noise levels trains on its own part).
    sde_steps, sde_noise: the stochastic sampler behind `posterior_scale`: number of equal steps, and a of the
        diffusion a·√(σ/(1 - σ)).
    Raises ConfigError for an impossible value.
    """

    shift: float = 1.0
    timestep_sampler: TimestepSampler | str | dict = "uniform"
    timestep_range: tuple[float, float] = (0.0, 1.0)
    sde_steps: int = 40
    sde_noise: float = 0.7

    def __post_init__(self) -> None:
        name = type(self).__name__
        _set(
            self,
            shift=number(f"{name}.shift", self.shift, 0, open_low=True),
            timestep_sampler=as_sampler(self.timestep_sampler),
            timestep_range=_range(name, self.timestep_range),
            sde_steps=integer(f"{name}.sde_steps", self.sde_steps, 2, 100_000),
            sde_noise=number(f"{name}.sde_noise", self.sde_noise, 0, open_low=True),
        )

    def timestep(self, u: Tensor) -> Tensor:
        low, high = (shift_time(edge, 1 / self.shift) for edge in self.timestep_range)
        sigma = shift_time(_sample(self.timestep_sampler, u, low, high), self.shift)
        return sigma.clamp(*self.timestep_range)

    def model_timestep(self, t: Tensor) -> Tensor:
        return (1000 * _sigma(t)).float()

    def posterior_scale(self, t: Tensor) -> Tensor:
        """c_t = Δσ (1 + g²(1 - σ)/(2σ))² / (2g²), g² = a²σ/(1 - σ), Δσ = 1 / sde_steps, float32 [B].

        Two Euler-Maruyama steps of the sampler of Flow-GRPO (arXiv 2505.05470) from the same x_t, with velocities whose
        mean squared difference is e, are Gaussians whose Kullback-Leibler divergence is c_t·e per dimension. Simplifies
        to Δσ (1 + a²/2)² (1 - σ) / (2a²σ): 0 at σ = 1; below σ = Δσ, where no step starts, it keeps its value at Δσ.
        """
        a2, step = self.sde_noise**2, 1 / self.sde_steps
        sigma = _sigma(t).clamp(min=step)
        return (step * (1 + a2 / 2) ** 2 / (2 * a2) * (1 - sigma) / sigma).float()

    def _coefficients(self, t: Tensor) -> _Coefficients:
        sigma = _sigma(t)
        one = torch.ones_like(sigma)
        return _Coefficients(clean_x=1 - sigma, noise_x=sigma, clean_y=-one, noise_y=one)


@dataclass(frozen=True)
class DDPM(DiffusionProcess):
    """Variance-preserving steps: x_t = √ā·s·clean + √(1 - ā)·noise (CogVideoX, VideoCrafter2, UNet3DConditionModel).

    Process time is the step index, int64 in [0, num_timesteps), and what the network is called with.

    prediction: "epsilon" (target = noise) or "v" (target = √ā·noise - √(1 - ā)·s·clean).
    beta_schedule: "linear" in β or "scaled_linear" in √β, from beta_start to beta_end in num_timesteps steps.
    snr_shift_scale: k of ā / (k + (1 - k)ā), which divides every signal-to-noise ratio by k (CogVideoX-2B: 3).
    zero_terminal_snr: rescale so that ā is exactly 0 at the last step (arXiv 2305.08891, Algorithm 1), after the shift.
    dynamic_rescale: None (s = 1), or the final value of s, which falls linearly from 1 over the first
        dynamic_rescale_steps steps and stays there (VideoCrafter2: 0.7 over 400).
    timestep_sampler, timestep_range: as in FlowMatching, in fractions of num_timesteps.
    Raises ConfigError for an impossible value; zero_terminal_snr needs prediction="v", for the noise says nothing about
    the clean latents where ā is 0.
    """

    prediction: str = "epsilon"
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    snr_shift_scale: float = 1.0
    zero_terminal_snr: bool = False
    dynamic_rescale: float | None = None
    dynamic_rescale_steps: int = 400
    timestep_sampler: TimestepSampler | str | dict = "uniform"
    timestep_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        name = type(self).__name__
        choice(f"{name}.prediction", self.prediction, ("epsilon", "v"))
        choice(f"{name}.beta_schedule", self.beta_schedule, ("linear", "scaled_linear"))
        flag(f"{name}.zero_terminal_snr", self.zero_terminal_snr)
        integer(f"{name}.num_timesteps", self.num_timesteps, 2, 1_000_000)
        start = number(f"{name}.beta_start", self.beta_start, 0, 1, open_low=True, open_high=True)
        end = number(f"{name}.beta_end", self.beta_end, start, 1, open_high=True)
        rescale = self.dynamic_rescale
        if rescale is not None:
            rescale = number(f"{name}.dynamic_rescale", rescale, 0, 1, open_low=True, kind="null or a number in (0, 1]")
            integer(f"{name}.dynamic_rescale_steps", self.dynamic_rescale_steps, 2, self.num_timesteps)
        if self.zero_terminal_snr and self.prediction != "v":
            raise ConfigError(
                f"{name}.zero_terminal_snr=True with prediction={self.prediction!r}: the last step has "
                "no signal, so the prediction must be 'v'"
            )
        _set(
            self,
            beta_start=start,
            beta_end=end,
            dynamic_rescale=rescale,
            snr_shift_scale=number(f"{name}.snr_shift_scale", self.snr_shift_scale, 0, open_low=True),
            timestep_sampler=as_sampler(self.timestep_sampler),
            timestep_range=_range(name, self.timestep_range),
        )

    @property
    def alphas_cumprod(self) -> Tensor:
        """ā of every step, float64 [num_timesteps] on the CPU."""
        return _ddpm_schedule(self, torch.device("cpu")).alphas_cumprod.clone()

    def timestep(self, u: Tensor) -> Tensor:
        low, high = self.timestep_range
        steps = (_sample(self.timestep_sampler, u, low, high) * self.num_timesteps).long()
        # 0.29·100 is 28.999…: without the tolerance, two ranges that meet would share a step.
        first = math.floor(low * self.num_timesteps + 1e-6)
        last = math.ceil(high * self.num_timesteps - 1e-6) - 1
        return steps.clamp(first, max(first, last))

    def model_timestep(self, t: Tensor) -> Tensor:
        return self._index(t)

    def posterior_scale(self, t: Tensor) -> Tensor:
        """c_t = β_t² / (2 σ_t² α_t (1 - ā_t)) for ε, times ā_t for v, float32 [B]; σ_t² is the posterior variance.

        The Kullback-Leibler divergence of p_θ(x_{t-1}|x_t) from q(x_{t-1}|x_t, x_0) (arXiv 2006.11239, Eq. 7-8, both
        with variance σ_t² = β_t (1 - ā_{t-1})/(1 - ā_t)) is c_t·e per dimension, e the mean squared prediction error.
        At t = 0 that variance is 0; as usual (arXiv 2102.09672) it keeps its value at t = 1. At a last step with ā = 0
        the v form is finite. With a dynamic rescale, x_0 stands for the rescaled latents.
        """
        return _ddpm_schedule(self, t.device).posterior_scale[self._index(t)].float()

    def _coefficients(self, t: Tensor) -> _Coefficients:
        index = self._index(t)
        return _Coefficients(*(table[index] for table in _ddpm_schedule(self, t.device).coefficients))

    def _index(self, t: Tensor) -> Tensor:
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"t is {t.dtype}: expected int64 step indices; get them from DDPM.timestep")
        _check_values(t, (t >= 0) & (t < self.num_timesteps), f"step indices from 0 to {self.num_timesteps - 1}")
        return t.long()


class _Schedule(NamedTuple):
    """Tables of a DDPM, float64 [num_timesteps]."""

    alphas_cumprod: Tensor
    coefficients: _Coefficients
    posterior_scale: Tensor


@functools.lru_cache(maxsize=64)
def _ddpm_schedule(process: DDPM, device: torch.device) -> _Schedule:
    """The tables of `process` on `device`, computed on the CPU so that every device sees the same values."""
    with torch.device("cpu"):
        steps, dtype = process.num_timesteps, torch.float64
        if process.beta_schedule == "linear":
            beta = torch.linspace(process.beta_start, process.beta_end, steps, dtype=dtype)
        else:
            beta = torch.linspace(process.beta_start**0.5, process.beta_end**0.5, steps, dtype=dtype) ** 2
        alphas_cumprod = (1 - beta).cumprod(0)
        shift = process.snr_shift_scale
        alphas_cumprod = alphas_cumprod / (shift + (1 - shift) * alphas_cumprod)
        if process.zero_terminal_snr:
            signal = alphas_cumprod.sqrt()
            alphas_cumprod = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
        signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

        rescale = torch.ones(steps, dtype=dtype)
        if process.dynamic_rescale is not None:
            rescale[:] = process.dynamic_rescale
            falling = process.dynamic_rescale_steps
            rescale[:falling] = torch.linspace(1, process.dynamic_rescale, falling, dtype=dtype)
        if process.prediction == "v":
            clean_y, noise_y = -noise * rescale, signal
        else:
            clean_y, noise_y = torch.zeros(steps, dtype=dtype), torch.ones(steps, dtype=dtype)

        previous = torch.cat([torch.ones(1, dtype=dtype), alphas_cumprod[:-1]])
        alpha = alphas_cumprod / previous
        beta = 1 - alpha
        variance = beta * (1 - previous) / (1 - alphas_cumprod)
        variance[0] = variance[1]
        scale = beta**2 / (2 * variance * (1 - alphas_cumprod))
        # For v the factor is ā_t / α_t = ā_{t-1}: no division by α_t, which is 0 at a last step without signal.
        scale = scale * previous if process.prediction == "v" else scale / alpha

        coefficients = _Coefficients(signal * rescale, noise, clean_y, noise_y)
        return _Schedule(
            alphas_cumprod.to(device), _Coefficients(*(table.to(device) for table in coefficients)), scale.to(device)
        )


def _set(instance: DiffusionProcess, **values: Any) -> None:
    """Store validated fields of a frozen dataclass."""
    for field, value in values.items():
        object.__setattr__(instance, field, value)


def _range(owner: str, value: Any) -> tuple[float, float]:
    """A pair (low, high) with 0 <= low < high <= 1, as floats."""
    where, expected = f"{owner}.timestep_range", "two numbers, 0 <= low < high <= 1"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise wrong(where, value, expected)
    low, high = (number(where, edge, 0, 1, kind=expected) for edge in value)
    if low >= high:
        raise wrong(where, value, expected)
    return low, high


def _sample(sampler: TimestepSampler | str | dict, u: Tensor, low: float, high: float) -> Tensor:
    """Times, float64 [B], of the uniforms `u` under `sampler` restricted to [low, high]."""
    if u.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"u is {u.dtype}: expected float64 (or float32) uniforms; get them from draw_uniform")
    sampler, u = as_sampler(sampler), u.double()
    _check_values(u, (u > 0) & (u < 1), "uniforms strictly between 0 and 1")
    if (low, high) != (0.0, 1.0):
        below_low, below_high = sampler.cdf(u.new_tensor([low, high]))
        u = below_low + (below_high - below_low) * u
    return sampler.quantile(u)


def _sigma(t: Tensor) -> Tensor:
    """Noise levels `t` in float64, checked."""
    if t.dtype not in (torch.float64, torch.float32):
        raise TypeError(
            f"t is {t.dtype}: expected float64 (or float32) noise levels; get them from FlowMatching.timestep"
        )
    sigma = t.double()
    _check_values(t, (sigma >= 0) & (sigma <= 1), "noise levels from 0 to 1, not model timesteps")
    return sigma


def _check_values(values: Tensor, valid: Tensor, expected: str) -> None:
    """ValueError unless every value is valid. Looked at on the CPU only: on an accelerator it would cost a sync."""
    if values.device.type == "cpu" and not bool(valid.all()):
        raise ValueError(f"got {values[~valid].tolist()[:4]}: expected {expected}")


def _combine(first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor) -> Tensor:
    """first_scale·first + second_scale·second in float32 [B, ...], scales being [B]."""
    if first.shape != second.shape:
        raise ValueError(f"shapes {tuple(first.shape)} and {tuple(second.shape)}: expected two equal shapes [B, ...]")
    if not (first.is_floating_point() and second.is_floating_point()):
        raise TypeError(f"dtypes {first.dtype} and {second.dtype}: expected floating-point latents")
    if first_scale.dim() != 1 or first.dim() == 0 or first_scale.shape[0] != first.shape[0]:
        raise ValueError(
            f"t has shape {tuple(first_scale.shape)} for latents {tuple(first.shape)}: expected [B], "
            "B being the first dimension of the latents"
        )
    scale = torch.stack([first_scale, second_scale]).to(first.device, torch.float32)
    scale = scale.view(2, -1, *[1] * (first.dim() - 1))
    return scale[0] * first.float() + scale[1] * second.float()


PROCESSES: dict[str, tuple[type[DiffusionProcess], dict[str, Any]]] = {
    "flow-matching": (FlowMatching, {}),
    "ddpm": (DDPM, {}),
    "wan": (FlowMatching, {"shift": 3.0}),
    "hunyuan-video": (FlowMatching, {"shift": 7.0}),
    "cogvideox-2b": (DDPM, {"prediction": "v", "snr_shift_scale": 3.0, "zero_terminal_snr": True}),
    "cogvideox-5b": (DDPM, {"prediction": "v", "snr_shift_scale": 1.0, "zero_terminal_snr": True}),
    "videocrafter2": (DDPM, {"prediction": "epsilon", "dynamic_rescale": 0.7}),
}


def process_from_name(name: str, **options: Any) -> DiffusionProcess:
    """The process called `name`, with `options` (fields of its dataclass) on top of that name's own.

    "flow-matching" and "ddpm" are the plain dataclasses; "wan", "hunyuan-video", "cogvideox-2b", "cogvideox-5b" and
    "videocrafter2" carry the settings those models were trained with.
    Raises ConfigError, listing what is known and what was probably meant, for an unknown name or option.
    """
    return build("process", PROCESSES, name, options)
