"""The stream kernel: its order of work under every interleaving, its bits, its bet, its end when nothing comes.

Off a device, programs of a launch are threads of Triton's interpreter that pause at random before every atomic.
"""

import functools
import inspect
import itertools
import random
import sys
import threading
import time

import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import backends, errors
from pgdpo_fast.backends import launches, operands
from pgdpo_fast.backends import triton as triton_backend

tl = pytest.importorskip("triton.language")  # the interpreter looks for it where a kernel comes from
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(backends.unavailable("triton", DEVICE) is not None, reason="needs triton")
GRANULARITIES = ("sample", "frame", "element")
B, SHAPE = 50.0, (3, 2, 8, 16)


# The schedule. `position` is the kernel's own function; the protocol around it is that of `stream_kernel`, a step each.


def position(ticket, total, lag):
    from pgdpo_fast.kernels.stream import position

    return position.fn(ticket, total, lag)


@pytest.mark.parametrize("pairs,segments,ahead", itertools.product((1, 2, 3, 7), (1, 2, 5, 16), (0, 1, 3, 100)))
def test_every_segment_has_one_error_ticket_and_a_later_gradient_ticket(pairs, segments, ahead):
    total = pairs * segments
    lag = min(segments + ahead, total)
    order = [position(ticket, total, lag) for ticket in range(2 * total)]
    place = {work: ticket for ticket, work in enumerate(order)}
    assert set(place) == {(errors, item) for errors in (0, 1) for item in range(total)} and len(place) == 2 * total
    for item in range(total):
        pair = item // segments
        last = max(place[1, pair * segments + s] for s in range(segments))
        assert last < place[0, item], "a gradient may wait only for tickets that were drawn before its own"
        assert place[0, item] - place[1, item] <= 2 * lag + 1, "what is read again is not far behind"


class Shared:
    """What the programs of a launch share, named as in the kernel."""

    def __init__(self, pairs, segments):
        self.pairs, self.segments = pairs, segments
        self.ticket = self.folded = self.left = self.gave_up = self.told = 0
        self.done, self.released = [0] * pairs, [0] * pairs
        self.log = []

    def counters(self):
        return self.ticket, self.folded, self.left, self.gave_up, *self.done, *self.released


def program(x, programs, lag, polls, losing=None):
    """One program, pausing before whatever other programs can see; says "wait" where it can do nothing but look again.

    `losing`: a pair whose release is lost, as a broken order of memory would have it.
    """
    total = x.pairs * x.segments
    yield
    ticket, x.ticket = x.ticket, x.ticket + 1
    while ticket < 2 * total:
        errors, item = position(ticket, total, lag)
        pair = item // x.segments
        if errors:
            yield
            x.log.append(("errors", item))
            yield
            arrived, x.done[pair] = x.done[pair], x.done[pair] + 1
            if arrived == x.segments - 1:
                yield
                x.log.append(("fold", pair))
                yield
                x.released[pair] = int(pair != losing)
                yield
                folded, x.folded = x.folded, x.folded + 1
                if folded == x.pairs - 1:
                    x.log.append(("loss", None))
        else:
            yield
            patience = 0 if x.gave_up else polls
            while not x.released[pair] and patience:
                patience -= 1
                yield "wait"
            if not x.released[pair]:
                x.gave_up = x.told = 1
                x.log.append(("nan", item))
            else:
                x.log.append(("gradients", item))
        yield
        ticket, x.ticket = x.ticket, x.ticket + 1
    yield
    left, x.left = x.left, x.left + 1
    if left == programs - 1:
        x.ticket = x.folded = x.left = x.gave_up = 0
        x.done, x.released = [0] * x.pairs, [0] * x.pairs


def run(x, programs, resident, lag, polls, draw, losing=None):
    """All programs to their end in a random interleaving, at most `resident` of them begun and not ended."""
    waiting = [program(x, programs, lag, polls, losing) for _ in range(programs)]
    running, stalled = [], 0
    while waiting or running:
        while waiting and len(running) < resident:
            running.append(waiting.pop())
        chosen = draw.choice(running)
        try:
            stalled = stalled + 1 if next(chosen) == "wait" else 0
        except StopIteration:
            running.remove(chosen)
            stalled = 0
        assert losing is not None or stalled < 1000 * resident, "every program waits: a deadlock"


