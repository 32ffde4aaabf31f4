"""docs/adopt.md runs: every line it gives for a trainer equals that trainer's formula, in loss and gradient.

The page is the only place the lines stand. Here are the formulas, written out from squared differences in float64, and
the inputs each needs; a row of the page without a formula, or a formula without a row, fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pgdpo_fast.bench.logit_error import CONTENDERS, logit_errors
from torch.nn import functional as F

import pgdpo_fast as pf

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "adopt.md").read_text()
VIDEO = (4, 3, 5, 6)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


# The page ------------------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    """The text below a `## ` heading, up to the next one."""
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.M)[0]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def snippets() -> dict[str, str]:
    """Anchor -> the python block under each `### ` heading."""
    found = re.findall(r"^### (.+?)\n\n```python\n(.*?)```", section("The lines"), flags=re.M | re.S)
    return {anchor(heading): code for heading, code in found}


def table() -> dict[str, str]:
    """Trainer -> the code that takes the place of its loss."""
    lines = [line for line in section("The table").splitlines() if line.startswith("| ")][1:]
    code, blocks = {}, snippets()
    for line in lines:
        trainer, _, ours, _ = (cell.strip() for cell in line.strip("|").split(" |")[:4])
        link = re.fullmatch(r"\[.+\]\(#(.+)\)", ours)
        if link:
            code[trainer] = blocks[link[1]]
        else:
            arguments = re.fullmatch(r"`(.+)`", ours)[1]
            code[trainer] = f"loss = pf.preference_loss(prediction, target, reference, objective={arguments}).loss"
    return code


def diffs() -> list[tuple[str, str]]:
    """(before, after) of each diff block."""
    blocks = re.findall(r"```diff\n(.*?)```", section("Three diffs"), flags=re.S)
    return [
        tuple("\n".join(line[1:] for line in block.splitlines() if line[:1] in (" ", sign)) for sign in "-+")
        for block in blocks
    ]


def run(code: str, inputs: dict) -> torch.Tensor:
    names = {"pf": pf, "torch": torch, "F": F, "math": math, **inputs}
    exec(code, names)
    return names["loss"]


# The inputs ----------------------------------------------------------------------------------------------------------


def pairs(count: int = 4, video: tuple[int, ...] = VIDEO, seed: int = 0) -> dict:
    """A batch `[2B, ...]` in float64: residuals of chosen and rejected that agree in some pairs and conflict in others,
    a policy part of the way from reference to target, further for the chosen clips."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ones = [1] * len(video)
    agreement = torch.tensor([0.9, 0.7, -0.6, 0.2])[torch.arange(count) % 4].double().view(-1, *ones)
    target, chosen = normal(2 * count, *video), 0.5 * normal(count, *video)
    residual = torch.cat([chosen, agreement * chosen + 0.3 * normal(count, *video)])
    share = torch.cat([torch.full((count, *ones), 0.2), torch.full((count, *ones), 0.1)]).double()
    prediction = target + (1 - share) * residual + 0.1 * normal(2 * count, *video)
    return {"prediction": prediction, "target": target, "reference": target + residual, "beta": 50.0}


def per_pair(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_options(**options) -> Callable[[], dict]:
    return lambda: {**pairs(), **options}


# The formulas --------------------------------------------------------------------------------------------------------


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


def errors(x: dict) -> tuple[torch.Tensor, ...]:
    """Mean squared errors `[B]`: policy chosen, policy rejected, reference chosen, reference rejected."""
    policy, frozen = mean((x["prediction"] - x["target"]) ** 2), mean((x["reference"] - x["target"]) ** 2)
    return *policy.chunk(2), *frozen.chunk(2)


def difference(x: dict) -> torch.Tensor:
    """m = d_w - d_l, `[B]`."""
    chosen, rejected, ref_chosen, ref_rejected = errors(x)
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def minus_log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-x))


def half(x):
    return minus_log_sigmoid(-0.5 * x["beta"] * difference(x)).mean()


def no_half(x):
    return minus_log_sigmoid(-x["beta"] * difference(x)).mean()


def hinge(x):
    return (1 + x["beta"] * difference(x)).clamp(min=0).mean()


def ipo(x):
    return ((-difference(x) - 1 / (2 * x["beta"])) ** 2).mean()


def weighted(x):
    return (x["weight"] * minus_log_sigmoid(-0.5 * x["beta"] * difference(x))).mean()


