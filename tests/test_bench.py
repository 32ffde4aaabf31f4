"""The benchmarks tell the truth: bytes are counted from the algorithm, a wrong contender gets no figure, memory is
measured, and the one GPU command runs end to end on a CPU, survives what its sections do, and withholds what is red."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pgdpo_fast.bench import (
    contenders,
    correctness,
    experiments,
    gpu,
    harness,
    report,
    sections,
    shapes,
    table,
    traffic,
    tuning,
)

from pgdpo_fast import objectives
from pgdpo_fast.backends import launches
from pgdpo_fast.backends import triton as triton_backend
from pgdpo_fast.cli.bench import Bench
from pgdpo_fast.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = shapes.Case(shapes.SMALL_SHAPES[1], 2)
EAGER, RECIPE = (next(c for c in contenders.CONTENDERS if c.name == name) for name in ("eager", "diffusion-dpo"))
FAST = harness.Budget(0.01, (2, 3))


def grid():
    return [
        replace(SMALL, granularity=g, reference_form=r, target_form=t)
        for g in shapes.GRANULARITIES
        for r in shapes.REFERENCE_FORMS
        for t in shapes.TARGET_FORMS
    ]


def test_floor_bytes_are_those_of_the_tensors_a_call_takes():
    for case in filter(lambda case: case.possible, grid()):
        x = contenders.make_inputs(case, CPU, 0)

        def held(value):
            if isinstance(value, torch.Tensor):
                return value.numel() * value.element_size()
            return sum(held(t) for t in vars(value).values() if t is not None)

        scales = 2 * case.pairs * 4 if case.target_form == "built" else 0  # two scalars per pair, not counted
        assert case.input_bytes == held(x.prediction) + held(x.target) + held(x.reference) - scales, case.key
        assert case.floor_bytes == case.input_bytes + held(x.prediction)


def test_the_floor_is_the_table_of_the_algorithm():
    case = shapes.Case(shapes.SHAPES["wan2.1-480p"], 1, "element", "predictions")
    video = 2 * 16 * 21 * 60 * 104
    assert case.floor_bytes == 8 * video == case.two_pass_bytes
    assert replace(case, granularity="sample").two_pass_bytes == 12 * video
    assert replace(case, granularity="sample", reference_form="errors").floor_bytes == 6 * video + 8


@pytest.mark.parametrize("name", ["eager", "diffusion-dpo"])
def test_baselines_agree_with_float64_wherever_they_can_run(name):
    contender = next(c for c in contenders.CONTENDERS if c.name == name)
    ran = 0
    for case in filter(lambda case: case.possible, grid()):
        if contender.refuses(case, CPU) is None:
            x = contenders.make_inputs(case, CPU, 1)
            assert harness.check(case, x, contender, *contender.prepare(case)(x)).green, case.key
            ran += 1
    assert ran == {"eager": 33, "diffusion-dpo": 2}[name]


def test_selected_pairs_are_those_pairs():
    x = contenders.make_inputs(replace(SMALL, pairs=3, reference_form="fp8", target_form="built"), CPU, 2)
    one = contenders.select(x, [1])
    assert torch.equal(one.prediction, x.prediction[[1, 4]])
    assert torch.equal(one.target.clean, x.target.clean[[1, 4]]) and torch.equal(one.target.noise, x.target.noise[[1]])
    assert torch.equal(one.reference.rejected_scale, x.reference.rejected_scale[[1]])


class Wrong(contenders.Contender):
    """A contender whose gradient is off by `error`."""

    error = 0.01

    def refuses(self, case, device):
        return None

    def prepare(self, case):
        call = EAGER.prepare(case)

        def wrong(x):
            loss, gradient = call(x)
            return loss, gradient * (1 + self.error)

        return wrong


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_contender_that_is_wrong_gets_no_figure(error):
    wrong = Wrong("wrong", "")
    object.__setattr__(wrong, "error", error)
    record = harness.measure(SMALL, CPU, contenders=(EAGER, wrong), budget=FAST)
    assert record["contenders"]["eager"]["status"] == "ok" and record["contenders"]["eager"]["time"]["median"] > 0
    assert record["contenders"]["wrong"]["status"] == "red"
    assert not {"time", "graph", "peak_extra_bytes"} & set(record["contenders"]["wrong"])


def test_a_contender_that_raises_costs_the_others_nothing():
    class Broken(Wrong):
        def prepare(self, case):
            raise RuntimeError("no such kernel")

    record = harness.measure(SMALL, CPU, contenders=(Broken("broken", ""), EAGER), budget=FAST)
    assert record["contenders"]["broken"] == {"status": "failed", "reason": "RuntimeError: no such kernel"}
    assert record["contenders"]["eager"]["status"] == "ok"


def test_a_case_that_does_not_fit_is_skipped_with_its_size(monkeypatch):
    monkeypatch.setattr(harness, "free_memory", lambda device: 1000)
    assert "GiB are free" in harness.measure(SMALL, CPU, contenders=(EAGER,))["skipped"]


def test_every_objective_that_has_a_name_is_timed():
    from pgdpo_fast.bench.test_bench_loss import test_objectives

    timed = [mark.args[1] for mark in test_objectives.pytestmark if mark.args[0] == "name"]
    assert timed == [objectives.NAMES]


def test_peak_memory_is_what_was_allocated():
    def step(i):
        a = torch.empty(1_000_000)
        b = torch.empty(500_000)
        del a
        c = torch.empty(100_000)
        return b, c

    assert harness.peak_extra_bytes(step, CPU) == 6_000_000


def test_contenders_take_turns_call_by_call_in_a_changing_order_and_every_call_counts():
    order, sets = [], []
    steps = {name: lambda i, n=name: (order.append(n), sets.append(i)) for name in "abc"}
    timings = harness.time_in_turns(steps, 0.0, (20, 20))
    assert set(timings) == set("abc") and all(t.repeats == 20 and t.fastest <= t.median for t in timings.values())
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 21 and all(set(r) == set("abc") for r in rounds)  # one warm-up
    assert {r[0] for r in rounds} == {r[2] for r in rounds} == set("abc")
    assert sets == list(range(1, 64))  # whoever comes next gets inputs that nobody has just read


def test_triton_is_never_timed_on_a_cpu():
    triton = next(c for c in contenders.CONTENDERS if c.name == "triton")
    assert "never timed" in triton.refuses(SMALL, CPU)


@pytest.fixture(scope="module")
def result():
    cases = (SMALL, replace(SMALL, granularity="element"))
    return table.run(cases, CPU, seed=3, budget=FAST, contenders=(EAGER, RECIPE, Wrong("native", "")))


def test_reports_hold_the_same_figures_and_no_red_one(result, tmp_path, capsys):
    written = {path.name: path for path in report.write(result, tmp_path, "x")}
    assert set(written) == {"x.json", "x.md", "x-roofline.png", "x-speedup.png"}
    assert json.loads(written["x.json"].read_text()) == json.loads(json.dumps(result))
    page = written["x.md"].read_text()
    assert "native red" in page and "| native |" not in page
    report.show(result)
    shown = capsys.readouterr().out
    median = report.duration(report.best_time(result["cases"][0]["contenders"]["eager"]))
    assert median in page and median in shown and "native red on" in shown and "  native  " not in shown


def test_a_busy_machine_is_pointed_out(result):
    def at(load):
        environment = result["environment"] | {"load_average": [load, 0.0, 0.0], "threads": 2}
        return report.markdown(result | {"environment": environment})

    assert "machine was busy (load 7.0" in at(7.0) and "Warning" not in at(0.4)


def test_comparison_calls_noise_noise(result):
    slower = json.loads(json.dumps(result))
    for case in slower["cases"]:
        eager = case["contenders"]["eager"]["time"]
        eager |= {"median": eager["median"] * 100, "spread": 0.0}
        case["contenders"]["diffusion-dpo"]["time"]["spread"] = 10.0
    found = {(c["case"], c["contender"]): c["verdict"] for c in report.compare(result, slower)}
    assert found[SMALL.key, "eager"] == "slower" and found[SMALL.key, "diffusion-dpo"] == "within noise"
    assert {c["verdict"] for c in report.compare(result, result)} == {"within noise"}


def test_quick_has_every_case_the_cpu_is_held_to_and_the_report_says_whether_it_held(result, capsys):
    assert {(c.granularity, c.reference_form) for c in table.QUICK} >= {key[:2] for key in report.GOALS}
    assert len(report.goals(result)) == 0  # the fused contender of this result was wrong
    held = json.loads(json.dumps(result))
    held["cases"] = [asdict(case) | {"shape": "s", "key": case.key} for case in table.QUICK]
    entry = {"status": "ok", "peak_extra_bytes": 0, "gate": {"loss_error": 0.0}}
    times = {"eager": 8.0, "compile": 5.0, "native": 1.0}
    for case in held["cases"]:
        case |= {"floor_bytes": 1, "gradient_bytes": 0, "contenders": {}}
        for name, seconds in times.items():
            case["contenders"][name] = entry | {"time": {"median": seconds, "fastest": seconds, "spread": 0.0}}
    told = report.goals(held)
    assert len(told) == 3 and all("held" in line for line in told)
    held["cases"][2]["contenders"]["native"]["time"]["median"] = 1.01
    assert [("missed" in line) for line in report.goals(held)] == [False, False, True]
    report.show(held)
    assert "aimed at 8×: missed" in capsys.readouterr().out and "aimed at 8×: missed" in report.markdown(held)


def test_default_cases_cover_the_shapes_and_batches():
    cases = table.cases(reference_forms=shapes.REFERENCE_FORMS, granularities=shapes.GRANULARITIES)
    assert len(cases) == 5 * 3 * (4 + 4 + 3) and all(case.possible for case in cases)


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "QUICK", (SMALL,))
    monkeypatch.setattr(
        table,
        "measure",
        lambda case, device, **options: harness.measure(case, device, contenders=(EAGER, RECIPE), **options),
    )
    Bench(quick=True, seconds=0.01, seed=1, out=tmp_path).run()
    Bench(quick=True, seconds=0.01, seed=1, out=tmp_path, compare=tmp_path / "quick.json").run()
    assert "Against the previous results" in (tmp_path / "quick.md").read_text()
    assert "vs eager" in capsys.readouterr().out


def test_command_refuses_impossible_requests(tmp_path):
    with pytest.raises(ConfigError, match="no errors form"):
        Bench(granularity=("element",), reference_form=("errors",)).run()
    with pytest.raises(ConfigError, match="above 0"):
        Bench(batch=(0,)).run()
    with pytest.raises(DataError, match="absent.json"):
        Bench(quick=True, compare=tmp_path / "absent.json").run()


# -- the GPU command


def test_every_experiment_names_a_setting_that_exists_and_restores_it():
    for experiment in experiments.EXPERIMENTS:
        before = [getattr(*experiments._resolve(path)) for path in experiment.settings]
        with experiments.applied(experiment.settings):
            assert [getattr(*experiments._resolve(path)) for path in experiment.settings] == list(
                experiment.settings.values()
            )
        assert [getattr(*experiments._resolve(path)) for path in experiment.settings] == before
        assert experiment.expected_ratio > 0 and experiment.because and all(case.possible for case in experiment.cases)


def timing(median, spread=0.01):
    return {"status": "ok", "median": median, "spread": spread}


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ([(timing(1.0), timing(0.9)), (timing(1.0), timing(0.99))], "keep"),
        ([(timing(1.0), timing(0.98)), (timing(1.0), timing(1.01))], "no difference"),
        ([(timing(1.0), timing(0.5)), (timing(1.0), timing(1.1))], "no difference"),  # much faster, but not everywhere
        ([(timing(1.0), timing(1.2))], "drop"),
        ([(timing(1.0), {"status": "red"})], "red"),
    ],
)
def test_a_setting_is_kept_only_when_it_wins_clearly_and_everywhere(pairs, expected):
    assert tuning.verdict(pairs)[0] == expected


class MadeUp(tuning.Tuner):
    """A tuner whose timings are made up: `seconds(case, launch)`, and the stream's bits right or not."""

    def __init__(self, tables, seconds, same_bits=True, withheld=lambda *_: None):
        super().__init__(CPU, 0, tables, withheld)
        self.seconds, self.same_bits = seconds, same_bits

    def time(self, case, launch, like=None, settings=None):
        key = launches.Key(90, case.granularity, case.reference_form, case.dtype, case.shape.numel, case.pairs)
        if like is not None and not self.same_bits:
            return {"status": "red", "detail": "other bits than two passes"}
        return {"status": "ok", "median": self.seconds(case, launch), "spread": 0.01, "found": None, "key": key}


