"""The fused backends compute what eager does in float64: every objective, granularity, form of input and size.

On a machine without a GPU the Triton kernels run in the interpreter, with small chunks and blocks so that a few hundred
elements still pass through several segments, the unmasked loop and the masked tail.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import backends, objectives
from pgdpo_fast.backends import launches, operands
from pgdpo_fast.backends import triton as triton_backend
from pgdpo_fast.objectives import Terms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = [name for name in ("triton", "native") if backends.unavailable(name, DEVICE) is None]
GRANULARITIES = ("sample", "frame", "element")
FIELDS = operands.Telemetry._fields
B = 50.0
OBJECTIVES = {
    "dpo": pf.DPO(B),
    "dpo-smoothed": pf.DPO(B, 0.1),
    "robust-dpo": pf.RobustDPO(B, 0.2),
    "ipo": pf.IPO(B),
    "slic": pf.SLiC(weight=0.5),
    "slic-hinge": pf.SLiC(B, 0.3, 0.5, hinge=True),
    "sft": pf.SFT(),
    "dpop": pf.DPOP(B),
    "dpo-shift": pf.DPOShift(B),
    "sdpo": pf.SDPO(B, clip=0.5),
    "dpo-clip-mask": pf.DPOClipMask(B, threshold=0.8),
    "sdpo-inside": pf.SDPO(B, clip=0.5, placement="inside"),
    "dpo-clip-mask-inside": pf.DPOClipMask(B, threshold=0.8, placement="inside"),
    "pgdpo": pf.PGDPO(),
    "equation": pf.PGDPO.equation(),
    "listing": pf.PGDPO.listing(k1=0.5, k2=0.5),
    "ars": pf.PGDPO.ars_only(),
    "ipr": pf.PGDPO.ipr_only(),
    "outer-reward": pf.PGDPO(combine="outer"),
    "outer-attached": pf.PGDPO(B, combine="outer", detach_weights=False),
    "rpo": pf.RPO(B, 0.3),
    "safeguarded": pf.Safeguarded(pf.DPO(B), scope="pair"),
    "safeguarded-batch": pf.Safeguarded(pf.DPO(B), mu=0.6),
    "safeguarded-anchor": pf.Safeguarded(pf.PGDPO(ipr="anchor"), mu=0.5, scope="pair"),
    "safeguarded-sdpo": pf.Safeguarded(pf.SDPO(B), scope="pair"),
    "safeguarded-listing": pf.Safeguarded(pf.PGDPO.listing(k1=0.5, k2=0.5), scope="pair"),
    "sum": pf.DPO(B) + 0.3 * pf.SFT(),
    "sum-of-one": 0.3 * pf.SFT(),
    "sum-of-four": 0.5 * pf.SFT()
    + 2.0 * pf.PGDPO(ipr="anchor")
    + 0.7 * pf.Safeguarded(pf.SDPO(B, placement="inside"), scope="pair")
    + pf.IPO(B),
    "sum-of-lambdas": pf.Safeguarded(pf.RPO(B), mu=0.2) + 0.5 * pf.Safeguarded(pf.DPOP(B), mu=0.6, scope="pair"),
    "sum-outer": pf.DPO(B) + 0.3 * pf.PGDPO(combine="outer"),
    "safeguarded-sum": pf.Safeguarded(0.5 * pf.DPO(B) + pf.SFT(), mu=0.5, scope="pair"),
    **{
        f"{ratio}-{'detached' if detach else 'attached'}": pf.PGDPO(
            B, 2.0, 0.5, ratio=ratio, detach_weights=detach, ipr="anchor" if detach else "reward", eps=0.5
        )
        for ratio in objectives.RATIOS
        for detach in (True, False)
    },
}
TARGETS = ("stacked", "tuple", "shared", "built", "built tuple")
REFERENCES = ("stacked", "tuple", "errors", "bf16", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 2, 5, 7), (2, 3, 8, 16), (1, 2, 3, 3))


def test_every_objective_that_has_a_name_is_compared_here():
    assert {type(objective) for objective in OBJECTIVES.values()} >= {o.make for o in objectives.LISTED.values()}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is full of NaN, so an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_segments(monkeypatch):
    """128 elements per segment and 64 per block, three groups of partial sums to a fold step."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(operands, "MIN_SEGMENT", 128)
        monkeypatch.setattr(triton_backend, "DEFAULT_LAUNCH", triton_backend.DEFAULT_LAUNCH._replace(block=64))