def a_sigmoid_a_column(x):
    policy = ((x["prediction"] - x["target"]) ** 2).mean(dim=(1, 2, 3))
    frozen = ((x["reference"] - x["target"]) ** 2).mean(dim=(1, 2, 3))
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), frozen.chunk(2)
    return minus_log_sigmoid(-0.5 * x["beta"] * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()


def clean_error(v: torch.Tensor, target: torch.Tensor, seed: int) -> torch.Tensor:
    """Squared error of the clean latents that v-predictions imply, over 1 - abar, for a random timestep a clip."""
    generator = torch.Generator().manual_seed(seed)
    noised = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    abar = 0.2 + 0.6 * torch.rand(len(v), *[1] * (v.ndim - 1), generator=generator, dtype=v.dtype)
    clean, implied = (abar.sqrt() * noised - (1 - abar).sqrt() * velocity for velocity in (target, v))
    return mean((implied - clean) ** 2 / (1 - abar))


def weighted_clean(x):
    policy, frozen = (clean_error(x[name], x["target"], seed=3) for name in ("prediction", "reference"))
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), frozen.chunk(2)
    return (
        x["weight"] * minus_log_sigmoid(-0.5 * x["beta"] * ((chosen - rejected) - (ref_chosen - ref_rejected)))
    ).mean()


def one_against_many(x):
    total = 0
    for n in range(len(x["rejected"])):
        one = x["rejected"][n : n + 1], x["rejected_target"][n : n + 1], x["rejected_reference"][n : n + 1]
        chosen = clean_error(x["chosen"], x["chosen_target"], 5) - clean_error(
            x["chosen_reference"], x["chosen_target"], 5
        )
        rejected = clean_error(one[0], one[1], 7) - clean_error(one[2], one[1], 7)
        total = total + minus_log_sigmoid(-0.5 * 5000 * (chosen - rejected)).mean()
    return total


def one_against_many_inputs():
    x = pairs(3)
    chosen, rejected = zip(*(x[name].chunk(2) for name in ("prediction", "target", "reference")), strict=True)
    # beta is fixed at 5000: a policy close to its reference keeps the sigmoid alive.
    near = [r + 0.01 * (p - r) for p, _, r in (chosen, rejected)]
    names = ("", "_target", "_reference")
    return {
        **{f"chosen{n}": t[:1] for n, t in zip(names, (near[0], *chosen[1:]), strict=True)},
        **{f"rejected{n}": t for n, t in zip(names, (near[1], *rejected[1:]), strict=True)},
    }


def interleaved(x):
    policy, frozen = mean((x["prediction"] - x["target"]) ** 2), mean((x["reference"] - x["target"]) ** 2)
    m = (policy[0::2] - frozen[0::2]) - (policy[1::2] - frozen[1::2])
    return minus_log_sigmoid(-0.5 * x["beta"] * m).mean()


def without_given_tokens(x):
    kept = {name: x[name][:, x["given"] :] for name in ("prediction", "target", "reference")}
    return half({**x, **kept})


def mean_margin_no_half(x):
    return minus_log_sigmoid(-x["beta"] * difference(x).mean())


def mean_margin(x):
    return minus_log_sigmoid(-0.5 * x["beta"] * difference(x).mean())


def shifted(x):
    chosen, rejected, ref_chosen, ref_rejected = errors(x)
    return minus_log_sigmoid(-0.5 * x["beta"] * ((chosen - ref_chosen) - x["shift"] * (rejected - ref_rejected))).mean()


def shifted_and_anchored(x):
    chosen, _, ref_chosen, _ = errors(x)
    return shifted(x) + x["weight"] * chosen.mean() + (chosen - ref_chosen).clamp(min=0).mean()


def a_chosen_clip_got_worse():
    x = pairs()
    x["prediction"][1] = 2 * x["reference"][1] - x["prediction"][1]
    return {**x, "shift": 0.25, "weight": 0.05}


def dpo_and_sft(x):
    return half(x) + x["weight"] * errors(x)[0].mean()


def summed(x):
    return half({**x, "beta": x["beta"] * math.prod(VIDEO)})


