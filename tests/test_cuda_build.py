"""The CUDA half of the native extension as far as a machine without a GPU can check it: packing rows of the reference
cache and gathering them.

The operators run with their launches emulated on the host (cuda_emulation.cpp): argument checks, the choice of the
kernel and every line a CUDA thread executes, against plain torch and float64. The kernels themselves are compiled for
every architecture and their resources and machine code inspected.
"""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pgdpo_fast as pf
from pgdpo_fast import backends, loss
from pgdpo_fast.backends import build, native, operators
from pgdpo_fast.backends.operands import Operands, segment_length
from pgdpo_fast.errors import BackendUnavailable
from pgdpo_fast.reference import rows

CPU = torch.device("cpu")
ARCHITECTURES = ("80", "90", "100")
NAMES = ("chosen", "rejected", "chosen_scale", "rejected_scale")


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
    library = operators.define("pgdpo_fast_emulated", operators.ROWS)
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
    kernels = str(Path(__file__).with_name("cuda_emulation.cpp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.SECONDS, kernels, 3)
        build._compile_and_link(
            folder / "emulated.so",
            [(name, command) for name in (kernels, "cuda/operators.cpp")],
            [*build.compiler(), *build.FLAGS],
        )
    torch.ops.load_library(folder / "emulated.so")
    yield torch.ops.pgdpo_fast_emulated
    del library


def latents(shape, pairs=2, dtype=torch.float32):
    """Predictions of a reference and their targets, each `[2B, ...]`, with blocks of zeros between them."""
    generator = torch.Generator().manual_seed(0)
    q, y = (torch.randn(2 * pairs, *shape, generator=generator).to(dtype) for _ in range(2))
    q[0, 0, 0] = y[0, 0, 0]
    return q, y


def packed(ops, q, target, format):
    """Rows of the operator, in memory that nobody wrote before."""
    tensors = loss._check(q, target, name="reference").operands
    like = pf.PackedReference.pack(q, target, format, backend="eager")
    rows = {name: torch.full_like(value, 77) for name, value in vars(like).items() if value is not None}
    length = segment_length(q.shape[1:])
    ops.pack(*tensors, *map(rows.get, NAMES), length)
    return rows


EVEN, ODD, LONG = (4, 3, 8, 16), (3, 5, 7, 9), (4, 3, 32, 48)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@needs_nvcc
@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [EVEN, ODD, LONG], ids=["vectors", "single values", "two segments"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_have_the_bytes_of_the_plain_ones(emulated, dtype, shape, format):
    q, y = latents(shape, dtype=dtype)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    scales = torch.tensor([1.0, 0.7]), torch.tensor([-1.0, 0.3])
    for target in (y, y.float(), y[:2], pf.NoisedTarget(y, noise, *scales)):
        rows = packed(emulated, q, target, format)
        plain = pf.PackedReference.pack(q, target, format, backend="eager")
        native_too = [pf.PackedReference.pack(q, target, format, backend="native")] * (not native.unavailable(CPU))
        for name, value in rows.items():
            for other in (plain, *native_too):
                assert torch.equal(value, getattr(other, name)), name


@needs_nvcc
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_bits_depend_on_neither_alignment_nor_batch(emulated, format):
    q, y = latents((4, 3, 32, 48), pairs=3, dtype=torch.bfloat16)  # five segments per pair, the last one short

    def shifted(x):
        """The same values on rows that start two bytes past an aligned address."""
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    rows = packed(emulated, q, y, format)
    moved = packed(emulated, shifted(q), shifted(y), format)
    alone = packed(emulated, q[[1, 4]], y[[1, 4]], format)
    for name, value in rows.items():
        assert torch.equal(value, moved[name]) and torch.equal(value[1:2], alone[name]), name


@needs_nvcc
def test_rows_of_a_batch_are_gathered(emulated):
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.randn(9, 4, 5, generator=generator),
        torch.arange(9 * 3, dtype=torch.uint8).view(9, 3),
        *(torch.randn(9, 2 + k, generator=generator) for k in range(4)),
    ]
    rows = [int(i) for i in torch.randint(0, 9, (70,), generator=generator)]  # more than one launch takes of either
    out = [torch.zeros(len(rows), *t.shape[1:], dtype=t.dtype) for t in tables]
    emulated.gather_rows(tables, rows, out)
    assert all(torch.equal(table[rows], got) for table, got in zip(tables, out, strict=True))
    with pytest.raises(RuntimeError, match="rows: expected numbers below 9, got 9"):
        emulated.gather_rows(tables[:1], [9], [out[0][:1]])


@needs_nvcc
def test_schemas_and_fakes_fit_the_operators(emulated):
    q, y = latents(EVEN)
    tensors = loss._check(q, y, name="reference").operands
    rows = vars(pf.PackedReference.pack(q, y, "fp8", backend="eager"))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*tensors, *map(rows.get, NAMES), segment_length(torch.Size(EVEN)))
    torch.library.opcheck(emulated.pack.default, arguments, test_utils=checks)
    table = torch.randn(5, 4)
    torch.library.opcheck(emulated.gather_rows.default, ([table], [4, 0], [torch.empty(2, 4)]), test_utils=checks)


@needs_nvcc
def test_operators_name_the_argument_that_is_wrong(emulated):
    q, y = latents(EVEN)
    tensors = loss._check(q, y, name="reference").operands
    rows = vars(pf.PackedReference.pack(q, y, "fp8", backend="eager"))
    length = segment_length(torch.Size(EVEN))
    with pytest.raises(RuntimeError, match="packed rows: expected bfloat16 or uint8"):
        emulated.pack(*tensors, rows["chosen"].float(), rows["rejected"].float(), None, None, length)
    with pytest.raises(RuntimeError, match="packed rows: expected one dtype, and scales with uint8"):
        emulated.pack(*tensors, rows["chosen"], rows["rejected"], None, None, length)
    with pytest.raises(RuntimeError, match="length: expected a multiple of 128, got 100"):
        emulated.pack(*tensors, *map(rows.get, NAMES), 100)


@needs_nvcc
@pytest.mark.parametrize("launched", [True, False], ids=["one launch", "torch"])
def test_rows_of_a_batch_come_back_as_they_lie_in_their_tables(emulated, monkeypatch, launched):
    monkeypatch.setattr(native, "_operators", emulated)
    monkeypatch.setattr(native, "rows_unavailable", lambda device: None if launched else "no nvcc")
    tables = vars(pf.PackedReference.pack(*latents(ODD, pairs=3), "fp8", backend="eager"))
    device = SimpleNamespace(type="cuda") if launched else CPU
    made = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made(*a, **k | {"device": CPU}))
    out = rows.bring(tables, [2, 0, 2, 1], device)
    assert out.keys() == tables.keys()
    assert all(torch.equal(out[name], table[[2, 0, 2, 1]]) for name, table in tables.items())


