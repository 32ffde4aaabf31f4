"""Objectives mean what their papers say: values and gradients against 50-digit arithmetic written from the formulas."""

import dataclasses
import itertools
import math
import pickle
import random
import re
from pathlib import Path

import mpmath as mp
import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import objectives
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.objectives import GroupErrors, from_name

mp.mp.dps = 50
NAMES = ("e_w", "e_l", "d_w", "d_l", "anchor", "cross")
RATIOS = ("logit", "symmetric", "abs", "signed")


# The oracle: plain functions of 50-digit numbers, one pair at a time. `free` and `held` hold the same values; a term
# written with `held` is a constant to differentiation (the detached weights, lambda and importance of the papers).


def sigma(x):
    return 1 / (1 + mp.exp(-x))


def softplus(x):
    return mp.log1p(mp.exp(x)) if x < 0 else x + mp.log1p(mp.exp(-x))


def rewards(s):
    return -s["d_w"], -s["d_l"]


def dpo(free, held, c, beta, smoothing=0):
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - r_l)
    return (1 - smoothing) * softplus(-z) + smoothing * softplus(z), z, 1, 1, 1


def robust_dpo(free, held, c, beta, flip):
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - r_l)
    return ((1 - flip) * softplus(-z) - flip * softplus(z)) / (1 - 2 * flip), z, 1, 1, 1


def pgdpo_ratio(s, kind, beta, eps):
    r_w, r_l = rewards(s)
    below = {
        "logit": 2 / beta,
        "symmetric": abs(r_w) + abs(r_l) + 2 / beta,
        "abs": abs(r_l) + abs(eps),
        "signed": r_l + eps,
    }[kind]
    return max(min((r_w - r_l) / below, mp.mpf(10) ** 6), -(mp.mpf(10) ** 6))


def pgdpo(free, held, c, beta, k1, k2, ratio, ars, ipr, kappa, weight, attached, eps):
    rho = pgdpo_ratio(free if attached else held, ratio, beta, eps)
    alpha = sigma(k1 * rho) if ars else 1
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - alpha * r_l)
    if ipr == "none":
        return softplus(-z), z, alpha, 1, 1
    gamma = sigma(-k2 * rho)
    regularizer = {"reward": -r_w, "anchor": free["anchor"]}[ipr]
    loss = gamma * softplus(-z) + sigma(k2 * rho) * weight * {"beta": beta / 2, "one": 1}[kappa] * regularizer
    return loss, z, alpha, gamma, 1


def ipo(free, held, c, beta):
    r_w, r_l = rewards(free)
    return ((r_w - r_l) / 2 - 1 / (2 * beta)) ** 2, beta / 2 * (r_w - r_l), 1, 1, 1


def slic(free, held, c, beta, delta, weight, hinge):
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - r_l) if hinge else (free["e_l"] - free["e_w"]) / 2
    return max(mp.mpf(0), delta - z) + weight * free["e_w"] / 2, z, 1, 1, 1


def sft(free, held, c):
    return free["e_w"], 0, 1, 1, 1


def dpop(free, held, c, beta, penalty):
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - r_l - penalty * max(mp.mpf(0), -r_w))
    return softplus(-z), z, 1, 1, 1


def rpo(free, held, c, beta, weight):
    value, z, *rest = dpo(free, held, c, beta)
    return value + weight * beta / 2 * free["e_w"], z, *rest


def dpo_shift(free, held, c, beta, shift):
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - shift * r_l)
    return softplus(-z), z, shift, 1, 1


def importance_dpo(free, held, c, beta, clip, threshold, inside=False):
    raw = mp.sqrt(mp.exp(-c * held["e_w"]) * mp.exp(-c * held["e_l"]))
    w = 0 if raw < threshold else min(max(raw, 1 - clip), 1 + clip)
    r_w, r_l = rewards(free)
    z = beta / 2 * (r_w - r_l)
    return (softplus(-w * z), w * z, 1, 1, w) if inside else (w * softplus(-z), z, 1, 1, w)


def m(x):
    return mp.mpf(x)


def pgdpo_case(
    ratio="logit", ars=True, ipr="reward", kappa="beta", weight=1.0, detach=True, beta=100.0, k1=1.0, k2=1.0, eps=1e-8
):
    objective = pf.PGDPO(
        beta=beta,
        k1=k1,
        k2=k2,
        ratio=ratio,
        ars=ars,
        ipr=ipr,
        ipr_scale=kappa,
        ipr_weight=weight,
        detach_weights=detach,
        eps=eps,
    )
    return objective, pgdpo, (m(beta), m(k1), m(k2), ratio, ars, ipr, kappa, m(weight), not detach, m(eps))


