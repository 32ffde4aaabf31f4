"""What must hold on the device before any speed counts: parity with float64 in every form a call can take, and the
properties torch and CUDA ask of an operator. Each check is one function that returns what it saw or raises.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pgdpo_fast as pf
from pgdpo_fast import backends, objectives
from pgdpo_fast.backends import native
from pgdpo_fast.diffusion import draw_noise
from pgdpo_fast.reference import rows

from .contenders import Contender, Inputs, forced, make_inputs, numbers, select
from .harness import check
from .shapes import BYTES, GRANULARITIES, REFERENCE_FORMS, SHAPES, SMALL_SHAPES, TARGET_FORMS, Case

BETA = 10.0  # on the errors of `make_inputs` logits near 1: every loss is well-conditioned, 1e-6 of it a fair bound


def with_beta(objective: pf.Objective) -> pf.Objective:
    """The objective, and those it is made of, with `BETA` in place of a beta."""

    def changed(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        return with_beta(value) if isinstance(value, pf.Objective) else value

    values = {item.name: getattr(objective, item.name) for item in fields(objective)}
    return replace(objective, **{name: BETA if name == "beta" else changed(value) for name, value in values.items()})


# Every objective that has a name, then two forms of them that have passes or switches of their own.
OBJECTIVES = (
    *(with_beta(objectives.from_name(name)) for name in objectives.NAMES),
    pf.PGDPO(beta=BETA, ratio="symmetric", ipr="anchor"),
    pf.DPO(beta=BETA, label_smoothing=0.1),
)
TRUNCATION_SLACK = 2.0  # Triton's interpreter truncates where hardware rounds


class Skip(Exception):
    """A check that cannot be made here; the message says why."""


def usable_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Fused backends that run on `device`, and why the others do not."""
    reasons = {name: backends.unavailable(name, device) for name in backends.NAMES if name != "eager"}
    return [name for name, reason in reasons.items() if reason is None], {k: v for k, v in reasons.items() if v}


def loss_of(x: Inputs, backend: str, granularity: str = "sample", objective: pf.Objective | None = None):
    objective = objective or pf.PGDPO()
    return pf.preference_loss(
        x.prediction,
        x.target,
        x.reference,
        objective=objective,
        granularity=granularity,
        backend=backend,
        **numbers(objective, x),
    )


def loss_and_gradient(x: Inputs, backend: str, granularity: str = "sample") -> tuple[pf.PreferenceLossOutput, Tensor]:
    out = loss_of(x, backend, granularity)
    return out, *torch.autograd.grad(out.loss, x.prediction)


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


# -- parity


def parity_cases(dry_run: bool) -> list[Case]:
    """The whole grid at an odd size, then at true video sizes, each in an order that mixes all properties early."""

    def grid(shape, pairs, dtypes=tuple(BYTES), targets=TARGET_FORMS):
        found = [Case(shape, pairs, *rest) for rest in product(GRANULARITIES, REFERENCE_FORMS, targets, dtypes)]
        found = [case for case in found if case.possible]
        random.Random(0).shuffle(found)
        return found

    odd = grid(SMALL_SHAPES[1], 2)
    even = grid(SMALL_SHAPES[0], 3, ("bfloat16", "float32"), ("stacked",))
    if dry_run:
        return odd[:10] + even[:4]
    large = [
        case
        for name in ("videocrafter2", "cogvideox-480p", "wan2.1-720p", "hunyuanvideo-720p")
        for case in grid(SHAPES[name], 1, ("bfloat16",), ("stacked",))
    ]
    return odd + even + grid(SHAPES["wan2.1-480p"], 1) + large


def objective_of(case: Case, index: int) -> pf.Objective:
    """The objective that case number `index` is compared with: all that its form of reference allows, in turns."""
    possible = [one for one in OBJECTIVES if case.reference_form != "errors" or not one.needs_anchor]
    return possible[index % len(possible)]


