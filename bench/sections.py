"""The parts of the GPU command, each run in a process of its own: a crash or a hang in one costs the others nothing.

A section writes one JSON record a finding, at once, so that whatever ended it, what it found is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import pgdpo_fast as pf
from pgdpo_fast.backends import native
from pgdpo_fast.backends.launches import Launch

from . import correctness, harness
from .contenders import CONTENDERS, OBJECTIVE, STREAM, TRITON, Contender, forced, make_inputs
from .experiments import BLOCKS, EXPERIMENTS, SIZES, STREAMS, Candidate, Experiment, Size, applied, given
from .shapes import BATCHES, SHAPES, SMALL_SHAPES, Case
from .tuning import DEFAULT, Tuner


class Run:
    """What a section knows: device, deadline, seed, which share of the work is its own, and where findings go: records
    of all sections, the table of launches, and where wheels of missing packages lie."""

    def __init__(
        self,
        records: Path,
        seconds: float,
        seed: int,
        shard: tuple[int, int],
        checks: list[dict],
        dry_run: bool,
        tables: Sequence[Path] = (),
        wheels: Path | None = None,
    ):
        self.records, self.seed, self.shard, self.dry_run = records, seed, shard, dry_run
        self.tables, self.wheels = tuple(tables), wheels
        self.red = [check for check in checks if check["status"] == "red"]
        self.retried = [check for check in checks if check["status"] == "retried alone"]
        self.deadline = time.monotonic() + seconds
        if not dry_run and not torch.cuda.is_available():
            raise SystemExit("no CUDA device: torch.cuda.is_available() is False; try --dry-run")
        self.device = torch.device("cpu" if dry_run else "cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def stop_on_dead_device(self) -> None:
        """After an illegal access every later call fails too: end the process rather than blame the rest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def add(self, **record) -> None:
        with self.records.open("a") as file:
            file.write(json.dumps(record) + "\n")


def describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def environment(run: Run) -> None:
    facts = harness.environment(run.device)
    if not run.dry_run:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw",
            "--format=csv,noheader",
        ]
        if shutil.which(query[0]):
            facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    run.add(kind="environment", **facts)
    run.add(kind="copy", **harness.measure_copy(run.device, 0.1 if run.dry_run else 2.0))
    begin = time.monotonic()
    names, reasons = correctness.usable_backends(run.device)  # builds the native kernels where that is still to do
    missing = dict(reasons)
    if run.device.type == "cuda":  # what C++ has there are the kernels of the reference cache
        missing.pop("native", None)
        if reason := native.rows_unavailable(run.device):
            missing["native"] = reason
    run.add(
        kind="environment",
        backends=names,
        backends_unavailable=reasons,
        missing=missing,
        build_seconds=time.monotonic() - begin,
    )


def facts(run: Run) -> None:
    """What a prediction needs besides the copy: the rate inside the last-level cache, the cost of one more kernel."""
    nbytes = harness.last_level_cache(run.device) // 4
    inside = harness.copy_timing(nbytes, run.device, 0.1 if run.dry_run else 1.0)
    run.add(kind="environment", cache_copy_bytes_per_second=nbytes / inside.median)
    if run.device.type == "cuda":
        x = torch.zeros(1, device=run.device)
        long, short = (harness.time_graph(lambda _, n=n: [x.add_(1) for _ in range(n)], 1).median for n in (110, 10))
        run.add(kind="environment", kernel_in_graph_s=(long - short) / 100)
    if correctness.usable_backends(run.device)[0].count("triton"):
        from . import latency

        if run.device.type == "cuda":
            seconds, looks = latency.flag_latency(run.device)
            run.add(kind="environment", flag_latency_s=seconds, flag_looks=looks)
        else:  # the interpreter runs one program after the other, so each waits in vain
            run.add(kind="environment", flag_looks=latency.play(1, run.device, polls=2).tolist())


def traffic_calls(run: Run) -> None:
    """What `traffic` counts the bytes of."""
    from . import traffic

    traffic.make_calls(run.device, run.seed, lambda case, form: run.add(kind="ran", case=case.key, form=form))


