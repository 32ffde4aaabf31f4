"""What `gpu.py` tries, each with what is expected of it before it is measured: launches for the table of dispatch
(tuning.py), and settings of the code, for a person to decide on.

A setting is worth keeping if the geometric mean over its cases is at least 3% lower, no case is 3% slower beyond its
spread, and parity stays green. NOTES.md holds the whole plan, what needs a kernel change too, and the outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module

from pgdpo_fast.backends.launches import Key, Launch

from .shapes import BATCHES, SHAPES, Case, VideoShape

SMALL = Case(SHAPES["wan2.1-480p"], 1, "sample", "errors")
MIDDLE = Case(SHAPES["wan2.1-480p"], 4, "sample", "errors")
LARGE = Case(SHAPES["hunyuanvideo-720p"], 16, "sample", "errors")
PREDICTIONS = Case(SHAPES["wan2.1-720p"], 4, "sample", "predictions")
ALONE = Case(SHAPES["wan2.1-720p"], 1, "sample", "predictions")
FRAME = Case(SHAPES["wan2.1-480p"], 4, "frame", "errors")
KEEP_GAIN = 0.03


def _resolve(path: str):
    module, name = path.rsplit(".", 1)
    module = import_module(f"pgdpo_fast.{module}")
    if not hasattr(module, name):
        raise AttributeError(f"experiment setting {path}: {module.__name__} has no {name}; update experiments.py")
    return module, name


@contextmanager
def applied(settings: Mapping[str, object]) -> Iterator[None]:
    """Values of module attributes under `pgdpo_fast`, for a while."""
    before = {}
    try:
        for path, value in settings.items():
            module, name = _resolve(path)
            before[path] = getattr(module, name)
            setattr(module, name, value)
        yield
    finally:
        for path, value in before.items():
            setattr(*_resolve(path), value)


class Given:
    """Stands in for the table of launches: one launch for every call, whose keys it remembers."""

    def __init__(self, launch: Launch):
        self.launch, self.keys = launch, set()

    def __call__(self, key: Key) -> Launch:
        self.keys.add(key)
        return self.launch


@contextmanager
def given(launch: Launch) -> Iterator[set[Key]]:
    """Every Triton call takes `launch`, whatever the table or the environment says; the keys it was asked for."""
    table = Given(launch)
    with applied({"backends.launches.find": table, "backends.launches.FORM": "auto"}):
        yield table.keys


@dataclass(frozen=True)
class Candidate:
    """A launch for the table, and the prediction: time over the default launch's, the mean over the sizes."""

    name: str
    launch: Launch
    expected_ratio: float
    because: str


STREAMS = (
    Candidate(
        "stream",
        Launch(form="stream"),
        0.70,
        "predictions and targets read once from memory: the two passes are capped at 60 to 67% of copy, and one launch "
        "for three saves 4 µs where the batch is small",
    ),
    Candidate(
        "stream, 6 MB ahead",
        Launch(form="stream", ahead=6 << 20),
        0.72,
        "half the distance: more of it still in L2 where a pair is large, more waiting where a fold is slow",
    ),
    Candidate(
        "stream, 24 MB ahead",
        Launch(form="stream", ahead=24 << 20),
        0.72,
        "no waiting, but 24 MB and a pair exceed half of L2 from Wan 480p on",
    ),
    Candidate(
        "stream, 4 programs",
        Launch(form="stream", programs=4),
        0.80,
        "half the bytes in flight; pays only if eight programs wait for tickets",
    ),
)
BLOCKS = (
    Candidate(
        "block 2048, 8 warps",
        Launch(2048, 8),
        1.0,
        "the same 128-bit loads per thread; twice the bytes in flight per program, half the programs",
    ),
    Candidate(
        "block 2048, 4 warps",
        Launch(2048, 4),
        0.97,
        "two independent 128-bit loads an operand and thread hide more latency; costs registers",
    ),
    Candidate(
        "block 4096, 8 warps",
        Launch(4096, 8),
        0.97,
        "as above with larger programs; the element form may lose occupancy",
    ),
    Candidate(
        "block 512, 2 warps",
        Launch(512, 2),
        1.05,
        "more, smaller programs: finer tail at B=1, less in flight per program",
    ),
    Candidate(
        "block 1024, 8 warps",
        Launch(1024, 8),
        1.1,
        "four bfloat16 per thread: 64-bit loads, twice the instructions for the same bytes",
    ),
)