def parity(case: Case, backend: str, device: torch.device, index: int, seed: int) -> dict:
    """Outcome of one comparison with float64: fresh inputs, poisoned memory, an incoming gradient other than 1 in
    every second case and always in float16, whose gradients would vanish without."""
    objective = objective_of(case, index)
    contender = Contender(backend, "", fused=True, objective=objective)
    incoming = float(case.pairs * case.shape.numel) / 2 if case.dtype == "float16" or index % 2 else 1.0
    x = make_inputs(case, device, seed + index)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        out = loss_of(x, backend, case.granularity, objective)
        (gradient,) = torch.autograd.grad(out.loss * incoming, x.prediction)
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = poisoned
    gate = check(case, x, contender, out.loss.detach(), gradient, incoming)
    if device.type == "cpu" and backend == "triton" and BYTES[case.dtype] == 2:
        gate = replace(gate, gradient_tolerance=TRUNCATION_SLACK * gate.gradient_tolerance)
    return {
        "objective": type(objective).__name__,
        "incoming": incoming,
        "status": "ok" if gate.green else "red",
        "detail": f"loss {gate.loss_error:.1e} of {gate.loss_tolerance:.0e}, gradient {gate.gradient_error:.1e} of "
        f"{gate.gradient_tolerance:.0e}",
    }


# -- properties


def gradcheck(backend: str, device: torch.device, dry_run: bool) -> str:
    """float64 gradients equal finite differences on the fused path itself."""
    shape = replace(SMALL_SHAPES[1], latents=(1, 2, 2, 3))
    settings = (
        ("sample", pf.PGDPO(detach_weights=False)),
        ("frame", pf.DPO(beta=10.0)),
        ("element", pf.DPO(beta=10.0)),
    )
    for granularity, objective in settings[:1] if dry_run and backend == "triton" else settings:
        x = make_inputs(Case(shape, 1, granularity, "predictions", dtype="float64"), device, 3)

        def loss(p, x=x, granularity=granularity, objective=objective):
            return loss_of(Inputs(p, x.target, x.reference), backend, granularity, objective).loss

        torch.autograd.gradcheck(loss, (x.prediction,), atol=1e-6, rtol=1e-4)
    return "sample, frame and element" if not (dry_run and backend == "triton") else "sample"