def traffic(run: Run) -> None:
    """Bytes each form moves to and from memory, against the floor's."""
    from . import traffic

    if run.dry_run:
        run.add(kind="traffic", status="skipped", detail="dry run")
        return
    kept, log = run.records.with_suffix(".calls"), run.records.with_suffix(".csv")
    calls, reason = traffic.run(_inner("traffic_calls", kept, run.seed), log, max(run.left(), 1))
    if not calls:
        run.add(kind="traffic", status="skipped", detail=reason)
    for (case, form), (read, written, kernels) in zip(traffic.CALLS, calls, strict=False):
        moved = read + written
        record = {"case": case.key, "form": form, "read": read, "written": written, "kernels": kernels}
        run.add(kind="traffic", status="ok", **record, floor=case.floor_bytes, ratio=moved / case.floor_bytes)


# -- correctness


def parity(run: Run) -> None:
    index, shards = run.shard
    names, reasons = correctness.usable_backends(run.device)
    for name, reason in reasons.items():
        if index == 0:
            run.add(kind="check", check="parity", backend=name, status="skipped", detail=reason)
    work = [(i, case, name) for i, case in enumerate(correctness.parity_cases(run.dry_run)) for name in names]
    for place, (i, case, name) in enumerate(work):
        if place % shards != index:
            continue
        if run.left() < 0:
            run.add(kind="left_out", check="parity", count=len(range(place, len(work), shards)), of=len(work))
            return
        record = {
            "check": "parity",
            "backend": name,
            "key": case.key,
            "granularity": case.granularity,
            "reference_form": case.reference_form,
        }
        _checked(run, record, lambda i=i, case=case, name=name: _parity(run, i, case, name))


def _parity(run: Run, index: int, case: Case, backend: str) -> dict:
    return correctness.parity(case, backend, run.device, index, run.seed)


def _checked(run: Run, record: dict, check: Callable[[], dict | str], last: bool = False) -> None:
    """Run one check and record how it ended. Beside other processes the memory of the card may not do: such a check is
    "retried alone" by the section of that name, and red only if it fails there."""
    run.add(kind="begin", **record)
    begin = time.monotonic()
    try:
        found = check()
        record |= found if isinstance(found, dict) else {"status": "ok", "detail": found}
    except correctness.Skip as reason:
        record |= {"status": "skipped", "detail": str(reason)}
    except torch.OutOfMemoryError as error:
        record |= {"status": "red" if last else "retried alone", "detail": describe(error)}
        torch.cuda.empty_cache()
    except Exception as error:  # a broken form is a finding; the others are still to be compared
        record |= {"status": "red", "detail": describe(error)}
    run.add(kind="check", **record, seconds=time.monotonic() - begin)
    run.stop_on_dead_device()


def properties(run: Run) -> None:
    for name, backend, check in correctness.checks(run.device, run.dry_run):
        if name in ALONE:
            continue
        record = {"check": name, "backend": backend}
        if run.left() < 0:
            run.add(kind="check", **record, status="skipped", detail="no time left in this section")
        else:
            _checked(run, record, check)


ALONE = ("offsets",)  # checks that need most of the card's memory


def alone(run: Run) -> None:
    """What needs the whole card, and what ran out of memory beside other processes."""
    again = [(check["check"], check["backend"], check.get("key")) for check in run.retried]
    work = [
        ({"check": name, "backend": backend}, check)
        for name, backend, check in correctness.checks(run.device, run.dry_run)
        if name in ALONE or (name, backend, None) in again
    ]
    names, _ = correctness.usable_backends(run.device)
    for i, case in enumerate(correctness.parity_cases(run.dry_run)):
        for name in names:
            if ("parity", name, case.key) in again:
                form = {"granularity": case.granularity, "reference_form": case.reference_form}
                record = {"check": "parity", "backend": name, "key": case.key, **form}
                work.append((record, lambda i=i, case=case, name=name: _parity(run, i, case, name)))
    for record, check in work:
        if run.left() < 0:
            run.add(kind="check", **record, status="skipped", detail="no time left in this section")
        else:
            _checked(run, record, check, last=True)


SUITES = ("test_fused.py", "test_loss.py", "test_diffusion.py", "test_draws.py")  # those that take a CUDA device


