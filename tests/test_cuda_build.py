"""The CUDA half of the native backend as far as a machine without a GPU can check it.

The operators run with their launches emulated on the host (cuda_emulation.cpp): argument checks, plans, the choice of
the kernel and every line a CUDA thread executes, against the float64 oracle. The kernels themselves are compiled for
every architecture and their resources and machine code inspected.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import backends, loss
from pgdpo_fast.backends import build, native, operands, operators
from pgdpo_fast.errors import BackendUnavailable

CPU = torch.device("cpu")
H200 = dict(multiprocessors=132, shared_limit=227 * 1024)
ARCHITECTURES = ("80", "90", "100")


def has_nvcc() -> str | None:
    try:
        return build.nvcc()
    except build.BuildError:
        return None


needs_nvcc = pytest.mark.skipif(has_nvcc() is None, reason="no nvcc: install the CUDA toolkit to check its kernels")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The CUDA operators over host memory, as `torch.ops.pgdpo_fast_emulated`."""
    folder, root = tmp_path_factory.mktemp("emulated"), build.sources()
    library = operators.define("pgdpo_fast_emulated", operators.FUSED | operators.NATIVE)
    library.define(
        f"one_touch_plan({operators.OPERANDS}, int reference_form, int length, bool anchor, "
        "int multiprocessors, int shared_limit) -> int[]"
    )
    command = [
        build.nvcc(),
        "-std=c++17",
        "-O1",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
        *build._torch_flags(),
        f"-I{root}",
        "-DPGDPO_NAMESPACE=pgdpo_fast_emulated",
        "-DPGDPO_CUDA=CPU",
    ]
    calls = {"kernels": Path(__file__).with_name("cuda_emulation.cpp"), "operators": root / "cuda" / "operators.cpp"}
    build._compile_and_link(
        folder / "emulated.so",
        {n: [*command, "-c", str(p)] for n, p in calls.items()},
        [*build.compiler(), *build.FLAGS],
    )
    torch.ops.load_library(folder / "emulated.so")
    yield torch.ops.pgdpo_fast_emulated
    del library