CASES = {
    "dpo": (pf.DPO(beta=100.0), dpo, (m(100),)),
    "dpo-smoothed": (pf.DPO(beta=1e4, label_smoothing=0.125), dpo, (m(1e4), m(0.125))),
    "robust-dpo": (pf.RobustDPO(beta=100.0, flip=0.125), robust_dpo, (m(100), m(0.125))),
    "ipo": (pf.IPO(beta=20.0), ipo, (m(20),)),
    "slic": (pf.SLiC(delta=1.0, weight=0.5), slic, (m(5000), m(1), m(0.5), False)),
    "slic-hinge": (pf.SLiC(beta=30.0, delta=1.5, weight=0.5, hinge=True), slic, (m(30), m(1.5), m(0.5), True)),
    "sft": (pf.SFT(), sft, ()),
    "rpo": (pf.RPO(beta=50.0, weight=0.25), rpo, (m(50), m(0.25))),
    "dpop": (pf.DPOP(beta=50.0, penalty=3.0), dpop, (m(50), m(3))),
    "dpo-shift": (pf.DPOShift(beta=50.0, shift=0.75), dpo_shift, (m(50), m(0.75))),
    "sdpo": (pf.SDPO(beta=50.0, clip=0.25), importance_dpo, (m(50), m(0.25), m(0))),
    "dpo-clip-mask": (pf.DPOClipMask(beta=50.0, clip=0.0625), importance_dpo, (m(50), m(0.0625), m(0.9))),
    "sdpo-inside": (
        pf.SDPO(beta=50.0, clip=0.25, placement="inside"),
        importance_dpo,
        (m(50), m(0.25), m(0), True),
    ),
    "dpo-clip-mask-inside": (
        pf.DPOClipMask(beta=50.0, clip=0.0625, placement="inside"),
        importance_dpo,
        (m(50), m(0.0625), m(0.9), True),
    ),
    "equation": (
        pf.PGDPO.equation(),
        pgdpo,
        (m(100), m(10), m(10), "signed", True, "reward", "one", m(1), False, m(1e-8)),
    ),
    "listing": (
        pf.PGDPO.listing(),
        pgdpo,
        (m(100), m(10), m(10), "signed", True, "anchor", "one", m(1), True, m(-1e-8)),
    ),
    "pgdpo-weighted": pgdpo_case(weight=0.25, kappa="one", k1=2.0, k2=0.5, beta=30.0),
    **{
        f"pgdpo-{ratio}-{ipr}-{'detached' if detach else 'attached'}": pgdpo_case(ratio, ipr=ipr, detach=detach)
        for ratio in RATIOS
        for ipr in ("reward", "anchor", "none")
        for detach in (True, False)
    },
    **{f"pgdpo-{ratio}-ipr-only": pgdpo_case(ratio, ars=False, detach=False) for ratio in RATIOS},
}


