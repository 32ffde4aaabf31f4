"""Compiles every Triton kernel for GPUs that need not be here and reads the machine code: `python bench/codegen.py`.

The real launchers run on CPU tensors with a stand-in driver that names the target and stops before the launch, so
types, strides, alignment hints and switches are those of a real call. Prints one row a kernel and writes
bench/results/codegen.md; exits with 1 where a gate fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import pgdpo_fast as pf  # noqa: E402
from pgdpo_fast.backends import launches  # noqa: E402
from pgdpo_fast.backends import triton as launchers  # noqa: E402

ARCHITECTURES = (80, 90, 100)
# 128 registers leave four blocks of 128 threads on a multiprocessor. Some objectives and operands take more on eight
# elements per thread; three blocks of it still keep 36 KB of loads on their way, enough to hide the latency of memory.
MAX_REGISTERS, MAX_REGISTERS_ELEMENTS, MAX_SHARED = 128, 168, 227 * 1024
# The last to arrive adds the losses; tickets, arrivals and waits of the stream; none anywhere else.
ATOMICS = {"fold_kernel": 1, "fold_elements_kernel": 1, "stream_kernel": 10}
WAN, COGVIDEOX, ODD, ONE = (16, 21, 60, 104), (16, 13, 60, 90), (3, 5, 7, 9), (1, 1, 1, 1)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
RESULTS = Path(__file__).parent / "results" / "codegen.md"


@dataclass(frozen=True)
class Case:
    """One call of the loss. `vector`: its rows allow 128-bit access; `narrow`: compiled for one target only;
    `budget`: instructions the element pass may take per pair-element."""

    name: str
    objective: pf.Objective
    shape: tuple[int, ...] = WAN
    dtype: torch.dtype = BF16
    granularity: str = "sample"
    target: str = "stacked"
    reference: str = "predictions"
    pairs: int = 2
    vector: bool = True
    narrow: bool = False
    budget: int | None = None
    form: str = "two-pass"

    def run(self) -> None:
        """Forward and backward; every kernel stops before its launch, so the numbers mean nothing."""
        rows = [torch.empty(2 * self.pairs, *self.shape, dtype=self.dtype) for _ in range(3)]
        prediction, target, reference = rows[0].requires_grad_(), rows[1], rows[2]
        scale = torch.empty(self.pairs)
        if self.target == "shared":
            target = target[: self.pairs]
        elif self.target == "built":
            target = pf.NoisedTarget(target, reference[: self.pairs], scale, scale)
        packed = torch.empty(self.pairs, *self.shape, dtype=BF16 if self.reference == "bf16" else torch.uint8)
        if self.reference == "errors":
            per = (self.pairs, self.shape[1]) if self.granularity == "frame" else (self.pairs,)
            reference = pf.ReferenceErrors(torch.empty(per), torch.empty(per))
        elif self.reference == "bf16":
            reference = pf.PackedReference(packed, packed)
        elif self.reference == "fp8":
            blocks = torch.empty(self.pairs, -(-torch.Size(self.shape).numel() // launchers.PACK_BLOCK))
            reference = pf.PackedReference(packed, packed, blocks, blocks)
        launches.FORM = self.form
        out = pf.preference_loss(
            prediction,
            target,
            reference,
            objective=self.objective,
            granularity=self.granularity,
            pair_weight=scale,
            posterior_scale=scale,
            backend="triton",
        )
        out.loss.backward()

    def vectors(self, kernel: str) -> tuple[int, int]:
        """128-bit loads and stores a thread needs for one block of the main loop."""
        elements = launchers.DEFAULT_LAUNCH.block // (32 * launchers.DEFAULT_LAUNCH.warps)

        def each(count: int, size: int = self.dtype.itemsize) -> int:
            return count * (elements * size // 16)

        loads = each(2 + {"stacked": 2, "shared": 1, "built": 3}[self.target])
        if kernel == "stream_kernel":
            both = [self.vectors(name) for name in ("pair_errors_kernel", "pair_gradient_kernel")]
            return both[0][0] + both[1][0], both[1][1]
        gradient = kernel == "pair_gradient_kernel"
        writes = gradient or kernel == "pair_elements_kernel" and not self.objective.outer
        reads = 0 if gradient and not self.objective.needs_anchor else 1 if gradient else 2
        loads += each(reads, {"predictions": self.dtype.itemsize, "bf16": 2}.get(self.reference, 0))
        return (loads, each(2) if writes else 0) if kernel.startswith("pair_") else (0, 0)


CASES = (
    Case("predictions", pf.PGDPO()),
    Case("predictions, fp32", pf.PGDPO(), dtype=FP32),
    Case("cached errors, built target", pf.DPO(), target="built", reference="errors"),
    Case("bf16 packed, anchor", pf.PGDPO(ipr="anchor"), target="shared", reference="bf16"),
    Case("fp8 packed", pf.PGDPO(), target="shared", reference="fp8"),
    Case("fp8 packed, fp32, anchor", pf.PGDPO(ipr="anchor"), dtype=FP32, reference="fp8"),
    Case("frames of 60x90", pf.PGDPO(), COGVIDEOX, granularity="frame"),
    Case("frames, fp32, cached errors", pf.PGDPO(), COGVIDEOX, FP32, "frame", reference="errors"),
    Case("safeguarded, fp16", pf.Safeguarded(pf.PGDPO(detach_weights=False, ratio="signed")), dtype=FP16),
    Case("sum, fp16", pf.RPO() + pf.Safeguarded(pf.PGDPO(ipr="anchor"), scope="pair"), dtype=FP16),
    Case("elements, sum", pf.RPO(), granularity="element"),
    Case("stream", pf.PGDPO(), form="stream"),
    Case("stream, cached errors, built target", pf.DPO(), target="built", reference="errors", form="stream"),
    Case("stream, frames of 60x90", pf.PGDPO(), COGVIDEOX, granularity="frame", form="stream"),
    Case("elements", pf.PGDPO(), granularity="element", budget=120),
    Case("elements, fp32", pf.PGDPO(), dtype=FP32, granularity="element"),
    Case("elements, fp8 packed", pf.PGDPO(), granularity="element", target="shared", reference="fp8"),
    Case("elements, listing", pf.PGDPO.listing(), granularity="element"),
    Case(
        "elements, safeguarded listing",
        pf.Safeguarded(pf.PGDPO.listing(), scope="pair"),
        dtype=FP32,
        granularity="element",
    ),
    Case("odd video, one pair", pf.PGDPO(), ODD, pairs=1, vector=False),
    Case("odd frames, one pair", pf.PGDPO(), ODD, granularity="frame", pairs=1, vector=False),
    Case("one element", pf.PGDPO(ipr="anchor"), ONE, granularity="element", pairs=1, vector=False, narrow=True),
    Case("one frame of one element", pf.DPO(), ONE, granularity="frame", pairs=1, vector=False, narrow=True),
    Case("float64", pf.PGDPO(ipr="anchor"), dtype=FP64, vector=False, narrow=True),
    *(
        Case(type(o).__name__, o, ODD, vector=False, narrow=True)
        for o in (pf.IPO(), pf.SLiC(), pf.SLiC(hinge=True), pf.SFT(), pf.DPOP(), pf.DPOShift(), pf.SDPO())
    ),
)


@dataclass(frozen=True)
class Row:
    """What the assembler made of one kernel. Sizes in bytes; loads and stores are instructions in the whole kernel."""

    kernel: str
    case: str
    arch: int
    registers: int
    local: int
    shared: int
    instructions: int
    per_element: float
    loads_128: int
    hinted: int
    stores_128: int
    loads_expected: int
    stores_expected: int
    double: int
    atomics: int
    flushing: int
    float64: bool
    budget: int | None
    reductions: list[str]

    def failures(self) -> list[str]:
        """The gates this kernel does not pass."""
        limit = MAX_REGISTERS_ELEMENTS if self.kernel in ("pair_elements_kernel", "stream_kernel") else MAX_REGISTERS
        gates = {
            f"{self.local} bytes of local memory": self.local == 0,
            f"{self.registers} registers, {limit} allowed": self.float64 or self.registers <= limit,
            f"{self.shared} bytes of shared memory": self.shared <= MAX_SHARED,
            f"{self.loads_128} 128-bit loads of {self.loads_expected}": self.loads_128 >= self.loads_expected,
            f"{self.hinted} of {self.loads_128} 128-bit loads with a hint": self.kernel != "stream_kernel"
            or self.hinted >= self.loads_expected,
            f"{self.stores_128} 128-bit stores of {self.stores_expected}": self.stores_128 >= self.stores_expected,
            f"{self.double} float64 instructions": self.float64 or self.double == 0,
            f"{self.atomics} atomics of {ATOMICS.get(self.kernel, 0)}": self.atomics <= ATOMICS.get(self.kernel, 0),
            f"{self.per_element} instructions an element, {self.budget} allowed": self.budget is None
            or 0 < self.per_element <= self.budget,
            f"{self.flushing} operations that flush denormals": self.float64 or self.flushing == 0,
        }
        return [message for message, passed in gates.items() if not passed]


class Target:
    """A driver of a GPU that is not here: enough to compile for it."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compiled(cases: tuple[Case, ...], arch: int) -> Iterator[tuple[Case, str, bytes, list[str]]]:
    """(case, kernel name, machine code, reductions) of every kernel the cases launch, each once."""
    launched, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run, reason = compile_only, launchers.unavailable
    launchers.unavailable = lambda device: None
    driver.set_active(Target(arch))
    seen = set()
    try:
        for case in cases:
            case.run()
            for name, kernel in launched:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    yield case, name, kernel.asm["cubin"], reductions(kernel.asm["ttgir"])
            launched.clear()
    finally:
        JITFunction.run, launchers.unavailable = run, reason