SMALLER, LARGER = (experiments.Size(shapes.SHAPES[name], "sample", "errors") for name in list(shapes.SHAPES)[1:3])
STREAM = experiments.STREAMS[:1]


def taken(path, size):
    """The launches that dispatch takes from a table for every batch of a size."""
    found = launches.read(path)
    keys = [launches.Key(90, c.granularity, c.reference_form, c.dtype, c.shape.numel, c.pairs) for c in size.cases()]
    return [(launches._best(found, key) or launches.Launch()) for key in keys]


def test_the_stream_is_taken_where_it_wins_clearly_and_two_passes_stay_where_they_do(tmp_path):
    path = tmp_path / "launches.json"

    def seconds(case, launch):
        gain = {1: 0.98, 4: 0.955, 16: 0.7}[case.pairs] if case.shape == SMALLER.shape else 1.0
        return gain if launch.form == "stream" else 1.0

    tuner = MadeUp([path], seconds)
    records = tuner.choose(SMALLER, STREAM)
    assert [r["verdict"] for r in records] == ["two-pass", "stream, block 1024", "stream, block 1024"]
    assert [launch.form for launch in taken(path, SMALLER)] == ["two-pass", "stream", "stream"]
    assert [launch.form for launch in taken(path, LARGER)] == ["two-pass", "stream", "stream"]  # as the next smaller
    tuner.choose(LARGER, STREAM)
    assert [launch.form for launch in taken(path, SMALLER)] == ["two-pass", "stream", "stream"]
    assert [launch.form for launch in taken(path, LARGER)] == ["two-pass"] * 3
    assert [(e.key.elements, e.key.pairs, e.ratio) for e in launches.read(path)] == [
        (SMALLER.shape.numel, 4, 0.955),
        (LARGER.shape.numel, 4, 1.0),
    ]
    assert {e.device for e in launches.read(path)} == {harness.device_name(CPU)}