def statistics(seed, count=24, largest=2):
    """Pairs from every decade of gap, both signs, policy better and worse than the reference on either video."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        gaps = [rng.choice((-1, 1)) * 10 ** rng.uniform(-8, largest) for _ in range(2)]
        e_w, e_l = 10 ** rng.uniform(-3, 1), 10 ** rng.uniform(-3, 1)
        rows.append((e_w, e_l, *gaps, 10 ** rng.uniform(-8, 1), rng.uniform(-1, 1) * math.sqrt(e_w * e_l)))
    return rows


def group_errors(rows, dtype=torch.float64, grad=False):
    columns = [torch.tensor(c, dtype=dtype)[:, None].requires_grad_(grad) for c in zip(*rows, strict=True)]
    return GroupErrors(*columns)


def evaluate(objective, rows, c=0.3, dtype=torch.float64):
    errors = group_errors(rows, dtype, grad=True)
    scale = torch.full((len(rows), 1), c, dtype=dtype)
    terms = objective.terms(errors, scale)
    given = [e for e in errors if e is not None]
    grads = torch.autograd.grad(terms.loss.sum(), given, allow_unused=True)
    return terms, [torch.zeros_like(e) if g is None else g for e, g in zip(given, grads, strict=True)]


def slope(function, row, c, args, name):
    """d loss / d `name` by 50-digit central differences, good to about 20 digits away from a kink."""
    held = dict(zip(NAMES, map(m, row), strict=True))
    h = mp.mpf(10) ** -22 * max(abs(held[name]), mp.mpf(10) ** -9)
    up, down = ({**held, name: held[name] + d} for d in (h, -h))
    return (function(up, held, c, *args)[0] - function(down, held, c, *args)[0]) / (2 * h)


def assert_close(found, expected, what, tolerance=1e-11, floor=1e-280):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert abs(m(a) - b) <= tolerance * abs(b) + floor, f"{what}[{i}]: {a} instead of {mp.nstr(b, 17)}"


def test_every_objective_that_has_a_name_is_compared_here():
    """`Safeguarded`, which changes gradients alone, and `Sum` have tests of their own."""
    written = {type(objective) for objective, _, _ in CASES.values()}
    assert written >= {listed.make for listed in objectives.LISTED.values()} - {pf.Safeguarded, pf.Sum}


@pytest.mark.parametrize("case", CASES)
def test_an_objective_is_its_formula(case):
    objective, function, args = CASES[case]
    rows, c = statistics(seed=len(case)), 0.3
    terms, grads = evaluate(objective, rows, c)
    expected = [function(s, s, m(c), *args) for s in (dict(zip(NAMES, map(m, r), strict=True)) for r in rows)]
    # Logits may cancel where alpha r_l is close to r_w: their error is one of the terms', not of the difference.
    for k, field in enumerate(("loss", "logits", "alpha", "gamma", "importance")):
        value = getattr(terms, field)
        assert value.shape == (len(rows), 1)
        assert_close(value[:, 0].tolist(), [m(e[k]) for e in expected], field)
    for k, name in enumerate(NAMES):
        expected = [slope(function, r, m(c), args, name) for r in rows]
        assert_close(
            grads[k][:, 0].tolist(),
            expected,
            f"d loss / d {name}",
            tolerance=1e-9,
            floor=1e-13 * max(1.0, grads[k].abs().max().item()),
        )


@pytest.mark.parametrize("case", CASES)
def test_a_beta_scale_is_another_beta_for_each_group(case):
    """Kappa = beta/2, the symmetric ratio's 2/beta and IPO's target 1/beta included; what has no beta is unmoved."""
    objective, _, _ = CASES[case]
    rows = statistics(5, count=6)
    scales = torch.tensor([0.25, 1.0, 3.0, 0.5, 2.0, 7.0], dtype=torch.float64)
    for beta_scale, shape in ((scales[:, None], (6, 1)), (scales.view(3, 2), (3, 2))):
        errors = [x.detach().view(shape).requires_grad_() for x in group_errors(rows) if x is not None]
        posterior = torch.full((shape[0], 1), 0.3, dtype=torch.float64)
        terms = objective.terms(GroupErrors(*errors), posterior, beta_scale=beta_scale)
        if objective.outer and shape[1] > 1:
            continue  # means over the groups are compared in test_fused.py
        grads = torch.autograd.grad(terms.loss.sum(), errors, allow_unused=True, materialize_grads=True)
        for i, (row, scale) in enumerate(zip(rows, scales.tolist(), strict=True)):
            beta = {"beta": objective.beta * scale} if hasattr(objective, "beta") else {}
            expected, expected_grads = evaluate(dataclasses.replace(objective, **beta), [row])
            for name in ("loss", "logits", "alpha", "gamma", "importance"):
                torch.testing.assert_close(
                    getattr(terms, name).flatten()[i], getattr(expected, name)[0, 0], rtol=1e-9, atol=0
                )
            for found, one in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(found.flatten()[i], one[0, 0], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("case", CASES)
def test_weights_carry_no_gradient_of_their_own(case):
    objective, _, _ = CASES[case]
    terms = objective.terms(group_errors(statistics(0), grad=True), torch.full((24, 1), 0.3, dtype=torch.float64))
    assert not any(getattr(terms, name).requires_grad for name in ("alpha", "gamma", "importance"))


@pytest.mark.parametrize(
    "case",
    [c for c, (o, _, _) in CASES.items() if not getattr(o, "detach_weights", False) and not o.needs_posterior_scale],
)
def test_gradients_pass_gradcheck(case):
    objective, _, _ = CASES[case]
    if getattr(objective, "ratio", None) == "signed":
        objective = dataclasses.replace(objective, eps=0.5, k1=1.0, k2=1.0)
    rows = [(0.9, 1.3, -0.021, 0.013, 0.004, 0.2), (0.4, 0.6, 0.034, -0.008, 0.001, -0.1)]
    errors = tuple(e for e in group_errors(rows, grad=True) if e is not None)
    assert torch.autograd.gradcheck(lambda *e: objective.terms(GroupErrors(*e)).loss, errors)


# Limits: no NaN and no infinity for any finite input.

EXTREME = [0.0, 1e-30, 1e-8, -1e-8, 1e-4, -1e-3, 1.0, -1.0, 1e2, -1e2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [1.0, 100.0, 1e4])
def test_every_objective_is_finite_at_the_extremes(dtype, beta):
    rows = [
        (e, e, d_w, d_l, abs(d_w), x)
        for d_w, d_l in itertools.product(EXTREME, EXTREME)
        for e, x in ((0.0, 0.0), (100.0, 1e-30), (100.0, -100.0))
    ]
    families = [
        pf.DPO(beta),
        pf.DPO(beta, 0.5),
        pf.RobustDPO(beta, 0.49),
        pf.IPO(beta),
        pf.SLiC(beta),
        pf.SLiC(beta, hinge=True),
        pf.SFT(),
        pf.RPO(beta),
        pf.DPOP(beta, 50.0),
        pf.DPOShift(beta, 0.5),
        pf.SDPO(beta),
        pf.SDPO(beta, placement="inside"),
        pf.DPOClipMask(beta),
        pf.Safeguarded(pf.DPO(beta)),
    ]
    families += [
        pf.PGDPO(beta, k, k, ratio=ratio, ipr=ipr, detach_weights=detach)
        for k in (0.1, 1.0, 100.0)
        for ratio in RATIOS
        for ipr in ("reward", "anchor")
        for detach in (True, False)
    ]
    for objective in families:
        terms, grads = evaluate(objective, rows, c=10.0, dtype=dtype)
        for name, value in (*terms._asdict().items(), *zip(NAMES, grads, strict=True)):
            bad = ~torch.isfinite(value[:, 0])
            assert not bad.any(), f"{objective}: {name} is {value[bad][0].item()} at {rows[bad.nonzero()[0, 0]]}"


def test_a_policy_equal_to_its_reference_starts_undecided():
    rows = [(0.7, 0.8, 0.0, 0.0, 0.0, 0.1)]
    for ratio in RATIOS:
        terms, _ = evaluate(pf.PGDPO(ratio=ratio, k1=10.0, k2=10.0), rows)
        assert (terms.alpha.item(), terms.gamma.item(), terms.logits.item()) == (0.5, 0.5, 0.0)
        assert terms.loss.item() == pytest.approx(0.5 * math.log(2), rel=1e-15)
    for objective in (pf.DPO(), pf.DPOP(), pf.DPOShift(), pf.PGDPO.ars_only()):
        assert evaluate(objective, rows)[0].loss.item() == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("detach", [True, False])
def test_the_signed_ratio_is_cut_at_its_pole(detach):
    objective = pf.PGDPO(ratio="signed", k1=1e-6, k2=1e-6, eps=0.25, detach_weights=detach, ipr="reward")
    rows = [(1.0, 1.0, d_w, 0.25, 0.0, 0.0) for d_w in (0.0, 0.25, 0.5)]  # r_l = -eps exactly
    terms, grads = evaluate(objective, rows)
    below = 1 / (1 + math.e)
    assert terms.alpha[:, 0].tolist() == pytest.approx([1 - below, 0.5, below])
    assert all(torch.isfinite(g).all() for g in grads)


def test_kinks_take_the_active_side():
    """At its corner a hinge still pushes: the gradient there is that of the active side, as in torch.clamp."""
    b = 15.0
    _, grads = evaluate(pf.SLiC(beta=30.0, delta=0.0, weight=0.0, hinge=True), [(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)])
    assert (grads[2].item(), grads[3].item()) == (b, -b)
    _, grads = evaluate(pf.DPOP(beta=30.0, penalty=3.0), [(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)])
    assert (grads[2].item(), grads[3].item()) == (0.5 * b * 4.0, -0.5 * b)
    _, grads = evaluate(pf.SLiC(beta=30.0, delta=1.0, weight=0.0, hinge=True), [(1.0, 1.0, -1.0, 0.0, 0.0, 0.0)])
    assert (grads[2].item(), grads[3].item()) == (0.0, 0.0)


# Relations between the objectives.


def same_bits(a, b):
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_pgdpo_without_ars_and_ipr_is_dpo_bit_for_bit(dtype, ratio):
    rows = statistics(3, count=200)
    for beta in (1.0, 100.0, 1e4):
        ours, our_grads = evaluate(pf.PGDPO(beta=beta, ars=False, ipr="none", ratio=ratio), rows, dtype=dtype)
        dpo_terms, dpo_grads = evaluate(pf.DPO(beta=beta), rows, dtype=dtype)
        assert torch.equal(ours.loss, dpo_terms.loss) and torch.equal(ours.logits, dpo_terms.logits)
        assert torch.equal(ours.alpha, dpo_terms.alpha) and torch.equal(ours.gamma, dpo_terms.gamma)
        assert all(torch.equal(a, b) for a, b in zip(our_grads, dpo_grads, strict=True))


@pytest.mark.parametrize("ratio", RATIOS)
def test_equal_temperatures_make_gamma_the_complement_of_alpha(ratio):
    terms, _ = evaluate(pf.PGDPO(ratio=ratio, k1=7.0, k2=7.0), statistics(4, count=100))
    torch.testing.assert_close(terms.gamma, 1 - terms.alpha, rtol=0, atol=2.3e-16)


def test_the_ratios_follow_the_papers_text_only_where_they_should():
    """A growing margin drives alpha to 1 and gamma to 0, unless the printed ratio meets a negative rejected reward."""
    rows = [(1.0, 1.0, -0.5, 0.5, 0.0, 0.0)]  # chosen reward +0.5, rejected reward -0.5
    for ratio in ("logit", "symmetric", "abs"):
        terms, _ = evaluate(pf.PGDPO(ratio=ratio, k1=20.0, k2=20.0), rows)
        assert terms.alpha.item() > 0.99 and terms.gamma.item() < 0.01
    terms, _ = evaluate(pf.PGDPO.equation(), rows)
    assert terms.alpha.item() < 0.01 and terms.gamma.item() > 0.99


def test_the_symmetric_ratio_stays_within_one():
    limit = 1 / (1 + math.exp(-1.0))
    terms, _ = evaluate(pf.PGDPO(ratio="symmetric"), statistics(5, count=200))
    assert terms.alpha.max() <= limit and terms.alpha.min() >= 1 - limit


def test_presets_are_the_documented_members_of_the_family():
    assert pf.PGDPO() == pf.PGDPO(
        beta=100.0,
        k1=1.0,
        k2=1.0,
        ratio="logit",
        ars=True,
        ipr="reward",
        ipr_scale="beta",
        ipr_weight=1.0,
        detach_weights=True,
        combine="pointwise",
    )
    assert pf.PGDPO.equation() == pf.PGDPO(100.0, 10.0, 10.0, ratio="signed", ipr="reward", ipr_scale="one")
    assert pf.PGDPO.listing() == pf.PGDPO(
        100.0,
        10.0,
        10.0,
        ratio="signed",
        ipr="anchor",
        ipr_scale="one",
        detach_weights=False,
        combine="outer",
        eps=-1e-8,
    )
    assert pf.PGDPO.ars_only(ratio="abs") == pf.PGDPO(ipr="none", ratio="abs")
    assert pf.PGDPO.ipr_only(beta=7.0) == pf.PGDPO(ars=False, beta=7.0)


def test_the_listing_multiplies_means_over_the_elements_of_one_video():
    """mean(gamma) mean(P) + (1 - mean gamma) mean(I), in plain floats over 40 elements."""
    rng = random.Random(8)
    d_w, d_l, anchor = ([rng.uniform(lo, 1) for _ in range(40)] for lo in (-1, -1, 0))
    errors = GroupErrors(*(torch.tensor([x], dtype=torch.float64) for x in (d_w, d_l, d_w, d_l, anchor)))
    terms = pf.PGDPO.listing(beta=3.0, k1=2.0, k2=0.5).terms(errors)
    rho = [(-w + r) / (-r - 1e-8) for w, r in zip(d_w, d_l, strict=True)]
    alpha = [1 / (1 + math.exp(-2.0 * x)) for x in rho]
    gamma = [1 / (1 + math.exp(0.5 * x)) for x in rho]
    preference = [math.log1p(math.exp(-1.5 * (-w + a * r))) for w, r, a in zip(d_w, d_l, alpha, strict=True)]
    mean = [sum(x) / 40 for x in (gamma, preference, anchor)]
    expected = mean[0] * mean[1] + (1 - mean[0]) * mean[2]
    assert terms.loss.shape == (1, 40)
    torch.testing.assert_close(terms.loss, torch.full((1, 40), expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_attached_weights_blow_up_the_first_step():
    """Where policy == reference the printed listing's gradient is k2 ln2 / (4 |eps|), about 1e5 times that of DPO at
    its usual beta of 5000, and it pushes the chosen reward down."""
    rows = [(0.7, 0.8, 0.0, 0.0, 0.0, 0.1)]
    _, listing = evaluate(pf.PGDPO.listing(), rows)
    _, usual = evaluate(pf.DPO(beta=5000.0), rows)
    assert listing[2].item() == pytest.approx(-10 * math.log(2) / 4 / 1e-8, rel=1e-6)
    assert usual[2].item() > 0 > listing[2].item()  # by the chosen gap, which descent on DPO lowers
    assert 1e5 < -listing[2].item() / usual[2].item() < 2e5
    _, equation = evaluate(dataclasses.replace(pf.PGDPO.equation(), detach_weights=False), rows)
    assert equation[2].item() == pytest.approx(-listing[2].item(), rel=1e-6)  # a positive eps turns it round
    _, detached = evaluate(dataclasses.replace(pf.PGDPO.listing(), detach_weights=True), rows)
    assert 0 < detached[2].item() < usual[2].item()


# Importance-weighted DPO.


def test_importance_weights_are_geometric_means_clipped_and_masked():
    c, rows = 0.5, [(0.1, 0.1, 0.1, -0.1, 0, 0), (0.1, 0.5, 0.1, -0.1, 0, 0), (2.0, 0.5, 0.1, -0.1, 0, 0)]
    raw = [math.sqrt(math.exp(-c * e_w) * math.exp(-c * e_l)) for e_w, e_l, *_ in rows]
    assert raw[0] > 0.9 > raw[1] > 0.8 > raw[2]
    sdpo, _ = evaluate(pf.SDPO(clip=0.125), rows, c)
    assert sdpo.importance[:, 0].tolist() == pytest.approx([raw[0], max(raw[1], 0.875), 0.875])
    masked, grads = evaluate(pf.DPOClipMask(clip=0.02), rows, c)
    assert masked.importance[:, 0].tolist() == pytest.approx([0.98, 0.0, 0.0])
    assert grads[2][1:].eq(0).all() and masked.loss[1:].eq(0).all()
    plain, plain_grads = evaluate(pf.DPO(), rows, c)
    torch.testing.assert_close(sdpo.loss, sdpo.importance * plain.loss)
    torch.testing.assert_close(evaluate(pf.SDPO(clip=0.125), rows, c)[1][2], sdpo.importance * plain_grads[2])


# Safeguarded.

SAFEGUARDED = [
    pf.DPO(100.0),
    pf.PGDPO(),
    pf.PGDPO.equation(k1=0.1, k2=0.1),
    pf.DPOShift(100.0),
    pf.DPOP(100.0),
    pf.SLiC(),
    pf.SLiC(100.0, hinge=True),
    pf.SDPO(100.0),
]


@pytest.mark.parametrize("ipr", ["reward", "anchor", "none"])
@pytest.mark.parametrize("ars", [True, False])
@pytest.mark.parametrize("ratio", ["logit", "symmetric", "abs", "signed"])
def test_a_setting_is_unused_exactly_where_the_loss_and_its_gradient_do_not_change_with_it(ratio, ars, ipr):
    torch.manual_seed(0)
    statistics = torch.rand(6, 64, 3, dtype=torch.float64) * 0.02

    def value(objective):
        errors = [x.clone().requires_grad_() for x in (*statistics[:2], *(statistics[2:4] - 0.01), *statistics[4:])]
        loss = objective.terms(pf.objectives.GroupErrors(*errors)).loss
        loss.sum().backward()
        return [loss.detach(), *(x.grad for x in errors if x.grad is not None)]

    objective = pf.PGDPO(ratio=ratio, ars=ars, ipr=ipr, eps=1e-3, combine="pointwise")
    other = {"beta": 7.0, "k1": 3.0, "k2": 3.0, "eps": 2e-3, "ipr_scale": "one", "ipr_weight": 0.5, "combine": "outer",
             "detach_weights": False, "ratio": "abs" if ratio == "signed" else "signed"}  # fmt: skip
    before, unused = value(objective), set()
    for name, changed in other.items():
        after = value(dataclasses.replace(objective, **{name: changed}))
        if len(before) == len(after) and all(map(torch.equal, before, after)):
            unused.add(name)
    assert unused == set(objective.unused_settings)
    assert pf.Safeguarded(objective).unused_settings == {f"base.{name}" for name in unused}
    assert pf.SLiC().unused_settings == {"beta"} and not pf.SLiC(hinge=True).unused_settings


@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("base", SAFEGUARDED, ids=lambda o: type(o).__name__)
def test_a_safeguarded_step_never_raises_the_chosen_error(base, mu):
    """Move both predictions by one small step along the summed gradient, as a shared parameter does. To first order the
    chosen error changes by -<p_w - y_w, G_w + G_l>, which is at most -mu times what its own gradient alone would do."""
    torch.manual_seed(0)
    raised = 0
    for trial in range(40):
        y = torch.randn(12, dtype=torch.float64)
        p_w = (y + torch.randn(12, dtype=torch.float64)).requires_grad_()
        size, noise = (2, 0.1) if trial % 2 else (30, 0.002)
        p_l = (y + size * (p_w.detach() - y) + torch.randn(12, dtype=torch.float64)).requires_grad_()
        q_w, q_l = p_w.detach() + noise * torch.randn(12), p_l.detach() + noise * torch.randn(12)
        u_w, u_l = p_w - y, p_l - y
        stats = [
            u_w.square().mean(),
            u_l.square().mean(),
            u_w.square().mean() - (q_w - y).square().mean(),
            u_l.square().mean() - (q_l - y).square().mean(),
            (p_w - q_w).square().mean(),
            (u_w * u_l).mean(),
        ]
        errors = GroupErrors(*(s.view(1, 1) for s in stats))
        scale = torch.full((1, 1), 0.01, dtype=torch.float64)
        g_w, g_l = (
            g if g is not None else torch.zeros(12, dtype=torch.float64)
            for g in torch.autograd.grad(
                pf.Safeguarded(base, mu).terms(errors, scale).loss.sum(),
                (p_w, p_l),
                retain_graph=True,
                allow_unused=True,
            )
        )
        own = (u_w * g_w).sum()
        assert (u_w * (g_w + g_l)).sum() >= mu * own - 1e-12 * own.abs()
        b_w, b_l = torch.autograd.grad(base.terms(errors, scale).loss.sum(), (p_w, p_l))
        raised += bool((u_w * (b_w + b_l)).sum() < 0)
    assert raised > 0, "the base objective never raised the chosen error, so this test shows nothing"


@pytest.mark.parametrize("base", [o for o, _, _ in CASES.values()], ids=list(CASES))
def test_safeguarding_leaves_the_value_alone_and_scales_only_the_rejected_gradient(base):
    rows, mu, c = statistics(11, count=200), 0.25, 0.3
    plain, plain_grads = evaluate(base, rows, c)
    guarded, grads = evaluate(pf.Safeguarded(base, mu, "pair"), rows, c)
    for name in plain._fields:
        assert torch.equal(getattr(guarded, name), getattr(plain, name)), name
    scale = torch.tensor(
        [min(max((1 - mu) * r[0] / r[5], 0), 1) if r[5] > 0 else 1.0 for r in rows], dtype=torch.float64
    )[:, None]
    assert 0 < (scale < 1).sum() < len(rows)
    for k in range(5):
        torch.testing.assert_close(grads[k], plain_grads[k] * (scale if k in (1, 3) else 1), rtol=1e-12, atol=0)

    rows = [(*row[:5], abs(row[5])) for row in rows]
    guarded, grads = evaluate(pf.Safeguarded(base, 0.875), rows, c)
    plain, plain_grads = evaluate(base, rows, c)
    assert torch.equal(guarded.loss, plain.loss)
    scale = 0.125 * sum(row[0] for row in rows) / sum(row[5] for row in rows)
    assert 0 < scale < 1
    for k in range(5):
        torch.testing.assert_close(grads[k], plain_grads[k] * (scale if k in (1, 3) else 1), rtol=1e-12, atol=0)
    assert pf.Safeguarded(base).needs_reference == base.needs_reference
    assert pf.Safeguarded(base).needs_anchor == base.needs_anchor
    assert pf.Safeguarded(base).needs_posterior_scale == base.needs_posterior_scale


def test_the_published_settings_of_the_safeguard():
    """arXiv 2511.03317's code: one lambda per batch; mu by model, 0 where the script is not told."""
    assert (pf.Safeguarded().mu, pf.Safeguarded().scope) == (0.0, "batch")
    for preset, mu in (("sd15", 0.9), ("sd15_dspo", 0.2), ("sdxl", 0.6)):
        made = getattr(pf.Safeguarded, preset)(pf.DPO(2000.0))
        assert made == pf.Safeguarded(pf.DPO(2000.0), mu, "batch")