class Recorded:
    """Stands in for torch.cuda.Event: over when the test says so."""

    over = False

    def record(self, stream):
        assert stream == "the current stream"

    def query(self):
        return Recorded.over


def test_host_memory_a_kernel_was_given_is_kept_until_the_device_is_past_it(monkeypatch):
    """Torch does not know of the kernel: without this it would hand the pinned block to the next one who asks."""
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(native, "_in_flight", [])
    launched = SimpleNamespace(default=lambda *arguments, **named: None)
    monkeypatch.setattr(native, "_operators", SimpleNamespace(pack=launched, gather_rows=launched))
    with FakeTensorMode():
        prediction, batch = torch.empty(2, 8, device="cuda"), torch.empty(1, 8, device="cuda")

    def pack():
        rows = {"chosen": torch.empty(1, 8, dtype=torch.bfloat16), "rejected": torch.empty(1, 8, dtype=torch.bfloat16)}
        native.pack(Operands(**dict.fromkeys(Operands._fields) | {"policy": prediction}), rows)
        return weakref.ref(rows["chosen"])

    def gather():
        table = torch.empty(3, 8)
        native.gather_rows([table], [2], [batch])
        return weakref.ref(table)

    for launch in (pack, gather):
        Recorded.over = False
        held = launch()
        gc.collect()
        assert held() is not None
        Recorded.over = True
        other = launch()  # the next launch lets go of what is done
        gc.collect()
        assert held() is None and other() is not None


def test_the_native_loss_is_for_cpu_tensors_and_says_what_to_use_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendUnavailable, match="is for CPU tensors; use backend='triton'"):
        backends.select("native", torch.device("cuda", 0))
    with pytest.raises(BackendUnavailable, match="for CPU tensors, these are on meta; use backend='eager'"):
        backends.select("native", torch.device("meta"))