def test_a_gain_within_the_spreads_is_none():
    old = timing(1.0, 0.05)
    assert not tuning.faster(old, timing(0.93, 0.01)) and tuning.faster(old, timing(0.91, 0.01))
    assert not tuning.faster(old, {"status": "red"}) and not tuning.faster(timing(1.0), timing(0.97, 0.001))


def test_a_stream_of_other_bits_or_withheld_is_not_taken(tmp_path):
    def seconds(case, launch):
        return 0.5 if launch.form == "stream" else 1.0

    path = tmp_path / "launches.json"
    records = MadeUp([path], seconds, same_bits=False).choose(SMALLER, STREAM)
    assert {r["candidates"]["stream"]["status"] for r in records} == {"red"} and launches.read(path) == ()
    red = [{"check": "stream_bits", "backend": "stream", "status": "red", "detail": "other bits in repeat 7"}]
    records = MadeUp([path], seconds, withheld=sections.withheld_by(red)).choose(SMALLER, STREAM)
    assert all("repeat 7" in r["stream"] and not r["candidates"] for r in records) and launches.read(path) == ()
    red = [{"check": "memcheck", "backend": "", "status": "red", "detail": "1 error"}]
    (record,) = MadeUp([tmp_path / "none.json"], seconds, withheld=sections.withheld_by(red)).choose(SMALLER, STREAM)
    assert record["verdict"] == "withheld" and not (tmp_path / "none.json").exists()