def suites(run: Run) -> None:
    """The tests that run on CUDA where there is one, over the very modules that are timed."""
    try:
        import pytest
    except ImportError:
        run.add(kind="check", check="tests", backend="triton", status="skipped", detail="needs pytest")
        return
    folder = Path(__file__).resolve().parent.parent / "tests"

    class Count:
        def __init__(self):
            self.passed, self.failed = 0, []

        def pytest_runtest_logreport(self, report):
            if report.failed:
                self.failed.append(report.nodeid.rpartition("/")[2])
            self.passed += report.when == "call" and report.passed

        def pytest_runtest_teardown(self, item):
            if run.left() < 0:
                item.session.shouldstop = "no time left"

    for name in SUITES:
        record = {"check": f"tests/{name}", "backend": "triton"}
        if run.left() < 0:
            run.add(kind="check", **record, status="skipped", detail="no time left in this section")
            continue
        count = Count()
        selected = ["-m", "gpu"] if run.dry_run else []

        def tests(name=name, count=count, selected=selected):
            ended = pytest.main(["-q", "-p", "no:cacheprovider", *selected, str(folder / name)], plugins=[count])
            broken = ended in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
            detail = f"{count.passed} passed, {len(count.failed)} failed {'; '.join(count.failed[:5])}".rstrip()
            return {"status": "red" if count.failed or broken else "ok", "detail": detail}

        _checked(run, record, tests)


def small_kernels(run: Run) -> None:
    """Every kernel once on small shapes: what compute-sanitizer watches."""
    names, _ = correctness.usable_backends(run.device)
    forms = [(name, nullcontext()) for name in names] + [("triton", forced("stream"))] * ("triton" in names)
    for backend, form in forms:
        with form:
            for granularity, reference in (
                ("sample", "errors"),
                ("sample", "predictions"),
                ("frame", "bf16"),
                ("element", "fp8"),
                ("element", "predictions"),
            ):
                x = make_inputs(Case(SMALL_SHAPES[1], 2, granularity, reference), run.device, run.seed)
                _, gradient = correctness.loss_and_gradient(x, backend, granularity)
                run.add(
                    kind="ran", backend=backend, case=f"{granularity}/{reference}", sum=float(gradient.float().sum())
                )
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def _inner(section: str, records: Path, seed: int) -> list[str]:
    """The command of a section that another tool watches."""
    script = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--section", section]
    return [*script, "--records", str(records), "--seconds", "600", "--seed", str(seed)]


def _sanitizer(run: Run, tool: str) -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    record = {"kind": "check", "check": tool, "backend": ""}
    if run.dry_run or found is None:
        run.add(**record, status="skipped", detail="dry run" if run.dry_run else "compute-sanitizer is not installed")
        return
    kept = run.records.with_suffix(f".{tool}")
    command = [
        found,
        "--tool",
        tool,
        "--report-api-errors",  # torch asks for what may fail, by design
        "no",
        "--error-exitcode",
        "9",
        *_inner("small_kernels", kept, run.seed),
    ]
    # Without torch's caching every tensor is its own allocation, so that one byte past it is out of bounds.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=max(run.left(), 1))
    except subprocess.TimeoutExpired:
        run.add(**record, status="skipped", detail="did not end within this section's time")
        return
    output = done.stdout + done.stderr
    verdict = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    ran = len(kept.read_text().splitlines()) if kept.exists() else 0
    detail = f"{verdict[-1] if verdict else 'no summary'}; {ran} calls"
    if done.returncode == 0 and verdict and ran:
        run.add(**record, status="ok", detail=detail)
    elif done.returncode == 9 or re.search(r"SUMMARY: [1-9]", " ".join(verdict)):
        run.add(**record, status="red", detail=detail, output=output[-4000:])
    else:
        run.add(**record, status="skipped", detail=f"exit code {done.returncode}: {detail}", output=output[-4000:])


def memcheck(run: Run) -> None:
    _sanitizer(run, "memcheck")


def racecheck(run: Run) -> None:
    _sanitizer(run, "racecheck")


# -- speed


