"""What is said of latents besides their numbers: weights of positions, the axis of the frames, and samples that are no
pairs. Every backend, granularity, form of the reference and dtype against the definition written out in float64."""

import itertools
import textwrap
import warnings

import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import backends
from pgdpo_fast.backends import operands
from pgdpo_fast.backends import triton as triton_backend
from tests.commands import run_scripts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in ("eager", "triton", "native") if backends.unavailable(name, DEVICE) is None]
FUSED = [name for name in BACKENDS if name != "eager"]
GRANULARITIES = ("sample", "frame", "element")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 2, 5, 7), (2, 3, 8, 16), (1, 2, 3, 3))  # C, F, H, W: F * H * W odd and even
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """128 elements per segment and 64 per block, so that small videos pass through several, and memory full of NaN."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(operands, "MIN_SEGMENT", 128)
        monkeypatch.setattr(triton_backend, "DEFAULT_LAUNCH", triton_backend.DEFAULT_LAUNCH._replace(block=64))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def near(shape, dtype=torch.float32, rows=4):
    """Prediction, target and reference, the prediction near its reference."""
    low = torch.float32 if dtype == torch.float64 else dtype
    y = draw(rows, *shape, seed=1).to(low)
    q = (y.double() + 0.5 * draw(rows, *shape, seed=2)).to(low)
    p = (q.double() + 0.1 * draw(rows, *shape, seed=3)).to(dtype)
    return p.requires_grad_(), y, q


def distance(found, expected):
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def weights_of(how, pairs, shape):
    """Weights >= 0 with as many axes as the latents."""
    sizes = {
        "frames": (pairs, 1, shape[1], 1, 1),
        "regions": (pairs, 1, *shape[1:]),
        "elements": (pairs, *shape),
        "one batch": (1, 1, shape[1], 1, shape[3]),
        "channels": (pairs, shape[0], 1, 1, 1),
        "mask": (pairs, 1, *shape[1:]),
    }[how]
    values = torch.rand(sizes, generator=torch.Generator().manual_seed(4)).to(DEVICE) + 0.1
    return values > 0.4 if how == "mask" else values


def means(values, granularity, frame_dim=2):
    """`[B, ...]` to `[B, G]`."""
    if granularity == "element":
        return values.flatten(1)
    return (
        values.movedim(frame_dim, 1).flatten(2).mean(2)
        if granularity == "frame"
        else values.flatten(1).mean(1)[:, None]
    )


def textbook(p, y, q, weight, granularity, normalize, beta):
    """DPO's loss from the definition: every squared difference times its weight, whatever the pass does."""
    p, y, q, w = p.double(), y.double(), q.double(), weight.double().expand(len(p) // 2, *p.shape[1:])
    if normalize:
        dims = [1, 3, 4] if granularity == "frame" else [1, 2, 3, 4]
        total = w.mean(dims, keepdim=True)
        w = w / total.masked_fill(total == 0, 1.0)
    gap = (p - y) ** 2 - (q - y) ** 2
    both = torch.cat([w, w])
    gap = torch.where(both == 0, 0.0, gap)
    if granularity == "element":
        chosen, rejected = gap.flatten(1).chunk(2)
        losses = torch.nn.functional.softplus(0.5 * beta * (chosen - rejected))
        return (w.flatten(1) * losses).mean()
    chosen, rejected = means(both * gap, granularity).chunk(2)
    return torch.nn.functional.softplus(0.5 * beta * (chosen - rejected)).mean()


# Weights.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("how", ["frames", "regions", "elements", "one batch", "channels", "mask"])
def test_a_weight_multiplies_every_squared_difference(backend, granularity, how):
    for shape, normalize in zip(SHAPES, (True, False, True), strict=True):
        p, y, q = near(shape, torch.float64)
        weight = weights_of(how, 2, shape)
        out = pf.preference_loss(
            p,
            y,
            q,
            objective=pf.DPO(50.0),
            granularity=granularity,
            latent_weight=weight,
            normalize_latent_weight=normalize,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(out.loss, p)
        exact = p.detach().requires_grad_()
        expected = textbook(exact, y, q, weight, granularity, normalize, 50.0)
        torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, exact)[0], rtol=1e-9, atol=1e-14)