def masked_mean(x):
    mask = x["mask"].expand_as(x["target"])

    def masked_error(prediction):
        squared = mask * (prediction - x["target"]) ** 2
        return squared.flatten(1).sum(1) / mask.flatten(1).sum(1)

    (chosen, rejected), (ref_chosen, ref_rejected) = (
        masked_error(x["prediction"]).chunk(2),
        masked_error(x["reference"]).chunk(2),
    )
    return minus_log_sigmoid(-0.5 * x["beta"] * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()


def mask_inputs():
    generator = torch.Generator().manual_seed(11)
    mask = (torch.rand(4, 1, *VIDEO[1:], generator=generator, dtype=torch.float64) > 0.4).double()
    return {**pairs(), "mask": mask.repeat(2, 1, 1, 1, 1)}


def simpletuner(x):
    margin = -math.prod(VIDEO) * difference(x)
    average = x["decay"] * x["margin_ema"] + (1 - x["decay"]) * margin.detach().abs().mean()
    odds = x["target_gf"] / (1 - x["target_gf"])
    beta = (-2 * math.log(odds) / average).clamp(x["beta_min"], x["beta_max"])
    moved = mean((x["prediction"] - x["reference"]) ** 2)
    anchors = sum(half_batch.mean() for half_batch in moved.chunk(2))
    return (
        minus_log_sigmoid(0.5 * beta * margin).mean()
        + 0.5 * x["anchor_alpha"] * anchors
        + x["sft_weight"] * errors(x)[0].mean()
    )


def mindspeed(x):
    log_probability = [-x["loss_beta"] * x["t"] * e for e in errors(x)]
    chosen, rejected, ref_chosen, ref_rejected = log_probability
    z = x["beta"] * ((chosen - rejected) - (ref_chosen - ref_rejected))
    smoothed = (1 - x["smoothing"]) * minus_log_sigmoid(z) + x["smoothing"] * minus_log_sigmoid(-z)
    return (smoothed * x["weight"] - x["pref_ftx"] * chosen).mean()


def flow_dpo(x):
    return minus_log_sigmoid(-0.5 * x["beta"] * (1 - x["t"]) ** 2 * difference(x)).mean()


def smpo(x):
    scale = -0.5 * x["beta"] * (2 * x["p0"] - 1) * 10
    return minus_log_sigmoid(scale * difference(x)).mean()


def scaled_gradient(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x.detach() + factor * (x - x.detach())


def conflict_factor(x: dict, dims) -> torch.Tensor:
    """clamp((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1) where the two agree in direction, else 1; sums over `dims`."""
    g_w, g_l = (x["prediction"] - x["target"]).detach().chunk(2)
    square, product = (g_w**2).sum(dims), (g_w * g_l).sum(dims)
    return torch.where(product > 0, ((1 - x["mu"]) * square / product).clamp(0, 1), torch.ones_like(product))


def safeguarded(dims):
    def loss(x):
        chosen, rejected, ref_chosen, ref_rejected = errors(x)
        rejected = scaled_gradient(rejected, conflict_factor(x, dims))
        return minus_log_sigmoid(-0.5 * x["beta"] * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()

    return loss


def dmpo(x):
    p, q = torch.sigmoid(-0.5 * x["beta"] * difference(x)), 1 - x["alpha"]
    return (p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))).mean()


def dspo(x):
    doubt = 1 - torch.sigmoid(-0.5 * x["beta"] * difference(x)).view(-1, 1, 1, 1, 1)
    p, y, q = (x[name].chunk(2)[0] for name in ("prediction", "target", "reference"))
    return mean((p - y - x["beta"] * doubt * (p - q)) ** 2).mean()


def dspo_sdxl(x):
    doubt = 1 - torch.sigmoid(-0.5 * x["beta"] * difference(x))
    moved = mean((x["prediction"] - x["reference"]).chunk(2)[0] ** 2)
    return (doubt**2 * moved).mean() if moved.mean() >= 0.1 else (doubt**2).mean()


def far_inputs():
    x = pairs()
    return {**x, "prediction": x["reference"] + 4 * (x["prediction"] - x["reference"]), "beta": 1.0}


def ddim_step_mean(noise, x):
    abar, before, sigma = (x[name].repeat(2).view(-1, 1, 1, 1, 1) for name in ("alpha", "alpha_prev", "sigma"))
    clean = (x["latents"] - (1 - abar).sqrt() * noise) / abar.sqrt()
    return before.sqrt() * clean + (1 - before - sigma**2).sqrt() * noise


def clipped_step_ratio(x):
    sigma = x["sigma"].repeat(2).view(-1, 1, 1, 1, 1)

    def log_probability(noise):
        z = (x["next_latents"] - ddim_step_mean(noise, x)) / sigma
        return mean(-0.5 * z**2 - sigma.log() - 0.5 * math.log(2 * math.pi))

    ratio = (log_probability(x["prediction"]) - log_probability(x["reference"])).exp()
    chosen, rejected = ratio.clamp(1 - x["eps"], 1 + x["eps"]).log().chunk(2)
    return minus_log_sigmoid(x["beta"] * (chosen - rejected)).mean()


def step_inputs():
    generator = torch.Generator().manual_seed(13)
    x = pairs()
    x |= {
        "latents": torch.randn(8, *VIDEO, generator=generator, dtype=torch.float64),
        "alpha": per_pair(0.3, 0.5, 0.6, 0.8),
        "alpha_prev": per_pair(0.4, 0.6, 0.68, 0.86),
        "sigma": per_pair(0.2, 0.25, 0.15, 0.2),
        "eps": 0.02,
        "beta": 10.0,
    }
    x["next_latents"] = ddim_step_mean(x["target"], x)
    return x


def kto(x):
    g = mean((x["reference"] - x["target"]) ** 2) - mean((x["prediction"] - x["target"]) ** 2)
    baseline = max(g.mean().item(), 0.0)
    utility = torch.where(x["liked"] == 1, g - baseline, baseline - g)
    return (1 - torch.sigmoid(x["beta"] * utility)).mean()


def dgpo(x):
    e, ref = mean((x["prediction"] - x["target"]) ** 2), mean((x["reference"] - x["target"]) ** 2)
    total = 0
    for group in range(x["groups"]):
        inside = x["group"] == group
        score = (x["advantage"] * x["beta"] * (e - ref) / x["group_size"])[inside].sum().detach()
        total = total + torch.sigmoid(score) * (x["advantage"] * e)[inside].sum()
    return total / len(e)


def mapo(x):
    chosen, rejected, *_ = errors(x)

    def odds(e):
        return x["snr"] * e / (torch.exp(x["snr"] * e) - 1)

    return (chosen + x["beta"] * minus_log_sigmoid(1000 * (odds(chosen) - odds(rejected)))).mean()


def reference_free(x):
    chosen, rejected, *_ = errors(x)
    return minus_log_sigmoid(-0.5 * x["beta"] * (chosen - rejected)).mean()


@dataclass(frozen=True)
class Formula:
    """A trainer's loss of the inputs, the inputs in float64, and which of them gradients are compared of."""

    loss: Callable[[dict], torch.Tensor]
    inputs: Callable[[], dict] = pairs
    leaves: tuple[str, ...] = ("prediction",)


WEIGHT = {"weight": per_pair(1.3, 0.4, 2.0, 0.7)}
TOKENS = {"video": (12, 16)}
FORMULAS = {
    "DiffusionDPO (Salesforce), UnifiedReward": Formula(half, lambda: pairs(video=(4, 8, 8))),
    "diffusers' `train_diffusion_dpo_sdxl.py`": Formula(half, lambda: pairs(video=(4, 8, 8))),
    "diffusers' `train_diffusion_dpo.py`, `sigmoid`": Formula(no_half, lambda: pairs(video=(4, 8, 8))),
    "diffusers' `train_diffusion_dpo.py`, `hinge`": Formula(hinge, lambda: {**pairs(video=(4, 8, 8)), "beta": 15.0}),
    "diffusers' `train_diffusion_dpo.py`, `ipo`": Formula(ipo, lambda: pairs(video=(4, 8, 8))),
    "VideoDPO, as shipped": Formula(a_sigmoid_a_column),
    "VideoDPO, one margin per video": Formula(weighted, with_options(**WEIGHT)),
    "VideoDPO_wan": Formula(weighted, with_options(**WEIGHT)),
    "VideoDPO_wan, `cogvideo_dpo.py`": Formula(weighted_clean, with_options(**WEIGHT)),
    "RealDPO": Formula(one_against_many, one_against_many_inputs, ("chosen", "rejected")),
    "flow_grpo `train_sd3_dpo.py`": Formula(half),
    "Flow-Factory": Formula(half),
    "verl-omni": Formula(interleaved),
    "Flux_DPO": Formula(no_half, lambda: pairs(**TOKENS)),
    "LTX trainers with conditioning frames": Formula(without_given_tokens, lambda: {**pairs(**TOKENS), "given": 3}),
    "invoke-training": Formula(mean_margin_no_half),
    "diffengine": Formula(mean_margin),
    "Video_inpainting_DPO": Formula(shifted, with_options(shift=0.25)),
    "Video_inpainting_DPO, anchored": Formula(shifted_and_anchored, a_chosen_clip_got_worse),
    "RPO, Reg-DPO": Formula(dpo_and_sft, with_options(weight=0.3)),
    "SimpleTuner `flow_dpo`, `norm_type=mean`": Formula(half),
    "SimpleTuner `flow_dpo`, `norm_type=sum`": Formula(summed, with_options(beta=0.1)),
    "SimpleTuner `flow_dpo`, `norm_type=masked_mean`": Formula(masked_mean, mask_inputs),
    "SimpleTuner `flow_dpo`, automatic β, anchor, SFT": Formula(
        simpletuner,
        with_options(
            margin_ema=per_pair(9.0)[0],
            decay=0.99,
            target_gf=0.2,
            beta_min=1e-3,
            beta_max=1.0,
            anchor_alpha=0.7,
            sft_weight=0.2,
        ),
    ),
    "MindSpeed-MM": Formula(
        mindspeed,
        with_options(t=per_pair(900, 500, 120, 30), loss_beta=0.5, beta=0.1, smoothing=0.1, pref_ftx=0.02, **WEIGHT),
    ),
    "Flow-DPO (arXiv 2501.13918)": Formula(flow_dpo, with_options(t=per_pair(0.9, 0.5, 0.12, 0.03))),
    "SmPO": Formula(smpo, with_options(p0=0.8, beta=10.0)),
    "Diffusion-SDPO, `diffusion-dpo`": Formula(safeguarded((0, 1, 2, 3, 4)), with_options(mu=0.9)),
    "Diffusion-SDPO, a λ for each pair": Formula(safeguarded((1, 2, 3, 4)), with_options(mu=0.9)),
    "Diffusion-SDPO, `dmpo`": Formula(dmpo, with_options(alpha=0.01)),
    "DSPO; Diffusion-SDPO, `dspo` on SD 1.5": Formula(dspo),
    "DSPO; Diffusion-SDPO, `dspo` on SDXL": Formula(dspo_sdxl),
    "SPO, LPO": Formula(clipped_step_ratio, step_inputs),
    "Diffusion-KTO": Formula(kto, with_options(liked=per_pair(1, 0, 0, 1, 1, 1, 0, 1))),
    "DGPO": Formula(
        dgpo,
        with_options(
            advantage=per_pair(1.1, -0.4, -1.5, 0.8, 0.3, 0.9, -1.2, 0.0),
            group=torch.tensor([0, 1, 0, 1, 1, 0, 1, 0]),
            groups=2,
            group_size=4,
        ),
    ),
    "MaPO": Formula(mapo, with_options(snr=0.5, beta=0.1)),
    "reference-free DPO": Formula(reference_free),
}


# The tests -----------------------------------------------------------------------------------------------------------


def cast(inputs: dict, dtype: torch.dtype, leaves: tuple[str, ...] = ()) -> dict:
    """Tensors in `dtype` (integers stay), the leaves with a gradient of their own."""
    floating = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    out = {**inputs, **{k: v.to(dtype) for k, v in floating.items()}}
    return out | {k: out[k].detach().clone().requires_grad_() for k in leaves}


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of theirs as a whole, which may not be zero."""
    size = theirs.norm().item()
    assert size > 1e-8
    assert (ours.double() - theirs).norm().item() <= tolerance * size


def test_every_trainer_on_the_page_has_a_formula_and_every_formula_a_row():
    assert list(table()) == list(FORMULAS)


def test_every_line_on_the_page_is_linked_from_the_table():
    linked = set(re.findall(r"\]\(#(.+?)\)", section("The table")))
    assert linked == set(snippets())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("trainer", FORMULAS)
def test_the_line_on_the_page_is_the_loss_of_the_trainer(trainer, dtype):
    formula = FORMULAS[trainer]
    inputs = cast(formula.inputs(), dtype, formula.leaves)
    theirs = cast(inputs, torch.float64, formula.leaves)
    loss, expected = run(table()[trainer], inputs), formula.loss(theirs)
    agree(loss.detach(), expected.detach(), TOLERANCE[dtype])
    loss.backward()
    expected.backward()
    for name in formula.leaves:
        agree(inputs[name].grad, theirs[name].grad, TOLERANCE[dtype])


def test_dspo_on_sdxl_takes_its_other_branch_far_from_the_reference():
    inputs = cast(far_inputs(), torch.float64, ("prediction",))
    theirs = cast(inputs, torch.float64, ("prediction",))
    moved = (inputs["prediction"] - inputs["reference"]).chunk(2)[0].square().mean().item()
    near = pairs()
    assert (near["prediction"] - near["reference"]).chunk(2)[0].square().mean().item() < 0.1 <= moved
    loss, expected = run(snippets()["dspo-on-sdxl"], inputs), dspo_sdxl(theirs)
    agree(loss.detach(), expected.detach(), 1e-12)
    loss.backward()
    expected.backward()
    agree(inputs["prediction"].grad, theirs["prediction"].grad, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("index", range(3))
def test_before_and_after_of_a_diff_are_the_same_loss(index, dtype):
    generator = torch.Generator().manual_seed(17)
    x = pairs() | {name: torch.randn(n, *VIDEO, generator=generator) for name, n in (("noise", 4), ("clean", 8))}
    if index == 1:  # a flow target
        shift = torch.cat([x["noise"], x["noise"]]) - x["clean"] - x["target"]
        x |= {name: x[name] + shift for name in ("prediction", "reference", "target")}
    before, after = (cast(x, dtype, ("prediction",)) for _ in range(2))
    losses = [run(code, inputs) for code, inputs in zip(diffs()[index], (before, after), strict=True)]
    for loss in losses:
        loss.backward()
    # The lines before round as their authors have them: in the dtype of the weights, or in float32.
    tolerance = 1e-4 if dtype == torch.float32 or index > 0 else 1e-12
    agree(losses[1].detach(), losses[0].detach().double(), tolerance)
    agree(after["prediction"].grad, before["prediction"].grad.double(), tolerance)


def test_there_are_three_diffs():
    assert len(diffs()) == 3


# Claims of the page beside the table


BETAS = {"mean, with ½": ("beta", half), "mean, no ½": ("2 * beta", no_half)}


def test_the_beta_table_agrees_with_the_rows_above_it():
    x = pairs()
    for prefix, (code, formula) in BETAS.items():
        rows = [row for row in section("β conventions").splitlines() if prefix in row]
        cell = rows[0].split(" | ")[1].strip("| `")
        assert cell == code
        ours = pf.preference_loss(x["prediction"], x["target"], x["reference"], objective=pf.DPO(eval(code, {}, x)))
        agree(ours.loss, formula(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_to_float_before_the_call_changes_nothing(dtype):
    x = cast(pairs(), dtype)
    args = [x[name] for name in ("prediction", "target", "reference")]
    plain = pf.preference_loss(*args, objective=pf.DPO(50.0))
    casted = pf.preference_loss(*(t.float() for t in args), objective=pf.DPO(50.0))
    torch.testing.assert_close(plain.logits, casted.logits, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [1e-3, 1e-4])
def test_in_bfloat16_the_recipe_has_no_digit_of_the_logit_and_ours_has_seven(step):
    recipe, after_float, ours, cached = logit_errors(torch.bfloat16, step, shape=(16, 5, 24, 40), pairs=4).values()
    assert recipe > 0.5 and ours < 1e-6
    assert ours < after_float < recipe and cached < recipe


def test_the_readme_counts_the_losses_of_the_table():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert re.search(r"(\d+) losses of public trainers", readme)[1] == str(len(table()))


def test_the_readme_names_the_columns_that_are_measured():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert f"| dtype, s | {' | '.join(CONTENDERS)} |" in readme.replace("`.float()`", ".float()")


def test_a_scheduler_noising_bfloat16_latents_does_not_match_a_target_built_in_float32():
    """diffusers casts the cumulative alphas to the latents' dtype; the page warns of mixing the two."""
    schedulers = pytest.importorskip("diffusers")
    scheduler = schedulers.CogVideoXDDIMScheduler()
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 64, 8, 8, 4, generator=generator).bfloat16()
    t = torch.linspace(0, 999, 64).long()
    abar = scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    exact = abar.sqrt() * noise.double() - (1 - abar).sqrt() * clean.double()
    theirs = scheduler.get_velocity(clean, noise, t).double()
    float32 = scheduler.get_velocity(clean.float(), noise.float(), t).double()

    def off(x):
        return (x - exact).abs().flatten(1).amax(1)

    assert off(theirs).max() > 0.03
    assert off(float32).max() < 1e-5


def test_no_gradient_flows_to_a_reference_that_carries_a_graph():
    x = pairs()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    prediction = x["prediction"].requires_grad_()
    pf.preference_loss(prediction, x["target"], weight * x["reference"], objective=pf.DPO(50.0)).loss.backward()
    assert weight.grad is None and prediction.grad.norm() > 0