def withheld_by(red: list[dict]) -> Callable[[Contender, Case], str | None]:
    """Why a fused contender's figure stays out of the headline: a red check of its backend, or of its very form."""

    def reason(contender: Contender, case: Case) -> str | None:
        for record in red if contender.fused else ():
            same_form = (
                record.get("granularity", case.granularity) == case.granularity
                and record.get("reference_form", case.reference_form) == case.reference_form
            )
            if (
                record["backend"] in ("", contender.name, contender.backend)
                and record["check"] not in ("draws", "cached_rows")
                and same_form
            ):
                return f"{record['check']} is red ({record['detail']})"
        return None

    return reason


def speed_cases(dry_run: bool) -> list[tuple[Case, bool]]:
    """(case, with torch.compile), most wanted first. Four pairs are timed for the fused backends alone."""
    if dry_run:
        return [(Case(SMALL_SHAPES[0], 1, "sample", "errors"), False), (Case(SMALL_SHAPES[0], 2, "element"), False)]
    main = [
        (Case(SHAPES[name], pairs, *form), pairs != 4)
        for pairs in (1, 16, 4)
        for name in SHAPES
        for form in (("sample", "errors"), ("element", "predictions"))
    ]
    wan = SHAPES["wan2.1-480p"]
    forms = [Case(wan, 4, g, r) for g in ("frame", "element", "sample") for r in ("errors", "bf16", "fp8")]
    forms += [Case(wan, 4, "sample", "predictions", t) for t in ("shared", "built")]
    whole = [Case(SHAPES[name], pairs, "sample", "predictions") for pairs in BATCHES for name in SHAPES]
    known = {case for case, _ in main}
    return main + [
        (case, case.shape is wan and case in whole and case.pairs != 4)
        for case in dict.fromkeys(forms + whole)
        if case.possible and case not in known
    ]


def speed(run: Run) -> None:
    withheld = withheld_by(run.red)
    work = speed_cases(run.dry_run)
    for place, (case, compiled) in enumerate(work):
        if run.left() < 0:
            run.add(kind="left_out", check="speed", count=len(work) - place, of=len(work))
            return
        contenders = [
            c
            for c in (*CONTENDERS, STREAM)
            if c.fused or ((compiled or c.name != "compile") and (case.pairs != 4 or run.dry_run))
        ]
        budget = harness.Budget(0.05, (2, 3)) if run.dry_run else harness.DEFAULT_BUDGET
        run.add(
            kind="case",
            **harness.measure(
                case,
                run.device,
                contenders=contenders,
                seed=run.seed + 1000 * place,
                budget=budget,
                withheld=withheld,
                count_launches=case.shape.name == "wan2.1-480p",
            ),
        )
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def warm(run: Run) -> None:
    """Compile what the timed sections will run, beside the correctness checks: they then find it in the disk caches."""
    names, _ = correctness.usable_backends(run.device)
    compiled = next(c for c in CONTENDERS if c.name == "compile")
    work = [(nullcontext, compiled, case) for case, with_compile in speed_cases(run.dry_run) if with_compile]
    if "triton" in names and not run.dry_run:
        timed = (*STREAMS[:1], *BLOCKS)
        work += [(lambda c=c: given(c.launch), TRITON, size.cases()[0]) for c in timed for size in SIZES]
        work += [(lambda e=e: _experiment(e), TRITON, case) for e in EXPERIMENTS for case in e.cases]
    index, shards = run.shard
    for context, contender, case in work[index::shards]:
        if run.left() < 0:
            return
        try:
            with context():
                contender.prepare(case)(make_inputs(case, run.device, run.seed))
        except Exception as error:  # the timed section will meet it again and record it
            print(f"{contender.name} on {case.key}: {describe(error)}", file=sys.stderr)
        run.stop_on_dead_device()


def _experiment(experiment: Experiment) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(given(experiment.launch))
    stack.enter_context(applied(experiment.settings))
    return stack


# -- tuning