def test_reasons_for_no_cuda_kernels_say_what_to_do(monkeypatch, tmp_path):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(BackendUnavailable, match="cannot pack on cuda:0: .* need an NVIDIA GPU .* nvidia-smi"):
        backends.packs_natively("native", cuda)
    assert not backends.packs_natively("auto", cuda) and not backends.packs_natively("eager", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "compute capability 7.5 is below the 8.0" in native.rows_unavailable(cuda)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("PGDPO_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_cuda_library", native._CudaLibrary())
    monkeypatch.setattr(shutil, "which", lambda name: None if "nvcc" in name else f"/usr/bin/{Path(name).name}")
    assert "no nvcc found; install the CUDA toolkit" in native.rows_unavailable(cuda)


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
            build.cuda_library(("90",)).get()


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA: make test-torch-2.11")
def test_the_library_builds_links_loads_and_registers(tmp_path):
    """Against a CUDA build of torch, without a GPU; in a process of its own, which the registrations end with."""
    code = """
        import sys, torch
        from pathlib import Path
        from pgdpo_fast.backends import build, operators
        target = Path(sys.argv[1])
        build.compile_cuda_library(target, ("90",))
        torch.ops.load_library(target)
        for name in ("pack", "gather_rows"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pgdpo_fast_native::{name}", "CUDA"), name
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cuda.so")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# What csrc may use of torch: all of it is in 2.11, the oldest torch supported. `make test-torch-2.11` compiles, links
# and runs this very list against that version; a name is added here after it has.
OF_TORCH_2_11 = {
    "<torch/csrc/stable/accelerator.h>",
    "<torch/csrc/stable/library.h>",
    "<torch/csrc/stable/ops.h>",
    "<torch/csrc/stable/tensor.h>",
    "<torch/headeronly/util/Exception.h>",
    "<torch/headeronly/util/shim_utils.h>",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_get_current_cuda_stream",
    "torch::headeronly::ScalarType",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::contiguous",
    "torch::stable::new_empty",
    "torch::stable::parallel_for",
}


def test_sources_use_nothing_of_torch_that_its_oldest_version_lacks():
    names = (
        r"\b(?:STD_|STABLE_)?TORCH_[A-Z_]+\b|\baoti_torch_\w+|\btorch::(?:stable|headeronly)(?:::\w+)+|<torch/[^>]+>"
    )
    used = {name for path in build.sources().rglob("*.*") for name in re.findall(names, path.read_text())}
    assert used == OF_TORCH_2_11


@needs_nvcc
def test_a_toolkit_of_another_cuda_version_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.raises(build.BuildError, match=r"torch of CUDA 11\.8; install a CUDA 11 toolkit"):
        build._check_toolkit()


def kernel_name(mangled: str) -> str:
    """`pack_kernel<f, 0, 1>` of a mangled name: float or double, then dtype and whether it reads vectors."""
    name, arguments = re.search(r"\d+([a-z_]+_kernel)(?:I(.*?E)Ev)?", mangled).groups()
    scalar = re.findall(r"^[fd]", arguments or "")
    numbers = [sign.replace("n", "-") + digits for sign, digits in re.findall(r"L[ib](n?)(\d+)E", arguments or "")]
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
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_to_their_resources(architecture, tmp_path):
    (source,) = build.CUDA_KERNELS
    target, where = tmp_path / "kernels.o", f"sm_{architecture}"
    command = [*build.nvcc_command((architecture,)), "-Xptxas=-v", "-c", str(build.sources() / source)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_registers(where, done.stderr)
    if disassembler() is not None:
        check_machine_code(where, target)


def check_registers(where: str, report: str) -> None:
    table = resources(report)
    assert sum(name.startswith("pack_kernel") for name in table) == 7, where
    for name, (registers, local, shared) in table.items():
        assert local == 0, f"{where} {name}: {local} bytes of stack and spills"
        assert shared == 0, f"{where} {name}: {shared} bytes of shared memory"
        assert registers <= 80, f"{where} {name}: {registers} registers"


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
        if name.startswith("gather") or re.match(r"pack_kernel<f, \d, 1", name):
            assert [c for c in codes if re.match(r"LDG.*\.128", c)], f"{where} {name}: no 128-bit loads"