class Batch:
    """Pairs close to their reference, in the forms `preference_loss` takes; `exact` is the same call in float64."""

    def __init__(
        self,
        pairs=2,
        shape=(3, 2, 5, 7),
        target="stacked",
        reference="stacked",
        dtype=torch.float32,
        granularity="sample",
        seed=0,
        noise=0.1,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, *shape, generator=generator).to(DEVICE)

        clean, noises = draw(2 * pairs), draw(pairs)
        scales = torch.rand(2, pairs, generator=generator).to(DEVICE)
        y = clean
        if target == "shared":
            y = torch.cat([clean[:pairs]] * 2)
        if target.startswith("built"):
            column = scales.view(2, pairs, *[1] * len(shape))
            y = (column[0] * noises).repeat(2, *[1] * len(shape)) + column[1].repeat(2, *[1] * len(shape)) * clean
        q = y + 0.5 * draw(2 * pairs)
        p = (q + noise * draw(2 * pairs)).to(dtype)
        low = torch.float32 if dtype == torch.float64 else dtype
        self.prediction = p.requires_grad_()
        self.target = {
            "stacked": lambda: y.to(low),
            "tuple": lambda: y.to(low).chunk(2),
            "shared": lambda: y[:pairs].to(low),
            "built": lambda: pf.NoisedTarget(clean.to(low), noises.to(low), *scales),
            "built tuple": lambda: pf.NoisedTarget(clean.to(low).chunk(2), noises, *scales),
        }[target]()
        exact_target = self.target
        if isinstance(exact_target, pf.NoisedTarget):
            parts = exact_target.clean if target == "built tuple" else (exact_target.clean,)
            exact_target = pf.NoisedTarget(
                torch.cat([c.double() for c in parts]), exact_target.noise.double(), *scales.double()
            )
        elif target == "tuple":
            exact_target = torch.cat(exact_target).double()
        else:
            exact_target = exact_target.double()
        q = q.to(low)
        if reference in ("bf16", "fp8"):
            self.reference = exact_reference = pf.PackedReference.pack(q, self.target, reference)
        elif reference == "errors":
            per = "sample" if granularity == "element" else granularity
            self.reference = exact_reference = pf.reference_errors(q.double(), exact_target, granularity=per)
        else:
            self.reference, exact_reference = q.chunk(2) if reference == "tuple" else q, q.double()
        self.exact = (self.prediction.detach().double().requires_grad_(), exact_target, exact_reference)
        self.scale = (torch.rand(pairs, generator=generator) * 0.3).to(DEVICE)
        frames = (shape[1],) if granularity == "frame" else ()
        self.beta_scale = (torch.rand(pairs, *frames, generator=generator) + 0.5).to(DEVICE)

    def run(self, objective, backend, exact=False, **options):
        """(output, gradient); stacked predictions unless `tuple` in options."""
        p, y, q = self.exact if exact else (self.prediction, self.target, self.reference)
        scale = self.scale if objective.needs_posterior_scale else None
        out = pf.preference_loss(p, y, q, objective=objective, posterior_scale=scale, backend=backend, **options)
        return out, torch.autograd.grad(out.loss, p)[0]


def distance(found, expected):
    """Relative L2 error."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_parity(batch, objective, backend, granularity, loosen=1.0, **options):
    out, grad = batch.run(objective, backend, granularity=granularity, **options)
    exact, exact_grad = batch.run(objective, "eager", exact=True, granularity=granularity, **options)
    dtype = batch.prediction.dtype
    tolerance = loosen * (1e-11 if dtype == torch.float64 else 1e-6)
    assert grad.dtype == dtype and torch.isfinite(grad).all()
    assert distance(grad, exact_grad) <= max(GRADIENT_TOLERANCE[dtype], tolerance)
    assert distance(out.loss, exact.loss) <= tolerance
    for name in FIELDS:
        found, expected = getattr(out, name), getattr(exact, name)
        assert found.shape == expected.shape
        if not torch.isnan(expected).all():
            assert distance(found, expected) <= 3 * tolerance, name


def ill_conditioned(objective, granularity):
    """Factor by which float32 rounding of single elements grows where a ratio divides by one element's reward."""
    base = getattr(objective, "base", objective)
    if granularity != "element" or getattr(base, "ratio", "logit") == "logit":
        return 1.0
    return 1e4 if base.ratio in ("signed", "abs") else 10.0


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_equals_eager_in_float64(small_segments, backend, granularity, name):
    """The formulas to 1e-11 in float64 arithmetic, and to rounding in float32."""
    objective = OBJECTIVES[name]
    loosen = ill_conditioned(objective, granularity)
    assert_parity(Batch(dtype=torch.float64, granularity=granularity), objective, backend, granularity, loosen=loosen)
    if not (loosen > 10 and not getattr(getattr(objective, "base", objective), "detach_weights", True)):
        assert_parity(Batch(seed=1, shape=(2, 2, 8, 16)), objective, backend, granularity, loosen=loosen)
    scaled = Batch(dtype=torch.float64, granularity=granularity, pairs=3, shape=(2, 3, 3, 5), seed=4)
    assert_parity(scaled, objective, backend, granularity, loosen=loosen, beta_scale=scaled.beta_scale)