class _Recorded(TorchDispatchMode):
    """Remembers the package's operators called inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("pgdpo_fast") and ".pair_" in str(function):
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.setdefault(function, (copies, dict(kwargs or {})))
        return function(*args, **(kwargs or {}))


def opcheck(backend: str, device: torch.device, dry_run: bool) -> str:
    """Schema, fake kernels and AOT dispatch of every operator a call reaches."""
    del dry_run
    names = set()
    for granularity in ("sample", "element"):
        x = make_inputs(Case(SMALL_SHAPES[1], 2, granularity, dtype="float32"), device, 5)
        with _Recorded() as recorded:
            loss_and_gradient(x, backend, granularity)
            pf.paired_errors(x.prediction, x.target, x.reference, granularity=granularity, backend=backend)
        for function, (args, kwargs) in recorded.calls.items():
            torch.library.opcheck(
                function,
                args,
                kwargs,
                test_utils=(
                    "test_schema",
                    "test_autograd_registration",
                    "test_faketensor",
                    "test_aot_dispatch_dynamic",
                ),
            )
            names.add(function.name())
    expect(len(names) >= 3, f"expected at least three operators to be reached, saw {sorted(names)}")
    return ", ".join(sorted(names))


def fullgraph(backend: str, device: torch.device, dry_run: bool) -> str:
    """torch.compile takes the call without a break, with no recompile over B once B is dynamic, to the same bits."""
    if dry_run and backend == "triton":
        raise Skip("the interpreter is not compiled")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, y, q: loss_of(Inputs(p, y, q), backend).loss,
        fullgraph=True,
        backend="aot_eager" if dry_run else "inductor",
    )
    for pairs in (2, 3, 4, 5):
        x = make_inputs(Case(SMALL_SHAPES[1], pairs, dtype="float32"), device, pairs)
        if pairs == 4:
            torch._dynamo.config.error_on_recompile = True
        try:
            loss = compiled(x.prediction, x.target, x.reference)
            (gradient,) = torch.autograd.grad(loss, x.prediction)
        finally:
            torch._dynamo.config.error_on_recompile = False
        out, expected = loss_and_gradient(x, backend)
        expect(torch.equal(loss, out.loss) and torch.equal(gradient, expected), f"B={pairs}: bits differ uncompiled")
    return "B = 2, 3, 4, 5; no recompile from the third on"


@contextmanager
def load(device: torch.device) -> Iterator[None]:
    """Large products on another stream: programs of ours then start in any order and wait for multiprocessors."""
    if device.type != "cuda":
        yield
        return
    a, stop = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16), threading.Event()

    def work():
        with torch.cuda.stream(torch.cuda.Stream(device)):
            while not stop.is_set():
                for _ in range(8):
                    a @ a
                torch.cuda.current_stream(device).synchronize()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def determinism(backend: str, device: torch.device, dry_run: bool) -> str:
    """The same bits from run to run on a busy device, and per pair whatever the batch."""
    shape, repeats = (SMALL_SHAPES[1], 1) if dry_run else (SHAPES["wan2.1-480p"], 200)
    most, fewer = (4, (1, 2)) if dry_run else (16, (1, 2, 4))
    chosen = GRANULARITIES[:1] if dry_run and backend == "triton" else GRANULARITIES
    for granularity in chosen:
        x = make_inputs(Case(shape, most, granularity), device, 7)
        out, gradient = loss_and_gradient(x, backend, granularity)
        with load(device):
            for turn in range(repeats):
                again, same = loss_and_gradient(x, backend, granularity)
                expect(
                    torch.equal(again.per_pair_loss, out.per_pair_loss) and torch.equal(same, gradient),
                    f"{granularity}: bits change from run to run, seen in repeat {turn + 1}",
                )
        for pairs in fewer:
            few, few_gradient = loss_and_gradient(select(x, range(pairs)), backend, granularity)
            rows = [*range(pairs), *range(most, most + pairs)]
            expect(torch.equal(few.per_pair_loss, out.per_pair_loss[:pairs]), f"{granularity}: loss depends on B")
            scaled = few_gradient * (pairs / most)
            expect(torch.equal(scaled, gradient[rows]), f"{granularity}: gradient depends on B")
    return f"{repeats} repeats under load, B = {', '.join(map(str, (*fewer, most)))}, {', '.join(chosen)}"


def bad_pair(backend: str, device: torch.device, dry_run: bool) -> str:
    """NaN in one pair is reported for that pair and touches no other."""
    del dry_run
    for granularity in GRANULARITIES:
        x = make_inputs(Case(SMALL_SHAPES[1], 3, granularity, dtype="float32"), device, 9)
        whole = loss_of(x, backend, granularity).per_pair_loss.detach()
        with torch.no_grad():
            x.prediction[1].view(-1)[5] = float("nan")
        out = loss_of(x, backend, granularity)
        finite = out.per_pair_loss.isfinite().reshape(3, -1).all(1).tolist()
        expect(finite == [True, False, True], f"{granularity}: finite pairs {finite}")
        expect(torch.equal(out.per_pair_loss[[0, 2]], whole[[0, 2]]), f"{granularity}: other pairs changed")
    return "all granularities"


def layouts(backend: str, device: torch.device, dry_run: bool) -> str:
    """Channels-last, transposed and sliced operands, and a tuple for a stack, give the bits of contiguous ones."""
    del dry_run
    x = make_inputs(Case(SMALL_SHAPES[1], 2, dtype="float32"), device, 11)
    out, gradient = loss_and_gradient(x, backend)
    relaid = {
        "channels_last_3d": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
        "transposed": lambda t: t.transpose(1, 4).contiguous().transpose(1, 4),
        "sliced": lambda t: torch.cat([t, t], 4)[..., : t.shape[4]],
    }
    for name, lay in relaid.items():
        y = Inputs(lay(x.prediction.detach()).requires_grad_(), lay(x.target), lay(x.reference))
        same, other = loss_and_gradient(y, backend)
        expect(torch.equal(same.loss, out.loss) and torch.equal(other, gradient), f"{name}: bits differ")
    halves = [t.detach().clone().requires_grad_() for t in x.prediction.chunk(2)]
    loss = loss_of(Inputs(tuple(halves), x.target, x.reference), backend).loss
    expect(torch.equal(torch.cat(torch.autograd.grad(loss, halves)), gradient), "tuple: bits differ")
    return ", ".join([*relaid, "tuple"])


def cuda_graph(backend: str, device: torch.device, dry_run: bool) -> str:
    """Loss and gradients captured once and replayed on new inputs give the bits of plain calls."""
    del dry_run
    if device.type != "cuda":
        raise Skip("CUDA graphs need a GPU")
    for granularity in GRANULARITIES:
        case = Case(SHAPES["wan2.1-480p"], 2, granularity)
        x, fresh = make_inputs(case, device, 13), make_inputs(case, device, 14)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                loss_and_gradient(x, backend, granularity)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, gradient = loss_and_gradient(x, backend, granularity)
        with torch.no_grad():
            for name in ("prediction", "target", "reference"):
                getattr(x, name).copy_(getattr(fresh, name))
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        expected, expected_gradient = loss_and_gradient(fresh, backend, granularity)
        expect(
            torch.equal(out.loss, expected.loss) and torch.equal(gradient, expected_gradient),
            f"{granularity}: a replay on new inputs differs from a plain call",
        )
    return "all granularities"


def streams(backend: str, device: torch.device, dry_run: bool) -> str:
    """On a side stream every launch waits for that stream's earlier work: work on the default stream would read NaN."""
    del dry_run
    if device.type != "cuda":
        raise Skip("streams need a GPU")
    for granularity in GRANULARITIES:
        x = make_inputs(Case(SHAPES["wan2.1-480p"], 1, granularity), device, 15)
        expected, expected_gradient = loss_and_gradient(x, backend, granularity)
        late = Inputs(torch.full_like(x.prediction, float("nan")).requires_grad_(), x.target, x.reference)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                late.prediction.copy_(x.prediction)
            out, gradient = loss_and_gradient(late, backend, granularity)
        side.synchronize()
        expect(
            torch.equal(out.loss, expected.loss) and torch.equal(gradient, expected_gradient),
            f"{granularity}: a call on a side stream ran ahead of it",
        )
    return "all granularities, behind a sleeping stream"