# Sums.


def test_a_sum_is_its_terms_added_up():
    rows, c = statistics(3, count=60), 0.3
    parts = ((pf.SFT(), 0.5), (pf.PGDPO(ipr="anchor"), 2.0), (pf.Safeguarded(pf.SDPO(50.0), scope="pair"), 0.25))
    whole, grads = evaluate(0.5 * pf.SFT() + pf.PGDPO(ipr="anchor") * 2 + parts[2][0] * 0.25, rows, c)
    each = [evaluate(objective, rows, c) for objective, _ in parts]
    weighted = [sum(w * x for w, x in zip((0.5, 2.0, 0.25), column)) for column in zip(*(g for _, g in each))]  # noqa: B905
    torch.testing.assert_close(whole.loss, sum(w * t.loss for (_, w), (t, _) in zip(parts, each, strict=True)))
    for found, expected in zip(grads, weighted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)
    for name in ("logits", "alpha", "gamma", "importance"):
        assert torch.equal(getattr(whole, name), getattr(each[1][0], name)), "SFT has no logits to tell of"


def test_sums_are_laid_open_and_equal_objectives_counted_once():
    dpo, sft = pf.DPO(50.0), pf.SFT()
    assert dpo + sft == pf.Sum((dpo, sft)) == pf.Sum([dpo, sft], [1, 1])
    assert 2 * (dpo + 0.5 * sft) + 3 * sft == pf.Sum((dpo, sft), (2.0, 4.0))
    assert (dpo + 0.3 * sft).beta == (sft + dpo).beta == 50.0 and not hasattr(0.5 * sft, "beta")
    rpo, by_hand = pf.RPO(50.0, 0.3), dpo + 7.5 * sft
    rows = statistics(1)
    torch.testing.assert_close(evaluate(rpo, rows)[0].loss, evaluate(by_hand, rows)[0].loss, rtol=1e-13, atol=0)
    assert [t.kind for t in by_hand.kernel_terms()] == [t.kind for t in rpo.kernel_terms()]
    assert (sft + dpo).epilogue() == (dpo + sft).epilogue(), "the term whose logits are told comes first"
    assert (dpo + pf.PGDPO.listing()).epilogue() is None
    assert sum((pf.DPO(b) for b in (1.0, 2.0, 3.0)), pf.DPO(4.0)).epilogue() is not None
    assert sum((pf.DPO(b) for b in (1.0, 2.0, 3.0, 5.0)), pf.DPO(4.0)).epilogue() is None
    for wrong in (lambda: dpo + 3, lambda: dpo * dpo, lambda: "2" * dpo):
        with pytest.raises(TypeError):
            wrong()
    for weight in (0.0, -1.0, math.inf, math.nan, True):
        with pytest.raises(ConfigError, match=r"Sum\.weights="):
            weight * dpo
    for objectives_, weights in (((), ()), ((dpo,), (1.0, 2.0)), ((pf.DPO,), ()), (dpo, ())):
        with pytest.raises(ConfigError, match=r"Sum\.(objectives|weights)="):
            pf.Sum(objectives_, weights)
    with pytest.raises(ConfigError, match="not safeguarded itself"):
        pf.Safeguarded(pf.Safeguarded(dpo) + sft)