def test_one_block_serves_all_batches_of_a_size_and_has_to_win_with_few_pairs_and_many(tmp_path):
    def seconds(case, launch):
        block = {2048: 0.9, 512: 0.8 if case.pairs == 16 else 1.2}.get(launch.block, 1.0)
        return block * (0.7 if launch.form == "stream" and case.pairs == 16 else 1.0)

    path = tmp_path / "launches.json"
    tuner = MadeUp([path], seconds)
    best, records = tuner.block(SMALLER, experiments.BLOCKS)
    assert best.block == 2048 and {r["verdict"] for r in records} >= {"keep", "no difference"}
    tuner.choose(SMALLER, STREAM, best)
    assert [(x.form, x.block) for x in taken(path, SMALLER)] == [
        ("two-pass", 2048),
        ("two-pass", 2048),
        ("stream", 2048),
    ]
    assert [round(e.ratio, 3) for e in launches.read(path)] == [0.9, 0.63]


def test_a_table_keeps_what_other_devices_measured_and_loses_what_is_measured_again(tmp_path):
    path = tmp_path / "launches.json"
    other = launches.Entry(
        launches.Key(100, "sample", "errors", "bfloat16", 1, 1), launches.Launch(form="stream"), "B200", 0.8
    )
    stale = other._replace(key=other.key._replace(architecture=90), device="an older driver")
    launches.write([other, stale], path)
    MadeUp([path, tmp_path / "copy.json"], lambda case, launch: 1.0).choose(SMALLER, STREAM)
    assert launches.read(path) == (other,) and (tmp_path / "copy.json").read_text() == path.read_text()


