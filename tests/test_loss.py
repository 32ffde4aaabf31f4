"""The public loss: any layout and stride of the same numbers gives the same loss, and every wrong argument is named."""

import copy
import functools
import itertools
import math
import pickle
import textwrap

import pytest
import torch
from torch.autograd import forward_ad

import pgdpo_fast as pf
from pgdpo_fast import backends
from pgdpo_fast.errors import BackendUnavailable, ConfigError, DerivativeError, NonFiniteError
from tests.commands import run_scripts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in ("eager", "triton", "native") if backends.unavailable(name, DEVICE) is None]
SHAPE = (2, 3, 4, 5)  # C, F, H, W
FIELDS = (
    "per_pair_loss",
    "logits",
    "alpha",
    "gamma",
    "importance",
    "policy_chosen_error",
    "policy_rejected_error",
    "chosen_gap",
    "rejected_gap",
    "chosen_reward",
    "rejected_reward",
    "margin",
    "gradient_factor",
    "reference_chosen_error",
    "reference_rejected_error",
)
METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logits",
    "gradient_factor",
    "weights/alpha",
    "weights/gamma",
    "weights/importance",
    "errors/policy_chosen",
    "errors/policy_rejected",
    "errors/reference_chosen",
    "errors/reference_rejected",
}


class Batch:
    """B pairs near their reference: prediction and reference `[2B, ...]`, target `[2B, ...]`."""

    def __init__(self, pairs=3, shape=SHAPE, dtype=torch.float32, seed=0, device=DEVICE):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(2 * pairs, *shape, generator=generator)
        reference = target + 0.5 * torch.randn(target.shape, generator=generator)
        prediction = reference + 0.1 * torch.randn(target.shape, generator=generator)
        self.pairs = pairs
        self.target, self.reference = target.to(device, dtype), reference.to(device, dtype)
        self.prediction = prediction.to(device, dtype).requires_grad_()


