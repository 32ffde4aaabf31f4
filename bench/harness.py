"""How a contender is measured: the correctness gate first, then time, launches and memory, against the machine's copy.

Calls rotate over input sets larger than three times the last-level cache, contenders take turns call by call so that a
busy machine slows them alike, and every figure comes with its spread. A contender that fails the gate gets no figure at
all.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import pgdpo_fast as pf
from pgdpo_fast.preemption import check_stop

from .contenders import CONTENDERS, Contender, Inputs, make_inputs, numbers, select
from .shapes import Case

# Relative error allowed against float64: of a fused backend the rounding of its result alone.
LOSS_TOLERANCE = {"bfloat16": 1e-6, "float16": 1e-6, "float32": 1e-6, "float64": 1e-12}
GRADIENT_TOLERANCE = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 1e-6, "float64": 1e-12}
# Cached errors: each of four errors near 1/4 may be off by half an ulp, 1.5e-8, times beta/2 = 50, on a loss near 0.3.
CACHED_ERRORS_SLACK = 10.0
# The others need only compute the same thing: torch.compile's running sums of millions of float32 cost four digits.
UNFUSED_TOLERANCE = 2e-3


# -- correctness


@dataclass(frozen=True)
class Gate:
    """Errors of one contender against float64 on the timed input; NaN is never green."""

    loss_error: float
    gradient_error: float
    loss_tolerance: float
    gradient_tolerance: float

    @property
    def green(self) -> bool:
        return self.loss_error <= self.loss_tolerance and self.gradient_error <= self.gradient_tolerance


def oracle(x: Inputs, objective: pf.Objective, granularity: str, pairs: Sequence[int]) -> tuple[float, Tensor]:
    """Loss and gradient `[2B, ...]` of these pairs alone, by the eager backend in float64."""
    wide = select(x, pairs, torch.Tensor.double)
    loss = pf.preference_loss(
        wide.prediction,
        wide.target,
        wide.reference,
        objective=objective,
        granularity=granularity,
        backend="eager",
        **numbers(objective, wide),
    ).loss
    return loss.item(), torch.autograd.grad(loss, wide.prediction)[0]


def check(case: Case, x: Inputs, contender: Contender, loss: Tensor, gradient: Tensor, incoming: float = 1.0) -> Gate:
    """Compare a loss and a gradient `[2B, ...]` (times `incoming`) with float64, pair by pair to bound memory, but for
    objectives that look at the whole batch."""
    total = error = norm = 0.0
    size = case.pairs if contender.objective.whole_batch else 1
    for first in range(0, case.pairs, size):
        pairs = range(first, first + size)
        part, expected = oracle(x, contender.objective, case.granularity, pairs)
        total += part * size / case.pairs
        expected.mul_(incoming * size / case.pairs)
        rows = [*pairs, *(pair + case.pairs for pair in pairs)]
        error += (gradient[rows].double() - expected).square().sum().item()
        norm += expected.square().sum().item()
    slack = CACHED_ERRORS_SLACK if case.reference_form == "errors" else 1.0
    loss_tolerance, gradient_tolerance = slack * LOSS_TOLERANCE[case.dtype], GRADIENT_TOLERANCE[case.dtype]
    if case.dtype in ("float32", "float64"):
        gradient_tolerance *= slack
    if not contender.fused:
        loss_tolerance, gradient_tolerance = UNFUSED_TOLERANCE, max(UNFUSED_TOLERANCE, 2 * gradient_tolerance)
    return Gate(abs(loss.item() - total) / abs(total), math.sqrt(error / norm), loss_tolerance, gradient_tolerance)


# -- time


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, fastest, and the interquartile range over the median."""

    median: float
    fastest: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        median = statistics.median(samples)
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
        return cls(median, min(samples), (high - low) / median, len(samples))


Step = Callable[[int], object]


def time_in_turns(steps: dict[str, Step], seconds: float, rounds: tuple[int, int] = (5, 1000)) -> dict[str, Timing]:
    """Wall-clock time of CPU calls `step(set_index)`: in each round every contender makes one call, in an order that
    changes from round to round.

    Noise of the machine then hits all alike, and each finds the caches as any of the others leaves them; a block of
    calls of one contender would find them as it likes them. No two calls in a row get the same set of inputs.

    Args:
        seconds: stop after this long, but not before `rounds[0]` rounds and not after `rounds[1]`.
    """
    order, names = random.Random(0), list(steps)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline, calls = time.perf_counter() + seconds, 0
    for turn in range(-1, rounds[1]):  # round -1 warms up
        check_stop()
        if turn >= rounds[0] and time.perf_counter() > deadline:
            break
        order.shuffle(names)
        for name in names:
            calls += 1
            begin = time.perf_counter()
            steps[name](calls)
            if turn >= 0:
                samples[name].append(time.perf_counter() - begin)
    return {name: Timing.of(values) for name, values in samples.items()}