def test_sizes_of_the_table_begin_with_one_pair():
    """The block, on which bits depend, is looked up with one pair."""
    assert all(size.batches[0] == 1 and all(case.possible for case in size.cases()) for size in experiments.SIZES)
    assert len(set(experiments.SIZES)) == len(experiments.SIZES)
    names = [candidate.name for candidate in (*experiments.STREAMS, *experiments.BLOCKS)]
    assert len(set(names)) == len(names)


def test_a_given_launch_is_the_one_a_call_takes(monkeypatch):
    pytest.importorskip("triton")
    if not correctness.usable_backends(CPU)[0].count("triton"):
        pytest.skip("needs Triton's interpreter")
    launched = []
    run = triton_backend.partial_sums
    monkeypatch.setattr(
        triton_backend, "partial_sums", lambda x, p, launch: launched.append(launch) or run(x, p, launch)
    )
    x = contenders.make_inputs(replace(SMALL, dtype="float32"), CPU, 0)
    for asked in (launches.Launch(512, 2), launches.Launch(form="stream")):
        with experiments.given(asked) as keys:
            correctness.loss_and_gradient(x, "triton")
        (key,) = keys
        assert key == launches.Key(0, "sample", "prediction", "float32", SMALL.shape.numel, 2)
    assert launched == [launches.Launch(512, 2)]  # the stream has no pass of errors


NCU = """==PROF== Connected to process 4242
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","at::native::vectorized(int)","dram__bytes_read.sum","byte","999"
"1","1","spin_kernel(long)","dram__bytes_read.sum","byte","5"
"1","1","spin_kernel(long)","dram__bytes_write.sum","byte","5"
"2","1","pair_errors_kernel","dram__bytes_read.sum","byte","16,773,120"
"2","1","pair_errors_kernel","dram__bytes_write.sum","byte","0"
"3","1","pair_gradient_kernel","dram__bytes_read.sum","byte","1,000"
"3","1","pair_gradient_kernel","dram__bytes_write.sum","byte","8,386,560"
"4","1","spin_kernel(long)","dram__bytes_read.sum","byte","5"
"4","1","spin_kernel(long)","dram__bytes_write.sum","byte","5"
"5","1","stream_kernel","dram__bytes_read.sum","byte","7"
"""


def test_counted_bytes_are_those_of_the_kernels_between_two_marks():
    assert traffic.read(NCU) == [
        (16_774_120, 8_386_560, ["pair_errors_kernel", "pair_gradient_kernel"]),
        (7, 0, ["stream_kernel"]),
    ]
    assert traffic.read("==ERROR== no permission\n") == []


def test_why_no_bytes_were_counted_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic.shutil, "which", lambda name: None)
    assert traffic.run(["true"], tmp_path / "log", 5.0) == ([], "ncu is not installed")
    profiler = tmp_path / "ncu"
    profiler.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    profiler.chmod(0o755)
    monkeypatch.setattr(traffic.shutil, "which", lambda name: str(profiler))
    assert traffic.run(["true"], tmp_path / "log", 5.0) == ([], "==ERROR== ERR_NVGPUCTRPERM")
    profiler.write_text(f"#!/bin/sh\ncat <<'TABLE'\n{NCU}TABLE\n")
    calls, reason = traffic.run(["true"], tmp_path / "log", 5.0)
    assert calls == [] and "no kernel was seen" in reason  # the table belongs into the log file
    assert len({(case, form) for case, form in traffic.CALLS}) == len(traffic.CALLS)