def test_a_sum_is_a_list_of_objectives_in_a_configuration():
    parts = [{"name": "dpo", "beta": 50}, {"name": "safeguarded", "base": {"name": "ipo"}}, "sft"]
    made = from_name("sum", objectives=parts, weights=[1, 0.5, 0.25])
    assert made == pf.DPO(50.0) + 0.5 * pf.Safeguarded(pf.IPO()) + 0.25 * pf.SFT()
    settings = objectives.REGISTRY.describe(made)
    assert settings["objectives"][0] == {"name": "dpo", "beta": 50.0, "label_smoothing": 0.0}
    assert objectives.REGISTRY.build(settings, "objective") == made
    assert objectives.label(settings) == "DPO + 0.5 Safeguarded IPO + 0.25 SFT"
    with pytest.raises(ConfigError) as error:
        from_name("sum", objectives=[{"name": "dpo", "betta": 1}, {"name": "sfd"}, 3], weights=[1, -2], wieght=1)
    for expected in (
        "objective.objectives[0].betta: dpo takes beta, label_smoothing; did you mean 'beta'?",
        "objective.objectives[1].name='sfd': expected one of",
        "objective.objectives[2]=3: expected a mapping with the key 'name'",
        "objective.weights=-2.0: expected a number above 0",
        "objective.wieght: sum takes objectives, weights; did you mean 'weights'?",
    ):
        assert expected in str(error.value), expected
    with pytest.raises(ConfigError, match=r"objective.objectives='dpo': expected a list of mappings"):
        from_name("sum", objectives="dpo")
    with pytest.raises(ConfigError, match=r"objective.weights=.*expected one number for every objective"):
        from_name("sum", objectives=["dpo", "sft", "ipo"], weights=[1, 2])