def time_on_device(step: Step, sets: int, seconds: float = 0.15, rounds: tuple[int, int] = (10, 60)) -> Timing:
    """Device time of ordinary launches between CUDA events, each sample one walk over all input sets."""
    for i in range(2 * min(sets, 2)):
        step(i)
    return _time_events(lambda: [step(i) for i in range(sets)], sets, seconds, rounds)


def time_graph(step: Step, sets: int, seconds: float = 0.15, rounds: tuple[int, int] = (10, 60)) -> Timing:
    """Device time of one replay of a CUDA graph that walks over all input sets, outputs kept apart so they rotate too.

    Capture refuses work that synchronizes; the exception is the caller's.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(sets, 3)):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.extend(step(i) for i in range(sets))
    timing = _time_events(graph.replay, sets, seconds, rounds)
    del kept
    graph.reset()
    return timing


def _time_events(walk: Callable[[], object], calls: int, seconds: float, rounds: tuple[int, int]) -> Timing:
    walk()
    samples, deadline = [], time.perf_counter() + seconds
    while len(samples) < rounds[0] or (len(samples) < rounds[1] and time.perf_counter() < deadline):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        walk()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e-3 / calls)
    return Timing.of(samples)


def host_seconds(step: Step, device_seconds: float, rounds: int = 5) -> float:
    """Time the CPU needs to issue one call, the device not waited for: the best of `rounds` runs of up to 50 calls."""
    best, calls = float("inf"), max(3, min(50, int(0.05 / device_seconds)))
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(calls):
            step(i)
        best = min(best, (time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return best


def copy_timing(nbytes: int, device: torch.device, seconds: float = 0.5) -> Timing:
    """Time of `copy_` that reads nbytes/2 and writes nbytes/2, rotating over more than three times the cache."""
    sets = max(1, -(-3 * last_level_cache(device) // nbytes))
    count = max(1, nbytes // 4)
    noise = torch.randn(min(count, 2**20), device=device).bfloat16().repeat(-(-count // 2**20))[:count]
    pairs = [(noise.clone(), noise.clone()) for _ in range(sets)]

    def step(i):
        source, destination = pairs[i % sets]
        destination.copy_(source)

    if device.type == "cuda":
        return time_graph(step, sets, seconds=min(seconds, 0.15))
    return time_in_turns({"copy": step}, seconds)["copy"]


# -- launches and memory


@contextmanager
def _quiet():
    """Without the two lines torch's profiler writes to stderr from C++ at every start and stop."""
    sys.stderr.flush()
    held, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(held, 2)
        os.close(held)
        os.close(null)