FORMS = list(itertools.product(("stacked", "shared", "built"), ("predictions", "errors", "bf16", "fp8"), GRANULARITIES))
FORMS = [(*form, DTYPES[i % 4], SHAPES[i % 3]) for i, form in enumerate(FORMS) if form[1:] != ("errors", "element")]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "target,reference,granularity,dtype,shape",
    FORMS,
    ids=["-".join(map(str, (t, r, g, str(d)[6:]))) for t, r, g, d, _ in FORMS],
)
def test_weights_go_with_every_form_of_input(backend, target, reference, granularity, dtype, shape):
    """An objective with anchor and cross term (where the reference allows the anchor), against eager in float64."""
    p, y, q = near(shape, dtype)
    weight = weights_of("regions", 2, shape)
    weight[0, :, 0] = 0
    scales = torch.rand(2, 2, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    forms = {
        "stacked": lambda z: y.to(z),
        "shared": lambda z: y[:2].to(z),
        "built": lambda z: pf.NoisedTarget(y.to(z), q[:2].to(z), *scales),
    }
    low = y.dtype
    exact_target = forms[target](torch.float64)
    if reference in ("bf16", "fp8"):
        given = exact_reference = pf.PackedReference.pack(q, forms[target](low), reference)
    elif reference == "errors":
        given = exact_reference = pf.reference_errors(
            q.double(), exact_target, granularity=granularity, latent_weight=weight, backend="eager"
        )
    else:
        given, exact_reference = q, q.double()
    objective = pf.Safeguarded(pf.PGDPO(50.0, ipr="reward" if reference == "errors" else "anchor"), mu=0.5)

    def run(prediction, target, reference, backend):
        out = pf.preference_loss(
            prediction,
            target,
            reference,
            objective=objective,
            granularity=granularity,
            latent_weight=weight,
            backend=backend,
        )
        return out, torch.autograd.grad(out.loss, prediction)[0]

    out, gradient = run(p, forms[target](low), given, backend)
    exact, exact_gradient = run(p.detach().double().requires_grad_(), exact_target, exact_reference, "eager")
    # Targets built in the kernel, residuals and errors kept: each one float32 rounding of numbers near 1.
    rounded = target == "built" or reference != "predictions"
    tolerance = GRADIENT_TOLERANCE[dtype] * (4 if rounded else 1)
    if dtype == torch.float64 and rounded:
        tolerance = 1e-6
    if reference == "errors":
        tolerance = max(tolerance, 1e-4)
    assert distance(out.loss, exact.loss) <= (1e-11 if tolerance < 1e-6 and dtype == torch.float64 else 1e-4)
    assert distance(gradient, exact_gradient) <= tolerance
    assert gradient.dtype == dtype
    for name in ("policy_chosen_error", "policy_rejected_error"):
        assert distance(getattr(out, name), getattr(exact, name)) <= 1e-6
    zero = weight.expand(2, *shape) == 0
    assert not gradient.chunk(2)[0][zero].any() and not gradient.chunk(2)[1][zero].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_zero_shuts_out_even_nan(backend, granularity, dtype):
    """The given first frame of image-to-video: what stands there in any operand reaches neither loss nor gradient."""
    p, y, q = near((2, 3, 4, 5), dtype)
    weight = torch.ones(1, 1, 3, 1, 1, device=DEVICE)
    weight[:, :, 0] = 0

    def run(p, y, q, objective):
        p = p.detach().requires_grad_()
        out = pf.preference_loss(
            p, y, q, objective=objective, granularity=granularity, latent_weight=weight, backend=backend
        )
        return out, torch.autograd.grad(out.loss, p)[0]

    for objective in (pf.DPO(50.0), pf.PGDPO(ipr="anchor"), pf.SFT(), pf.Safeguarded(pf.DPO(50.0))):
        clean, clean_gradient = run(p, y, q, objective)
        spoiled = [x.detach().clone() for x in (p, y, q)]
        for x in spoiled:
            x[:, :, 0] = float("nan")
        out, gradient = run(*spoiled, objective)
        assert torch.isfinite(out.telemetry).all() and torch.equal(out.telemetry, clean.telemetry)
        assert torch.equal(out.loss, clean.loss) and torch.equal(gradient, clean_gradient)
        assert not gradient[:, :, 0].any() and gradient[:, :, 1:].any()
    kept = pf.reference_errors(spoiled[2], spoiled[1], granularity="frame", latent_weight=weight, backend=backend)
    assert torch.isfinite(kept.chosen).all() and not kept.chosen[:, 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_first_frame_is_the_clip_without_it(backend):
    p, y, q = near((2, 4, 3, 5), torch.float64)
    weight = torch.ones(1, 1, 4, 1, 1, device=DEVICE, dtype=torch.bool)
    weight[:, :, 0] = False
    for objective in (pf.DPO(50.0), pf.PGDPO()):
        whole = pf.preference_loss(p, y, q, objective=objective, latent_weight=weight, backend=backend)
        rest = pf.preference_loss(p[:, :, 1:], y[:, :, 1:], q[:, :, 1:], objective=objective, backend=backend)
        torch.testing.assert_close(whole.telemetry, rest.telemetry, rtol=1e-12, atol=1e-14)
        gradients = [torch.autograd.grad(out.loss, p)[0] for out in (whole, rest)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_of_one_change_nothing_and_a_group_of_zeros_gives_zeros(backend, granularity):
    p, y, q = near((2, 3, 4, 5))
    options = dict(objective=pf.DPO(50.0), granularity=granularity, backend=backend)
    plain = pf.preference_loss(p, y, q, **options)
    for normalize in (True, False):
        one = torch.ones(1, 1, 3, 1, 1, device=DEVICE)
        out = pf.preference_loss(p, y, q, latent_weight=one, normalize_latent_weight=normalize, **options)
        torch.testing.assert_close(out.telemetry, plain.telemetry, rtol=1e-6, atol=1e-8)
    none = pf.preference_loss(p, y, q, latent_weight=torch.zeros(2, 1, 1, 1, 1, device=DEVICE), **options)
    (gradient,) = torch.autograd.grad(none.loss, p)
    assert not gradient.any() and not none.chosen_gap.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck_with_weights(backend, granularity):
    p, y, q = near((2, 3, 1, 2), torch.float64, rows=2)
    weight = torch.rand(1, 1, 3, 1, 2, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    weight[..., 0, 0, 0] = 0

    def loss(p):
        return pf.preference_loss(
            p, y, q, objective=pf.PGDPO(5.0, ipr="anchor", detach_weights=False), granularity=granularity,
            latent_weight=weight, backend=backend,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (p,), fast_mode=True)


def test_weights_that_do_not_fit_are_named():
    p, y, q = near((2, 3, 4, 5))
    options = dict(objective=pf.DPO(), backend="eager")
    for weight in (torch.ones(3, 1, 1), torch.ones(2, 1, 4, 1, 1), 2.0, torch.ones(4, 1, 3, 1, 1)):
        with pytest.raises(ValueError, match=r"latent_weight: expected a tensor that broadcasts to \(2, 2, 3, 4, 5\)"):
            pf.preference_loss(p, y, q, latent_weight=weight, **options)
    with pytest.raises(ValueError, match="latent_weight: PGDPO with combine='outer'"):
        pf.preference_loss(
            p, y, q, objective=pf.PGDPO(combine="outer"), granularity="element", latent_weight=torch.ones(1, 1, 1, 1, 1)
        )


# The axis of the frames.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (3, 2, 5, 7), (4, 5, 13, 33)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_frames_outside_channels_are_the_same_frames(backend, shape, weighted):
    """`[B, F, C, H, W]` as CogVideoX has it, with runs of a frame that lie one after another: not a copy is made."""
    p, y, q = near(shape, torch.float64)
    weight = weights_of("regions", 2, shape) if weighted else None
    options = dict(objective=pf.PGDPO(50.0, ipr="anchor"), granularity="frame", backend=backend)
    out = pf.preference_loss(p, y, q, frame_dim=2, latent_weight=weight, **options)
    (gradient,) = torch.autograd.grad(out.loss, p)
    turned = [x.detach().transpose(1, 2).contiguous() for x in (p, y, q)]
    turned[0].requires_grad_()
    weight = None if weight is None else weight.transpose(1, 2)
    other = pf.preference_loss(*turned, frame_dim=1, latent_weight=weight, **options)
    (other_gradient,) = torch.autograd.grad(other.loss, turned[0])
    torch.testing.assert_close(other.telemetry, out.telemetry, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(other_gradient.transpose(1, 2), gradient, rtol=1e-9, atol=1e-14)
    assert other.chosen_gap.shape == (2, shape[1])


def test_a_frame_outside_channels_is_cut_into_runs_that_do_not_cross_it():
    assert operands.segments_of(torch.Size((16, 13, 60, 90)), 1) == (60 * 90, 1)
    operands_of = {(13, 16, 60, 90): 0, (21, 16, 90, 160): 0, (13, 4, 40, 64): 0, (5, 1350, 64): 0, (7, 9): 0}
    for shape, axis in operands_of.items():
        length, consecutive = operands.segments_of(torch.Size(shape), axis)
        assert length * consecutive == torch.Size(shape[1:]).numel()
        assert consecutive == 1 or length >= operands.MIN_SEGMENT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape,frame_dim", [((5, 6, 7), 1), ((6, 5, 7), 2), ((6, 7, 5), 3), ((5,), 1), ((2, 5, 3), 2)])
def test_frames_of_any_rank(backend, shape, frame_dim):
    """Tokens by frame `[B, F, L, D]`, and frames on any axis of latents of any rank >= 2."""
    p, y, q = near(shape, torch.float64)
    errors = pf.paired_errors(p, y, q, granularity="frame", frame_dim=frame_dim, anchor=True, backend=backend)
    expected = ((p - y) ** 2).movedim(frame_dim, 1).flatten(2) if len(shape) > 1 else ((p - y) ** 2)[..., None]
    torch.testing.assert_close(torch.cat([errors.policy_chosen, errors.policy_rejected]), expected.mean(2))
    (gradient,) = torch.autograd.grad(errors.policy_chosen.square().sum() + errors.anchor.sum(), p)
    (exact,) = torch.autograd.grad(
        expected.mean(2)[:2].square().sum()
        + ((p - q)[:2] ** 2).sum() * (shape[frame_dim - 1] / torch.Size(shape).numel()),
        p,
    )
    torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(33, 6), (3, 8, 9), (7,), (2, 3, 2, 3, 2)], ids=["tokens", "images", "vectors", "six axes"]
)
def test_samples_and_elements_have_any_rank(backend, shape):
    p, y, q = near(shape, torch.float64)
    some = torch.rand(2, *[1] * (len(shape) - 1), shape[-1], dtype=torch.float64).to(DEVICE)
    for granularity, weight in itertools.product(("sample", "element"), (None, some)):
        options = dict(objective=pf.PGDPO(), granularity=granularity, latent_weight=weight)
        out = pf.preference_loss(p, y, q, backend=backend, **options)
        (gradient,) = torch.autograd.grad(out.loss, p)
        flat = p.detach().requires_grad_()
        expected = pf.preference_loss(flat, y, q, backend="eager", **options)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.loss, flat)[0])


def test_an_axis_that_may_be_channels_is_told_of_once():
    options = dict(objective=pf.DPO(), granularity="frame", backend="eager")
    backends._warned.clear()
    cogvideo = near((5, 16, 2, 2))
    with pytest.warns(RuntimeWarning, match=r"takes axis 2 of \[B, 5, 16, 2, 2\] as 16 frames.*frame_dim=1") as told:
        for _ in range(2):
            pf.preference_loss(*cogvideo, **options)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pf.preference_loss(*cogvideo, frame_dim=1, **options).chosen_gap.shape == (2, 5)
        assert pf.preference_loss(*cogvideo, frame_dim=2, **options).chosen_gap.shape == (2, 16)
        pf.preference_loss(*near((16, 5, 2, 2)), **options)
    for wrong in (0, 5, -1, True, 2.0):
        with pytest.raises(ValueError, match=f"frame_dim={wrong!r}: expected the axis of the frames, 1 to 4"):
            pf.preference_loss(*cogvideo, frame_dim=wrong, **options)
    with pytest.raises(ValueError, match=r"frame_dim=1 for \[B, F, \.\.\.\]"):
        pf.preference_loss(*near((5, 16, 2)), **options)


# Samples that are no pairs.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weighted", [None, "shared", "own"])
def test_sample_errors_are_each_samples_own(backend, samples, granularity, weighted):
    p, y, q = near((2, 3, 5, 7), torch.float64, rows=samples)
    weight = None
    if weighted:
        weight = torch.rand(1 if weighted == "shared" else samples, 1, 3, 5, 7, dtype=torch.float64).to(DEVICE)
    found = pf.sample_errors(
        p, y, q, granularity=granularity, anchor=True, latent_weight=weight, normalize_latent_weight=False,
        backend=backend,
    )  # fmt: skip
    w = 1.0 if weight is None or granularity == "element" else weight
    expected = [means(w * x, granularity) for x in ((p - y) ** 2, (p - y) ** 2 - (q.double() - y) ** 2, (p - q) ** 2)]
    factors = [draw(*x.shape, seed=7 + i).double() for i, x in enumerate(expected)]
    for x, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(x, exact)
    (gradient,) = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, found, strict=True)), p)
    (exact,) = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, expected, strict=True)), p)
    torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("samples", [4, 5])