@pytest.mark.parametrize("seed", range(150))
def test_no_interleaving_stalls_or_reorders(seed):
    """Any number of programs, any residency from one on; one call after another on the same counters."""
    draw = random.Random(seed)
    pairs, segments = draw.randint(1, 5), draw.randint(1, 9)
    total = pairs * segments
    lag = min(segments + draw.randint(0, 6), total)
    x = Shared(pairs, segments)
    for _ in range(3):
        programs = draw.randint(1, 12)
        x.log.clear()
        run(x, programs, draw.randint(1, programs), lag, 10**9, draw)
        place = {event: when for when, event in enumerate(x.log)}
        assert len(place) == len(x.log) == 2 * total + pairs + 1
        for item in range(total):
            pair = item // segments
            assert place["errors", item] < place["fold", pair] < place["gradients", item]
            assert place["fold", pair] < place["loss", None]
        assert not any(x.counters()) and not x.told


@pytest.mark.parametrize("seed", range(50))
def test_a_release_that_never_comes_ends_in_nan_and_zeroed_counters(seed):
    draw = random.Random(seed)
    pairs, segments, programs = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 8)
    x, losing, total = Shared(pairs, segments), draw.randrange(pairs), pairs * segments
    run(x, programs, draw.randint(1, programs), min(segments + 2, total), 30, draw, losing)
    wrong = {item for what, item in x.log if what == "nan"}
    assert set(range(losing * segments, (losing + 1) * segments)) <= wrong
    # Once one has given up nobody waits, so pairs that would have come may be NaN too; none is left out.
    assert wrong | {item for what, item in x.log if what == "gradients"} == set(range(total))
    assert x.told and not any(x.counters())