FORMS = itertools.product(TARGETS, REFERENCES, GRANULARITIES)
FORMS = [(*form, DTYPES[i % 4], SHAPES[i % 3]) for i, form in enumerate(FORMS) if form[1:] != ("errors", "element")]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "target,reference,granularity,dtype,shape",
    FORMS,
    ids=["-".join(map(str, (t, r, g, str(d)[6:]))) for t, r, g, d, _ in FORMS],
)
def test_every_form_of_input_equals_eager(small_segments, backend, target, reference, granularity, dtype, shape):
    """Targets x references x granularities; dtypes and odd and even sizes take turns."""
    batch = Batch(target=target, reference=reference, granularity=granularity, dtype=dtype, shape=shape, seed=2)
    anchor = reference not in ("errors",)
    objective = pf.PGDPO(B, ipr="anchor" if anchor else "reward")
    # A target built in the kernel, and a gap from cached errors, are each one float32 rounding of numbers near 1.
    loosen = 100.0 if reference == "errors" else 4.0 if target.startswith("built") else 1.0
    if dtype == torch.float64:
        loosen = 1e5 if target.startswith("built") or reference in ("fp8", "bf16") else 1.0
    assert_parity(batch, objective, backend, granularity, loosen=loosen)
    assert_parity(batch, objective, backend, granularity, loosen=loosen, beta_scale=batch.beta_scale)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tuples_weights_and_no_reference(small_segments, backend, dtype, granularity):
    batch = Batch(dtype=dtype, pairs=3)
    weight = torch.tensor([0.5, 2.0, 0.0], device=DEVICE)
    assert_parity(batch, pf.PGDPO(), backend, granularity, pair_weight=weight)
    batch.reference, batch.exact = None, (*batch.exact[:2], None)
    assert_parity(batch, pf.SLiC(), backend, granularity, pair_weight=weight)
    out, grad = batch.run(pf.SLiC(), backend, granularity=granularity)
    pair = tuple(t.detach().requires_grad_() for t in batch.prediction.chunk(2))
    other = pf.preference_loss(pair, batch.target, objective=pf.SLiC(), granularity=granularity, backend=backend)
    assert torch.equal(out.loss, other.loss)
    assert torch.equal(torch.cat(torch.autograd.grad(other.loss, pair)), grad)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (129,), (4096,), (8197,), (3, 1, 1, 1), (2, 5, 1, 1)], ids=str)
def test_any_size_with_the_committed_launch(backend, shape):
    """One element, just under and over a block of scales, whole chunks and a short last one."""
    for reference in ("stacked", "fp8"):
        for granularity in ("sample", "element") if len(shape) == 1 else GRANULARITIES:
            batch = Batch(shape=shape, reference=reference, granularity=granularity, noise=1.0)
            assert_parity(batch, pf.PGDPO(B), backend, granularity, loosen=4.0)