def test_wheels_of_missing_packages_are_installed_behind_all_others(tmp_path, monkeypatch):
    """Without an index and without what they ask for; a package that is there already stays the one imported."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(RuntimeError, match="expected wheels in it"):
        sections.install_wheels(wheels, tmp_path / "site")
    for name, needs in (("carried_for_step", "Requires-Dist: no_such_package\n"), ("torch", "")):
        with zipfile.ZipFile(wheels / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "HERE = True\n")
            info = f"{name}-9.9.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n{needs}")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    sections.install_wheels(wheels, tmp_path / "site")
    found = importlib.util.find_spec("carried_for_step"), importlib.util.find_spec("torch")
    assert Path(found[0].origin).is_relative_to(tmp_path) and not Path(found[1].origin).is_relative_to(tmp_path)


def test_parity_covers_the_whole_grid_at_an_odd_and_at_a_true_size():
    forms = {
        (g, r, t, d)
        for g in shapes.GRANULARITIES
        for r in shapes.REFERENCE_FORMS
        for t in shapes.TARGET_FORMS
        for d in shapes.BYTES
        if (g, r) != ("element", "errors")
    }
    cases = correctness.parity_cases(dry_run=False)
    for name in ("small-odd", "wan2.1-480p"):
        found = [c for c in cases if c.shape.name == name]
        assert {(c.granularity, c.reference_form, c.target_form, c.dtype) for c in found} == forms
    assert {c.shape.name for c in cases} >= set(shapes.SHAPES)


def test_parity_compares_every_objective_that_has_a_name():
    met = {
        type(correctness.objective_of(case, index))
        for index, case in enumerate(correctness.parity_cases(dry_run=False))
        if case.shape.name == "small-odd"
    }
    assert met >= {listed.make for listed in objectives.LISTED.values()}


@pytest.mark.parametrize("objective", correctness.OBJECTIVES, ids=repr)
def test_the_bounds_of_the_parity_check_are_met_by_every_objective(objective, monkeypatch):
    monkeypatch.setattr(correctness, "OBJECTIVES", (objective,))
    for index, granularity in enumerate(shapes.GRANULARITIES):
        case = shapes.Case(shapes.SMALL_SHAPES[1], 2, granularity, dtype=("float32", "bfloat16", "float16")[index])
        found = correctness.parity(case, "native", CPU, index, seed=7)
        assert found["status"] == "ok", found


def test_the_speed_table_has_every_shape_and_batch_and_compile_at_one_and_sixteen_pairs():
    cases = sections.speed_cases(False)
    timed = {(case.shape.name, case.pairs, case.granularity) for case, _ in cases}
    compiled = {(case.shape.name, case.pairs, case.granularity) for case, with_compile in cases if with_compile}
    wanted = {(s, b, g) for s in shapes.SHAPES for b in (1, 4, 16) for g in ("sample", "element")}
    assert timed >= wanted and compiled >= {(s, b, g) for s, b, g in wanted if b != 4}
    assert 4 not in {b for _, b, _ in compiled}


def test_a_withheld_figure_is_in_the_record_and_in_no_table(tmp_path):
    ours = Wrong("native", "")
    object.__setattr__(ours, "error", 0.0)
    result = table.run((SMALL,), CPU, seed=3, budget=FAST, contenders=(EAGER,))
    record = harness.measure(
        SMALL, CPU, contenders=(EAGER, ours), budget=FAST, withheld=lambda c, _: "streams is red" if c is ours else None
    )
    assert record["contenders"]["native"]["time"]["median"] > 0
    result |= {"cases": [record]}
    page, seconds = report.markdown(result), report.best_time(record["contenders"]["native"])
    assert "| native |" not in page and "| eager |" in page
    assert f"native withheld: streams is red; it took {report.duration(seconds)}" in page
    assert "streams is red" in report.headline(result) and "vs eager (" not in report.headline(result)


class Finding(list):
    """Stands in for a section's Run."""

    retried, red, dry_run, device, seed = [], [], True, CPU, 0

    def add(self, **record):
        self.append(record)

    def left(self):
        return 1.0

    def stop_on_dead_device(self):
        pass


def test_out_of_memory_beside_others_is_retried_alone_and_only_there_red(monkeypatch):
    def check():
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(correctness, "checks", lambda *_: [("streams", "triton", check), ("draws", "", lambda: "fine")])
    monkeypatch.setattr(correctness, "usable_backends", lambda _: ([], {}))
    first = Finding()
    sections.properties(first)
    found = [r for r in first if r["kind"] == "check"]
    assert [(r["check"], r["status"]) for r in found] == [("streams", "retried alone"), ("draws", "ok")]
    again = Finding()
    again.retried = found[:1]
    sections.alone(again)
    assert [(r["check"], r["status"]) for r in again if r["kind"] == "check"] == [("streams", "red")]


def test_red_forms_and_red_backends_are_withheld():
    native, triton = (contenders.Contender(name, "", fused=True) for name in ("native", "triton"))
    parity = {
        "check": "parity",
        "backend": "native",
        "granularity": "sample",
        "reference_form": "predictions",
        "status": "red",
        "detail": "loss 1",
    }
    reason = sections.withheld_by([parity])
    assert "parity is red" in reason(native, SMALL)
    assert reason(native, replace(SMALL, granularity="frame")) is None and reason(triton, SMALL) is None
    reason = sections.withheld_by([{"check": "streams", "backend": "native", "status": "red", "detail": "ran ahead"}])
    assert reason(native, replace(SMALL, granularity="frame")) and reason(triton, SMALL) is None
    assert reason(contenders.STREAM, SMALL) is None
    reason = sections.withheld_by([parity | {"backend": "triton"}])
    assert reason(triton, SMALL) and reason(contenders.STREAM, SMALL)  # one code, two forms
    everyone = sections.withheld_by([{"check": "memcheck", "backend": "", "status": "red", "detail": "1 error"}])
    assert everyone(native, SMALL) and everyone(triton, SMALL) and everyone(EAGER, SMALL) is None