def relative(value, expected) -> float:
    difference = (value.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is full of NaN, so an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


class Case:
    """A call of the loss with the tensors an operator takes, and the oracle's answer in float64."""

    def __init__(
        self, prediction, target, reference, objective, granularity="sample", weight=None, posterior_scale=None
    ):
        call = loss._check(prediction, target, reference)
        self.objective, self.granularity, self.call = objective, granularity, call
        self.x = operands.gather(*call.tensors)
        self.groups = 1 if granularity == "element" else call.groups(granularity)
        self.dtype, self.pairs = self.x.compute_dtype, self.x.pairs
        self.weight, self.posterior_scale = weight, posterior_scale
        self.tensors = call.tensors
        self.form = call.reference_form
        self.length = operands.segment_length(self.x.policy.chosen.shape[1:], self.groups)
        self.epilogue = objective.epilogue()
        errors = call.reference_errors
        self.reference_errors = (
            None
            if errors is None
            else torch.stack([e.to(self.dtype).view(self.pairs, self.groups) for e in (errors.chosen, errors.rejected)])
        )

    def number(self, x):
        return None if x is None else x.to(self.dtype)

    def settings(self):
        return self.epilogue.kind, self.epilogue.flags, list(self.epilogue.parameters)

    def plan(self):
        return self.form, self.groups, self.length, self.objective.needs_anchor, self.objective.needs_cross

    def numbers(self):
        weight = self.number(self.weight)
        weight = None if weight is None else weight[:, None].expand(-1, self.groups).contiguous()
        return self.reference_errors, weight, self.number(self.posterior_scale)

    def errors(self, ops, anchor=False, cross=False):
        return ops.pair_errors(*self.tensors, self.form, self.groups, self.length, anchor, cross)

    def run(self, ops, incoming=None):
        """Loss, telemetry and gradients of the operators."""
        loss_, telemetry, coefficients = ops.pair_objective(
            *self.tensors, *self.numbers(), *self.plan(), *self.settings()
        )
        one = torch.ones((), dtype=self.dtype) if incoming is None else incoming
        gradients = ops.pair_gradient(*self.tensors, coefficients, one, *self.plan()[:-1])
        return loss_, telemetry, *self.halves(*gradients)

    def run_elements(self, ops, bet=True, incoming=None):
        outer = self.objective.outer
        bet = bet and not outer
        numbers = self.number(self.weight), self.number(self.posterior_scale)
        settings = (self.form, self.length, *self.settings(), outer)
        loss_, telemetry, means, *gradients = ops.pair_elements(*self.tensors, *numbers, *settings, bet)
        if not bet:
            gradients = [operators.gradient_like(t) for t in self.tensors[:2]]
        one = torch.ones((), dtype=self.dtype) if incoming is None else incoming
        ops.pair_elements_gradient(*self.tensors, *numbers, means, one, *gradients, *settings, bet)
        return loss_, telemetry, *self.halves(*gradients)

    def halves(self, chosen, rejected):
        assert chosen.shape == self.tensors[0].shape and chosen.is_contiguous()
        if self.tensors[1] is not None:
            return chosen, rejected
        assert rejected.shape == (0,)
        return chosen.chunk(2)

    def oracle(self):
        x, wide = self.call.tensors, lambda t: None if t is None else t.double()
        policy = [t.double().requires_grad_() for t in self.x.policy]
        packed = self.call.reference_form > 1
        tensors = (
            *policy,
            *self.x.target,
            wide(x[4]),
            wide(x[5]),
            *(self.x.reference or (None, None)),
            *(self.x.reference_scale or (None, None)),
        )
        target = tuple(t.double() for t in self.x.target)
        if x[4] is not None:
            target = pf.NoisedTarget(target, tensors[4], *tensors[5])
        reference = None
        if packed:
            reference = pf.PackedReference(*tensors[6:])
        elif self.call.reference_form == 1:
            reference = tensors[6:8]
        elif self.call.reference_errors is not None:
            reference = self.call.reference_errors
        out = pf.preference_loss(
            tuple(policy),
            target,
            reference,
            objective=self.objective,
            granularity=self.granularity,
            pair_weight=wide(self.weight),
            posterior_scale=wide(self.posterior_scale),
            backend="eager",
        )
        return out.loss.detach(), out, *torch.autograd.grad(out.loss, policy, materialize_grads=True)


LIMITS = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-6, torch.float64: 1e-13}


def check(case: Case, result, gradient_scale: float = 1.0):
    expected_loss, out, *expected = case.oracle()
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    assert relative(result[0], expected_loss) < tolerance
    telemetry = result[1] if case.granularity == "frame" else result[1][..., 0]
    for k, name in enumerate(
        (
            "per_pair_loss",
            "logits",
            "alpha",
            "gamma",
            "importance",
            "policy_chosen_error",
            "policy_rejected_error",
            "chosen_gap",
            "rejected_gap",
        )
    ):
        torch.testing.assert_close(
            telemetry[k].double(), getattr(out, name).double(), rtol=1e-4, atol=1e-6, equal_nan=True
        )
    for value, want in zip(result[2:], expected, strict=True):
        assert relative(value, gradient_scale * want) < LIMITS[value.dtype]


def latents(shape, pairs=2, dtype=torch.float32, seed=0, noise=0.1):
    """Predictions, targets and a nearby reference, each `[2B, ...]`."""
    generator = torch.Generator().manual_seed(seed)
    p, y, n = (torch.randn(2 * pairs, *shape, generator=generator) for _ in range(3))
    return p.to(dtype), y.to(dtype), (p + noise * n).to(dtype)


def references(form, q, y):
    if form == "none":
        return None
    if form == "errors":
        e = (q.float() - y.float()).square().flatten(1).mean(1).chunk(2)
        return pf.ReferenceErrors(*e)
    return q if form == "predictions" else pf.PackedReference.pack(q, y, form)


EVEN, ODD = (4, 3, 8, 16), (3, 5, 7, 9)