@pytest.mark.parametrize("backend", FUSED)
def test_many_segments_are_all_folded(monkeypatch, backend):
    """More partial sums than one step of the fold takes, and more pairs than one of its blocks."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(operands, "MIN_SEGMENT", 1)
        monkeypatch.setattr(operands, "MAX_SEGMENTS", 150)
        monkeypatch.setattr(triton_backend, "FOLD_PARTS", 16)
    assert DEVICE.type == "cuda" or operands.segment_length(torch.Size((37,))) == 1
    for granularity in ("sample", "element"):
        assert_parity(Batch(shape=(37,), pairs=3), pf.PGDPO(B), backend, granularity)
    assert_parity(Batch(shape=(5, 9, 1, 2), pairs=1), pf.PGDPO(B), backend, "frame")


@pytest.mark.skipif(
    "triton" not in FUSED or DEVICE.type == "cuda", reason="rows per program follow from the shape there"
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bits_do_not_depend_on_how_many_groups_a_program_folds(small_segments, monkeypatch, granularity):
    """One group a program, and the last of many adds the losses, or all groups in one program. Four parts a group:
    from eight on the interpreter's own sums depend on how many lie side by side."""
    batch, found = Batch(pairs=3, shape=(2, 2, 8, 16)), []
    weight = torch.tensor([0.5, 2.0, 1.0], device=DEVICE)
    for parts in (4, 512):
        monkeypatch.setattr(triton_backend, "FOLD_PARTS", parts)
        found.append(batch.run(pf.PGDPO(), "triton", granularity=granularity, pair_weight=weight))
    (out, grad), (other, other_grad) = found
    assert torch.equal(out.loss, other.loss) and torch.equal(grad, other_grad)
    assert torch.equal(out.telemetry, other.telemetry)


def test_a_video_is_cut_by_its_shape_alone():
    """Every element in exactly one segment, every segment in one group, few enough partial sums to fold."""
    for shape in ((16, 21, 60, 104), (16, 33, 90, 160), (4, 16, 40, 64), (16, 13, 60, 90), (1, 1, 1, 1), (5,)):
        shape = torch.Size(shape)
        numel, length = shape.numel(), operands.segment_length(shape)
        assert length <= numel <= length * operands.MAX_SEGMENTS
        if len(shape) == 4 and shape[1] > 1:
            assert operands.segments_of(shape, 1) == (shape[2] * shape[3], 1)


# Numerical promises.


@pytest.mark.parametrize("backend", ["eager", *FUSED])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gap_keeps_its_relative_accuracy_where_training_starts(backend, granularity):
    """bf16 policy = reference + 1e-3 noise: gaps are 1e-3 of the errors, yet good to float32 rounding."""
    batch = Batch(shape=(2, 2, 16, 16), dtype=torch.bfloat16, noise=1e-3)
    out, _ = batch.run(pf.DPO(5000.0), backend, granularity=granularity)
    exact, _ = batch.run(pf.DPO(5000.0), "eager", exact=True, granularity=granularity)
    assert out.chosen_gap.abs().max() < 0.01 * out.policy_chosen_error.min()
    for name in ("chosen_gap", "rejected_gap"):
        assert distance(getattr(out, name), getattr(exact, name)) < 1e-5


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float16_gradients_are_rounded_after_the_loss_scale(backend, granularity):
    """Gradients far below the smallest float16 survive under a loss scale of 65536; rounded before it they are zero."""
    batch = Batch(dtype=torch.float16)
    objective = pf.DPO(beta=1e-5)
    out = pf.preference_loss(
        batch.prediction, batch.target, batch.reference, objective=objective, granularity=granularity, backend=backend
    )
    (plain,) = torch.autograd.grad(out.loss, batch.prediction, retain_graph=True)
    (scaled,) = torch.autograd.grad(65536.0 * out.loss, batch.prediction)
    _, exact = batch.run(objective, "eager", exact=True, granularity=granularity)
    assert distance(plain, exact) > 0.1
    assert distance(scaled, 65536.0 * exact) < 2.0**-9


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_pairs_bits_depend_on_nothing_but_the_pair(small_segments, granularity):
    """The same from run to run, alone or in a batch, whatever its neighbours and its place."""
    batch = Batch(pairs=5, shape=(2, 2, 8, 16))
    out, grad = batch.run(pf.PGDPO(), "triton", granularity=granularity)
    again, again_grad = batch.run(pf.PGDPO(), "triton", granularity=granularity)
    assert torch.equal(out.loss, again.loss) and torch.equal(grad, again_grad)
    for pairs in ([3], [4, 3], [0, 1, 3]):
        rows = torch.tensor(pairs + [5 + i for i in pairs], device=DEVICE)
        p = batch.prediction.detach()[rows].requires_grad_()
        part = pf.preference_loss(
            p,
            batch.target[rows],
            batch.reference[rows],
            objective=pf.PGDPO(),
            granularity=granularity,
            backend="triton",
        )
        for name in FIELDS:
            assert torch.equal(getattr(part, name), getattr(out, name)[pairs]), name
        (part_grad,) = torch.autograd.grad(part.loss, p)
        torch.testing.assert_close(part_grad * len(pairs), grad[rows] * 5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "name",
    ["dpo", "ipo", "sft", "sum", "dpop", "logit-attached", "symmetric-attached", "signed-attached", "outer-attached"],
)
def test_gradcheck_runs_on_the_fused_path_itself(backend, granularity, name):
    batch = Batch(pairs=1, shape=(2, 2, 1, 2), dtype=torch.float64)

    def loss(chosen, rejected):
        return pf.preference_loss(
            (chosen, rejected),
            batch.target,
            batch.reference,
            objective=OBJECTIVES[name],
            granularity=granularity,
            backend=backend,
        ).loss

    pair = tuple(t.detach().clone().requires_grad_() for t in batch.prediction.chunk(2))
    assert torch.autograd.gradcheck(loss, pair, fast_mode=name != "dpo", atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["ipo", "symmetric-attached", "outer-attached"])