def offsets(backend: str, device: torch.device, dry_run: bool) -> str:
    """Rows more than 2^31 elements apart, and a batch of more than 2^31 elements, are addressed right."""
    if dry_run or device.type != "cuda":
        raise Skip("needs 40 GiB of device memory")
    case = Case(SHAPES["videocrafter2"], 2)
    x = make_inputs(case, device, 17)
    expected, expected_gradient = loss_and_gradient(x, backend)
    apart = 2**31 + 64
    buffer = torch.empty(apart + case.shape.numel, dtype=torch.bfloat16, device=device)
    chosen, rejected = x.prediction.detach().chunk(2)
    strides = (apart, *chosen.stride()[1:])
    far = buffer.as_strided(chosen.shape, strides).copy_(chosen)
    halves = (far.detach().requires_grad_(), rejected.clone().requires_grad_())
    out = loss_of(Inputs(halves, x.target, x.reference), backend)
    gradient = torch.cat(torch.autograd.grad(out.loss, halves))
    expect(torch.equal(out.loss, expected.loss) and torch.equal(gradient, expected_gradient), "far rows: bits differ")
    del buffer, far, halves, out, gradient

    case = Case(SHAPES["hunyuanvideo-720p"], 256, "sample", "errors")
    expect(case.elements > 2**31, "the batch is too small for this check")
    prediction = torch.empty(512, *case.shape.latents, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty(256, *case.shape.latents, dtype=torch.bfloat16, device=device).normal_()
    reference = pf.ReferenceErrors(*(torch.full((256,), 2.0, device=device) for _ in range(2)))
    x = Inputs(prediction.requires_grad_(), target, reference)
    out, gradient = loss_and_gradient(x, backend)
    alone, alone_gradient = loss_and_gradient(select(x, [255]), backend)
    expect(torch.equal(out.per_pair_loss[255:], alone.per_pair_loss), "2^31 elements: the last pair's loss is wrong")
    expect(torch.equal(gradient[[255, 511]], alone_gradient / 256), "2^31 elements: the last pair's gradient is wrong")
    return f"rows {apart} elements apart; a batch of {case.elements} elements"


PROPERTIES: tuple[Callable[[str, torch.device, bool], str], ...] = (
    determinism,
    cuda_graph,
    streams,
    bad_pair,
    layouts,
    gradcheck,
    opcheck,
    offsets,
    fullgraph,
)


def stream_bits(device: torch.device, dry_run: bool) -> str:
    """The stream makes the bits of two passes: on a busy device, for any batch, by a bet that is right and by one that
    is not, which backward's kernel then mends."""
    shape, repeats = (SMALL_SHAPES[1], 1) if dry_run else (SHAPES["wan2.1-480p"], 200)
    batches = (1, 2) if dry_run else (1, 2, 16)
    forms = [("sample", "errors"), ("frame", "predictions"), ("sample", "predictions"), ("frame", "errors")]
    for (granularity, reference), pairs in product(forms[: 2 if dry_run else 4], batches):
        x = make_inputs(Case(shape, pairs, granularity, reference), device, 23)

        def made(form, incoming, x=x, granularity=granularity):
            with forced(form):
                out = loss_of(x, "triton", granularity)
                return (out.loss.detach(), out.telemetry, *torch.autograd.grad(incoming * out.loss, x.prediction))

        expected = {incoming: made("two-pass", incoming) for incoming in (1.0, 3.0)}
        with load(device):
            for turn in range(repeats):
                for incoming in (1.0, 3.0) if turn < 2 else (1.0,):
                    found = made("stream", incoming)
                    both = zip(found, expected[incoming], strict=True)
                    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in both)
                    expect(same, f"{granularity}, {reference}, B={pairs}: other bits in repeat {turn + 1}")
    return f"{repeats} repeats under load, B = {', '.join(map(str, batches))}"