def launches(step: Step) -> int:
    """Kernels, copies and memsets one call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    step(0)
    torch.cuda.synchronize()
    with _quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(1)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """Most memory torch's allocator held during one call beyond what it held before, outputs included.

    On a CPU this follows the profiler's record of every allocation; memory a library takes elsewhere is not seen.
    """
    step(0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step(1)
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step(1)
        del kept
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# -- the machine


def last_level_cache(device: torch.device) -> int:
    """Bytes of L2 on a GPU, of the largest cache a core sees on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 * 2**20)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(available.group(1)) * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    return model.group(1).strip() if model else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """Folder name of a device's results: h200, intel-r-xeon-r-processor-2-threads."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-").removeprefix("nvidia-")
    return name if device.type == "cuda" else f"{name}-{torch.get_num_threads()}-threads"


def environment(device: torch.device) -> dict:
    """What a figure depends on besides the code."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    facts = {
        "device": device_name(device),
        "device_type": device.type,
        "slug": slug(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "last_level_cache_bytes": last_level_cache(device),
        "pgdpo_fast": pf.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts


# -- one case


@dataclass(frozen=True)
class Budget:
    """Seconds of timing a case gets, and the fewest and most rounds."""

    seconds: float = 10.0
    rounds: tuple[int, int] = (5, 1000)


DEFAULT_BUDGET = Budget()


def input_sets(case: Case, device: torch.device) -> int:
    """Sets to rotate over so that three times the last-level cache passes before an input comes back."""
    return max(2, -(-3 * last_level_cache(device) // case.floor_bytes))


def needed_bytes(case: Case, device: torch.device) -> int:
    """Rough memory of measuring a case: its sets, and the float32 temporaries of the unfused contenders."""
    temporaries = case.elements * 4 * (16 if case.granularity == "element" else 8)
    oracle_bytes = 2 * case.shape.numel * 8 * (30 if case.granularity == "element" else 12)
    return (input_sets(case, device) + 1) * case.floor_bytes + temporaries + oracle_bytes


def measure(
    case: Case,
    device: torch.device,
    *,
    contenders: Sequence[Contender] = CONTENDERS,
    seed: int = 0,
    budget: Budget = DEFAULT_BUDGET,
    withheld: Callable[[Contender, Case], str | None] = lambda *_: None,
    count_launches: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> dict:
    """Gate and measure all contenders on one case, as a JSON-ready record.

    Args:
        withheld: (contender, case) -> why its speed stays out of tables and figures (red elsewhere), or None; it is
            measured and recorded all the same.
        count_launches: on a GPU, profile one call of each contender.
        progress: called with a line before each slow part.
    """
    record = {
        "key": case.key,
        **asdict(case),
        "shape": case.shape.name,
        "latents": list(case.shape.latents),
        "floor_bytes": case.floor_bytes,
        "two_pass_bytes": case.two_pass_bytes,
        "gradient_bytes": case.gradient_bytes,
        "seed": seed,
        "contenders": {},
    }
    needed, free = needed_bytes(case, device), free_memory(device)
    if needed > 0.9 * free:
        record["skipped"] = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return record
    sets = record["sets"] = input_sets(case, device)
    inputs = [make_inputs(case, device, seed + i) for i in range(sets)]
    steps = {}
    for contender in contenders:
        entry = record["contenders"][contender.name] = {"status": "skipped"}
        if reason := contender.refuses(case, device):
            entry["reason"] = reason
            continue
        progress(f"{case.key}: {contender.name}, check")
        try:
            call = contender.prepare(case)
            begin = time.perf_counter()
            loss, gradient = call(inputs[0])
            entry["first_call_s"] = time.perf_counter() - begin
            gate = check(case, inputs[0], contender, loss, gradient)
        except Exception as error:  # one broken contender must not cost the others their figures
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            continue
        entry["gate"] = asdict(gate)
        if not gate.green:
            entry |= {
                "status": "red",
                "reason": f"loss off by {gate.loss_error:.1e}, gradient by "
                f"{gate.gradient_error:.1e}: no speed is reported",
            }
            continue
        entry["status"] = "ok"
        if reason := withheld(contender, case):
            entry["withheld"] = reason
        steps[contender.name] = lambda i, call=call: call(inputs[i % sets])
        del loss, gradient

    progress(f"{case.key}: timing {', '.join(steps)}")
    fused = {contender.name for contender in contenders if contender.fused}
    record["copy"] = asdict(copy_timing(case.floor_bytes, device, seconds=0.1 * budget.seconds))
    if device.type == "cuda":
        for name, step in steps.items():
            _measure_on_device(record["contenders"][name], step, sets, name in fused)
            if count_launches:
                record["contenders"][name]["launches"] = launches(step)
    else:
        for name, timing in time_in_turns(steps, budget.seconds, budget.rounds).items():
            record["contenders"][name]["time"] = asdict(timing)
    for name, step in steps.items():
        record["contenders"][name]["peak_extra_bytes"] = peak_extra_bytes(step, device)
    return record


def _measure_on_device(entry: dict, step: Step, sets: int, whole: bool) -> None:
    """Graph time; with `whole`, or where that cannot be had, launch by launch and the host's time too."""
    try:
        entry["graph"] = asdict(time_graph(step, sets))
    except RuntimeError as error:  # work that synchronizes cannot be captured; the launch-by-launch time stands
        entry["graph_failed"] = str(error).splitlines()[0][:300]
        torch.cuda.synchronize()
    if whole or "graph" not in entry:
        entry["time"] = asdict(time_on_device(step, sets))
        entry["host_s"] = host_seconds(step, entry["time"]["median"])


def measure_copy(device: torch.device, seconds: float = 2.0) -> dict:
    """The ceiling: bytes read plus bytes written per second of a large copy, far past every cache."""
    nbytes = 8 * 2**30 if device.type == "cuda" else 2**29
    timing = copy_timing(nbytes, device, seconds)
    return {"bytes": nbytes, "time": asdict(timing), "bytes_per_second": nbytes / timing.median}