def test_gradcheck_with_a_beta_of_each_pair(backend, granularity, name):
    batch = Batch(pairs=2, shape=(1, 2, 1, 2), dtype=torch.float64, granularity=granularity)

    def loss(chosen, rejected):
        return pf.preference_loss(
            (chosen, rejected),
            batch.target,
            batch.reference,
            objective=OBJECTIVES[name],
            granularity=granularity,
            beta_scale=batch.beta_scale,
            backend=backend,
        ).loss

    pair = tuple(t.detach().clone().requires_grad_() for t in batch.prediction.chunk(2))
    assert torch.autograd.gradcheck(loss, pair, fast_mode=True, atol=1e-4, rtol=1e-3)


class Median(pf.Objective):
    """An objective with no kernel form: the mean of the largest frame losses of each pair."""

    def terms(self, errors, posterior_scale=None):
        logits = 20.0 * (errors.gap_rejected - errors.gap_chosen)
        loss = torch.nn.functional.softplus(-logits)
        one = torch.ones_like(loss)
        return Terms(loss.amax(-1, keepdim=True).expand_as(loss), logits, one, one, one)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_an_objective_written_in_torch_runs_fused(small_segments, backend, granularity):
    assert Median().epilogue() is None
    assert_parity(Batch(dtype=torch.float64), Median(), backend, granularity)
    batch = Batch(dtype=torch.bfloat16, target="built", reference="fp8")
    assert_parity(batch, Median(), backend, granularity, loosen=10)


@pytest.mark.parametrize("backend", FUSED)
def test_launches_reads_and_writes_nothing_it_was_not_given(small_segments, backend):
    """Rows surrounded by guard bands: nothing outside them is read into the result or written."""
    batch = Batch(pairs=2, shape=(2, 2, 5, 7))
    clean, _ = batch.run(pf.PGDPO(), backend, granularity="frame")
    tensors = []
    for t in (batch.prediction, batch.target, batch.reference):
        wide = torch.full((4, 3 + 140 + 5), float("nan"), device=DEVICE)
        wide[:, 3:143] = t.detach().flatten(1)
        tensors.append(wide)
    before = [w.clone() for w in tensors]
    p, y, q = (w[:, 3:143].unflatten(1, (2, 2, 5, 7)) for w in tensors)
    p.requires_grad_()
    for granularity in GRANULARITIES:
        out = pf.preference_loss(p, y, q, objective=pf.PGDPO(), granularity=granularity, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, p)
        assert torch.isfinite(out.loss) and torch.isfinite(grad).all()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(tensors, before, strict=True))


# The operators as torch sees them.

OPERATORS = {"pair_errors", "pair_objective", "pair_gradient", "pair_elements", "pair_elements_gradient"}


STREAM = {"pair_stream", "pair_stream_gradient"}