# The kernel.


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """128 elements per segment, 64 per block, gradients one segment later than need be; nothing left of other tests."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(operands, "MIN_SEGMENT", 128)
        launch = triton_backend.DEFAULT_LAUNCH._replace(block=64, ahead=1)
        monkeypatch.setattr(triton_backend, "DEFAULT_LAUNCH", launch)
    for held in (triton_backend._last, triton_backend._states, triton_backend._gave_up):
        held.clear()


@pytest.fixture
def interleaved(monkeypatch):
    """Programs of the stream kernel run at the same time, each pausing at random before its atomics."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    draw, begin, atomic = random.Random(0), interpreter.GridExecutor.__init__, interpreter.InterpreterBuilder

    def at_once(self, fn, arg_names, grid, *rest):
        begin(self, fn, arg_names, grid, *rest)
        if fn.__name__ not in ("stream_kernel", "ping_pong_kernel"):
            return
        called, raised = [], []

        def together(**arguments):
            called.append(arguments)
            if len(called) < grid[0]:
                return

            def one():
                try:
                    fn(**arguments)
                except Exception as error:  # told below: a thread would only print it
                    raised.append(error)

            threads = [threading.Thread(target=one) for _ in range(grid[0])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if raised:
                raise raised[0]

        functools.update_wrapper(together, fn)
        together.__signature__ = inspect.signature(fn)
        self.fn = together

    create = atomic.create_atomic_rmw

    def paused(self, *arguments):
        time.sleep(draw.random() * 2e-4)
        return create(self, *arguments)

    monkeypatch.setattr(interpreter.GridExecutor, "__init__", at_once)
    monkeypatch.setattr(atomic, "create_atomic_rmw", paused)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def batch(
    pairs=3, shape=SHAPE, target="stacked", reference="stacked", dtype=torch.float32, granularity="sample", seed=0
):
    """Arguments of `preference_loss`, predictions first."""
    generator = torch.Generator().manual_seed(seed)
    p, y, q = (torch.randn(2 * pairs, *shape, generator=generator).to(DEVICE, dtype) for _ in range(3))
    q, p = y + 0.5 * q, y + 0.5 * q + 0.1 * p
    scale = torch.rand(2, pairs, generator=generator).to(DEVICE)
    target = {
        "stacked": lambda: y,
        "shared": lambda: y[:pairs],
        "tuple": lambda: y.chunk(2),
        "built": lambda: pf.NoisedTarget(y, q[:pairs].clone(), *scale),
    }[target]()
    if reference in ("bf16", "fp8"):
        q = pf.PackedReference.pack(q, target, reference)
    elif reference == "errors":
        q = pf.reference_errors(q, target, granularity=granularity, backend="eager")
    return p.requires_grad_(), target, q


def loss_and_gradient(form, arguments, granularity, monkeypatch, scale=1.0, **options):
    monkeypatch.setattr(launches, "FORM", form)
    options = {"objective": pf.PGDPO(B)} | options
    out = pf.preference_loss(*arguments, granularity=granularity, backend="triton", **options)
    return out, torch.autograd.grad(scale * out.loss, arguments[0])[0]


def assert_same_bits(first, second):
    (out, gradient), (other, other_gradient) = first, second
    assert torch.equal(out.loss, other.loss) and torch.equal(gradient, other_gradient)
    assert torch.equal(out.telemetry.nan_to_num(7.0), other.telemetry.nan_to_num(7.0))


FORMS = [
    ("stacked", "stacked", torch.float32),
    ("built", "errors", torch.bfloat16),
    ("shared", "bf16", torch.bfloat16),
    ("tuple", "fp8", torch.float16),
    ("built", "stacked", torch.float64),
]


@pytest.mark.parametrize("granularity", ["sample", "frame"])
@pytest.mark.parametrize("target,reference,dtype", FORMS, ids=lambda x: str(x).removeprefix("torch."))
def test_bits_are_those_of_two_passes(monkeypatch, target, reference, dtype, granularity):
    arguments = batch(target=target, reference=reference, dtype=dtype, granularity=granularity)
    weight = torch.tensor([0.5, 2.0, 1.0], device=DEVICE)
    objective = pf.PGDPO(B) if reference == "errors" else pf.Safeguarded(pf.PGDPO(B, ipr="anchor"))
    found = [
        loss_and_gradient(form, arguments, granularity, monkeypatch, objective=objective, pair_weight=weight)
        for form in ("two-pass", "stream")
    ]
    assert_same_bits(*found)
    assert torch.isfinite(found[0][1]).all()


@pytest.mark.parametrize("seed", range(6))
def test_bits_do_not_depend_on_programs_or_their_order(monkeypatch, interleaved, seed):
    draw = random.Random(seed)
    granularity, pairs = draw.choice(("sample", "frame")), draw.randint(1, 4)
    shape = draw.choice(((3, 2, 8, 16), (2, 3, 5, 7), (1, 2, 9, 31)))
    arguments = batch(pairs=pairs, shape=shape, seed=seed)
    expected = loss_and_gradient("two-pass", arguments, granularity, monkeypatch)
    for programs in (1, draw.randint(2, 9)):
        monkeypatch.setattr(triton_backend, "STREAM_PROGRAMS", programs)
        assert_same_bits(loss_and_gradient("stream", arguments, granularity, monkeypatch), expected)
    assert triton_backend._states and not any(state.any() for state in triton_backend._states.values())
    exact = [x.detach().double() for x in arguments]
    exact[0].requires_grad_()
    out = pf.preference_loss(*exact, objective=pf.PGDPO(B), granularity=granularity, backend="eager")
    (gradient,) = torch.autograd.grad(out.loss, exact[0])
    torch.testing.assert_close(expected[0].loss.double(), out.loss, rtol=1e-6, atol=0)
    assert (expected[1].double() - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("frame_dim", [1, 2])
def test_weights_of_latents_and_frames_on_any_axis_stream(monkeypatch, frame_dim):
    arguments = batch(shape=(3, 4, 8, 16))
    weight = torch.rand(3, 1, 1, 8, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {"latent_weight": weight, "frame_dim": frame_dim}
    found = [loss_and_gradient(form, arguments, "frame", monkeypatch, **options) for form in launches.FORMS]
    assert_same_bits(*found)
    assert found[0][0].alpha.shape == (3, (3, 4)[frame_dim - 1])


def test_sums_of_objectives_stream_but_one_safeguard_for_the_batch_does_not(monkeypatch):
    """Its coefficients need the sums of all pairs: it takes two passes even where the stream is forced."""
    arguments, ran = batch(), []
    beta_scale = torch.tensor([1.0, 2.0, 0.5], device=DEVICE)
    monkeypatch.setattr(triton_backend, "check_waits", lambda device: ran.append(device))  # asked in the stream alone
    both = pf.DPO(B) + pf.SFT()
    for objective, streams in ((both, True), (pf.Safeguarded(both, scope="batch"), False)):
        ran.clear()
        options = {"objective": objective} | ({"beta_scale": beta_scale} if streams else {})
        found = [loss_and_gradient(form, arguments, "sample", monkeypatch, **options) for form in launches.FORMS]
        assert_same_bits(*found)
        assert bool(ran) == streams


# The bet.


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forward_makes_the_gradients_for_the_incoming_gradient_seen_last(monkeypatch, granularity):
    """The first step of scale 3 is written again, the second is not; and a step of scale 5 is right all the same."""
    arguments, written = batch(), []
    expected = {s: loss_and_gradient("two-pass", arguments, granularity, monkeypatch, s)[1] for s in (3.0, 5.0)}
    triton_backend._last.clear()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "pair_stream." in str(function):
                written.append(result[-2].clone())
            return result

    for scale, right in ((3.0, False), (3.0, True), (5.0, False), (5.0, True)):
        with Recorder():
            _, gradient = loss_and_gradient("stream", arguments, granularity, monkeypatch, scale)
        assert torch.equal(gradient, expected[scale])
        assert torch.equal(written[-1], expected[scale]) == right


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_right_bet_writes_nothing_and_a_second_backward_writes_elsewhere(monkeypatch, granularity):
    monkeypatch.setattr(launches, "FORM", "stream")
    arguments = batch()
    out = pf.preference_loss(*arguments, objective=pf.PGDPO(B), granularity=granularity, backend="triton")
    (gradient,) = torch.autograd.grad(out.loss, arguments[0], retain_graph=True)
    kept = gradient.clone()
    (twice,) = torch.autograd.grad(2.0 * out.loss, arguments[0], retain_graph=True)
    assert torch.equal(gradient, kept) and torch.equal(twice, 2.0 * kept)

    out = pf.preference_loss(*arguments, objective=pf.PGDPO(B), granularity=granularity, backend="triton")
    node = out.loss.grad_fn
    _, _, chosen, *_ = node.saved_tensors
    chosen.data.fill_(7.0)  # what a kernel that found its bet right leaves alone
    (untouched,) = torch.autograd.grad(out.loss, arguments[0])
    assert torch.equal(untouched, torch.full_like(untouched, 7.0))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float16_is_rounded_after_the_loss_scale_in_the_stream_too(monkeypatch, granularity):
    arguments, objective = batch(dtype=torch.float16), pf.DPO(beta=1e-5)
    for _ in range(2):  # the second time by the bet
        _, scaled = loss_and_gradient("stream", arguments, granularity, monkeypatch, 65536.0, objective=objective)
        exact = [x.detach().double() for x in arguments]
        exact[0].requires_grad_()
        out = pf.preference_loss(*exact, objective=objective, granularity=granularity, backend="eager")
        (gradient,) = torch.autograd.grad(65536.0 * out.loss, exact[0])
        assert (scaled.double() - gradient).norm() <= 2.0**-9 * gradient.norm()


# The end of a wait.


def test_a_wait_without_end_is_nan_and_an_error_that_names_the_way_out(monkeypatch):
    if DEVICE.type == "cuda":
        pytest.skip("breaks the counters of a launch")
    monkeypatch.setattr(triton_backend, "STREAM_POLLS", 3)
    arguments = batch()
    expected = loss_and_gradient("stream", arguments, "sample", monkeypatch)
    (state,) = triton_backend._states.values()
    for notice in ("call", "check"):
        state[4] = -1000  # segments summed of the first pair: its last one never comes
        out, gradient = loss_and_gradient("stream", arguments, "sample", monkeypatch)
        assert gradient[0].isnan().all() and gradient[3].isnan().all()
        assert not state.any()
        with pytest.raises(errors.KernelTimeout, match="PGDPO_FAST_FORM=two-pass"):
            if notice == "check":
                out.check_finite()
            else:
                loss_and_gradient("stream", arguments, "sample", monkeypatch)
        assert_same_bits(loss_and_gradient("stream", arguments, "sample", monkeypatch), expected)


@pytest.mark.parametrize("rounds", [1, 20])
def test_two_programs_hand_a_flag_back_and_forth(interleaved, rounds):
    """What bench/gpu.py times as the flag's latency."""
    from pgdpo_fast.bench import latency

    looks = latency.play(rounds, DEVICE, polls=10_000)
    assert (looks >= rounds).all()


def test_a_flag_that_never_comes_is_told():
    if DEVICE.type == "cuda":
        pytest.skip("the interpreter runs one program after the other")
    from pgdpo_fast.bench import latency

    assert latency.play(3, DEVICE, polls=5).tolist() == [-5, -6]  # the second saw the first one


# The table.


def entry(pairs=1, elements=1, ratio=0.9, **launch):
    key = launches.Key(90, "sample", "prediction", "bfloat16", elements, pairs)
    return launches.Entry(key, launches.Launch(**launch), "a device", ratio)


def test_the_table_gives_the_launch_of_the_largest_size_reached(tmp_path, monkeypatch):
    path = tmp_path / "launches.json"
    entries = (
        entry(4, 1000, form="stream"),
        entry(1, 5000, block=2048, warps=8),
        entry(8, 1000, form="stream", ahead=1),
    )
    launches.write(entries, path)
    assert set(launches.read(path)) == set(entries)
    monkeypatch.setattr(launches, "_table", lambda: launches.read(path))
    launches.find.cache_clear()
    key = entry().key
    for elements, pairs, form, block in (
        (999, 99, None, 0),
        (1000, 3, None, 0),
        (1000, 4, "stream", 1024),
        (9000, 4, "two-pass", 2048),
    ):
        found = launches.find(key._replace(elements=elements, pairs=pairs))
        assert (found and (found.form, found.block)) == (form and (form, block))
    assert launches.find(key._replace(elements=1000, pairs=8)).ahead == 1
    assert launches.find(key._replace(elements=1000, pairs=8, architecture=80)) is None
    launches.find.cache_clear()


@pytest.mark.parametrize(
    "rows,fault",
    [
        ([entry(form="both")], "form='both'"),
        ([entry(block=1000)], "powers of two"),
        ([entry(ratio=-1.0)], "ratio"),
        ([entry(4, block=2048)], "block and warps are not those of one pair"),
    ],
    ids=["form", "block", "ratio", "pairs"],
)
def test_an_impossible_entry_is_refused(tmp_path, rows, fault):
    launches.write(rows, tmp_path / "launches.json")
    with pytest.raises(errors.ConfigError, match=fault):
        launches.read(tmp_path / "launches.json")


def test_two_passes_until_a_device_says_otherwise(monkeypatch):
    assert launches.Launch().form == "two-pass" and launches.FORM == "auto"
    launches.read()  # the table of the package can be read
    assert launches.form(launches.Launch(form="stream")) == "stream"
    for forced in launches.FORMS:
        monkeypatch.setattr(launches, "FORM", forced)
        assert {launches.form(launches.Launch(form=form)) for form in launches.FORMS} == {forced}
    monkeypatch.setattr(launches, "FORM", "fast")
    with pytest.raises(errors.ConfigError, match="PGDPO_FAST_FORM='fast': expected 'auto', 'two-pass' or 'stream'"):
        launches.form(launches.Launch())