def same_result(run, other, tolerance=0.0):
    """Two (output, gradients) agree in loss, every field and every gradient."""
    (a, grads_a), (b, grads_b) = run, other
    for x, y in zip(
        [*(getattr(a, f) for f in ("loss", *FIELDS)), *grads_a],
        [*(getattr(b, f) for f in ("loss", *FIELDS)), *grads_b],
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def call(prediction, target, reference, objective=None, **options):
    """(output, gradients by the tensors of `prediction`)."""
    out = pf.preference_loss(prediction, target, reference, objective=objective or pf.PGDPO(), **options)
    leaves = [prediction] if isinstance(prediction, torch.Tensor) else list(prediction)
    return out, torch.autograd.grad(out.loss, leaves)


# What the numbers are.


def groups_of(video, granularity):
    """Lists of the elements of each group, by explicit indices."""
    channels, frames, height, width = video.shape
    index = itertools.product(range(channels), range(frames), range(height), range(width))
    keys = {"sample": lambda c, f, h, w: 0, "frame": lambda c, f, h, w: f, "element": lambda *i: i}[granularity]
    groups = {}
    for i in index:
        groups.setdefault(keys(*i), []).append(video[i].item())
    return list(groups.values())


def gap(p, q, y):
    return math.fsum((a - t) ** 2 - (b - t) ** 2 for a, b, t in zip(p, q, y, strict=True)) / len(p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_rewards_are_gaps_of_mean_squared_errors_over_each_group(backend, granularity):
    x = Batch(pairs=2, dtype=torch.float64)
    out = pf.preference_loss(
        x.prediction, x.target, x.reference, objective=pf.DPO(beta=50.0), granularity=granularity, backend=backend
    )
    losses = []
    for pair in range(2):
        rewards = []
        for row in (pair, 2 + pair):
            p, q, y = (groups_of(t[row], granularity) for t in (x.prediction, x.reference, x.target))
            rewards.append([-gap(*group) for group in zip(p, q, y, strict=True)])
        losses.append([math.log1p(math.exp(-25.0 * (w - r))) for w, r in zip(*rewards, strict=True)])
        chosen, rejected = (torch.tensor(r, dtype=torch.float64, device=DEVICE) for r in rewards)
        if granularity != "frame":
            chosen, rejected = chosen.mean(), rejected.mean()
        torch.testing.assert_close(out.chosen_reward[pair], chosen, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.rejected_reward[pair], rejected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(out.margin[pair], chosen - rejected, rtol=1e-10, atol=1e-14)
    assert out.loss.item() == pytest.approx(sum(map(sum, losses)) / sum(map(len, losses)), rel=1e-12)
    shape = (2, 3) if granularity == "frame" else (2,)
    assert all(getattr(out, name).shape == shape for name in FIELDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_dpo_is_the_textbook_one(backend):
    """d loss / d p_w = beta/B sigmoid(-z) (p_w - y_w) / M, and the opposite sign for the rejected video."""
    x = Batch(pairs=2, dtype=torch.float64)
    out, (grad,) = call(x.prediction, x.target, x.reference, pf.DPO(beta=50.0), backend=backend)
    factor = 50.0 / 2 * torch.sigmoid(-out.logits) / math.prod(SHAPE)
    factor = torch.cat([factor, -factor]).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(grad, factor * (x.prediction - x.target).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_the_frame_dimension_of_one_frame_is_the_sample(backend, granularity):
    x = Batch(shape=(2, 1, 4, 5))
    out, grads = call(x.prediction, x.target, x.reference, granularity=granularity, backend=backend)
    whole = call(x.prediction, x.target, x.reference, backend="eager")
    torch.testing.assert_close(out.loss, whole[0].loss)
    torch.testing.assert_close(grads, whole[1])


# Layouts.


def halves(t):
    return tuple(half.requires_grad_(t.requires_grad) for half in t.detach().chunk(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_stacked_tensors_and_tuples_are_the_same_call(backend, granularity):
    x = Batch()
    options = dict(granularity=granularity, backend=backend)
    out, (grad,) = call(x.prediction, x.target, x.reference, **options)
    stacked = out, grad.split(3)
    same_result(call(halves(x.prediction), halves(x.target), halves(x.reference), **options), stacked)
    same_result(call(list(halves(x.prediction)), x.target, list(halves(x.reference)), **options), stacked)
    same_result(call(halves(x.prediction), halves(x.target), x.reference, **options), stacked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_target_equals_two_copies_of_it(backend):
    x = Batch()
    shared = x.target[:3]
    twice = call(x.prediction, torch.cat([shared, shared]), x.reference, backend=backend)
    same_result(call(x.prediction, shared, x.reference, backend=backend), twice)
    out, grads = call(halves(x.prediction), shared, halves(x.reference), backend=backend)
    same_result((out, [torch.cat(grads)]), twice)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_built_in_the_kernel_equals_one_built_before(backend, dtype):
    x = Batch(dtype=torch.float64)
    clean, noise = x.target.float(), torch.randn(3, *SHAPE, device=DEVICE)
    noise_scale, clean_scale = torch.rand(3, device=DEVICE), -torch.rand(3, device=DEVICE)
    column = (slice(None),) + (None,) * 4
    target = torch.cat([noise_scale[column] * noise + clean_scale[column] * c for c in clean.split(3)])
    prediction = x.prediction.detach().to(dtype).requires_grad_()
    built = pf.NoisedTarget(clean, noise, noise_scale, clean_scale)
    same_result(
        call(prediction, built, x.reference, backend=backend),
        call(prediction, target, x.reference, backend=backend),
        2e-6 if dtype == torch.float32 else 1e-2,
    )
    built = pf.NoisedTarget(clean.split(3), noise, noise_scale.double(), clean_scale)
    same_result(
        call(prediction, built, x.reference, backend=backend),
        call(prediction, target, x.reference, backend=backend),
        2e-6 if dtype == torch.float32 else 1e-2,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_cached_reference_errors_equal_reference_predictions(backend, granularity):
    x = Batch(dtype=torch.float64)
    cached = pf.reference_errors(x.reference, x.target, granularity=granularity, backend=backend)
    assert cached.chosen.shape == ((3, 3) if granularity == "frame" else (3,))
    assert not cached.chosen.requires_grad
    options = dict(granularity=granularity, backend=backend)
    online = call(x.prediction, x.target, x.reference, **options)
    same_result(call(x.prediction, x.target, cached, **options), online, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_policy_equal_to_its_reference_has_gaps_of_exactly_zero(backend, dtype):
    x = Batch(dtype=dtype, shape=(3, 5, 7, 11))
    prediction = x.reference.detach()
    for reference in (x.reference, pf.reference_errors(x.reference, x.target, backend=backend)):
        out = pf.preference_loss(prediction, x.target, reference, objective=pf.DPO(), backend=backend)
        assert out.chosen_gap.eq(0).all() and out.rejected_gap.eq(0).all()
        assert out.loss.item() == pytest.approx(math.log(2), rel=1e-6)


def layouts(reference, target):
    return {
        "stacked": (reference, target),
        "tuples": (reference.split(3), target.split(3)),
        "mixed": (reference.split(3), target),
        "shared": (reference, target[:3]),
        "shared tuple": (reference.split(3), target[:3]),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["stacked", "tuples", "mixed", "shared", "shared tuple"])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_a_packed_reference_stands_for_the_predictions_it_packs(backend, layout, format):
    x = Batch(shape=(3, 3, 5, 7))  # 315 elements: the third block of 128 is cut short
    reference, target = layouts(x.reference, x.target)[layout]
    packed = pf.PackedReference.pack(reference, target, format)
    size, ulp = {"bf16": (2, 2.0**-8), "fp8": (1, 1.1 * 2.0**-4)}[format]
    assert packed.chosen.element_size() == size and packed.chosen.shape == (3, 3, 3, 5, 7)
    y = x.target if "shared" not in layout else torch.cat([x.target[:3]] * 2)
    stored = torch.cat([packed.chosen, packed.rejected])
    if format == "fp8":
        scales = torch.cat([packed.chosen_scale, packed.rejected_scale]).repeat_interleave(128, 1)[:, :315]
        stored = stored.view(torch.float8_e4m3fn).float() * scales.view(stored.shape)
    residual = x.reference - y
    floor = residual.abs().flatten(1).amax(1).view(-1, 1, 1, 1, 1) * (2.0**-15 if format == "fp8" else 0)
    assert ((stored.float() - residual).abs() <= ulp * residual.abs() + floor).all()
    if format == "fp8":  # rounding is paid for in every block: its sum of squares is kept
        squares = [
            torch.nn.functional.pad(t.float().flatten(1), (0, 69)).square().unflatten(1, (3, 128)).sum(-1)
            for t in (stored, residual)
        ]
        torch.testing.assert_close(*squares, rtol=1e-5, atol=0)
    exact = call(x.prediction, target, y + stored.float(), backend=backend)
    same_result(call(x.prediction, target, packed, backend=backend), exact, 2e-6)


def test_packing_zero_and_tiny_residuals_is_exact_enough():
    target = torch.randn(2, 2, 2, 8, 8)
    reference = target.clone()
    packed = pf.PackedReference.pack(reference, target, "fp8")
    assert packed.chosen.eq(0).all() and torch.isfinite(packed.chosen_scale).all()
    packed = pf.PackedReference.pack(torch.full_like(target, 1e-38), torch.zeros_like(target), "fp8")
    scale = packed.chosen_scale.repeat_interleave(128, 1).view(1, 2, 2, 8, 8)
    stored = packed.chosen.view(torch.float8_e4m3fn).float() * scale
    assert torch.isfinite(stored).all() and stored.max() < 2e-38


def test_an_anchor_needs_predictions_and_gets_its_gradient():
    x = Batch(dtype=torch.float64)
    objective = pf.PGDPO(ipr="anchor")
    plain = x.prediction.detach().requires_grad_()
    p, q, y = plain, x.reference, x.target
    e = ((p - y) ** 2).flatten(1).mean(1)
    d = e - ((q - y) ** 2).flatten(1).mean(1)
    z = 50.0 * (d[3:] - d[:3])
    alpha, gamma = torch.sigmoid(z.detach()), torch.sigmoid(-z.detach())
    anchor = ((p - q) ** 2).flatten(1).mean(1)[:3]
    loss = (gamma * torch.nn.functional.softplus(50.0 * (d[:3] - alpha * d[3:])) + (1 - gamma) * 50.0 * anchor).mean()
    expected = torch.autograd.grad(loss, plain)
    for backend in BACKENDS:
        out, grads = call(x.prediction, x.target, x.reference, objective, backend=backend)
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(grads, expected)


# Strides.


def strided(t, how):
    """The same numbers as `t` in other memory."""
    t = t.detach()
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "batch last":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]
    if how == "padded rows":
        wide = torch.full((t.shape[0], t[0].numel() + 3), float("nan"), dtype=t.dtype, device=t.device)
        wide[:, 1:-2] = t.flatten(1)
        return wide[:, 1:-2].unflatten(1, t.shape[1:])
    if how == "channels last":
        return t.contiguous(memory_format=torch.channels_last_3d)
    if how == "every other row":
        return torch.stack([t, torch.full_like(t, float("nan"))], 1).flatten(0, 1)[::2]
    assert how == "frames first"
    return t.movedim(2, 1).contiguous().movedim(1, 2)


STRIDES = ("transposed", "batch last", "sliced", "padded rows", "channels last", "every other row", "frames first")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "granularity,how",
    [
        *(("sample", how) for how in STRIDES),
        ("frame", "frames first"),
        ("frame", "padded rows"),
        ("element", "transposed"),
        ("element", "padded rows"),
    ],
)
def test_strides_change_nothing_and_no_input_is_written_to(backend, granularity, how):
    x = Batch()
    prediction, target, reference = (strided(t, how) for t in (x.prediction, x.target, x.reference))
    assert torch.equal(prediction, x.prediction) and prediction.stride() != x.prediction.stride()
    options = dict(granularity=granularity, backend=backend)
    plain = call(x.prediction, x.target, x.reference, **options)
    versions = [t._version for t in (prediction, target, reference)]
    prediction.requires_grad_()
    found = call(prediction, target, reference, **options)
    # eager sums in memory order, kernels in row order
    same_result(found, plain, 1e-5 if backend == "eager" else 0.0)
    assert found[1][0].shape == prediction.shape
    assert [t._version for t in (prediction, target, reference)] == versions
    for t, before in ((prediction, x.prediction), (target, x.target), (reference, x.reference)):
        assert torch.equal(t, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_are_read_in_place(backend):
    x = Batch()
    one = x.target[:1].expand(6, *SHAPE)
    same_result(
        call(x.prediction, one, x.reference, backend=backend),
        call(x.prediction, one.contiguous(), x.reference, backend=backend),
    )
    prediction = x.prediction[:1].detach().requires_grad_()
    out = pf.preference_loss(prediction.expand(6, *SHAPE), x.target, x.reference, objective=pf.PGDPO(), backend=backend)
    whole = prediction.detach().repeat(6, 1, 1, 1, 1).requires_grad_()
    _, (grad,) = call(whole, x.target, x.reference, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out.loss, prediction)[0], grad.sum(0, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_further_apart_than_two_to_the_31_elements(backend):
    """Four rows 2^30 elements apart: the rejected half starts beyond 32-bit offsets. Only the pages touched exist."""
    if DEVICE.type == "cpu":
        storage = torch.empty(3 * 2**30 + 4096, dtype=torch.bfloat16)
    else:
        storage = torch.empty(3 * 2**30 + 4096, dtype=torch.bfloat16, device=DEVICE)
    x = Batch(pairs=2, dtype=torch.bfloat16)
    far = storage.as_strided((4, *SHAPE), (2**30, *x.target.stride()[1:]))
    far.copy_(x.prediction.detach())
    far.requires_grad_()
    out = pf.preference_loss(far, x.target, x.reference, objective=pf.PGDPO(), backend=backend)
    near, (expected,) = call(x.prediction, x.target, x.reference, backend=backend)
    assert torch.equal(out.loss, near.loss)
    # the gradient by the strided view, not by the 6 GB beneath it
    assert torch.equal(torch.autograd.grad(out.loss, far)[0], expected)
    del storage, far
    storage = torch.empty(3 * 2**30 + 4096, dtype=torch.bfloat16, device=DEVICE)
    far = storage.as_strided((4, *SHAPE), (2**30, *x.target.stride()[1:])).copy_(x.reference)
    assert torch.equal(call(x.prediction, x.target, far, backend=backend)[0].loss, near.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (7, 1, 1, 1), (1, 1, 1, 1), (2, 3, 4, 5, 6)], ids=str)
def test_a_sample_reward_takes_latents_of_any_rank(backend, shape):
    x = Batch(shape=shape)
    flat = Batch(shape=shape)
    out = call(x.prediction, x.target, x.reference, backend=backend)
    prediction = flat.prediction.detach().flatten(1).requires_grad_()
    other, grads = call(prediction, flat.target.flatten(1), flat.reference.flatten(1), backend="eager")
    same_result(out, (other, [g.view(x.prediction.shape) for g in grads]), 1e-5)


# Gradients in and out.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_the_incoming_gradient_scales_the_gradient(backend, granularity):
    x = Batch()
    options = dict(granularity=granularity, backend=backend)
    _, (plain,) = call(x.prediction, x.target, x.reference, **options)
    out = pf.preference_loss(x.prediction, x.target, x.reference, objective=pf.PGDPO(), **options)
    for incoming in (0.0, -2.0, 65536.0, 1e-3):
        (grad,) = torch.autograd.grad(out.loss * incoming, x.prediction, retain_graph=True)
        assert (grad - incoming * plain).norm() <= 1e-6 * abs(incoming) * plain.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_paired_errors_carry_any_incoming_gradient(backend, granularity):
    """Weights on `[B, G]` statistics of any stride: dense, expanded from one number, transposed."""
    x = Batch(dtype=torch.float64)
    groups = 3 if granularity == "frame" else 1
    dense = torch.randn(6, 3, groups, dtype=torch.float64, device=DEVICE)
    for weights in (dense, dense[:1, :1, :1].expand(6, 3, groups), dense.transpose(1, 2).contiguous().transpose(1, 2)):
        grads = []
        for name in ("eager", backend):
            errors = pf.paired_errors(
                x.prediction, x.target, x.reference, granularity=granularity, anchor=True, cross=True, backend=name
            )
            assert all(e.shape == (3, groups) for e in errors)
            statistics = [e for e in errors if e.requires_grad]
            assert len(statistics) == 6, "the cross term is documented to carry no gradient"
            loss = torch.autograd.grad(statistics, x.prediction, [w for w in weights])
            grads.append(loss[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_backward_can_run_twice_and_gradients_accumulate(backend, granularity):
    x = Batch()
    options = dict(granularity=granularity, backend=backend, objective=pf.PGDPO())
    out = pf.preference_loss(x.prediction, x.target, x.reference, **options)
    (first,) = torch.autograd.grad(3 * out.loss, x.prediction, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(out.loss, x.prediction, retain_graph=True)
    (third,) = torch.autograd.grad(-2 * out.loss, x.prediction)
    assert torch.equal(first, kept), "a later backward wrote over a gradient already handed out"
    torch.testing.assert_close(first, 3 * second, rtol=2e-6, atol=0)
    torch.testing.assert_close(third, -2 * second, rtol=2e-6, atol=0)
    for _ in range(2):
        out = pf.preference_loss(x.prediction, x.target, x.reference, **options)
        out.loss.backward(retain_graph=True)
        x.prediction.grad.mul_(1.0)  # as gradient clipping does
        (0 * out.loss).backward()
    torch.testing.assert_close(x.prediction.grad, 2 * second, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
@pytest.mark.parametrize("way", ["loss", "errors"])
def test_a_gradient_penalty_is_right_or_refused(backend, granularity, way):
    """The penalty's own gradient by the textbook on eager; the fused backends say which one to ask, and lose no step
    that takes first derivatives alone."""
    x = Batch(dtype=torch.float64)

    def loss(backend):
        arguments = dict(granularity=granularity, backend=backend)
        if way == "loss":
            return pf.preference_loss(x.prediction, x.target, x.reference, objective=pf.DPO(50.0), **arguments).loss
        return pf.paired_errors(x.prediction, x.target, **arguments).policy_chosen.square().sum()

    if backend == "eager" or (way, granularity) == ("errors", "element"):  # such errors are plain torch everywhere

        def slope(p):
            x.prediction = p
            return torch.autograd.grad(loss(backend), p, create_graph=True)[0].square().sum()

        p = x.prediction.detach().requires_grad_()
        direction = torch.randn_like(p)
        (second,) = torch.autograd.grad(slope(p), p)
        step = 1e-6 * direction
        ahead, behind = (slope((p.detach() + s).requires_grad_()).detach() for s in (step, -step))
        torch.testing.assert_close((second * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)
        return
    with pytest.raises(DerivativeError, match=r'create_graph=True: .*gradient penalty .*backend="eager"'):
        torch.autograd.grad(loss(backend), x.prediction, create_graph=True)
    with pytest.raises(DerivativeError, match="create_graph=True"):
        loss(backend).backward(create_graph=True)
    with torch.enable_grad():
        (first,) = torch.autograd.grad(loss(backend), x.prediction)
    torch.testing.assert_close(first, torch.autograd.grad(loss("eager"), x.prediction)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "element"])
def test_transforms_of_torch_func_are_right_or_refused(backend, granularity):
    x = Batch(dtype=torch.float64)

    def loss(p):
        return pf.preference_loss(
            p, x.target, x.reference, objective=pf.DPO(50.0), granularity=granularity, backend=backend
        ).loss

    p = x.prediction.detach()
    if backend == "eager":
        leaf = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(p), gradient)
        torch.testing.assert_close(torch.func.jvp(loss, (p,), (p,))[1], (gradient * p).sum())
        torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([p, 2 * p])), torch.stack([loss(p), loss(2 * p)]))
        return
    for transform in (
        lambda: torch.func.grad(loss)(p),
        lambda: torch.func.jvp(loss, (p,), (p,)),
        lambda: torch.func.vmap(loss)(torch.stack([p, p])),
    ):
        with pytest.raises(DerivativeError, match=r'torch\.func: .*backend="eager"'):
            transform()
    with forward_ad.dual_level(), pytest.raises(DerivativeError, match=r'forward-mode .*backend="eager"'):
        loss(forward_ad.make_dual(p, p))


@pytest.mark.parametrize("what", ["reference", "target", "target.noise"])
def test_a_graph_behind_what_gets_no_gradient_is_told_once(what):
    """And changes nothing: no gradient flows there."""
    backends._warned.clear()
    x = Batch()
    weight = torch.ones(1, device=DEVICE, requires_grad=True)
    half = x.prediction.shape[0] // 2
    scale = torch.ones(half, device=DEVICE)
    target, reference = x.target, x.reference
    if what == "reference":
        reference = weight * reference
    elif what == "target":
        target = weight * target
    else:
        target = pf.NoisedTarget(target, weight * target[:half], scale, scale)
    with pytest.warns(RuntimeWarning, match=rf"{what}: carries a graph.*torch\.no_grad\(\)") as told:
        for _ in range(3):
            out = pf.preference_loss(x.prediction, target, reference, objective=pf.DPO(), backend="eager")
    assert len(told) == 1
    out.loss.backward()
    assert weight.grad is None


def test_a_graph_is_told_from_compiled_code_too():
    torch._dynamo.reset()
    backends._warned.clear()
    x = Batch()

    def step(p, y, q):
        return pf.preference_loss(p, y, 1.0 * q, objective=pf.DPO(), backend="eager").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="reference: carries a graph"):
        loss = compiled(x.prediction, x.target, x.reference.requires_grad_())
    torch.testing.assert_close(loss, step(x.prediction, x.target, x.reference))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "element"])
def test_only_what_needs_a_gradient_gets_one(backend, granularity):
    x = Batch()
    options = dict(objective=pf.PGDPO(), granularity=granularity, backend=backend)
    _, (whole,) = call(x.prediction, x.target, x.reference, granularity=granularity, backend=backend)
    for k in range(2):
        pair = [t.detach() for t in halves(x.prediction)]
        pair[k].requires_grad_()
        target, reference = x.target.clone().requires_grad_(), x.reference.clone().requires_grad_()
        pf.preference_loss(pair, target, reference, **options).loss.backward()
        torch.testing.assert_close(pair[k].grad, whole.split(3)[k], rtol=2e-6, atol=0)
        assert pair[1 - k].grad is None and target.grad is None and reference.grad is None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = pf.preference_loss(x.prediction, x.target, x.reference, **options)
        assert not out.loss.requires_grad
    out = pf.preference_loss(x.prediction.detach(), x.target, x.reference, **options)
    assert not out.loss.requires_grad
    out = pf.preference_loss(x.prediction, x.target, x.reference, **options)
    assert out.loss.requires_grad and not any(getattr(out, f).requires_grad for f in FIELDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_changed_before_backward_is_noticed_or_does_not_matter(backend):
    for which in ("target", "prediction"):
        x = Batch()
        _, (expected,) = call(x.prediction, x.target, x.reference, backend=backend)
        prediction = x.prediction * 1
        out = pf.preference_loss(prediction, x.target, x.reference, objective=pf.PGDPO(), backend=backend)
        with torch.no_grad():
            (x.target if which == "target" else prediction).add_(1.0)
        try:
            (grad,) = torch.autograd.grad(out.loss, x.prediction)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    x = Batch(dtype=torch.float32)
    plain = call(x.prediction, x.target, x.reference, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = call(x.prediction, x.target, x.reference, backend=backend)
    same_result(found, plain)
    model = torch.nn.Linear(5, 5, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        prediction = model(x.prediction.detach())
        assert prediction.dtype == torch.bfloat16
        loss = pf.preference_loss(prediction, x.target, x.reference, objective=pf.PGDPO(), backend=backend).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32 and model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "prediction,other",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_may_differ_and_the_loss_is_float32_or_better(backend, prediction, other):
    x, y = Batch(dtype=prediction), Batch(dtype=other)
    out, (grad,) = call(x.prediction, y.target, y.reference, backend=backend)
    wide = torch.float64 if prediction == torch.float64 else torch.float32
    assert out.loss.dtype == wide and grad.dtype == prediction
    assert all(getattr(out, f).dtype == wide for f in FIELDS)
    exact = Batch(dtype=torch.float64)
    exact.prediction = x.prediction.detach().double().requires_grad_()
    expected, (grad64,) = call(exact.prediction, y.target.double(), y.reference.double(), backend="eager")
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    tolerance = 2.0 ** {torch.bfloat16: -8, torch.float16: -9}.get(prediction, -18)
    assert (grad.double() - grad64).norm() <= tolerance * grad64.norm()


# Weights.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_a_pair_weight_multiplies_its_pairs_loss(backend, granularity):
    x = Batch(dtype=torch.float64)
    weight = torch.tensor([0.0, 2.0, 0.5], device=DEVICE)
    options = dict(granularity=granularity, backend=backend)
    out, (grad,) = call(x.prediction, x.target, x.reference, pair_weight=weight, **options)
    plain, (plain_grad,) = call(x.prediction, x.target, x.reference, **options)
    per_pair = plain.per_pair_loss.flatten(1).mean(1) if granularity == "frame" else plain.per_pair_loss
    torch.testing.assert_close(out.loss, (weight * per_pair).mean())
    torch.testing.assert_close(grad, weight.repeat(2).view(-1, 1, 1, 1, 1) * plain_grad)
    torch.testing.assert_close(out.per_pair_loss, plain.per_pair_loss)
    out, _ = call(x.prediction, x.target, x.reference, pair_weight=float("nan") * weight, backend=backend)
    with pytest.raises(NonFiniteError, match="the weights are not finite"):
        out.check_finite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_importance_objectives_take_the_posterior_scale(backend):
    x = Batch(dtype=torch.float64)
    scale = torch.tensor([0.01, 0.3, 5.0], device=DEVICE)
    out, _ = call(
        x.prediction, x.target, x.reference, pf.DPOClipMask(beta=50.0), posterior_scale=scale, backend=backend
    )
    raw = torch.exp(-scale * (out.policy_chosen_error + out.policy_rejected_error) / 2)
    expected = torch.where(raw < 0.9, 0.0, raw.clamp(0.9, 1.1))
    torch.testing.assert_close(out.importance, expected)
    assert 0 < expected.count_nonzero() < 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_beta_scale_gives_every_pair_a_beta_of_its_own(backend):
    """One scale for all is another beta, one per pair holds for all its frames, and no gradient flows to it."""
    x = Batch(dtype=torch.float64)
    inputs = x.prediction, x.target, x.reference
    scale = torch.tensor([0.5, 1.0, 3.0], device=DEVICE, requires_grad=True)
    for granularity in ("sample", "frame", "element"):
        options = dict(granularity=granularity, backend=backend)
        same = call(*inputs, pf.PGDPO(beta=20.0), beta_scale=torch.full((3,), 2.5, device=DEVICE), **options)
        same_result(same, call(*inputs, pf.PGDPO(beta=50.0), **options), 1e-12)
        own, _ = call(*inputs, pf.DPO(beta=20.0), beta_scale=scale, **options)
        for i, beta in enumerate((10.0, 20.0, 60.0)):
            plain, _ = call(*inputs, pf.DPO(beta=beta), **options)
            torch.testing.assert_close(own.per_pair_loss[i], plain.per_pair_loss[i], rtol=1e-12, atol=0)
    assert scale.grad is None
    options = dict(granularity="frame", backend=backend)
    per_frame = call(*inputs, pf.DPO(20.0), beta_scale=scale.detach()[:, None].expand(3, 3), **options)
    same_result(per_frame, call(*inputs, pf.DPO(20.0), beta_scale=scale, **options))


class WithoutBetaScale(pf.Objective):
    def terms(self, errors, posterior_scale=None):
        return self.result(errors.policy_chosen, errors.gap_rejected - errors.gap_chosen)


class WithBetaScale(pf.Objective):
    def terms(self, errors, posterior_scale=None, *, beta_scale=None):
        logits = 5.0 * (1.0 if beta_scale is None else beta_scale) * (errors.gap_rejected - errors.gap_chosen)
        return self.result(-torch.nn.functional.logsigmoid(logits), logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_objective_that_takes_no_beta_scale_says_how_to_add_it(backend):
    x = Batch(dtype=torch.float64)
    inputs, scale = (x.prediction, x.target, x.reference), torch.full((3,), 2.0, device=DEVICE)
    call(*inputs, WithoutBetaScale(), backend=backend)
    for objective in (WithoutBetaScale(), pf.Safeguarded(WithoutBetaScale())):
        with pytest.raises(
            ConfigError, match=r"beta_scale: \w+.terms does not take it; add the argument beta_scale=None"
        ):
            call(*inputs, objective, beta_scale=scale, backend=backend)
    own = call(*inputs, WithBetaScale(), beta_scale=scale, backend=backend)
    same_result(own, call(*inputs, pf.DPO(20.0), backend=backend), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frame_weights_make_a_weighted_mean_over_frames(backend):
    x = Batch(dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]], device=DEVICE)
    options = dict(granularity="frame", backend=backend)
    plain, _ = call(x.prediction, x.target, x.reference, **options)
    out, (grad,) = call(x.prediction, x.target, x.reference, frame_weight=weight, **options)
    loss = plain.per_pair_loss
    expected = ((loss[0, 0] + 3 * loss[0, 2]) / 4 + loss[1].mean()) / 3
    torch.testing.assert_close(out.loss, expected)
    frames = grad.abs().sum((1, 3, 4))
    assert torch.equal(frames > 0, (weight > 0).repeat(2, 1))
    both = call(
        x.prediction,
        x.target,
        x.reference,
        frame_weight=weight,
        pair_weight=torch.ones(3, device=DEVICE) * 2,
        **options,
    )[0]
    torch.testing.assert_close(both.loss, 2 * expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frame_labels_exchange_the_videos_where_the_rejected_one_is_better(backend):
    x = Batch(dtype=torch.float64)
    label = torch.tensor([[1, -1, 0], [1, 1, 1], [-1, -1, -1]], device=DEVICE)
    options = dict(granularity="frame", backend=backend)
    out, (grad,) = call(x.prediction, x.target, x.reference, frame_label=label, **options)
    plain, (plain_grad,) = call(x.prediction, x.target, x.reference, **options)
    swap = [torch.cat(t.detach().split(3)[::-1]) for t in (x.prediction, x.target, x.reference)]
    swapped, (swapped_grad,) = call(swap[0].requires_grad_(), *swap[1:], **options)
    flipped = torch.cat(swapped_grad.split(3)[::-1])
    torch.testing.assert_close(out.per_pair_loss, torch.where(label < 0, swapped.per_pair_loss, plain.per_pair_loss))
    expected = (
        (plain.per_pair_loss[0, 0] + swapped.per_pair_loss[0, 1]) / 2
        + plain.per_pair_loss[1].mean()
        + swapped.per_pair_loss[2].mean()
    ) / 3
    torch.testing.assert_close(out.loss, expected)
    share = torch.tensor([1.5, 1.0, 1.0], device=DEVICE)[:, None]
    by_frame = torch.where(label.repeat(2, 1)[:, None, :, None, None] < 0, flipped, plain_grad)
    by_frame = by_frame * (share * (label != 0)).repeat(2, 1)[:, None, :, None, None]
    torch.testing.assert_close(grad, by_frame)


# Telemetry.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_metrics_are_means_of_the_fields(backend, granularity):
    x = Batch()
    out, _ = call(x.prediction, x.target, x.reference, granularity=granularity, backend=backend)
    metrics = out.metrics()
    assert set(metrics) == METRICS and all(v.shape == () and not v.requires_grad for v in metrics.values())
    for key, field in {
        "rewards/chosen": "chosen_reward",
        "rewards/margins": "margin",
        "weights/gamma": "gamma",
        "errors/reference_rejected": "reference_rejected_error",
    }.items():
        torch.testing.assert_close(metrics[key], getattr(out, field).mean())
    assert metrics["rewards/accuracies"].item() == pytest.approx((out.margin > 0).float().mean().item())
    reward = out.reference_chosen_error - out.policy_chosen_error
    torch.testing.assert_close(out.chosen_reward, reward, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.gradient_factor, torch.sigmoid(-out.logits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_reference_rewards_and_accuracy_are_unknown(backend):
    x = Batch()
    out, _ = call(x.prediction, x.target, None, pf.SFT(), backend=backend)
    metrics = out.metrics()
    unknown = {k for k, v in metrics.items() if torch.isnan(v)}
    assert unknown == {k for k in METRICS if k.startswith(("rewards/", "errors/reference"))}
    known, _ = call(x.prediction, x.target, x.reference, pf.SFT(), backend=backend)
    assert not any(torch.isnan(v) for v in known.metrics().values())
    assert torch.equal(known.loss, out.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
@pytest.mark.parametrize(
    "where,value", [("prediction", float("nan")), ("target", float("inf")), ("reference", float("-inf"))]
)
def test_one_bad_pair_is_named_and_leaves_the_others_alone(backend, granularity, where, value):
    x = Batch(pairs=4, shape=(1, 2, 4, 5))
    options = dict(granularity=granularity, backend=backend)
    good, (good_grad,) = call(x.prediction, x.target, x.reference, **options)
    good.check_finite()
    tensors = {k: getattr(x, k).detach().clone() for k in ("prediction", "target", "reference")}
    tensors[where][1, 0, 1, 0, 0] = value  # chosen video of pair 1
    tensors["prediction"].requires_grad_()
    bad, (bad_grad,) = call(**tensors, **options)
    others = [0, 2, 3]
    for name in FIELDS:
        assert torch.equal(getattr(bad, name)[others], getattr(good, name)[others]), name
    rows = others + [4 + i for i in others]
    assert torch.equal(bad_grad[rows], good_grad[rows])
    with pytest.raises(NonFiniteError, match=r"pair\(s\) 1 of 4"):
        bad.check_finite()
    with pytest.raises(NonFiniteError, match=r"pair\(s\) cat of 4"):
        bad.check_finite(["dog", "cat", "owl", "fox"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_what_an_objective_takes_no_notice_of_may_be_nan(backend, granularity):
    x = Batch(pairs=2, shape=(2, 2, 4, 5))
    options = dict(objective=pf.SFT(), granularity=granularity, backend=backend)
    good, (good_grad,) = call(x.prediction, x.target, None, **options)
    prediction, reference = x.prediction.detach().clone(), x.reference.clone()
    prediction[3, 1, 0, 2, 1] = float("nan")  # rejected video of pair 1
    reference[0, 1, 0, 2, 1] = float("nan")  # the reference's chosen video of pair 0
    for given in (None, reference):
        bad, (bad_grad,) = call(prediction.requires_grad_(), x.target, given, **options)
        assert torch.equal(bad.loss, good.loss) and torch.equal(bad_grad, good_grad)
        assert (bad_grad[2:] == 0).all()
        bad.check_finite()


# The module.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_module_is_the_function(backend):
    x = Batch()
    module = pf.PreferenceLoss(pf.PGDPO(beta=7.0), granularity="frame", backend=backend)
    out = module(x.prediction, x.target, x.reference, pair_weight=torch.ones(3, device=DEVICE))
    plain = call(x.prediction, x.target, x.reference, pf.PGDPO(beta=7.0), granularity="frame", backend=backend)
    same_result((out, torch.autograd.grad(out.loss, [x.prediction])), plain)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x.prediction, x.target, x.reference).loss, out.loss) and repr(twin) == repr(module)
    assert "beta=7.0" in repr(module) and "'frame'" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()
    scale = torch.rand(3, device=DEVICE) + 0.5
    scaled, plain = (
        f(x.prediction, x.target, x.reference, beta_scale=scale)
        for f in (
            module,
            functools.partial(pf.preference_loss, objective=module.objective, granularity="frame", backend=backend),
        )
    )
    assert torch.equal(scaled.loss, plain.loss) and not torch.equal(scaled.loss, out.loss)
    weight = torch.rand(3, 3, device=DEVICE)
    assert torch.equal(
        module(x.prediction, x.target, x.reference, frame_weight=weight).loss,
        call(
            x.prediction,
            x.target,
            x.reference,
            pf.PGDPO(beta=7.0),
            granularity="frame",
            backend=backend,
            frame_weight=weight,
        )[0].loss,
    )


def test_the_module_checks_its_settings_when_built():
    for wrong, name in (
        (dict(objective=pf.PGDPO), "objective"),
        (dict(objective=pf.DPO(), backend="cuda"), "backend"),
        (dict(objective=pf.DPO(), granularity="clip"), "granularity"),
    ):
        with pytest.raises(ValueError, match=name):
            pf.PreferenceLoss(**wrong)


# Errors.


def good_arguments():
    x = Batch()
    return dict(prediction=x.prediction, target=x.target, reference=x.reference, objective=pf.PGDPO())


ones = torch.ones


def latents(batch, **options):
    return torch.zeros(batch, *SHAPE, **options)


BAD = {
    "a number": (dict(prediction=3.0), "prediction: expected a tensor"),
    "no prediction": (dict(prediction=None), "prediction: expected a tensor"),
    "an odd batch": (dict(prediction=latents(3)), r"prediction: expected \[2B, ...\].*odd batch.*\(3, 2"),
    "an empty batch": (dict(prediction=latents(0)), "prediction: expected a non-empty batch"),
    "an empty video": (dict(prediction=torch.zeros(6, 2, 0, 4, 5)), "prediction: expected a non-empty batch"),
    "a vector": (dict(prediction=torch.zeros(6)), "prediction: expected a non-empty batch of latents"),
    "integers": (dict(prediction=latents(6, dtype=torch.int32)), "prediction: expected bfloat16.*int32"),
    "complex": (dict(prediction=latents(6, dtype=torch.complex64)), "prediction: expected bfloat16.*complex64"),
    "three videos": (dict(prediction=(latents(3),) * 3), "prediction: expected a tensor or a"),
    "one video": (dict(prediction=(latents(6),)), r"prediction: expected a tensor or a \(chosen, rejected\)"),
    "unequal videos": (dict(prediction=(latents(3), latents(2))), "prediction: .*one shape"),
    "two devices": (
        dict(prediction=(latents(3), latents(3, device="meta"))),
        "prediction: .*one shape, dtype and device",
    ),
    "unequal dtypes": (dict(prediction=(latents(3), latents(3).half())), "prediction: .*one shape"),
    "strings": (dict(prediction=("a", "b")), "prediction: expected a tensor"),
    "wrong target": (dict(target=torch.zeros(6, 2, 3, 4, 4)), "target: expected shape .* got"),
    "target batch": (dict(target=latents(4)), "target: expected shape"),
    "no target": (dict(target=None), "target: expected a tensor"),
    "integer target": (dict(target=latents(6).long()), "target: expected .*float.* got torch.int64"),
    "half target tuple": (dict(target=(latents(2),) * 2), "target: expected shape"),
    "shared reference": (dict(reference=latents(3)), "reference: expected shape"),
    "no reference": (dict(reference=None), "reference: PGDPO needs the reference"),
    "boolean reference": (dict(reference=latents(6).bool()), "reference: expected"),
    "reference text": (dict(reference="cached"), "reference: expected a tensor"),
    "meta target": (dict(target=latents(6, device="meta")), "target: expected a tensor on .* like the prediction"),
    "meta reference": (dict(reference=latents(6, device="meta")), "reference: expected a tensor on"),
    "an objective class": (dict(objective=pf.PGDPO), "objective: expected an instance"),
    "an objective name": (dict(objective="pgdpo"), "objective: expected an instance"),
    "granularity": (dict(granularity="clip"), "granularity='clip': expected one of 'sample', 'frame', 'element'"),
    "no granularity": (dict(granularity=None), "granularity=None: expected one of"),
    "backend": (dict(backend="cuda"), "backend='cuda': expected 'auto', 'triton', 'native', 'eager'"),
    "weight shape": (dict(pair_weight=ones(6)), r"pair_weight: expected shape \(3,\)"),
    "weight list": (dict(pair_weight=[1.0, 1.0, 1.0]), r"pair_weight: expected shape \(3,\).*list"),
    "weight device": (dict(pair_weight=ones(3, device="meta")), "pair_weight: expected a tensor on"),
    "scale shape": (dict(posterior_scale=ones(3, 1)), r"posterior_scale: expected shape \(3,\)"),
    "beta scale shape": (dict(beta_scale=ones(3, 1)), r"beta_scale: expected shape \(3,\)"),
    "beta scale number": (dict(beta_scale=2.0), r"beta_scale: expected shape \(3,\).*float"),
    "beta scale device": (dict(beta_scale=ones(3, device="meta")), "beta_scale: expected a tensor on"),
    "frame beta scale": (
        dict(beta_scale=ones(3, 2), granularity="frame"),
        r"beta_scale: expected shape \(3,\) or \(3, 3\)",
    ),
    "scale missing": (dict(objective=pf.SDPO()), "posterior_scale: SDPO needs"),
    "safeguarded scale": (dict(objective=pf.Safeguarded(pf.SDPO())), "posterior_scale: .* needs"),
    "error shape": (dict(reference=pf.ReferenceErrors(ones(4), ones(4))), "reference.chosen: expected shape"),
    "frame errors": (dict(reference=pf.ReferenceErrors(ones(3, 3), ones(3, 3))), "reference.chosen: expected"),
    "one error": (dict(reference=pf.ReferenceErrors(ones(3), None)), "reference.rejected: expected"),
    "element errors": (
        dict(reference=pf.ReferenceErrors(ones(3), ones(3)), granularity="element"),
        "reference: granularity='element' needs",
    ),
    "anchor errors": (
        dict(reference=pf.ReferenceErrors(ones(3), ones(3)), objective=pf.PGDPO(ipr="anchor")),
        "reference: PGDPO with ipr='anchor' needs",
    ),
    "packed float": (dict(reference=pf.PackedReference(latents(3), latents(3))), "reference: expected torch.bfloat16"),
    "packed unscaled": (
        dict(reference=pf.PackedReference(*[latents(3, dtype=torch.uint8)] * 2)),
        "reference: expected torch.bfloat16",
    ),
    "packed scale": (
        dict(reference=pf.PackedReference(*[latents(3, dtype=torch.uint8)] * 2, *[ones(3, 2)] * 2)),
        "reference.*scale: expected shape",
    ),
    "packed half scale": (
        dict(reference=pf.PackedReference(*[latents(3, dtype=torch.uint8)] * 2, ones(3, 1), None)),
        "reference.*scale: expected shape",
    ),
    "packed scale dtype": (
        dict(reference=pf.PackedReference(*[latents(3, dtype=torch.uint8)] * 2, *[ones(3, 1).long()] * 2)),
        "reference.*scale: .*float32",
    ),
    "noise shape": (
        dict(target=pf.NoisedTarget(latents(6), latents(6), ones(3), ones(3))),
        "target.noise: expected shape",
    ),
    "noise scale": (
        dict(target=pf.NoisedTarget(latents(6), latents(3), ones(1), ones(3))),
        "target.noise_scale: expected shape",
    ),
    "clean shape": (
        dict(target=pf.NoisedTarget(latents(3), latents(3), ones(3), ones(3))),
        "target.clean: expected shape",
    ),
    "noise dtype": (
        dict(target=pf.NoisedTarget(latents(6), latents(3).long(), ones(3), ones(3))),
        "target.noise: expected",
    ),
    "frame weight": (dict(frame_weight=ones(3, 3)), "frame_weight.*granularity='frame'"),
    "frame weight shape": (
        dict(frame_weight=ones(3, 2), granularity="frame"),
        r"frame_weight: expected shape \(3, 3\)",
    ),
    "frame label shape": (dict(frame_label=ones(3), granularity="frame"), r"frame_label: expected shape \(3, 3\)"),
    "frame label anchor": (
        dict(frame_label=ones(3, 3), granularity="frame", objective=pf.PGDPO(ipr="anchor")),
        "frame_label: .*anchor",
    ),
}


def to_device(x):
    if isinstance(x, torch.Tensor):
        return x if x.device.type == "meta" else x.to(DEVICE)
    if isinstance(x, tuple):
        return tuple(map(to_device, x))
    if isinstance(x, (pf.ReferenceErrors, pf.PackedReference, pf.NoisedTarget)):
        return type(x)(*(to_device(v) for v in vars(x).values()))
    return x


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_named(what):
    change, message = BAD[what]
    arguments = {**good_arguments(), **{k: to_device(v) for k, v in change.items()}}
    with pytest.raises(ValueError, match=message) as raised:
        pf.preference_loss(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: pf.PackedReference.pack(x.reference, x.target, "fp4"), "format='fp4'"),
        (lambda x: pf.PackedReference.pack(x.reference[:5], x.target), "reference: .*odd batch"),
        (lambda x: pf.PackedReference.pack(x.reference, x.target[:2]), "target: expected shape"),
        (lambda x: pf.PackedReference.pack((x.reference,), x.target), "reference: expected a tensor or a"),
        (lambda x: pf.PackedReference.pack(None, x.target), "reference: expected a tensor"),
        (lambda x: pf.PackedReference.pack(x.reference.long(), x.target), "reference: expected"),
        (lambda x: pf.reference_errors(x.reference, x.target, granularity="element"), "granularity='element'"),
        (lambda x: pf.reference_errors(x.reference, None), "target: expected a tensor"),
        (lambda x: pf.paired_errors(x.prediction, x.target, anchor=True), "anchor: needs"),
        (
            lambda x: pf.paired_errors(x.prediction[:, 0], x.target[:, 0], granularity="frame"),
            "granularity='frame': expected latents",
        ),
    ],
)
def test_the_other_doors_name_bad_arguments_too(call, message):
    with pytest.raises(ValueError, match=message):
        call(Batch())


def test_a_backend_asked_for_by_name_never_falls_back():
    x = Batch(device="meta")
    with pytest.raises(BackendUnavailable, match="backend='triton' cannot run on meta"):
        pf.preference_loss(x.prediction, x.target, x.reference, objective=pf.DPO(), backend="triton")
    assert issubclass(BackendUnavailable, ConfigError)
    out = pf.preference_loss(x.prediction, x.target, x.reference, objective=pf.DPO())  # auto works out shapes
    assert out.loss.device.type == "meta" and out.alpha.shape == (3,)


# Several processes.


def run_ranks(tmp_path, body, world=2):
    """Run `body` in `world` gloo processes on the CPU; each saves `result`, returned in rank order."""
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        import pgdpo_fast as pf
        rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    """)
        + textwrap.dedent(body)
        + textwrap.dedent("""
        torch.save(result, f"{folder}/result{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    """)
    )
    run_scripts(tmp_path, *([script, rank, world, tmp_path] for rank in range(world)))
    return [torch.load(tmp_path / f"result{r}.pt") for r in range(world)]


def test_two_processes_with_half_the_latents_each_equal_one_with_all(tmp_path):
    """Context parallel: height is sharded. Loss, telemetry and gradients of every objective family and granularity."""
    x = Batch(dtype=torch.float64, device="cpu")
    torch.save([t.detach() for t in (x.prediction, x.target, x.reference)], tmp_path / "batch.pt")
    cases = {
        "pgdpo": pf.PGDPO(),
        "safeguarded": pf.Safeguarded(pf.DPO(50.0)),
        "anchor": pf.PGDPO(ipr="anchor"),
        "sft": pf.SFT(),
    }
    torch.save(cases, tmp_path / "cases.pt")
    ranks = run_ranks(
        tmp_path,
        """
        shards = [t.chunk(world, 3)[rank].contiguous() for t in torch.load(f"{folder}/batch.pt")]
        cases, result = torch.load(f"{folder}/cases.pt", weights_only=False), {}
        for name, objective in cases.items():
            for granularity in ("sample", "frame"):
                p = shards[0].clone().requires_grad_()
                out = pf.preference_loss(p, *shards[1:], objective=objective, granularity=granularity,
                                         pair_weight=torch.tensor([1.0, 2.0, 0.5]), process_group=dist.group.WORLD)
                out.loss.backward()
                result[name, granularity] = out.loss.detach(), out.margin, out.alpha, out.policy_chosen_error, p.grad
        whole = pf.reference_errors(shards[2], shards[1])
        total = torch.stack([whole.chosen, whole.rejected])
        dist.all_reduce(total)
        p = shards[0].clone().requires_grad_()
        out = pf.preference_loss(p, shards[1], pf.ReferenceErrors(*(total / world)), objective=cases["pgdpo"],
                                 process_group=dist.group.WORLD)
        out.loss.backward()
        result["cached"] = out.loss.detach(), p.grad
        try:
            pf.preference_loss(*shards, objective=cases["pgdpo"], granularity="element", process_group=dist.group.WORLD)
        except ValueError as error:
            result["error"] = str(error)
    """,
    )
    for name, objective in cases.items():
        for granularity in ("sample", "frame"):
            out, (grad,) = call(
                x.prediction,
                x.target,
                x.reference,
                objective,
                granularity=granularity,
                pair_weight=torch.tensor([1.0, 2.0, 0.5]),
            )
            for rank in ranks:
                fields = out.loss.detach(), out.margin, out.alpha, out.policy_chosen_error
                torch.testing.assert_close(rank[name, granularity][:-1], fields, rtol=1e-11, atol=1e-14)
            found = torch.cat([r[name, granularity][-1] for r in ranks], 3)
            torch.testing.assert_close(found, grad, rtol=1e-11, atol=1e-15)
    out, (grad,) = call(x.prediction, x.target, pf.reference_errors(x.reference, x.target))
    torch.testing.assert_close(ranks[0]["cached"][0], out.loss.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(torch.cat([r["cached"][-1] for r in ranks], 3), grad, rtol=1e-9, atol=1e-15)
    assert "process_group" in ranks[0]["error"]


def test_data_parallel_training_equals_one_process(tmp_path):
    """Two ranks of two pairs under DistributedDataParallel against one process with four pairs: three SGD steps."""
    torch.manual_seed(0)
    torch.save([torch.randn(8, 2, 3, 4, 5, dtype=torch.float64) for _ in range(3)], tmp_path / "batch.pt")
    body = """
        latents, target, reference = (t.view(2, 4, 2, 3, 4, 5) for t in torch.load(f"{folder}/batch.pt"))
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        latents, target, reference = (t[:, mine].flatten(0, 1) for t in (latents, target, reference))
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 5).double()
        parallel = model if world == 1 else torch.nn.parallel.DistributedDataParallel(model)
        loss = pf.PreferenceLoss(pf.PGDPO())
        sgd = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            sgd.zero_grad()
            loss(parallel(latents), target, reference).loss.backward()
            sgd.step()
        result = model.state_dict()
    """
    alone = {"torch": torch, "pf": pf, "folder": tmp_path, "rank": 0, "world": 1}
    exec(textwrap.dedent(body), alone)
    for rank in run_ranks(tmp_path, body):
        torch.testing.assert_close(dict(rank), dict(alone["result"]), rtol=1e-10, atol=1e-13)


def test_sharded_training_equals_one_process(tmp_path):
    """Two ranks of two pairs under FSDP2 against one process with four pairs: gradients, and parameters after SGD."""
    torch.manual_seed(0)
    torch.save([torch.randn(8, 2, 3, 4, 5) for _ in range(3)], tmp_path / "batch.pt")
    names = [name for name in ("eager", "native") if backends.unavailable(name, torch.device("cpu")) is None]
    torch.save(names, tmp_path / "backends.pt")
    body = """
        latents, target, reference = (t.view(2, 4, 2, 3, 4, 5) for t in torch.load(f"{folder}/batch.pt"))
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        latents, target, reference = (t[:, mine].flatten(0, 1) for t in (latents, target, reference))
        result = {}
        for backend in torch.load(f"{folder}/backends.pt"):
            torch.manual_seed(1)
            model = torch.nn.Sequential(torch.nn.Conv3d(2, 6, 3, padding=1), torch.nn.SiLU(),
                                        torch.nn.Conv3d(6, 2, 1), torch.nn.Linear(5, 5))
            if world > 1:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard
                mesh = init_device_mesh("cpu", (world,))
                for part in (model[0], model[2], model[3], model):
                    fully_shard(part, mesh=mesh)
            sgd = torch.optim.SGD(model.parameters(), 0.05)
            out = pf.preference_loss(model(latents), target, reference, objective=pf.PGDPO(beta=1.0), backend=backend)
            out.loss.backward()
            sgd.step()
            assert world == 1 or all(p.to_local().numel() < p.numel() for p in model.parameters())
            result[backend] = {name: tuple(t.full_tensor() if world > 1 else t for t in (p.grad, p.detach()))
                               for name, p in model.named_parameters()}
    """
    alone = {"torch": torch, "pf": pf, "folder": tmp_path, "rank": 0, "world": 1}
    exec(textwrap.dedent(body), alone)
    for rank in run_ranks(tmp_path, body):
        torch.testing.assert_close(rank, alone["result"], rtol=1e-6, atol=1e-6)
    assert all(gradient.abs().max() > 1e-3 for gradient, _ in alone["result"][names[0]].values())


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_kept_errors_come_in_any_dtype_with_or_without_an_axis_of_groups_and_get_no_gradient(backend):
    if reason := backends.unavailable(backend, torch.device("cpu")):
        pytest.skip(reason)
    p, y, q = (torch.randn(4, 3, 2, 4, 5) for _ in range(3))
    kept = pf.reference_errors(q, y, backend="eager")

    def loss(chosen, rejected):
        errors = pf.ReferenceErrors(chosen, rejected)
        return pf.preference_loss(p, y, errors, objective=pf.DPO(10.0), backend=backend).loss

    expected = loss(kept.chosen, kept.rejected)
    assert torch.equal(loss(kept.chosen[:, None], kept.rejected), expected)
    assert torch.equal(loss(kept.chosen[:, None], kept.rejected[:, None]), expected)
    assert torch.equal(loss(kept.chosen.double(), kept.rejected), expected)
    learnt = kept.chosen.clone().requires_grad_()
    assert torch.equal(loss(learnt, kept.rejected), expected) and not loss(learnt, kept.rejected).requires_grad