def reductions(code: str) -> list[str]:
    """Shape and layout of everything Triton's intermediate code adds up: they alone decide the order of a sum."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    found = re.findall(r"tt\.reduce\.return.*?\}\) : \((tensor<.*?>)\) ->", code, re.DOTALL)
    return sorted({re.sub(r"#\w+(?=[>,}])", lambda name: layouts.get(name[0], name[0]), kind) for kind in found})


def read(case: Case, kernel: str, arch: int, cubin: bytes, sums: list[str]) -> Row:
    """Resource usage and instruction counts, by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    resource = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    operations = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]+)", code))

    def count(pattern: str) -> int:
        return sum(n for name, n in operations.items() if re.match(pattern, name))

    loads, stores = case.vectors(kernel) if case.vector else (0, 0)
    launch = launchers.DEFAULT_LAUNCH
    loop = main_loop(code) / (launch.block / (32 * launch.warps)) if kernel.startswith("pair_") else 0.0
    return Row(
        kernel,
        case.name,
        arch,
        resource["REG"],
        resource["STACK"] + resource["LOCAL"] + count("LDL|STL"),
        resource["SHARED"],
        operations.total(),
        loop,
        count(r"LDG.*\.128"),
        count(r"LDG(?=.*\.128).*\.E[FL]\b"),
        count(r"STG.*\.128"),
        loads,
        stores,
        count(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64|MUFU.*64"),
        count("RED|ATOM"),
        count(r"F(ADD|MUL|FMA).*\.FTZ"),
        case.dtype == FP64,
        case.budget if kernel == "pair_elements_kernel" else None,
        sums,
    )


def main_loop(code: str) -> int:
    """Instructions in the largest innermost loop; 0 where there is none."""
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    jumps = [(int(to[1], 16), at) for at, line in lines if (to := re.search(r"\bBRA\b.* (0x[0-9a-f]+)", line))]
    back = [(start, end) for start, end in jumps if start < end]
    inner = [x for x in back if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in back)]
    return max((sum(start <= at <= end for at, _ in lines) for start, end in inner), default=0)