def fake_sections(tmp_path, monkeypatch, bodies):
    """Run the parent over scripts that stand in for sections; returns (result, what was saved after each wave)."""
    sections_ = tuple(gpu.Section(name, 4, wave) for wave, name in enumerate(bodies))

    def start(section, shard, folder, seconds, options, red):
        records, log = folder / f"{section.name}.jsonl", folder / f"{section.name}.log"
        script = "import json, os, sys, time\nout = open(sys.argv[1], 'a', buffering=1)\n" + bodies[section.name]
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(records)],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return process, records, log

    monkeypatch.setattr(gpu, "SECTIONS", sections_)
    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    saved = []
    options = SimpleNamespace(seconds=17.0, seed=1, only=[], part=None, dry_run=False, require=["triton", "native"])
    return gpu.run_waves(options, tmp_path, lambda result: saved.append(json.dumps(result))), saved


ENVIRONMENT = "out.write(json.dumps({'kind': 'environment', 'device': 'x'}) + '\\n')"


def test_a_section_that_crashes_or_hangs_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    begin = "out.write(json.dumps({'kind': 'begin', 'check': 'streams', 'backend': 'native'}) + '\\n')\n"
    result, saved = fake_sections(
        tmp_path,
        monkeypatch,
        {
            "environment": ENVIRONMENT,
            "crash": begin + "print('illegal address'); os.abort()",
            "cut": "out.write(json.dumps({'kind': 'case', 'key': 'a'}) + '\\n{\"kind\": \"ca'); sys.exit(0)",
            "hang": begin + "time.sleep(60)",
        },
    )
    assert len(saved) == 4
    crash = result["sections"]["crash"]["ended"]
    assert crash.startswith("exit code -6") and "illegal address" in crash
    assert result["sections"]["cut"]["ended"] == "ok" and result["cases"] == [{"key": "a"}]
    assert result["sections"]["hang"]["ended"].startswith("time limit")
    assert [(c["check"], c["status"]) for c in result["checks"]] == [("streams", "red"), ("streams", "skipped")]


def test_a_required_backend_that_is_missing_is_red(tmp_path, monkeypatch):
    facts = "{'kind': 'environment', 'device': 'x', 'missing': {'native': 'no nvcc found'}}"
    result, _ = fake_sections(
        tmp_path, monkeypatch, {"environment": f"out.write(json.dumps({facts}) + '\\n')", "parity": ""}
    )
    assert result["checks"] == [
        {"check": "required", "backend": "native", "status": "red", "detail": "required, but no nvcc found"}
    ]


def test_nothing_a_section_started_is_alive_when_the_next_begins(tmp_path, monkeypatch):
    child = "import subprocess\nprint(subprocess.Popen(['sleep', '300']).pid, file=open('CHILD', 'w'))"
    look = """
        pid = open("CHILD").read().strip()
        try:
            state = open(f"/proc/{pid}/stat").read().split()[2]
        except FileNotFoundError:
            state = "gone"
        out.write(json.dumps({"kind": "case", "state": state}) + "\\n")
    """
    monkeypatch.chdir(tmp_path)
    bodies = {"environment": ENVIRONMENT, "sanitizer": child, "speed": textwrap.dedent(look)}
    monkeypatch.setattr(gpu, "computing", lambda: [])
    result, _ = fake_sections(tmp_path, monkeypatch, bodies)
    assert [case["state"] in ("gone", "Z") for case in result["cases"]] == [True], result["cases"]


def test_what_a_killed_command_found_is_kept(tmp_path):
    scratch, file = tmp_path / "scratch", tmp_path / "out" / "gpu.jsonl"
    scratch.mkdir()
    (scratch / "parity-0.jsonl").write_text('{"kind": "check"}\n')
    gpu.keep_records(scratch, file, every=0.01)
    (scratch / "speed-0.jsonl").write_text('{"kind": "case"}\n')
    until = time.monotonic() + 10
    while time.monotonic() < until and not (file.exists() and "case" in file.read_text()):
        time.sleep(0.01)
    assert file.read_text().split() == ['{"kind":', '"check"}', '{"kind":', '"case"}']
    shutil.rmtree(scratch)


