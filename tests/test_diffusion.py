"""Noising, targets and timesteps are those the models were trained with, in float32 whatever the latents' dtype."""

import ast
import dataclasses
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pgdpo_fast.diffusion as diffusion
from pgdpo_fast.diffusion import (
    DDPM,
    PROCESSES,
    FlowMatching,
    LogitNormal,
    Shifted,
    Uniform,
    draw_uniform,
    process_from_name,
    sampler_from_name,
)
from pgdpo_fast.diffusion.timesteps import shift_time
from pgdpo_fast.errors import ConfigError

SHAPE = (4, 3, 6, 6)
EVERY_PROCESS = sorted(PROCESSES)


def latents(batch, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(batch, *SHAPE, generator=generator)
    noise = torch.randn(batch, *SHAPE, generator=generator)
    return clean.to(dtype), noise.to(dtype)


def times_of(process, count=9):
    """Process times over the whole range, both ends included."""
    if isinstance(process, FlowMatching):
        return torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.linspace(0, process.num_timesteps - 1, count, dtype=torch.float64).long()


def column(values):
    return values.view(-1, 1, 1, 1, 1)


# Against the schedulers the models are sampled with.


def cog_options(name):
    process = process_from_name(name)
    return process, dict(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=process.snr_shift_scale,
    )


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b"])
@pytest.mark.parametrize("scheduler_name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_cogvideox_scheduler_recovers_the_clean_latents_from_the_exact_v(name, scheduler_name):
    diffusers = pytest.importorskip("diffusers")
    process, options = cog_options(name)
    options.pop("clip_sample") if scheduler_name == "CogVideoXDPMScheduler" else None
    scheduler = getattr(diffusers, scheduler_name)(**options)
    scheduler.set_timesteps(50)
    torch.testing.assert_close(process.alphas_cumprod.float(), scheduler.alphas_cumprod.float(), rtol=2e-5, atol=1e-9)
    clean, noise = latents(1)
    for step in (999, 979, 499, 19):
        t = torch.tensor([step])
        noised, v = process.add_noise(clean, noise, t), process.target(clean, noise, t)
        if scheduler_name == "CogVideoXDPMScheduler":
            if step == 999:
                continue  # its log-SNR is infinite here; it still predicts the clean latents, as checked by DDIM
            found = scheduler.step(v, None, step, None, noised)[1]
        else:
            found = scheduler.step(v, step, noised).pred_original_sample
        torch.testing.assert_close(found, clean, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "schedule, prediction, zero_snr",
    [
        ("scaled_linear", "epsilon", False),
        ("linear", "epsilon", False),
        ("scaled_linear", "v", False),
        ("linear", "v", True),
        ("scaled_linear", "v", True),
    ],
)
def test_ddim_scheduler_recovers_the_clean_latents(schedule, prediction, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    process = DDPM(prediction=prediction, beta_schedule=schedule, zero_terminal_snr=zero_snr)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=schedule,
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(process.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-8)
    clean, noise = latents(1)
    for step in (999, 500, 1, 0):
        t = torch.tensor([step])
        noised, exact = process.add_noise(clean, noise, t), process.target(clean, noise, t)
        # ε at the last step is divided by √ā = 0.07, and the scheduler's own table is float32.
        found = scheduler.step(exact, step, noised)
        tolerance = 2e-3 if prediction == "epsilon" else 2e-5
        torch.testing.assert_close(found.pred_original_sample, clean, rtol=0, atol=tolerance)
        if step > 1:
            back = process.add_noise(clean, noise, t - 1)
            torch.testing.assert_close(found.prev_sample, back, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_flow_match_euler_walks_from_any_of_its_sigmas_to_the_clean_latents(shift):
    diffusers = pytest.importorskip("diffusers")
    process = FlowMatching(shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    clean, noise = latents(1)
    scheduler.set_timesteps(sigmas=torch.tensor([1.0, 0.75, 0.5, 0.25]).numpy())
    sigmas = process.timestep(torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(scheduler.sigmas[1:4].double(), sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.timesteps[1:4], process.model_timestep(sigmas), rtol=1e-6, atol=0)
    for index, sigma in enumerate(scheduler.sigmas[:4]):
        t = sigma[None].double()
        sample = process.add_noise(clean, noise, t)
        scheduler.set_begin_index(index)
        scheduler._step_index = None
        for timestep in scheduler.timesteps[index:]:
            sample = scheduler.step(process.target(clean, noise, t), timestep, sample).prev_sample
        torch.testing.assert_close(sample, clean, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cogvideox-2b", [0.9975, 0.389, 0.0953, 0.0108, 0]),
        ("cogvideox-5b", [0.9991, 0.6525, 0.241, 0.0328, 0]),
    ],
)
def test_cogvideox_signal_levels(name, expected):
    found = process_from_name(name).alphas_cumprod[[0, 250, 500, 750, 999]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-5)
    assert found[-1] == 0


# Against definitions in float64.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_flow_matching_equals_its_definition(dtype):
    process = FlowMatching(shift=3.0)
    clean, noise = latents(9, dtype=dtype)
    sigma = times_of(process)
    noised, velocity = process.add_noise(clean, noise, sigma), process.target(clean, noise, sigma)
    expected = (1 - column(sigma)) * clean.double() + column(sigma) * noise.double()
    assert noised.dtype == velocity.dtype == torch.float32
    torch.testing.assert_close(noised.double(), expected, rtol=0, atol=6e-7)
    assert torch.equal(velocity, noise.float() - clean.float())
    assert torch.equal(noised[0], clean[0].float()) and torch.equal(noised[-1], noise[-1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [None, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        dict(prediction="epsilon"),
        dict(prediction="v"),
        dict(prediction="v", zero_terminal_snr=True, snr_shift_scale=3.0),
        dict(prediction="epsilon", beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_timesteps=600),
    ],
)
def test_ddpm_equals_its_definition(options, rescale, dtype):
    process = DDPM(**options, dynamic_rescale=rescale)
    steps = process.num_timesteps
    root = 0.5 if process.beta_schedule == "scaled_linear" else 1.0
    first, last = process.beta_start**root, process.beta_end**root
    signal, alpha_bar = [], 1.0
    for i in range(steps):
        alpha_bar *= 1 - (first + (last - first) * i / (steps - 1)) ** (1 / root)
        snr = alpha_bar / (1 - alpha_bar) / process.snr_shift_scale
        signal.append(math.sqrt(snr / (1 + snr)))
    if process.zero_terminal_snr:
        signal = [(value - signal[-1]) * signal[0] / (signal[0] - signal[-1]) for value in signal]

    clean, noise = latents(9, dtype=dtype)
    t = times_of(process)
    signal = column(torch.tensor([signal[i] for i in t.tolist()], dtype=torch.float64))
    scale = column(
        torch.tensor(
            [1.0 if rescale is None else max(1 - (1 - rescale) * i / 399, rescale) for i in t.tolist()],
            dtype=torch.float64,
        )
    )
    x0, spread = clean.double() * scale, (1 - signal**2).sqrt()
    target = noise.double() if process.prediction == "epsilon" else signal * noise.double() - spread * x0
    noised, found = process.add_noise(clean, noise, t), process.target(clean, noise, t)
    assert noised.dtype == found.dtype == torch.float32
    torch.testing.assert_close(noised.double(), signal * x0 + spread * noise.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.double(), target, rtol=0, atol=1e-6)


def test_bfloat16_latents_lose_nothing_in_the_noising():
    clean, noise = latents(9, dtype=torch.bfloat16)
    for name in EVERY_PROCESS:
        process = process_from_name(name)
        t = times_of(process)
        assert torch.equal(process.add_noise(clean, noise, t), process.add_noise(clean.float(), noise.float(), t))
        assert torch.equal(process.target(clean, noise, t), process.target(clean.float(), noise.float(), t))


@pytest.mark.parametrize("name", EVERY_PROCESS)
def test_the_exact_prediction_gives_back_clean_and_noise_at_both_ends(name):
    process = process_from_name(name)
    clean, noise = latents(9)
    t = times_of(process)
    noised, exact = process.add_noise(clean, noise, t), process.target(clean, noise, t)
    # VideoCrafter2 divides by √ā·s, 0.048 at the last step.
    tolerance = 3e-5 if name in ("ddpm", "videocrafter2") else 2e-6
    torch.testing.assert_close(process.clean_from_prediction(noised, exact, t), clean, rtol=0, atol=tolerance)
    torch.testing.assert_close(process.noise_from_prediction(noised, exact, t), noise, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", EVERY_PROCESS)
def test_target_coefficients_build_the_target(name):
    process = process_from_name(name)
    clean, noise = latents(9)
    t = times_of(process)
    noise_scale, clean_scale = process.target_coefficients(t)
    assert noise_scale.shape == clean_scale.shape == (9,) and noise_scale.dtype == clean_scale.dtype == torch.float32
    expected = column(noise_scale) * noise + column(clean_scale) * clean
    torch.testing.assert_close(process.target(clean, noise, t), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b"])
def test_the_last_step_without_signal_is_pure_noise_and_predicts_the_clean_latents(name):
    process = process_from_name(name)
    clean, noise = latents(2)
    t = torch.tensor([999, 999])
    assert torch.equal(process.add_noise(clean, noise, t), noise)
    assert torch.equal(process.target(clean, noise, t), -clean)
    assert torch.equal(process.clean_from_prediction(noise, -clean, t), clean)
    assert torch.isfinite(process.posterior_scale(t)).all()


def test_noising_and_inversion_are_differentiable_even_after_a_first_use_in_inference_mode():
    process = DDPM(prediction="v", beta_end=0.0123)  # a schedule no other test has cached
    clean, noise = latents(2)
    t = torch.tensor([10, 900])
    with torch.inference_mode():
        process.add_noise(clean, noise, t)
    prediction = process.target(clean, noise, t).requires_grad_()
    process.clean_from_prediction(process.add_noise(clean, noise, t), prediction, t).sum().backward()
    expected = -(1 - process.alphas_cumprod[t]).sqrt()
    torch.testing.assert_close(prediction.grad[:, 0, 0, 0, 0].double(), expected, rtol=1e-6, atol=0)


# Posterior scales: the divergence between two denoising steps, worked out from their means.


def gaussian_divergence(left_mean, right_mean, variance):
    """Kullback-Leibler divergence a dimension of Gaussians of equal variance."""
    return (left_mean - right_mean) ** 2 / (2 * variance)


@pytest.mark.parametrize(
    "options",
    [
        dict(prediction="epsilon"),
        dict(prediction="v"),
        dict(prediction="v", zero_terminal_snr=True, snr_shift_scale=3.0),
    ],
)
def test_posterior_scale_of_ddpm_is_the_divergence_of_a_denoising_step(options):
    process = DDPM(**options)
    abar = [1.0, *process.alphas_cumprod.tolist()]
    x0, eps, error = 0.4, -1.3, 0.37
    for step in (1, 2, 400, 997, 998, 999):
        now, before = abar[step + 1], abar[step]
        beta = 1 - now / before
        variance = beta * (1 - before) / (1 - now)

        def posterior_mean(clean, x, now=now, before=before, beta=beta):
            return (math.sqrt(before) * beta * clean + math.sqrt(now / before) * (1 - before) * x) / (1 - now)

        x = math.sqrt(now) * x0 + math.sqrt(1 - now) * eps
        if process.prediction == "epsilon":
            wrong = (x - math.sqrt(1 - now) * (eps + error)) / math.sqrt(now)
        else:
            v = math.sqrt(now) * eps - math.sqrt(1 - now) * x0
            wrong = math.sqrt(now) * x - math.sqrt(1 - now) * (v + error)
        expected = gaussian_divergence(posterior_mean(x0, x), posterior_mean(wrong, x), variance) / error**2
        assert process.posterior_scale(torch.tensor([step])).item() == pytest.approx(expected, rel=1e-5)


def test_posterior_scale_of_flow_matching_is_the_divergence_of_a_stochastic_step():
    process = FlowMatching(sde_steps=25, sde_noise=0.9)
    x, velocity, error, step = 0.7, -0.2, 0.31, 1 / 25
    for sigma in (0.04, 0.2, 0.5, 0.9, 0.999):
        diffusion_squared = 0.81 * sigma / (1 - sigma)

        def mean(v, sigma=sigma, diffusion_squared=diffusion_squared):
            return x - step * (v + diffusion_squared / (2 * sigma) * (x + (1 - sigma) * v))

        expected = gaussian_divergence(mean(velocity), mean(velocity + error), diffusion_squared * step) / error**2
        found = process.posterior_scale(torch.tensor([sigma], dtype=torch.float64)).item()
        assert found == pytest.approx(expected, rel=1e-6)
    ends = process.posterior_scale(torch.tensor([0.0, 0.04, 1.0], dtype=torch.float64))
    assert ends[0] == ends[1] and ends[2] == 0


@pytest.mark.parametrize("name", EVERY_PROCESS)
def test_posterior_scale_is_finite_and_not_negative_everywhere(name):
    process = process_from_name(name)
    t = (
        torch.linspace(0, 1, 1001, dtype=torch.float64)
        if isinstance(process, FlowMatching)
        else torch.arange(process.num_timesteps)
    )
    scale = process.posterior_scale(t)
    assert scale.dtype == torch.float32 and scale.shape == t.shape
    assert torch.isfinite(scale).all() and (scale >= 0).all()


# Timesteps.

U = torch.linspace(0, 1, 20_002, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize(
    "sampler", [Uniform(), LogitNormal(), LogitNormal(mean=-0.5, std=1.7), Shifted(3.0), Shifted(0.4)]
)
def test_quantile_inverts_cdf_and_increases(sampler):
    times = sampler.quantile(U)
    assert times.dtype == torch.float64 and (times.diff() > 0).all() and times.min() > 0 and times.max() < 1
    torch.testing.assert_close(sampler.cdf(times), U, rtol=0, atol=1e-12)
    ends = sampler.cdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [0.0, 1.0]


def test_logit_normal_has_its_mean_and_deviation():
    logits = torch.logit(LogitNormal(mean=0.3, std=0.8).quantile(U))
    assert logits.mean().item() == pytest.approx(0.3, abs=1e-6)
    assert logits.std().item() == pytest.approx(0.8, rel=2e-3)


def test_flow_timestep_is_the_shifted_sample():
    assert torch.equal(FlowMatching().timestep(U), U)
    sigma = FlowMatching(shift=5.0).timestep(U)
    torch.testing.assert_close(sigma, 5 * U / (1 + 4 * U), rtol=1e-14, atol=0)
    both = FlowMatching(shift=2.0, timestep_sampler=Shifted(2.5)).timestep(U)
    torch.testing.assert_close(both, sigma, rtol=1e-12, atol=0)
    for shift in (0.3, 3.0, 7.0, 11.1):
        edges = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53, 1.0], dtype=torch.float64)
        moved = shift_time(shift_time(edges, 1 / shift), shift)
        assert moved[0] == 0 and moved[-1] == 1 and shift_time(1.0, 1 / shift) == 1.0
    middle = FlowMatching(shift=3.0, timestep_sampler="logit-normal").timestep(torch.tensor([0.5], dtype=torch.float64))
    assert middle.item() == pytest.approx(0.75)


def test_ddpm_timestep_reaches_every_step_equally():
    process = DDPM(num_timesteps=50)
    t = process.timestep(U)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=50)
    assert counts.numel() == 50 and (counts - 400).abs().max() <= 1
    edges = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert process.timestep(edges).tolist() == [0, 49]
    assert DDPM(timestep_sampler=LogitNormal(std=9.0)).timestep(edges).tolist() == [0, 999]


def test_model_timestep_is_what_the_networks_are_called_with():
    sigma = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    flow = FlowMatching().model_timestep(sigma)
    assert flow.dtype == torch.float32 and flow.tolist() == [0.0, 250.0, 1000.0]
    steps = DDPM().model_timestep(torch.tensor([0, 999], dtype=torch.int32))
    assert steps.dtype == torch.int64 and steps.tolist() == [0, 999]


@pytest.mark.parametrize("sampler", ["uniform", "logit-normal", "shifted"])
def test_a_timestep_range_is_the_conditional_distribution(sampler):
    whole = FlowMatching(shift=3.0, timestep_sampler=sampler)
    part = dataclasses.replace(whole, timestep_range=(0.6, 0.9))
    sigma = whole.timestep(U)
    kept = sigma[(sigma >= 0.6) & (sigma <= 0.9)]
    expected = torch.quantile(kept, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    found = part.timestep(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert part.timestep(U).min() >= 0.6 and part.timestep(U).max() <= 0.9


def test_ranges_that_meet_share_no_step():
    u = torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for edge in (0.29, 0.5, 0.57):  # 0.29·100 rounds to below 29, and 0.57·100 to below 57
        low = DDPM(num_timesteps=100, timestep_range=(0.0, edge)).timestep(u)
        high = DDPM(num_timesteps=100, timestep_range=(edge, 1.0)).timestep(u)
        assert high.min() == low.max() + 1 == round(100 * edge)
        assert low.min() == 0 and high.max() == 99


def test_a_draw_gives_the_same_timestep_however_it_is_asked_for():
    process = process_from_name("wan", timestep_sampler="logit-normal")
    together = process.timestep(draw_uniform(0, ["a", "b", "c"], [4, 5, 6]))
    assert process.timestep(draw_uniform(0, ["b"], [5])).item() == together[1].item()


# Construction.


def test_processes_are_values():
    for name in EVERY_PROCESS:
        process = process_from_name(name)
        assert process == process_from_name(name) and hash(process) == hash(process_from_name(name))
        assert pickle.loads(pickle.dumps(process)) == process
        with pytest.raises(dataclasses.FrozenInstanceError):
            process.timestep_range = (0.0, 0.5)
    assert repr(FlowMatching(shift=3)) == repr(FlowMatching(shift=3.0))


def test_names_carry_the_settings_of_the_models():
    assert process_from_name("wan") == FlowMatching(shift=3.0)
    assert process_from_name("wan", shift=5.0) == FlowMatching(shift=5.0)
    assert process_from_name("cogvideox-2b") == DDPM(prediction="v", snr_shift_scale=3.0, zero_terminal_snr=True)
    rescale = process_from_name("videocrafter2")
    ones = torch.ones(4, 1)
    x = rescale.add_noise(ones, torch.zeros(4, 1), torch.tensor([0, 200, 399, 999])).double().squeeze()
    scale = x / rescale.alphas_cumprod[[0, 200, 399, 999]].sqrt()
    torch.testing.assert_close(
        scale, torch.tensor([1.0, 1 - 0.3 * 200 / 399, 0.7, 0.7], dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_samplers_come_by_name_mapping_or_value():
    expected = LogitNormal(mean=0.5, std=2.0)
    assert sampler_from_name("logit-normal", mean=0.5, std=2) == expected
    mapping = {"name": "logit-normal", "mean": 0.5, "std": 2.0}
    assert FlowMatching(timestep_sampler=mapping).timestep_sampler == expected
    assert DDPM(timestep_sampler=expected).timestep_sampler == expected
    assert FlowMatching(timestep_range=[0, 0.5]).timestep_range == (0.0, 0.5)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: process_from_name("flow-maching"),
            "process.name='flow-maching': expected one of .*cogvideox-2b.*flow-matching.*did you mean 'flow-matching'",
        ),
        (lambda: process_from_name(["wan"]), "process.name=.*expected one of"),
        (lambda: sampler_from_name(None), "timestep_sampler.name=None"),
        (lambda: process_from_name("wan", shfit=3.0), "process.shfit: wan takes .*did you mean 'shift'"),
        (lambda: process_from_name("uniform-ish"), "process.name=.uniform-ish.: expected one of"),
        (lambda: sampler_from_name("logitnormal"), "did you mean 'logit-normal'"),
        (lambda: sampler_from_name("uniform", std=1.0), "std: uniform takes no settings"),
        (lambda: FlowMatching(timestep_sampler={"mean": 1.0}), "timestep_sampler"),
        (lambda: FlowMatching(timestep_sampler=3), "timestep_sampler"),
        (lambda: FlowMatching(shift=0), "FlowMatching.shift=0: expected a number above 0"),
        (lambda: FlowMatching(shift="3"), "FlowMatching.shift='3'"),
        (lambda: FlowMatching(shift=math.nan), "FlowMatching.shift=nan"),
        (lambda: FlowMatching(shift=True), "FlowMatching.shift=True"),
        (lambda: FlowMatching(sde_steps=1), "sde_steps=1"),
        (lambda: FlowMatching(sde_noise=-1.0), "sde_noise=-1.0"),
        (lambda: FlowMatching(timestep_range=(0.5, 0.5)), "timestep_range"),
        (lambda: FlowMatching(timestep_range=(0.5,)), "timestep_range"),
        (lambda: FlowMatching(timestep_range=(-0.1, 0.5)), "timestep_range"),
        (lambda: LogitNormal(std=0.0), "LogitNormal.std=0.0"),
        (lambda: LogitNormal(mean=math.inf), "LogitNormal.mean=inf"),
        (lambda: Shifted(shift=-3.0), "Shifted.shift=-3.0"),
        (lambda: DDPM(prediction="velocity"), "DDPM.prediction='velocity': expected one of epsilon, v"),
        (lambda: DDPM(prediction="epsilom"), "did you mean 'epsilon'"),
        (lambda: DDPM(beta_schedule="cosine"), "DDPM.beta_schedule='cosine'"),
        (lambda: DDPM(beta_start=0.0), "beta_start=0.0"),
        (lambda: DDPM(beta_start=0.02, beta_end=0.01), "beta_end=0.01"),
        (lambda: DDPM(num_timesteps=1), "num_timesteps=1"),
        (lambda: DDPM(num_timesteps=1000.0), "num_timesteps=1000.0"),
        (lambda: DDPM(snr_shift_scale=0.0), "snr_shift_scale=0.0"),
        (lambda: DDPM(prediction="v", zero_terminal_snr="yes"), "zero_terminal_snr='yes'"),
        (lambda: DDPM(zero_terminal_snr=True), "zero_terminal_snr=True with prediction='epsilon'.*must be 'v'"),
        (lambda: DDPM(dynamic_rescale=0.0), "dynamic_rescale=0.0"),
        (lambda: DDPM(dynamic_rescale=0.7, dynamic_rescale_steps=2000), "dynamic_rescale_steps=2000"),
    ],
)
def test_impossible_settings_are_named(build, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "process, t, error, message",
    [
        (FlowMatching(), torch.tensor([0.5, 0.5], dtype=torch.bfloat16), TypeError, "bfloat16"),
        (FlowMatching(), torch.tensor([500, 20]), TypeError, "int64"),
        (FlowMatching(), torch.tensor([500.0, 20.0]), ValueError, "not model timesteps"),
        (FlowMatching(), torch.tensor([0.5, math.nan]), ValueError, "noise levels from 0 to 1"),
        (DDPM(), torch.tensor([0.5, 0.5]), TypeError, "float32"),
        (DDPM(), torch.tensor([0, 1000]), ValueError, "step indices from 0 to 999"),
        (DDPM(), torch.tensor([0, -1]), ValueError, r"\[-1\].*step indices from 0 to 999"),
        (FlowMatching(), torch.tensor([0.5]), ValueError, r"t has shape \(1,\)"),
        (FlowMatching(), torch.tensor(0.5), ValueError, r"t has shape \(\)"),
        (DDPM(), torch.tensor([[5], [6]]), ValueError, r"t has shape \(2, 1\)"),
    ],
)
def test_wrong_times_are_refused(process, t, error, message):
    clean, noise = latents(2)
    for call in (process.add_noise, process.target):
        with pytest.raises(error, match=message):
            call(clean, noise, t)


def test_wrong_latents_and_uniforms_are_refused():
    process = FlowMatching()
    clean, noise = latents(2)
    t = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="two equal shapes"):
        process.add_noise(clean, noise[:1], t)
    with pytest.raises(TypeError, match="floating-point"):
        process.add_noise(clean.long(), noise.long(), t)
    for u in (torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            process.timestep(u)
    with pytest.raises(TypeError, match="float16"):
        process.timestep(torch.tensor([0.5], dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EVERY_PROCESS)
def test_gpu_equals_cpu(name):
    process = process_from_name(name)
    clean, noise = latents(9)
    t = times_of(process)
    for where in ("cpu", "cuda"):
        found = process.add_noise(clean.cuda(), noise.cuda(), t.to(where))
        torch.testing.assert_close(found.cpu(), process.add_noise(clean, noise, t), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(process.posterior_scale(t.to(where)).cpu(), process.posterior_scale(t))


# Layering.


def test_diffusion_is_built_from_torch_errors_options_and_the_standard_library():
    allowed = {"torch", *sys.stdlib_module_names}
    for path in Path(diffusion.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [node.module]
            for name in names:
                assert (
                    name.split(".")[0] in allowed
                    or name in ("pgdpo_fast.errors", "pgdpo_fast.options")
                    or name.startswith("pgdpo_fast.diffusion")
                ), f"{path.name} imports {name}"


def test_importing_diffusion_loads_no_heavy_package():
    code = (
        "import sys, pgdpo_fast.diffusion; "
        "print([m for m in ('diffusers', 'transformers', 'peft', 'triton', 'av', 'pgdpo_fast.loss', "
        "'pgdpo_fast.backends', 'pgdpo_fast.objectives') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
