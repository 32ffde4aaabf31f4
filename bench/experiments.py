"""Launch settings to try, each with what is expected of it before it is measured. `gpu.py` measures them all.

A setting is kept if the geometric mean over its cases is at least 3% faster, no case is 3% slower beyond its spread,
and parity stays green. NOTES.md holds the whole plan, the ideas that need a kernel change too, and the outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from pgdpo_fast.backends.triton import Launch

from .shapes import SHAPES, Case

SMALL = Case(SHAPES["wan2.1-480p"], 1, "sample", "errors")
LARGE = Case(SHAPES["hunyuanvideo-720p"], 16, "sample", "errors")
PREDICTIONS = Case(SHAPES["wan2.1-720p"], 4, "sample", "predictions")
ELEMENT = Case(SHAPES["wan2.1-720p"], 4, "element", "predictions")
FRAME = Case(SHAPES["wan2.1-480p"], 4, "frame", "errors")
KEEP_GAIN = 0.03


@dataclass(frozen=True)
class Experiment:
    """Values for module attributes under `pgdpo_fast`, and the prediction: time over the present setting's time."""

    name: str
    settings: dict[str, object]
    cases: tuple[Case, ...]
    expected_ratio: float
    because: str
    backend: str = "triton"

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = {}
        try:
            for path, value in self.settings.items():
                module, name = _resolve(path)
                before[path] = getattr(module, name)
                setattr(module, name, value)
            yield
        finally:
            for path, value in before.items():
                setattr(*_resolve(path), value)


def _resolve(path: str):
    module, name = path.rsplit(".", 1)
    module = import_module(f"pgdpo_fast.{module}")
    if not hasattr(module, name):
        raise AttributeError(f"experiment setting {path}: {module.__name__} has no {name}; update experiments.py")
    return module, name


_LAUNCH, _CHUNK = "backends.triton.DEFAULT_LAUNCH", "backends.operands.MIN_CHUNK"
_CHUNKS, _FOLD = "backends.operands.MAX_CHUNKS", "backends.triton.FOLD_PARTS"

EXPERIMENTS = (
    Experiment(
        "block 2048, 8 warps",
        {_LAUNCH: Launch(2048, 8)},
        (SMALL, LARGE, ELEMENT),
        1.0,
        "the same 128-bit loads a thread; twice the bytes in flight a program, half the programs",
    ),
    Experiment(
        "block 2048, 4 warps",
        {_LAUNCH: Launch(2048, 4)},
        (SMALL, LARGE, ELEMENT),
        0.97,
        "two independent 128-bit loads an operand and thread hide more latency; costs registers",
    ),
    Experiment(
        "block 4096, 8 warps",
        {_LAUNCH: Launch(4096, 8)},
        (SMALL, LARGE, ELEMENT),
        0.97,
        "as above with larger programs; the element form may lose occupancy",
    ),
    Experiment(
        "block 512, 2 warps",
        {_LAUNCH: Launch(512, 2)},
        (SMALL, LARGE, ELEMENT),
        1.05,
        "more, smaller programs: finer tail at B=1, less in flight a program",
    ),
    Experiment(
        "block 1024, 8 warps",
        {_LAUNCH: Launch(1024, 8)},
        (SMALL, LARGE, ELEMENT),
        1.1,
        "four bfloat16 a thread: 64-bit loads, twice the instructions for the same bytes",
    ),
    Experiment(
        "chunks of 8192 or more",
        {_CHUNK: 8192},
        (SMALL, LARGE, PREDICTIONS),
        1.0,
        "half the partial sums; at B=1 256 programs are fewer than two a multiprocessor: may lose",
    ),
    Experiment(
        "chunks of 2048 or more",
        {_CHUNK: 2048, _CHUNKS: 1024},
        (SMALL, LARGE, PREDICTIONS),
        1.02,
        "twice the programs of the error pass and twice the fold's reads; helps only if B=1 starves",
    ),
    Experiment(
        "at most 2048 chunks",
        {_CHUNKS: 2048},
        (SMALL, LARGE, PREDICTIONS),
        0.98,
        "better balance over 132 multiprocessors at B=1: 512 programs leave a tail of a quarter wave",
    ),
    Experiment(
        "fold of 256 parts",
        {_FOLD: 256},
        (SMALL, FRAME),
        1.0,
        "two trips to memory for 512 chunks, two partials a thread; frames take 16 rows a program, twice the programs",
    ),
    Experiment(
        "fold of 1024 parts",
        {_FOLD: 1024},
        (SMALL, FRAME),
        1.02,
        "frames take 64 rows a program, half the programs; two rows a program at sample granularity",
    ),
)