def operator_calls(backend, granularities=GRANULARITIES):
    """(operator, arguments) of a forward and backward in each of the ways the package calls them."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("pgdpo_fast") and ".pair_" in str(function):
                calls.append((function, tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    with Recorder():
        for granularity in granularities:
            for target, reference in (("stacked", "stacked"), ("built", "fp8"), ("shared", "tuple")):
                batch = Batch(target=target, reference=reference, shape=(2, 2, 3, 5))
                batch.run(pf.PGDPO(ipr="anchor"), backend, granularity=granularity)
        pair = tuple(t.detach().requires_grad_() for t in batch.prediction.chunk(2))
        for objective in (pf.DPO(), pf.PGDPO(ipr="anchor", combine="outer"), pf.SDPO(), OBJECTIVES["sum-of-four"]):
            for granularity in ("frame", "element"):
                out = pf.preference_loss(
                    pair,
                    batch.target,
                    batch.reference,
                    objective=objective,
                    backend=backend,
                    granularity=granularity,
                    posterior_scale=batch.scale,
                    beta_scale=batch.beta_scale if isinstance(objective, pf.DPO) else None,
                )
                (2 * out.loss).backward()
        errors = pf.paired_errors(pair, batch.target, batch.reference, cross=True, backend=backend)
        (errors.gap_chosen - errors.policy_rejected).sum().backward()
    return calls


@pytest.mark.parametrize("backend", FUSED)
def test_every_operator_passes_opcheck(monkeypatch, backend):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, and one poison is not equal to another
    calls = operator_calls(backend)
    found = {str(f).split(".")[1] for f, _ in calls}
    if backend == "triton":
        assert found == OPERATORS | STREAM
        monkeypatch.setattr(launches, "FORM", "stream")
        calls += [call for call in operator_calls(backend, ("frame",)) if str(call[0]).split(".")[1] in STREAM]
    else:
        assert found == OPERATORS
    seen, traced = set(), set()
    for function, args in calls:
        key = (function, *((a.shape, a.dtype) if isinstance(a, torch.Tensor) else str(a) for a in args))
        if key not in seen:
            seen.add(key)
            torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
        if key[0] not in traced:  # slow, and the same for every form
            traced.add(key[0])
            torch.library.opcheck(function, args, test_utils=("test_aot_dispatch_dynamic",))


@pytest.mark.parametrize("backend", FUSED)
def test_traced_results_have_device_dtype_and_shape_of_the_real_ones(backend):
    for function, args in operator_calls(backend):
        traced = function(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        pairs = zip(
            torch.utils._pytree.tree_leaves(traced), torch.utils._pytree.tree_leaves(function(*args)), strict=True
        )
        for fake, real in pairs:
            assert fake is real is None or (fake.device.type, fake.dtype, fake.shape) == (
                "meta",
                real.dtype,
                real.shape,
            )


def test_an_objectives_numbers_are_copied_to_a_device_once_and_kept():
    """Another stream or a captured graph may read them at any time."""
    first, *others = (pf.DPO(beta=float(beta)).epilogue() for beta in range(1, 400))
    held = triton_backend._parameters(first, torch.float32, torch.device("cpu"))
    for other in others:
        triton_backend._parameters(other, torch.float32, torch.device("cpu"))
    assert triton_backend._parameters(first, torch.float32, torch.device("cpu")) is held


def test_one_binary_serves_every_number_of_pairs():
    """Triton makes others for integers that are 1 or divisible by 16, with sums in another order."""
    code = """
        from pgdpo_fast.kernels import element, pair
        kernels = [getattr(m, n) for m in (element, pair) for n in dir(m) if n.endswith("_kernel")]
        for kernel in kernels:
            names = {p.name for p in kernel.params if p.name in ("pairs", "rows")}
            assert names and all(p.do_not_specialize for p in kernel.params if p.name in names), kernel
        print(len(set(kernels)))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 6


@pytest.mark.parametrize("backend", FUSED)
def test_a_sum_is_one_pass_like_each_of_its_terms(backend):
    launched = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("pgdpo_fast"):
                launched[-1].append(str(function).split(".")[1])
            return function(*args, **(kwargs or {}))

    for granularity in GRANULARITIES:
        for objective in (pf.DPO(B), pf.DPO(B) + 0.3 * pf.SFT(), OBJECTIVES["sum-of-four"]):
            launched.append([])
            with Recorder():
                Batch(granularity=granularity).run(objective, backend, granularity=granularity)
        assert launched[-1] == launched[-2] == launched[-3] and len(launched[-1]) == 2


@pytest.mark.parametrize("name", ["rpo", "sum-of-four", "safeguarded-sum", "safeguarded-batch"])
def test_sums_compile_as_one_graph(name):
    torch._dynamo.reset()
    backend, batch = FUSED[-1], Batch()

    def step(p, y, q, scale):
        return pf.preference_loss(
            p, y, q, objective=OBJECTIVES[name], posterior_scale=scale, beta_scale=scale + 0.5, backend=backend
        ).loss

    arguments = (batch.prediction, batch.target, batch.reference, batch.scale)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    expected = step(*arguments)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(x, batch.prediction)[0] for x in (loss, expected)))