@dataclass(frozen=True)
class Size:
    """Calls that share the bits of their sums: one shape, granularity, form of reference and dtype, any batch."""

    shape: VideoShape
    granularity: str
    reference_form: str
    dtype: str = "bfloat16"
    batches: tuple[int, ...] = BATCHES

    def cases(self) -> tuple[Case, ...]:
        return tuple(
            Case(self.shape, pairs, self.granularity, self.reference_form, dtype=self.dtype) for pairs in self.batches
        )


# Most wanted first: what is left out when time ends keeps the default.
WAN, HUNYUAN, SMALLEST = (SHAPES[name] for name in ("wan2.1-480p", "hunyuanvideo-720p", "videocrafter2"))
SIZES = (
    *(Size(shape, "sample", form) for form in ("errors", "predictions") for shape in SHAPES.values()),
    *(Size(WAN, "frame", form) for form in ("errors", "predictions")),
    *(Size(WAN, "sample", form) for form in ("bf16", "fp8")),
    *(Size(shape, "element", "predictions") for shape in (WAN, SMALLEST, HUNYUAN)),
)


@dataclass(frozen=True)
class Experiment:
    """Values for module attributes under `pgdpo_fast`, and the prediction: time over the present setting's time, both
    with `launch`."""

    name: str
    settings: dict[str, object]
    cases: tuple[Case, ...]
    expected_ratio: float
    because: str
    launch: Launch = field(default=Launch())
    backend: str = "triton"


_SEGMENT, _SEGMENTS = "backends.operands.MIN_SEGMENT", "backends.operands.MAX_SEGMENTS"
_FOLD = "backends.triton.FOLD_PARTS"

EXPERIMENTS = (
    Experiment(
        "stream without hints to the caches",
        {"backends.triton.STREAM_KEEP": "", "backends.triton.STREAM_PASS": ""},
        (SMALL, LARGE, ALONE),
        1.1,
        "references and gradients then push out what is to be read again; no effect where a batch fits in L2",
        launch=Launch(form="stream"),
    ),
    Experiment(
        "two passes with hints to the caches",
        {"backends.triton.TWO_PASS_KEEP": "evict_last", "backends.triton.TWO_PASS_PASS": "evict_first"},
        (SMALL, MIDDLE, ALONE),
        0.9,
        "one pair of Wan 720p: 19 MB of references no longer push out 39 MB of predictions and targets; nothing where "
        "all fits or nothing does",
    ),
    Experiment(
        "gradients of two passes walk forwards",
        {"backends.triton.BACKWARDS": False},
        (SMALL, MIDDLE, ALONE),
        1.05,
        "four pairs of Wan 480p, 67 MB: the last 50 MB are no longer hit; nothing at one pair",
    ),
    Experiment(
        "error pass of 96 registers",
        {"backends.triton.PASS_REGISTERS": 96},
        (SMALL, LARGE, PREDICTIONS),
        1.0,
        "five blocks per multiprocessor in place of four, a few spills on sm_100; bound by memory with either",
    ),
    Experiment(
        "segments of 8192 or more",
        {_SEGMENT: 8192},
        (SMALL, LARGE, PREDICTIONS),
        1.0,
        "half the partial sums; at B=1 256 programs are fewer than two per multiprocessor: may lose",
    ),
    Experiment(
        "segments of 2048 or more",
        {_SEGMENT: 2048, _SEGMENTS: 1024},
        (SMALL, LARGE, PREDICTIONS),
        1.02,
        "twice the programs of the error pass and twice the fold's reads; helps only if B=1 starves",
    ),
    Experiment(
        "at most 2048 segments",
        {_SEGMENTS: 2048},
        (SMALL, LARGE, PREDICTIONS),
        0.98,
        "better balance over 132 multiprocessors at B=1: 512 programs leave a tail of a quarter wave",
    ),
    Experiment(
        "fold of 256 parts",
        {_FOLD: 256},
        (SMALL, FRAME),
        1.0,
        "two trips to memory for 512 segments; frames take 16 rows per program, twice the programs",
    ),
    Experiment(
        "fold of 1024 parts",
        {_FOLD: 1024},
        (SMALL, FRAME),
        1.02,
        "frames take 64 rows per program, half the programs; two rows per program at sample granularity",
    ),
)