def table(rows: list[Row]) -> str:
    """The rows as Markdown; several targets of one kernel share a line."""
    lines = [
        "| kernel | call | registers | shared | instructions | an element | 128-bit loads | 128-bit stores | gates |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, case in dict.fromkeys((row.kernel, row.case) for row in rows):
        group = [row for row in rows if (row.kernel, row.case) == (kernel, case)]
        for variant in range(max(Counter(row.arch for row in group).values())):
            same = [[r for r in group if r.arch == arch][variant] for arch in dict.fromkeys(r.arch for r in group)]

            def each(field: str, same=same) -> str:
                return " / ".join(str(getattr(row, field)) for row in same)

            failures = "; ".join(f"sm_{row.arch}: {x}" for row in same for x in row.failures())
            lines.append(
                f"| {kernel} | {case} | {each('registers')} | {each('shared')} | {each('instructions')} "
                f"| {each('per_element')} | {each('loads_128')} | {each('stores_128')} | {failures or 'pass'} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, e.g. 80 90")
    parser.add_argument("--calls", nargs="+", help="names of the calls to compile for, by default all")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the Markdown table")
    options = parser.parse_args()
    rows = [
        read(case, kernel, arch, cubin, sums)
        for arch in options.arch
        for case, kernel, cubin, sums in compiled(
            tuple(c for c in CASES if (arch == 90 or not c.narrow) and c.name in (options.calls or [c.name])), arch
        )
    ]
    rows.sort(key=lambda row: (row.kernel, row.case, row.arch))
    text = table(rows)
    header = (
        f"# Machine code of the Triton kernels\n\nTriton {triton.__version__}, "
        f"{' / '.join(f'sm_{arch}' for arch in options.arch)}; columns with several numbers follow that order. "
        "No kernel may use local memory, float64 (in float32 builds) or flush denormals, "
        "none but the folds and the "
        "stream atomics; "
        f"at most {MAX_REGISTERS} registers ({MAX_REGISTERS_ELEMENTS} in pair_elements_kernel, stream_kernel). "
        '"An element" counts the instructions of the main loop for one element of a pair, 0 where there is no loop; '
        "the element pass of PG-DPO on bfloat16 may take 120. Loads and stores count the whole kernel, main loop and "
        "masked tail.\n\n"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(header + text + "\n")
    if options.json:
        options.json.write_text(json.dumps([{**asdict(row), "failures": row.failures()} for row in rows], indent=1))
    print(text)
    return int(any(row.failures() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