@pytest.mark.parametrize("backend", FUSED)
def test_no_gradient_is_made_that_nobody_can_ask_for(backend):
    """At element granularity gradients are written in the forward pass, but not under no_grad."""
    written = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if str(function).split(".")[1] in ("pair_elements", "pair_stream"):
                written.append(sum(t.numel() for t in out[-2:]))
            return out

    batch = Batch()
    for context in (torch.enable_grad(), torch.no_grad()):
        with Recorder(), context:
            pf.preference_loss(
                batch.prediction,
                batch.target,
                batch.reference,
                objective=pf.PGDPO(),
                granularity="element",
                backend=backend,
            )
    assert written == [batch.prediction.numel(), 0]


@pytest.mark.parametrize("backend,granularity", [("eager", "sample"), *itertools.product(FUSED, GRANULARITIES)])
def test_compiles_as_one_graph_for_every_batch_size(backend, granularity):
    """torch.compile(fullgraph=True): no graph break, no recompilation as B changes, the same loss and gradients."""
    torch._dynamo.reset()

    objective = pf.PGDPO(B)

    def step(p, y, q, weight):
        out = pf.preference_loss(
            2.0 * p,
            y,
            q,
            objective=objective,
            granularity=granularity,
            pair_weight=weight,
            beta_scale=weight + 0.5,
            backend=backend,
        )
        return out.loss, out.metrics(), out.alpha

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for pairs in (4, 6, 9):  # no size twice: equal sizes would be taken for one
        batch = Batch(pairs=pairs, seed=pairs, shape=(1, 2, 3, 5))
        arguments = (batch.prediction, batch.target, batch.reference, torch.rand(pairs, device=DEVICE))
        with torch.compiler.set_stance("default" if pairs == 4 else "fail_on_recompile"):
            loss, metrics, alpha = compiled(*arguments)
            (grad,) = torch.autograd.grad(3.0 * loss, batch.prediction)
        expected, expected_metrics, expected_alpha = step(*arguments)
        (expected_grad,) = torch.autograd.grad(3.0 * expected, batch.prediction)
        torch.testing.assert_close(
            (loss, metrics, alpha, grad), (expected, expected_metrics, expected_alpha, expected_grad)
        )


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sample", "element"])
def test_inductor_compiles_a_training_step(granularity):
    torch._dynamo.reset()
    model = torch.nn.Linear(7, 7, device=DEVICE)
    batch = Batch()

    def step(latents):
        loss = pf.preference_loss(
            model(latents),
            batch.target,
            batch.reference,
            objective=pf.PGDPO(B),
            granularity=granularity,
            backend="triton",
        ).loss
        loss.backward()
        return loss.detach()

    grads = []
    for function in (step, torch.compile(step)):
        model.zero_grad()
        loss = function(batch.prediction.detach())
        grads.append((loss, model.weight.grad.clone()))
    torch.testing.assert_close(grads[1], grads[0])


# Selection.


def test_a_cpu_tensor_never_reaches_a_device_launch():
    code = """if True:
        import torch, pgdpo_fast as pf
        from pgdpo_fast.errors import BackendUnavailable
        p = torch.randn(2, 8, requires_grad=True)
        try:
            pf.preference_loss(p, p.detach(), p.detach(), objective=pf.DPO(), backend="triton")
        except BackendUnavailable as error:
            print(error)
        pf.preference_loss(p, p.detach(), p.detach(), objective=pf.DPO()).loss.backward()
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PGDPO_FAST_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "backend='triton' cannot run on cpu: triton has no CPU backend" in done.stdout


def test_an_interpreter_that_cannot_run_on_this_numpy_says_so(monkeypatch):
    for version, of_numpy, refused in (("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.6", False)):
        monkeypatch.setattr(triton_backend.metadata, "version", lambda name, of_numpy=of_numpy: of_numpy)
        assert ("needs numpy < 2.4" in (triton_backend._interpreter_reason(version) or "")) == refused


def test_auto_never_picks_the_interpreter():
    assert backends.select("auto", torch.device("cpu")) in ("eager", "native")


ROOT = Path(__file__).resolve().parent.parent


def numbers_in_python():
    """Every number that Python, Triton and C++ share: kinds, switches, forms and places, by the kernels' names."""
    shared = {name: value for name, value in vars(objectives).items() if name.startswith(("KIND_", "FLAG_", "TERM_"))}
    shared |= {f"RATIO_{name.upper()}": place for place, name in enumerate(objectives.RATIOS)}
    shared |= {f"REFERENCE_{form.name}": form.value for form in operands.ReferenceForm}
    for prefix, places in {
        "PARAMETER": objectives.Parameters,
        "STATISTIC": objectives.GroupErrors,
        "TELEMETRY": operands.Telemetry,
        "COEFFICIENT": operands.Coefficients,
        "MEAN": operands.ElementMeans,
    }.items():
        shared |= {f"{prefix}_{name.upper()}": place for place, name in enumerate(places._fields)}
    after = len(operands.Telemetry._fields)
    return shared | {"SUM_COMPLEMENT": after, "SUM_IMPLICIT": after + 1}