# Kernel form.


INSIDE_THE_KERNELS = {case: objective for case, (objective, _, _) in CASES.items() if objective.epilogue() is not None}


@pytest.mark.parametrize("case", INSIDE_THE_KERNELS)
def test_an_epilogue_is_plain_numbers_by_name(case):
    objective = INSIDE_THE_KERNELS[case]
    for o in (objective, pf.Safeguarded(objective)):
        kind, flags, parameters = o.epilogue()
        assert type(kind) is int and type(flags) is int and all(type(p) is float for p in parameters)
        for term in o.kernel_terms():
            assert type(term.parameters) is objectives.Parameters
            assert term.kind < 2**objectives.TERM_KIND_BITS and term.flags < 2**objectives.TERM_FLAG_BITS
    assert type(pf.Safeguarded(objective).epilogue().parameters) is tuple, "torch 2.11 compiles no other"
    distinct = {o.epilogue() for o in INSIDE_THE_KERNELS.values()}
    # combine is not the kernel's business; everything else that differs must differ for the kernel too
    assert len(distinct) == len(
        {
            dataclasses.astuple(dataclasses.replace(o, combine="pointwise"))
            if isinstance(o, pf.PGDPO)
            else (type(o), *dataclasses.astuple(o))
            for o in INSIDE_THE_KERNELS.values()
        }
    )