@needs_nvcc
@pytest.mark.parametrize("form", ["none", "errors", "predictions", "bf16", "fp8"])
@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["vectors", "single values"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_sample_and_frame_passes_equal_the_oracle(emulated, dtype, shape, form):
    p, y, q = latents(shape, dtype=dtype)
    objective = pf.SLiC() if form == "none" else pf.PGDPO(beta=2.0)
    for granularity in ("sample",) if form == "errors" else ("sample", "frame"):
        case = Case(p, y, references(form, q, y), objective, granularity)
        check(case, case.run(emulated))


OBJECTIVES = {
    "dpo": pf.DPO(beta=20.0, label_smoothing=0.1),
    "ipo": pf.IPO(beta=20.0),
    "slic": pf.SLiC(hinge=True, beta=20.0),
    "sft": pf.SFT(),
    "dpop": pf.DPOP(beta=20.0),
    "shift": pf.DPOShift(beta=20.0),
    "sdpo": pf.SDPO(beta=20.0, clip=0.5),
    "safeguarded": pf.Safeguarded(pf.DPO(beta=20.0)),
    "anchor": pf.PGDPO(ipr="anchor", ratio="symmetric"),
    "attached": pf.PGDPO(detach_weights=False, ratio="abs"),
    "equation": pf.PGDPO.equation(),
}


@needs_nvcc
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_with_weights_and_a_scaled_gradient(emulated, objective, granularity):
    p, y, q = latents(EVEN, pairs=3, seed=1)
    incoming = torch.tensor(2.5)
    case = Case(
        p,
        y,
        q,
        objective,
        granularity,
        weight=torch.tensor([0.5, 2.0, 1.0]),
        posterior_scale=torch.tensor([0.1, 0.3, 0.2]),
    )
    check(case, (case.run_elements if granularity == "element" else case.run)(emulated, incoming=incoming), 2.5)


@needs_nvcc
@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["vectors", "single values"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_elements_pointwise_and_outer(emulated, dtype, shape):
    p, y, q = latents(shape, dtype=dtype)
    for objective in (pf.PGDPO(beta=5.0), pf.PGDPO(beta=5.0, ratio="symmetric", ipr="anchor", combine="outer")):
        case = Case(p, y, q, objective, "element")
        check(case, case.run_elements(emulated))


@needs_nvcc
def test_a_bet_on_an_incoming_gradient_of_one_is_written_over_when_it_was_wrong(emulated):
    p, y, q = latents(EVEN)
    case = Case(p, y, q, pf.PGDPO(beta=5.0), "element")
    right, wrong = case.run_elements(emulated), case.run_elements(emulated, incoming=torch.tensor(0.5))
    late = case.run_elements(emulated, bet=False)
    assert all(torch.equal(a, b) for a, b in zip(right[2:], late[2:], strict=True))
    assert all(torch.equal(0.5 * a, b) for a, b in zip(right[2:], wrong[2:], strict=True))


@needs_nvcc
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reference", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_operands_of_different_dtypes(emulated, target, reference):
    p, y, q = latents(EVEN, dtype=torch.bfloat16)
    for objective, granularity in ((pf.PGDPO(ipr="anchor"), "sample"), (pf.DPO(beta=5.0), "element")):
        case = Case(p, y.to(target), q.to(reference), objective, granularity)
        check(case, (case.run_elements if granularity == "element" else case.run)(emulated))


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_built_and_shared_targets(emulated, dtype):
    p, y, q = latents(EVEN, dtype=dtype)
    noise = torch.randn(2, *EVEN, generator=torch.Generator().manual_seed(5))
    scales = torch.tensor([1.0, 0.7]), torch.tensor([-1.0, 0.3])
    for target in (y[:2], pf.NoisedTarget(y, noise.to(dtype), *scales), pf.NoisedTarget(y, noise, *scales)):
        for granularity in ("sample", "element"):
            case = Case(p, target, q, pf.PGDPO(beta=5.0), granularity)
            check(case, (case.run_elements if granularity == "element" else case.run)(emulated))


@needs_nvcc
@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_bits_depend_on_neither_alignment_nor_batch(emulated, granularity):
    p, y, q = latents((4, 3, 32, 48), pairs=3, dtype=torch.bfloat16)  # five chunks of a sample, the last one short

    def shifted(x):
        """The same values on rows that start two bytes past an aligned address."""
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def run(p, y, q):
        case = Case(p, y, q, pf.PGDPO(beta=5.0), granularity)
        return (case.run_elements if granularity == "element" else case.run)(emulated)

    first, moved = run(p, y, q), run(*map(shifted, (p, y, q)))
    assert all(torch.equal(a, b) for a, b in zip(first, moved, strict=True))
    alone = run(*(t[[1, 4]] for t in (p, y, q)))
    assert torch.equal(alone[1][:, 0], first[1][:, 1])


@needs_nvcc
def test_a_policy_that_equals_the_reference_has_gaps_of_zero(emulated):
    p, y, _ = latents(EVEN, dtype=torch.bfloat16)
    means = Case(p, y, None, pf.SFT()).errors(emulated)
    case = Case(p, y, pf.ReferenceErrors(means[0, :, 0], means[1, :, 0]), pf.PGDPO())
    assert torch.equal(case.run(emulated)[1][7:], torch.zeros(2, 2, 1))


@needs_nvcc
def test_statistics_equal_the_oracle(emulated):
    p, y, q = latents(EVEN)
    means = Case(p, y, q, pf.PGDPO(), "frame").errors(emulated, anchor=True, cross=True)
    expected = pf.paired_errors(
        p.double(), y.double(), q.double(), granularity="frame", anchor=True, cross=True, backend="eager"
    )
    assert relative(means, torch.stack(expected)) < 1e-6


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_one_call_for_loss_and_gradients_equals_two(emulated, dtype):
    p, y, q = latents(EVEN, dtype=dtype)
    case = Case(p, y, q, pf.PGDPO())
    loss_, telemetry, *gradients, one = emulated.loss_and_gradients(
        *case.tensors, *case.numbers(), None, *case.plan(), *case.settings()
    )
    assert one == (dtype == torch.bfloat16)
    assert all(
        torch.equal(a, b) for a, b in zip((loss_, telemetry, *case.halves(*gradients)), case.run(emulated), strict=True)
    )


@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_one_call_for_loss_and_gradients_on_the_cpu(granularity):
    if backends.unavailable("native", CPU):
        pytest.skip(backends.unavailable("native", CPU))
    p, y, q = latents(EVEN)
    case = Case(p, y, q, pf.PGDPO(), granularity)
    loss_, telemetry, *gradients = native.loss_and_gradients(
        case.tensors, *case.plan(), *case.numbers(), *case.settings()
    )
    check(case, (loss_, telemetry, *case.halves(*gradients)))


def plan(ops, shape, pairs, dtype=torch.bfloat16, target=None, shared=False, anchor=False, **device):
    p = torch.empty(2 * pairs, *shape, dtype=dtype)
    y = torch.empty(pairs if shared else 2 * pairs, *shape, dtype=target or dtype)
    case = Case(p, y, p if anchor else None, pf.SFT())
    return ops.one_touch_plan(*case.tensors, case.form, case.length, anchor, *(device or H200).values())


@needs_nvcc
def test_which_calls_fit_on_chip(emulated):
    wan_480p, cogvideox = (16, 21, 60, 104), (16, 13, 60, 90)
    # 512 segments of 4096 elements, 4 on each of 128 blocks, 4 operands of 8 KB each.
    assert plan(emulated, wan_480p, 1) == [128, 4, 4 * 4 * 8192]
    assert plan(emulated, wan_480p, 2) == [0, 0, 0]  # 8 segments a block are 256 KB
    assert plan(emulated, wan_480p, 2, shared=True) == [128, 8, 8 * 3 * 8192]  # the pair's one target is held once
    assert plan(emulated, wan_480p, 1, anchor=True) == [128, 4, 4 * 5 * 8192]
    assert plan(emulated, wan_480p, 1, dtype=torch.float32) == [0, 0, 0]
    assert plan(emulated, wan_480p, 1, target=torch.float32) == [0, 0, 0]  # dtypes differ: two launches
    assert plan(emulated, cogvideox, 3) == [118, 7, 7 * 4 * 8192]
    assert plan(emulated, ODD, 1) == [0, 0, 0]  # rows that are not aligned
    assert plan(emulated, wan_480p, 1, multiprocessors=132, shared_limit=4 * 4 * 8192 + 2048) == [128, 4, 131072]
    assert plan(emulated, wan_480p, 1, multiprocessors=132, shared_limit=4 * 4 * 8192 + 2047) == [0, 0, 0]
    assert plan(emulated, wan_480p, 1, multiprocessors=0, shared_limit=1 << 20) == [0, 0, 0]


@needs_nvcc
@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [EVEN, ODD, (4, 3, 32, 48)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_packed_rows_have_the_bytes_of_the_plain_ones(emulated, dtype, shape, format):
    p, y, q = latents(shape, dtype=dtype)
    q[0, 0, 0] = y[0, 0, 0]  # blocks of zeros
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    scales = torch.tensor([1.0, 0.7]), torch.tensor([-1.0, 0.3])
    cpu = native if backends.unavailable("native", CPU) is None else None
    for target in (y, y.float(), y[:2], pf.NoisedTarget(y, noise, *scales)):
        case = Case(q, target, None, pf.SLiC())
        packed = pf.PackedReference.pack(q, target, format, backend="eager")
        expected = {name: value for name, value in vars(packed).items() if value is not None}
        rows = {name: torch.full_like(value, 77) for name, value in expected.items()}
        places = [rows.get(name) for name in ("chosen", "rejected", "chosen_scale", "rejected_scale")]
        means = emulated.pack(*case.tensors, *places, case.length)
        assert torch.equal(means, case.errors(emulated)[:2, :, 0])
        for name, value in expected.items():
            assert torch.equal(rows[name], value), name
            assert cpu is None or torch.equal(cpu.pack(case.tensors, format)[0][name], value), name


@needs_nvcc
def test_rows_of_a_batch_are_gathered(emulated):
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.randn(9, 4, 5, generator=generator),
        torch.arange(9 * 3, dtype=torch.uint8).view(9, 3),
        *(torch.randn(9, 2 + k, generator=generator) for k in range(4)),
    ]
    rows = [int(i) for i in torch.randint(0, 9, (70,), generator=generator)]  # more than one launch takes of either
    implementations = [emulated] if backends.unavailable("native", CPU) else [emulated, torch.ops.pgdpo_fast_native]
    for ops in implementations:
        out = [torch.zeros(len(rows), *t.shape[1:], dtype=t.dtype) for t in tables]
        ops.gather_rows(tables, rows, out)
        assert all(torch.equal(table[rows], got) for table, got in zip(tables, out, strict=True))
        with pytest.raises(RuntimeError, match="rows: expected numbers below 9, got 9"):
            ops.gather_rows(tables[:1], [9], [out[0][:1]])


@needs_nvcc
def test_operators_name_the_argument_that_is_wrong(emulated):
    p, y, q = latents(EVEN)
    case, sdpo = Case(p, y, q, pf.PGDPO()), Case(p, y, q, pf.SDPO())
    one, coefficients = torch.ones(()), torch.zeros(3, 2, 1)
    with pytest.raises(RuntimeError, match=r"weight: expected 2 contiguous float32"):
        emulated.pair_objective(*case.tensors, None, torch.ones(2).double(), None, *case.plan(), *case.settings())
    with pytest.raises(RuntimeError, match=r"coefficients: expected 6 contiguous"):
        emulated.pair_gradient(*case.tensors, coefficients[:2], one, *case.plan()[:-1])
    with pytest.raises(RuntimeError, match=r"gradients: expected the prediction's dtype"):
        emulated.pair_elements_gradient(
            *case.tensors,
            None,
            None,
            torch.zeros(4, 2),
            one,
            p.half(),
            p.half(),
            1,
            case.length,
            *case.settings(),
            False,
            False,
        )
    with pytest.raises(RuntimeError, match=r"posterior_scale: the objective needs it"):
        emulated.pair_objective(*sdpo.tensors, None, None, None, *sdpo.plan(), *sdpo.settings())


def test_reasons_for_no_cuda_kernels_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(BackendUnavailable, match="CPU and CUDA tensors, these are on meta"):
        backends.select("native", torch.device("meta"))
    cuda = torch.device("cuda", 0)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="need an NVIDIA GPU .* nvidia-smi"):
            backends.select("native", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 7.5 is below the 8.0" in native.unavailable(cuda)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("PGDPO_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_cuda_library", native._CudaLibrary())
    monkeypatch.setattr(shutil, "which", lambda name: None if "nvcc" in name else f"/usr/bin/{Path(name).name}")
    assert "no nvcc found; install the CUDA toolkit" in native.unavailable(cuda)


@needs_nvcc
def test_a_failed_build_shows_its_first_error(monkeypatch, tmp_path):
    broken = tmp_path / "csrc"
    shutil.copytree(build.sources(), broken)
    for name in build.CUDA_KERNELS:
        (broken / name).write_text("#error the broken line\nint x = ;\n")
    monkeypatch.setattr(build, "sources", lambda: broken)
    monkeypatch.setattr(build, "CUDA_HOST", ())
    monkeypatch.setenv("PGDPO_FAST_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # the second time from the record of the first
        with pytest.raises(build.BuildError, match="error: #error .?the broken line"):
            build.cached_cuda_library(("90",))


@needs_nvcc
def test_a_toolkit_of_another_cuda_version_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.raises(build.BuildError, match=r"torch of CUDA 11\.8; install a CUDA 11 toolkit"):
        build._check_toolkit()


def kernel_name(mangled: str) -> str:
    """`errors_kernel<f, 0, 0, 1>` of a mangled name: float or double, then the template's numbers."""
    name, arguments = re.search(r"\d+([a-z_]+_kernel)(?:I(.*?E)Ev)?", mangled).groups()
    scalar = re.findall(r"^[fd]", arguments or "")
    numbers = [sign.replace("n", "-") + digits for sign, digits in re.findall(r"Li(n?)(\d+)E", arguments or "")]
    return f"{name}<{', '.join(scalar + numbers)}>"


def resources(report: str) -> dict[str, tuple[int, int, int]]:
    """Kernel -> registers, bytes of stack and spills, bytes of static shared memory."""
    table, name, local = {}, None, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = kernel_name(found[1])
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            local = sum(map(int, found.groups()))
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            table[name] = int(found[1]), local, int(shared[1]) if shared else 0
    return table


def disassembler() -> str | None:
    try:
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    except (ImportError, AttributeError):
        return shutil.which("cuobjdump")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_to_their_resources(architecture, tmp_path):
    def compiled(source):
        target = tmp_path / f"{Path(source).name}.o"
        command = [*build.nvcc_command((architecture,)), "-Xptxas=-v", "-c", str(build.sources() / source)]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return source, target, done.stderr

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, build.CUDA_KERNELS))
    for source, target, report in objects:
        check_registers(f"{source} sm_{architecture}", report)
        if disassembler() is not None:
            check_machine_code(f"{source} sm_{architecture}", target)


def check_registers(where: str, report: str) -> None:
    table = resources(report)
    assert table, where
    for name, (registers, local, shared) in table.items():
        assert local == 0, f"{where} {name}: {local} bytes of stack and spills"
        assert shared <= 2048, f"{where} {name}: {shared} bytes of shared memory"
        # float64 is there for gradcheck, single values for odd shapes: neither is made for speed.
        single = re.match(r"\w+_kernel<f, \d, 2\b", name)
        most = 255 if "_kernel<d" in name else 168 if single else 128
        assert registers <= most, f"{where} {name}: {registers} registers"


def check_machine_code(where: str, target: Path) -> None:
    """128-bit accesses; no local memory, no float atomics, no float64 arithmetic in float32 kernels."""
    listing = subprocess.run([disassembler(), "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    for part in listing.split("Function : ")[1:]:
        name = kernel_name(part.split("\n", 1)[0])
        codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", part, re.M)
        assert not [c for c in codes if c.startswith(("LDL", "STL"))], f"{where} {name}: local memory"
        assert not [c for c in codes if re.match(r"RED|ATOMG?\..*F(16|32|64)", c)], f"{where} {name}: atomics"
        if "_kernel<d" in name:
            continue
        double = [c for c in codes if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.RCP64", c)]
        assert not double, f"{where} {name}: {double[:3]}"
        access = re.match(r"(errors|gradient|elements)_kernel<f, \d, (\d)", name)
        if access and access[2] != "2":  # all but the pass that reads single values
            assert [c for c in codes if re.match(r"LDG.*\.128", c)], f"{where} {name}: no 128-bit loads"
            if access[1] == "gradient":
                assert [c for c in codes if re.match(r"STG.*\.128", c)], f"{where} {name}: no 128-bit stores"
        if name.startswith("one_touch"):
            assert [c for c in codes if re.match(r"LDGSTS.*128", c)], f"{where} {name}: no 128-bit copies"