def draws(device: torch.device) -> str:
    """The noise generator gives the CPU's values to one ulp."""
    shape = (16, 5, 31, 53)
    here = draw_noise(7, ["a", "b", "clip-3"], [0, 5, 2**31], shape, "cpu")
    there = draw_noise(7, ["a", "b", "clip-3"], [0, 5, 2**31], shape, device).cpu()
    ulps = (here.view(torch.int32).long() - there.view(torch.int32).long()).abs()
    same_sign = (here.sign() == there.sign()) | (here == 0)
    expect(bool(same_sign.all()) and int(ulps.max()) <= 1, f"off by up to {int(ulps.max())} ulp")
    return f"{int((ulps > 0).sum())} of {ulps.numel()} values differ, by one ulp"


def cached_rows(device: torch.device, dry_run: bool) -> str:
    """Rows packed on the device and into pinned memory are the bytes of plain torch, and come back as they were."""
    if reason := native.rows_unavailable(device):
        raise Skip(reason)
    count = 0
    shapes = SMALL_SHAPES[:2] if dry_run else (SMALL_SHAPES[1], SHAPES["wan2.1-480p"])
    for shape, dtype, form in product(shapes, BYTES, ("bf16", "fp8")):
        for target_form in TARGET_FORMS:
            x = make_inputs(Case(shape, 2, "element", "predictions", target_form, dtype), device, 19)
            plain, *packed = (
                vars(pf.PackedReference.pack(x.reference, x.target, form, backend=backend, to_host=to_host))
                for backend, to_host in (("eager", False), ("native", False), ("native", True))
            )
            for name, value in plain.items():
                same = value is None or all(torch.equal(other[name].to(device), value) for other in packed)
                expect(same, f"{shape.name} {dtype} {target_form} {form}: {name} differs")
            held = {name: value for name, value in packed[1].items() if value is not None}
            for tables in (held, {name: value.to(device) for name, value in held.items()}):
                for name, value in rows.bring(tables, [1, 0, 1], device).items():
                    expect(torch.equal(value, plain[name][[1, 0, 1]]), f"{shape.name} {form}: gathered {name} differs")
            count += 1
    return f"{count} forms, packed to the device and to the host, gathered from both"


def checks(device: torch.device, dry_run: bool) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """(name, backend, check) of every property on every backend that runs here."""
    yield "draws", "", lambda: draws(device)
    yield "cached_rows", "native", lambda: cached_rows(device, dry_run)
    names, _ = usable_backends(device)
    for function, backend in product(PROPERTIES, names):
        yield function.__name__, backend, lambda f=function, b=backend: f(b, device, dry_run)
    if "triton" in names:  # in the form that is not the default; what is red there withholds that form alone
        yield "stream_bits", "stream", lambda: stream_bits(device, dry_run)
        for function in (cuda_graph, streams):
            yield function.__name__, "stream", lambda f=function: forced("stream")(f)("triton", device, dry_run)