def tuning(run: Run) -> None:
    """The table of launches, forms before blocks, and between them the experiments on settings of the code."""
    names, reasons = correctness.usable_backends(run.device)
    if "triton" not in names:
        run.add(kind="experiment", **SKIPPED, detail=reasons["triton"])
        return
    sizes, streams, blocks, trials = SIZES, STREAMS, BLOCKS, EXPERIMENTS
    if run.dry_run:  # a few of each on a tiny case, in float32: the interpreter truncates where bfloat16 rounds
        sizes, streams, blocks, trials = (TINY,), STREAMS[:1], BLOCKS[-1:], EXPERIMENTS[:1] + EXPERIMENTS[-1:]
        trials = tuple(replace(trial, cases=TINY.cases()[:1]) for trial in trials)
    tuner = Tuner(run.device, run.seed, run.tables, withheld_by(run.red))
    work: list[tuple[str, Callable[[], None]]] = [
        *(("sizes", lambda size=size: _launches(run, tuner, size, streams)) for size in sizes),
        *(
            ("experiments", lambda trial=trial: run.add(kind="experiment", **tuner.experiment(trial)))
            for trial in trials
        ),
        *(("blocks", lambda size=size: _blocks(run, tuner, size, blocks, streams)) for size in sizes),
    ]
    for place, (_, step) in enumerate(work):
        if run.left() < 0:
            for what, count in Counter(name for name, _ in work[place:]).items():
                of = sum(name == what for name, _ in work)
                run.add(kind="left_out", check=f"tuning, {what}", count=count, of=of)
            return
        step()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


SKIPPED = {"name": "all", "backend": "triton", "expected_ratio": 1.0, "verdict": "skipped"}
TINY = Size(SMALL_SHAPES[0], "sample", "errors", dtype="float32", batches=(1, 2))


def _launches(run: Run, tuner: Tuner, size: Size, streams: tuple[Candidate, ...], block: Launch = DEFAULT) -> None:
    for record in tuner.choose(size, streams, block):
        run.add(kind="launch", **record)


def _blocks(run: Run, tuner: Tuner, size: Size, blocks: tuple[Candidate, ...], streams: tuple[Candidate, ...]) -> None:
    best, records = tuner.block(size, blocks)
    for record in records:
        run.add(kind="experiment", **record)
    if best != DEFAULT:
        _launches(run, tuner, size, streams, best)


# -- the reference cache