def test_sample_errors_take_two_launches_and_copy_no_input(backend, samples):
    p, y, q = near((2, 3, 5, 7), rows=samples)
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            if function is torch.ops.aten.clone.default or function is torch.ops.aten.contiguous.default:
                assert args[0].numel() < p[0].numel(), "an operand was copied"
            return function(*args, **(kwargs or {}))

    with Recorder():
        errors = pf.sample_errors(p, y, q, backend=backend)
        (errors.gap.square().sum()).backward()
    ours = [name.split(".")[1] for name in calls if name.startswith("pgdpo_fast")]
    assert ours == ["pair_errors", "pair_gradient"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_errors_take_targets_built_in_the_kernel_and_packed_references(backend):
    p, clean, q = near((2, 3, 4, 5), rows=3)
    noise, scales = draw(3, 2, 3, 4, 5, seed=8), torch.rand(2, 3).to(DEVICE)
    column = scales.view(2, 3, 1, 1, 1, 1)
    y = column[0] * noise + column[1] * clean
    found = pf.sample_errors(p, pf.NoisedTarget(clean, noise, *scales), q, backend=backend)
    expected = pf.sample_errors(p, y, q, backend="eager")
    torch.testing.assert_close(found.gap, expected.gap, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.gap.square().sum(), p)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    p, y, q = near((2, 3, 4, 5))
    packed = pf.PackedReference.pack(q, y)
    torch.testing.assert_close(
        pf.sample_errors(p, y, packed, backend=backend).gap, pf.sample_errors(p, y, q, backend="eager").gap,
        rtol=1e-2, atol=1e-3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a PackedReference holds pairs"):
        pf.sample_errors(p[:3], y[:3], packed, backend=backend)
    for wrong, name in (((p, y[:2], q), "target"), ((p, y, q[:2]), "reference"), (((p, p), y, q), "prediction")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            pf.sample_errors(*wrong, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_paired_errors_have_the_anchor_of_both_videos(backend, granularity):
    p, y, q = near((2, 3, 4, 5), torch.float64)
    errors = pf.paired_errors(p, y, q, anchor=True, granularity=granularity, backend=backend)
    expected = means((p - q) ** 2, granularity)
    torch.testing.assert_close(torch.cat([errors.anchor, errors.anchor_rejected]), expected)
    factor = draw(*expected.shape, seed=9).double()
    (gradient,) = torch.autograd.grad((factor * torch.cat([errors.anchor, errors.anchor_rejected])).sum(), p)
    torch.testing.assert_close(gradient, torch.autograd.grad((factor * expected).sum(), p)[0])


# Compiled, sharded.


@pytest.mark.parametrize("backend", ["eager", "native"] if "native" in BACKENDS else ["eager"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_new_arguments_compile_as_one_graph(backend, granularity):
    torch._dynamo.reset()

    def step(p, y, q, weight):
        loss = pf.preference_loss(
            2.0 * p, y, q, objective=pf.DPO(50.0), granularity=granularity, latent_weight=weight, backend=backend,
            **({"frame_dim": 1} if granularity == "frame" else {}),
        ).loss  # fmt: skip
        errors = pf.sample_errors(p[:-1], y[:-1], q[:-1], backend=backend)
        return loss + errors.gap.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    p, y, q = near((2, 3, 4, 5))
    weight = weights_of("frames", 2, (2, 3, 4, 5))
    loss = compiled(p, y, q, weight)
    (gradient,) = torch.autograd.grad(loss, p)
    expected = step(p, y, q, weight)
    torch.testing.assert_close((loss, gradient), (expected, torch.autograd.grad(expected, p)[0]))


SHARDED = """
    import sys
    import torch, torch.distributed as dist
    import pgdpo_fast as pf
    dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
    generator = torch.Generator().manual_seed(0)
    p, y, q = (torch.randn(4, 2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(2, 1, 3, 4, 5, generator=generator, dtype=torch.float64)
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for granularity in ("sample", "frame"):
        for normalize in (True, False):
            options = dict(
                objective=pf.PGDPO(), granularity=granularity, frame_dim=2, normalize_latent_weight=normalize
            )
            whole = p.clone().requires_grad_()
            expected = pf.preference_loss(whole, y, q, latent_weight=weight, **options).loss
            expected.backward()
            mine = p[..., part, :].clone().requires_grad_()
            loss = pf.preference_loss(
                mine, y[..., part, :], q[..., part, :], latent_weight=weight[..., part, :],
                process_group=dist.group.WORLD, **options
            ).loss
            loss.backward()
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(mine.grad, whole.grad[..., part, :])
    dist.destroy_process_group()
"""


def test_weights_are_normalised_over_the_ranks_that_share_the_latents(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED))
    address = f"file://{tmp_path / 'meeting'}"
    run_scripts(tmp_path, *([script, address, rank] for rank in range(2)))