# Construction.

NUMBERS = [
    (cls, f.name)
    for cls in (listed.make for listed in objectives.LISTED.values())
    for f in dataclasses.fields(cls)
    if f.type == "float"
]
OUT_OF_RANGE = {
    "beta": [0, -1.0],
    "label_smoothing": [-0.1, 0.6],
    "flip": [-0.1, 0.5],
    "k1": [0, -1],
    "k2": [0, -1],
    "ipr_weight": [-1],
    "delta": [-1],
    "weight": [-0.1],
    "penalty": [-1],
    "shift": [-0.1, 1.1],
    "clip": [-0.1, 1.1],
    "threshold": [-0.1, 1.1],
    "mu": [-0.1, 1.1],
    "eps": [],
}


@pytest.mark.parametrize("cls,name", NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_are_checked_on_construction(cls, name):
    wrong = ["1", None, True, float("nan"), float("inf"), -float("inf"), 10**400, torch.tensor(1.0), [1.0], 1j]
    for value in wrong + OUT_OF_RANGE[name]:
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{name}=.*expected"):
            cls(**{name: value})


CHOICES = [
    (pf.PGDPO, "ratio", "signed"),
    (pf.PGDPO, "ipr", "anchor"),
    (pf.PGDPO, "ipr_scale", "one"),
    (pf.PGDPO, "combine", "outer"),
    (pf.PGDPO, "ars", False),
    (pf.PGDPO, "detach_weights", False),
    (pf.SLiC, "hinge", True),
    (pf.SDPO, "placement", "inside"),
    (pf.Safeguarded, "scope", "pair"),
    (pf.DPOClipMask, "placement", "inside"),
]


@pytest.mark.parametrize("cls,name,good", CHOICES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_choices_are_checked_on_construction(cls, name, good):
    assert getattr(cls(**{name: good}), name) == good
    for value in ("nope", None, 1.0, 0, 1, [], torch.tensor([1, 0]), float("nan")):
        with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{name}=.*expected one of"):
            cls(**{name: value})


@pytest.mark.parametrize("ratio", ["signed", "abs"])
def test_a_ratio_with_a_pole_needs_an_epsilon(ratio):
    for eps in (0.0, 1e-60):
        with pytest.raises(ConfigError, match="eps"):
            pf.PGDPO(ratio=ratio, eps=eps)
    pf.PGDPO(ratio="logit", eps=0.0)


@pytest.mark.parametrize("base", [None, pf.DPO, "dpo", pf.Safeguarded()])
def test_only_plain_objectives_can_be_safeguarded(base):
    with pytest.raises(ConfigError, match=r"Safeguarded\(base="):
        pf.Safeguarded(base)


def test_objectives_are_values():
    assert pf.PGDPO() == pf.PGDPO() and hash(pf.PGDPO()) == hash(pf.PGDPO()) and pf.PGDPO() != pf.PGDPO(beta=1.0)
    assert pickle.loads(pickle.dumps(pf.Safeguarded(pf.PGDPO.listing()))) == pf.Safeguarded(pf.PGDPO.listing())
    with pytest.raises(dataclasses.FrozenInstanceError):
        pf.PGDPO().beta = 3.0


@pytest.mark.parametrize("name", objectives.NAMES)
def test_every_name_makes_its_objective(name):
    objective = from_name(name)
    assert objectives.REGISTRY.build(objectives.REGISTRY.describe(objective), "objective") == objective
    assert isinstance(objective, pf.Objective) and getattr(pf, type(objective).__name__) is type(objective)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: from_name("pgdop"), r"objective.name='pgdop': expected one of .*did you mean 'pgdpo'"),
        (lambda: from_name("DPO"), r"objective.name='DPO'.*did you mean 'dpo'"),
        (lambda: from_name(None), r"objective.name=None: expected one of"),
        (lambda: from_name(["dpo"]), r"objective.name=\['dpo'\]: expected one of"),
        (lambda: from_name("pgdpo", betta=3.0), r"objective.betta: pgdpo takes .*did you mean 'beta'"),
        (lambda: from_name("sft", beta=3.0), r"objective.beta: sft takes no settings"),
        (lambda: from_name("dpo", beta="high"), r"objective.beta='high': expected a number"),
    ],
)
def test_a_wrong_name_or_key_says_what_was_meant(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def table_of(page, heading):
    """Cells of the rows of the first table below a heading."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    lines = itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    )
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines][2:]


def test_the_readme_explains_every_objective_that_has_a_name():
    names = [name for cells in table_of("README.md", "## Objectives") for name in re.findall(r"`(\w+)", cells[0])]
    assert sorted(names) == sorted(listed.make.__name__ for listed in objectives.LISTED.values())


def test_the_docs_list_every_name_with_its_class_label_and_defaults():
    rows = []
    for name, listed in objectives.LISTED.items():
        values = objectives.REGISTRY.describe(listed.make())
        settings = ", ".join(f"`{key}: {_as_yaml(value)}`" for key, value in values.items() if key != "name")
        rows.append([f"`{name}`", f"`{listed.make.__name__}`", listed.label, settings or "none"])
    assert table_of("docs/objectives.md", "## In a configuration file") == rows


def _as_yaml(value):
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def test_every_label_is_one_of_its_own():
    labels = [objectives.label({"name": name}) for name in objectives.NAMES]
    assert len(set(labels)) == len(labels) and "" not in labels
    assert objectives.label({"name": "safeguarded", "base": {"name": "dpo"}}) == "Safeguarded DPO"
    assert objectives.label({"name": "my_package.losses:SquaredHinge"}) == "SquaredHinge"


def test_the_objectives_module_is_reachable_from_the_package():
    assert pf.objectives.from_name("dpo") == pf.DPO() and "pgdpo" in pf.objectives.NAMES


# Helpers.


def test_betas_of_other_conventions_give_the_same_logits():
    """The same pair through three codes: mean with 1/2 (ours), sum with 1/2, mean without 1/2."""
    d_w, d_l, elements = 0.02, 0.05, 64
    ours = evaluate(pf.DPO(beta=pf.beta_from_sum(3.0, elements)), [(1, 1, d_w, d_l, 0, 0)])[0].logits.item()
    assert ours == pytest.approx(0.5 * 3.0 * (elements * d_l - elements * d_w))
    ours = evaluate(pf.DPO(beta=40.0), [(1, 1, d_w, d_l, 0, 0)])[0].logits.item()
    assert ours == pytest.approx(pf.beta_without_half(40.0) * (d_l - d_w))


def test_videodpo_weights_rare_scores_up():
    """Six scores in bins of 0.01: bin probabilities 3/6, 2/6 and 1/6."""
    chosen, rejected = [0.105, 0.106, 0.215], [0.104, 0.214, 0.305]
    p = {0.105: 3 / 6, 0.106: 3 / 6, 0.104: 3 / 6, 0.215: 2 / 6, 0.214: 2 / 6, 0.305: 1 / 6}
    for exponent in (0.72, 1.0):
        weights = pf.videodpo_pair_weight(torch.tensor(chosen), torch.tensor(rejected), exponent)
        expected = [(0.5 / math.sqrt(p[w] * p[r])) ** exponent for w, r in zip(chosen, rejected, strict=True)]
        assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert pf.videodpo_pair_weight(
        torch.tensor(chosen), torch.tensor(rejected), 0.5, form="code"
    ).tolist() == pytest.approx([(0.72 / w) ** 0.5 for w in chosen], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_printed_to_the_bins_precision_fall_into_their_own_bin(dtype):
    """0.29 / 0.01 is 28.999..., yet a score of 0.29 belongs to the bin that starts there: 100 scores, 100 bins."""
    scores = torch.tensor([i / 100 for i in range(100)], dtype=dtype)
    weights = pf.videodpo_pair_weight(scores[:50], scores[50:])
    torch.testing.assert_close(weights, torch.ones(50))


@pytest.mark.parametrize(
    "arguments,name",
    [
        (dict(chosen_score=torch.ones(3), rejected_score=torch.ones(2)), "chosen_score"),
        (dict(chosen_score=torch.ones(0), rejected_score=torch.ones(0)), "chosen_score"),
        (dict(chosen_score=torch.ones(2, 2), rejected_score=torch.ones(2, 2)), "chosen_score"),
        (dict(chosen_score=torch.tensor([float("nan")]), rejected_score=torch.ones(1)), "chosen_score"),
        (dict(chosen_score=torch.ones(1), rejected_score=torch.tensor([float("inf")])), "rejected_score"),
        (dict(chosen_score=torch.zeros(1), rejected_score=torch.ones(1), form="code"), "chosen_score"),
        (dict(chosen_score=torch.ones(1), rejected_score=torch.ones(1), form="mine"), "form"),
        (dict(chosen_score=torch.ones(1), rejected_score=torch.ones(1), bin_width=0.0), "bin_width"),
    ],
)
def test_videodpo_weights_name_what_is_wrong(arguments, name):
    with pytest.raises(ValueError, match=name):
        pf.videodpo_pair_weight(**arguments)