def cache(run: Run) -> None:
    """Packing into pinned memory and gathering back, each against a pinned copy of the same bytes."""
    from pgdpo_fast.reference import rows

    on_gpu = run.device.type == "cuda"
    case = Case(SMALL_SHAPES[0] if run.dry_run else SHAPES["wan2.1-480p"], 2, "element", "predictions")
    count = 8 if run.dry_run else 64
    x = make_inputs(case, run.device, run.seed)

    def timed(work: Callable[[], object]) -> float:
        samples = []
        for turn in range(3 if run.dry_run else 12):
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            if turn >= (1 if run.dry_run else 3):
                samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    for form in ("bf16", "fp8"):
        if run.left() < 0:
            run.add(kind="left_out", check="cache", count=1, of=2)
            return
        packed = vars(pf.PackedReference.pack(x.reference, x.target, form))
        packed = {name: value for name, value in packed.items() if value is not None}
        host = {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=on_gpu) for k, v in packed.items()}
        table = {k: torch.empty((count, *v.shape[1:]), dtype=v.dtype, pin_memory=on_gpu) for k, v in packed.items()}
        for k, v in table.items():
            v.copy_(packed[k].cpu().repeat((count // case.pairs, *[1] * (v.ndim - 1))))
        numbers = [(7 * i) % count for i in range(case.pairs)]

        def copy_out(packed=packed, host=host):
            for name, value in packed.items():
                host[name].copy_(value, non_blocking=True)

        run.add(
            kind="cache",
            form=form,
            bytes=sum(v.numel() * v.element_size() for v in packed.values()),
            pairs=case.pairs,
            shape=case.shape.name,
            pack_s=timed(lambda form=form: rows.pack(x.reference, x.target, form)),
            copy_out_s=timed(copy_out),
            gather_s=timed(lambda table=table, numbers=numbers: rows.bring(table, numbers, run.device)),
            copy_in_s=timed(lambda host=host: [v.to(run.device, non_blocking=True) for v in host.values()]),
        )


# -- a training step

WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
    "patch_size": [1, 2, 2],
}
WAN_TINY = WAN_1_3B | {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}


def install_wheels(wheels: Path, target: Path) -> None:
    """Install the wheels of a folder, offline and without what they ask for, where imports look last: packages of the
    environment, torch above all, come first.

    Raises:
        RuntimeError: pip failed, or the folder has no wheel.
    """
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise RuntimeError(f"{wheels}: expected wheels in it, as `pip download --no-deps` leaves them")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*command, "--target", str(target), *found], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip install of the wheels in {wheels}: {done.stderr.strip()[-300:]}")
    sys.path.append(str(target))


REFERENCES = ("cached", "adapter-off", "copy")


def step(run: Run) -> None:
    """Forward, loss and backward of Wan2.1-1.3B with random weights, 480p, for every place the reference can come from:
    where the time and the memory go."""
    try:
        if run.wheels is not None:
            install_wheels(run.wheels, run.records.parent / "site")
        import diffusers
        import peft  # noqa: F401

        from pgdpo_fast.models import LoraConfig, ModelConfig, NoisedBatch, adapter_from_config, adapters_off
    except (ImportError, RuntimeError) as error:
        run.add(kind="step", status="skipped", detail=f"needs diffusers and peft: {error}")
        return
    on_gpu = run.device.type == "cuda"
    config = ModelConfig(
        architecture=WAN_TINY if run.dry_run else WAN_1_3B,
        train="lora",
        lora=LoraConfig(),
        gradient_checkpointing=True,
        text_tokens=8 if run.dry_run else None,
    )
    adapter = adapter_from_config(config)
    with torch.device(run.device):
        frozen = adapter.load(run.device)
        model = adapter.make_trainable(adapter.load(run.device))
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    height, width = (8, 8) if run.dry_run else (60, 104)
    text = {"text": torch.randn(2, adapter.text_tokens, config.architecture["text_dim"], device=run.device)}
    times = torch.full((2,), 500.0, device=run.device)
    work = [
        (frames, reference, backend)
        for frames in ((2,) if run.dry_run else (5, 21))
        for reference in REFERENCES
        for backend in ("auto", "eager")
    ]
    for frames, reference, backend in work:
        record = {
            "kind": "step",
            "model": "wan2.1-1.3b" if not run.dry_run else "tiny",
            "parameters": sum(p.numel() for p in model.parameters()),
            "diffusers": diffusers.__version__,
            "frames": frames,
            "reference": reference,
            "backend": backend,
            "train": "lora",
            "checkpointing": True,
        }
        if run.left() < 0:
            run.add(**record, status="skipped", detail=f"{frames} frames, {reference}, {backend}: no time left")
            continue
        generator = torch.Generator(run.device).manual_seed(run.seed)
        shape = (2, 16, frames, height, width)
        noised, target = (torch.randn(shape, device=run.device, generator=generator) for _ in range(2))
        batch = NoisedBatch(noised, times, text)
        frozen.to(run.device if reference == "copy" else "cpu")  # its memory counts where it is used alone

        @torch.no_grad()
        def reference_now(reference=reference, batch=batch, target=target, backend=backend):
            with adapters_off(model) if reference != "copy" else nullcontext():
                prediction = adapter.predict(frozen if reference == "copy" else model, batch)
            return pf.reference_errors(prediction, target, backend=backend)

        cached = reference_now() if reference == "cached" else None

        def one(cached=cached, reference_now=reference_now, batch=batch, target=target, backend=backend):
            given = cached or reference_now()
            prediction = adapter.predict(model, batch)
            loss = pf.preference_loss(prediction, target, given, objective=OBJECTIVE, backend=backend).loss
            torch.autograd.grad(loss, parameters)

        samples = []
        for turn in range(2 if run.dry_run else 4):
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            one()
            if on_gpu:
                torch.cuda.synchronize()
            if turn:
                samples.append(time.perf_counter() - begin)
            if run.left() < 0 and samples:
                break
        run.add(
            **record,
            status="ok",
            seconds=statistics.median(samples),
            samples=samples,
            peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        )


SECTIONS = {
    function.__name__: function
    for function in (
        environment,
        facts,
        parity,
        properties,
        suites,
        alone,
        memcheck,
        racecheck,
        warm,
        small_kernels,
        traffic,
        traffic_calls,
        speed,
        tuning,
        cache,
        step,
    )
}