@pytest.mark.parametrize(
    "paths,number,limit",
    [
        (
            ("kernels/epilogue.py", "kernels/pair.py", "kernels/element.py"),
            r"^([A-Z]\w+_\w+) = tl\.constexpr\((\d+)\)",
            r"^RATIO_LIMIT = tl\.constexpr\((.*)\)",
        ),
        (("csrc/epilogue.h", "csrc/pair.h"), r"^ +([A-Z]\w+_\w+) = (\d+),", r"\bRATIO_LIMIT = (.*);"),
    ],
    ids=["triton", "csrc"],
)
def test_the_kernels_number_formulas_switches_and_places_as_python_does(paths, number, limit):
    text = "\n".join((ROOT / path).read_text() for path in paths)
    found = {name: int(value) for name, value in re.findall(number, text, re.MULTILINE)}
    ours = numbers_in_python()
    assert {name: found.get(name) for name in ours} == ours
    kinds = tuple(f"{name.split('_')[0]}_" for name in ours if not name.startswith("FLAG_"))
    unknown = {name for name in found if name.startswith(kinds)} - ours.keys()
    assert not unknown, "a place in the kernels that Python has no name for"
    assert float(re.search(limit, text, re.MULTILINE)[1]) == objectives.RATIO_LIMIT


def test_the_native_library_counts_the_places_as_python_does():
    """The sizes that end each list of places in C++."""
    text = (ROOT / "csrc/epilogue.h").read_text() + (ROOT / "csrc/pair.h").read_text()
    for count, places in {
        "PARAMETERS": objectives.Parameters,
        "STATISTICS": objectives.GroupErrors,
        "TELEMETRY": operands.Telemetry,
        "COEFFICIENTS": operands.Coefficients,
        "ELEMENT_MEANS": operands.ElementMeans,
        "ELEMENT_SUMS": (*operands.Telemetry._fields, "complement", "implicit"),
    }.items():
        size = len(places) if isinstance(places, tuple) else len(places._fields)
        assert re.search(rf"^ +{count} = (\d+),", text, re.MULTILINE)[1] == str(size), count


def test_softplus_is_accurate_to_float32_everywhere():
    """The series behind log(1 + exp(-z)) through the whole loss: z from -100 to 100 by chosen gaps of one element."""
    if DEVICE.type == "cuda" or "triton" in FUSED:
        z = torch.linspace(-100, 100, 401)
        y = torch.zeros(2 * len(z), 1, device=DEVICE)
        p = torch.zeros_like(y)
        p[: len(z), 0] = (100 - z).sqrt()
        p[len(z) :, 0] = 10.0
        out = pf.preference_loss(
            p,
            y,
            pf.ReferenceErrors(*[torch.zeros(len(z), device=DEVICE)] * 2),
            objective=pf.DPO(beta=2.0),
            backend="triton",
        )
        exact = torch.nn.functional.softplus(-out.logits.double())
        assert ((out.per_pair_loss.double() - exact).abs() <= 3e-7 * exact + 1e-37).all()
        assert math.isclose(out.logits.min().item(), -100, rel_tol=1e-5)


@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_strided_weights_and_scales_are_read_as_they_are(granularity):
    """Every other value of a longer tensor: a kernel that assumed stride 1 would read its neighbours."""
    prediction, target, reference = (torch.randn(6, 2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    weight, scale = torch.rand(6, dtype=torch.float64)[::2], torch.rand(6, dtype=torch.float64)[::2]
    assert not weight.is_contiguous()
    fused, oracle = (
        pf.preference_loss(
            prediction,
            target,
            reference,
            objective=pf.SDPO(beta=10.0, clip=0.9),
            pair_weight=w,
            granularity=granularity,
            posterior_scale=s,
            backend=backend,
        ).loss
        for backend, w, s in (("triton", weight, scale), ("eager", weight.contiguous(), scale.contiguous()))
    )
    torch.testing.assert_close(fused, oracle, rtol=1e-12, atol=0)