def test_the_parts_name_sections_that_exist_and_leave_none_out():
    names = {section.name for section in gpu.SECTIONS}
    limits = {"smoke": 240, "full": 580, "tuning": 420, "confirm": 150}
    assert {name for _, limited in gpu.PARTS.values() for name in limited} == names
    assert set(gpu.PARTS) == set(limits)
    for part, (seconds, limited) in gpu.PARTS.items():
        assert seconds <= limits[part] and "environment" in limited


def test_speed_beside_another_computing_process_is_red(monkeypatch):
    monkeypatch.setattr(gpu, "computing", lambda: ["4242, python"])
    found = gpu.alone_on_device(patience=0.0)
    assert found["status"] == "red" and "4242" in found["detail"]
    assert sections.withheld_by([found])(contenders.TRITON, SMALL)


def test_without_a_device_nothing_else_is_started(tmp_path, monkeypatch):
    result, saved = fake_sections(tmp_path, monkeypatch, {"environment": "sys.exit('no CUDA device')", "speed": ""})
    assert list(result["sections"]) == ["environment"] and len(saved) == 1
    assert "no CUDA device" in result["sections"]["environment"]["ended"]


@pytest.mark.slow
def test_dry_run_goes_through_every_section(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OUT": str(tmp_path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list(tmp_path.iterdir())) <= 8 and "==== parity" in (tmp_path / "dry-run.log").read_text()
    assert "case | backend | time" in done.stdout[-12000:]
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert {name: entry["ended"] for name, entry in result["sections"].items()} == {s.name: "ok" for s in gpu.SECTIONS}
    checks = {(c["check"], c["backend"]): c["status"] for c in result["checks"]}
    names = [function.__name__ for function in correctness.PROPERTIES]
    backends = result["environment"]["backends"]
    assert "triton" in backends and set(checks) >= {(name, b) for name in [*names, "parity"] for b in backends}
    assert set(checks.values()) <= {"ok", "skipped"}
    assert result["cases"] and result["cache"] and not result["left_out"]
    steps = {(s["reference"], s["backend"]): s["status"] for s in result["step"]}
    assert steps == {(r, b): "ok" for r in sections.REFERENCES for b in ("auto", "eager")}
    assert {e["verdict"] for e in result["experiments"]} <= {"keep", "drop", "no difference"}
    assert checks["stream_bits", "stream"] == "ok"
    assert [set(entry["candidates"]) for entry in result["launches"]][:2] == [{"stream"}, {"stream"}]
    launches.read(tmp_path / "launches.json")
    assert [t["status"] for t in result["traffic"]] == ["skipped"]
    assert result["environment"]["flag_looks"][0] < 0  # the interpreter runs one program at a time: it gave up
    assert "DRY RUN" in (tmp_path / "dry-run.md").read_text() and (tmp_path / "dry-run-roofline.png").stat().st_size


@pytest.mark.slow
def test_the_gpu_command_needs_no_package_of_the_trainer(tmp_path):
    """Where diffusers, tyro, rich and the rest are missing, the step is skipped by name and the loss still runs."""
    for name in ("diffusers", "peft", "transformers", "tyro", "rich", "av", "pyarrow", "yaml", "safetensors"):
        package = tmp_path / "absent" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "speed", "cache", "step"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "absent")},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "dry-run.json").read_text())
    assert {entry["ended"] for entry in result["sections"].values()} == {"ok"}
    assert [(s["status"], "diffusers" in s["detail"]) for s in result["step"]] == [("skipped", True)]
    assert result["cache"] and all(case["contenders"]["eager"]["status"] == "ok" for case in result["cases"])


def test_the_command_leaves_the_clone_off_the_path(tmp_path):
    """`kernels/` and `bench/` next to pgdpo_fast must not shadow packages of those names."""
    script = (
        f"import sys; sys.argv = ['gpu.py']; sys.path.insert(0, {str(ROOT / 'bench')!r}); "
        f"import runpy; names = runpy.run_path({str(ROOT / 'bench' / 'gpu.py')!r}, run_name='x'); "
        "names['load_all'](); "
        "import pgdpo_fast.kernels, bench, importlib.util as u; "
        "print(u.find_spec('kernels'), u.find_spec('harness'), pgdpo_fast.kernels.__file__)"
    )
    out = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    kernels, harness_, where = out.stdout.split()
    assert where == str(ROOT / "kernels" / "__init__.py") and harness_ == "None"
    assert kernels == "None" or str(ROOT) not in kernels
