"""The native CPU kernels beyond what every fused backend is tested for: dtypes mixed freely, real chunk sizes, threads,
extreme values, the vector functions, sanitizers, and how the library is built, cached, found and refused."""

import itertools
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import pgdpo_fast as pf
from pgdpo_fast import backends, objectives
from pgdpo_fast.backends import build, native
from pgdpo_fast.backends.operands import Operands, Reduction, ReferenceForm
from pgdpo_fast.cli import doctor
from pgdpo_fast.errors import NonFiniteError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GRANULARITIES = ("sample", "frame", "element")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OBJECTIVES = {
    "dpo": pf.DPO(100.0),
    "dpo-smoothed": pf.DPO(100.0, 0.2),
    "robust-dpo": pf.RobustDPO(100.0, 0.2),
    "ipo": pf.IPO(20.0),
    "slic": pf.SLiC(weight=0.3),
    "hinge": pf.SLiC(100.0, 0.5, 0.3, hinge=True),
    "sft": pf.SFT(),
    "dpop": pf.DPOP(100.0),
    "shift": pf.DPOShift(100.0),
    "sdpo": pf.SDPO(100.0, clip=0.5),
    "clip-mask": pf.DPOClipMask(100.0, threshold=0.8),
    "sdpo-inside": pf.SDPO(100.0, clip=0.5, placement="inside"),
    "rpo": pf.RPO(100.0, 0.3),
    "safeguarded": pf.Safeguarded(pf.DPO(100.0), scope="pair"),
    "safeguarded-batch": pf.Safeguarded(pf.DPO(100.0), mu=0.6),
    "sum": 0.5 * pf.SFT() + pf.PGDPO(ipr="anchor") + 0.7 * pf.DPO(100.0) + 2.0 * pf.IPO(20.0),
    "pgdpo": pf.PGDPO(),
    "pgdpo-k": pf.PGDPO(k1=2.0, k2=0.5),
    "attached": pf.PGDPO(detach_weights=False),
    "anchor": pf.PGDPO(ipr="anchor"),
    "outer": pf.PGDPO(combine="outer"),
    "symmetric": pf.PGDPO(ratio="symmetric"),
    "abs": pf.PGDPO(ratio="abs", eps=0.5),
    "listing": pf.PGDPO(ratio="signed", ipr="anchor", ipr_scale="one", detach_weights=False, combine="outer", eps=5.0),
}
needs_native = pytest.mark.skipif(native.unavailable(CPU) is not None, reason=str(native.unavailable(CPU)))


def pair(shape, seed=0, pairs=2, dtypes=(torch.float32,) * 3, spread=0.1):
    """Stacked prediction, target, reference; the prediction `spread` from the reference."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(2 * pairs, *shape, generator=generator, dtype=torch.float64)

    y = draw()
    q = y + 0.5 * draw()
    p = q + spread * draw()
    return tuple(t.to(dtype) for t, dtype in zip((p, y, q), dtypes, strict=True))


def run(tensors, objective, granularity, backend="native", posterior_scale=0.1, **options):
    p, y, q = tensors
    p = p.detach().requires_grad_()
    scale = torch.full((len(p) // 2,), posterior_scale) if objective.needs_posterior_scale else None
    out = pf.preference_loss(
        p, y, q, objective=objective, granularity=granularity, backend=backend, posterior_scale=scale, **options
    )
    return out, torch.autograd.grad(out.loss, p)[0]


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()


def assert_parity(tensors, objective, granularity, loosen=1.0, **options):
    out, gradient = run(tensors, objective, granularity, **options)
    exact, exact_gradient = run([t.double() for t in tensors], objective, granularity, "eager", **options)
    dtype = tensors[0].dtype
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6 * loosen
    assert gradient.dtype == dtype
    assert distance(out.loss, exact.loss) <= tolerance
    assert distance(gradient, exact_gradient) <= max(tolerance, rounding)


def test_every_objective_that_has_a_name_is_compared_here():
    assert {type(objective) for objective in OBJECTIVES.values()} >= {o.make for o in objectives.LISTED.values()}


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_videos_of_several_real_chunks_equal_eager(name, granularity):
    """2 * 5 * 30 * 35 elements: three segments of 4096, the last odd, blocks of 128 and a masked vector at the end."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert_parity(pair((2, 5, 30, 35), dtypes=(dtype,) * 3), OBJECTIVES[name], granularity)
    assert_parity(pair((2, 5, 30, 35)), OBJECTIVES[name], granularity, beta_scale=torch.tensor([0.5, 1.75]))


@needs_native
@pytest.mark.parametrize("shape", [(4, 16, 128, 136), (4, 17, 127, 131)], ids=["aligned", "odd"])
@pytest.mark.parametrize("granularity", ["sample", "frame"])
def test_gradients_of_large_videos_are_written_past_the_caches(granularity, shape):
    """From 4 MiB on, where rows and chunks start at a whole vector: half of the odd ones do not."""
    for dtype in DTYPES:
        assert_parity(
            pair(shape, dtypes=(dtype,) * 3, pairs=1),
            pf.PGDPO(ipr="anchor"),
            granularity,
            pair_weight=torch.full((1,), 4096.0),
        )  # keeps float16 gradients normal numbers


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dtypes_mix_freely(granularity):
    for number, dtypes in enumerate(itertools.product(DTYPES, repeat=3)):
        shape = (2, 3, 3, 5 + number % 7)
        assert_parity(pair(shape, number, dtypes=dtypes), OBJECTIVES["anchor"], granularity)


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, granularity):
    """Sliced, transposed, expanded and channels-last operands give the bits of contiguous ones."""
    p, y, q = pair((4, 3, 6, 5), dtypes=(dtype,) * 3)
    layouts = {
        "rows apart": lambda t: torch.stack([t, t + 1], 1)[:, 0],
        "transposed": lambda t: t.transpose(2, 4).contiguous().transpose(2, 4),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
        "sliced": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    }
    out, gradient = run((p, y, q), pf.PGDPO(), granularity)
    for change in layouts.values():
        again, again_gradient = run((change(p), change(y), change(q)), pf.PGDPO(), granularity)
        assert torch.equal(out.loss, again.loss) and torch.equal(gradient, again_gradient)
    shared = y[:1].expand(2, *y.shape[1:])
    expanded, _ = run((p, shared, q), pf.PGDPO(), granularity)
    copied, _ = run((p, shared.contiguous(), q), pf.PGDPO(), granularity)
    assert torch.equal(expanded.loss, copied.loss)


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weights", ["pair_weight", "posterior_scale", "beta_scale"])
def test_numbers_of_any_strides(weights, granularity):
    tensors, spaced = pair((2, 2, 5, 5), pairs=3), torch.rand(6)[::2]
    results = []
    for values in (spaced, spaced.clone()):
        p = tensors[0].clone().requires_grad_()
        options = {"posterior_scale": torch.ones(3), weights: values}
        out = pf.preference_loss(
            p, *tensors[1:], objective=pf.SDPO(5.0), granularity=granularity, backend="native", **options
        )
        results.append((out.loss, torch.autograd.grad(out.loss, p)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


EXTREME = [
    pf.DPO(1e4),
    pf.IPO(1e4),
    pf.SLiC(1e4, hinge=True),
    pf.DPOP(1e4, 100.0),
    pf.DPOShift(1e4),
    pf.SDPO(1e4),
    pf.SDPO(1e4, placement="inside"),
    *(
        pf.PGDPO(1e4, 100.0, 100.0, ratio=ratio, detach_weights=detach, ipr=ipr, combine=combine)
        for ratio in ("logit", "symmetric", "abs", "signed")
        for detach in (True, False)
        for ipr in ("reward", "anchor", "none")
        for combine in ("pointwise", "outer")
    ),
    pf.RPO(1e4),
    *(pf.Safeguarded(base, scope="pair") for base in (pf.DPO(1e4), pf.PGDPO(1e4, 100.0, 100.0))),
]


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_overflows(granularity):
    """Policy equal to the reference, gaps from 1e-8 to 1e2, beta 1e4, K 100: all finite, in float32 and float64."""
    for dtype, gap in itertools.product((torch.float32, torch.float64), (0.0, 1e-8, 1e-4, 1.0, 1e2)):
        _, y, q = pair((1, 2, 3, 7), dtypes=(dtype,) * 3)
        away = torch.linspace(-1, 1, q.numel(), dtype=dtype).view_as(q)
        p = y + (q - y + gap * away) if gap else q
        for objective in EXTREME:
            out, gradient = run((p, y, q), objective, granularity)
            assert torch.isfinite(gradient).all(), (objective, gap)
            assert torch.isfinite(out.loss) and torch.isfinite(out.logits).all(), (objective, gap)


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pair_leaves_the_others_alone(granularity, value):
    tensors = pair((2, 3, 9, 11), pairs=4)
    clean, clean_gradient = run(tensors, pf.PGDPO(), granularity)
    for which in range(3):
        broken = [t.clone() for t in tensors]
        broken[which][2, 1, 1, 4, 5] = value
        out, gradient = run(broken, pf.PGDPO(), granularity)
        assert not torch.isfinite(out.loss)
        others = [0, 1, 3]
        for name in ("per_pair_loss", "logits", "alpha", "gamma", "chosen_gap", "policy_chosen_error"):
            assert torch.equal(getattr(out, name)[others], getattr(clean, name)[others]), name
        rows = others + [4 + i for i in others]
        assert torch.equal(gradient[rows], clean_gradient[rows])
        with pytest.raises(NonFiniteError, match=r"pair\(s\) 2 of 4"):
            out.check_finite()


@needs_native
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_threads_nor_neighbours(granularity, dtype):
    tensors = pair((4, 5, 40, 64), pairs=3, dtypes=(dtype,) * 3)
    objective = pf.PGDPO()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7, 7):
            torch.set_num_threads(threads)
            results.append(run(tensors, objective, granularity))
    finally:
        torch.set_num_threads(before)
    for out, gradient in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss) and torch.equal(gradient, results[0][1])
    alone, alone_gradient = run([t[[1, 4]] for t in tensors], objective, granularity)
    assert torch.equal(alone.per_pair_loss, results[0][0].per_pair_loss[1:2])
    assert distance(alone_gradient, 3 * results[0][1][[1, 4]]) < (1e-6 if dtype == torch.float32 else 2.0**-8)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_compute_the_same(capability):
    """The library a lesser processor would build, checked in a process that believes it is one."""
    code = """if True:
        import torch
        from pgdpo_fast.backends import build, native
        assert native.unavailable(torch.device("cpu")) is None, native.unavailable(torch.device("cpu"))
        print(native.status().instruction_set)
        import test_native as tests
        for granularity in tests.GRANULARITIES:
            for objective in tests.OBJECTIVES.values():
                for dtype in tests.DTYPES[:3] if objective == tests.pf.PGDPO() else tests.DTYPES[2:]:
                    tests.assert_parity(tests.pair((2, 3, 25, 31), dtypes=(dtype,) * 3), objective, granularity)
    """
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    if build.host_instruction_set() != "generic":
        assert done.stdout.split() == [{"default": "generic"}.get(capability, capability)]


def _driver(tmp_path, *flags):
    """Output of tests/native_driver.cpp built for this machine, as {name: number}."""
    name = build.host_instruction_set()
    program, root = tmp_path / "driver", build.sources()
    call = [
        *build.compiler(),
        "-std=c++17",
        "-w",
        "-ffp-contract=fast",
        *flags,
        *build.INSTRUCTION_SETS[name],
        f"-DPGDPO_ISA={name}",
        f"-I{root}",
        str(ROOT / "tests" / "native_driver.cpp"),
        *(str(root / source) for source in build.CPU_PASSES),
        "-o",
        str(program),
    ]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        return done.stderr, None
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return done.stderr, {key: float(value) for key, value in map(str.split, done.stdout.splitlines())}


@needs_native
def test_sanitizers(tmp_path):
    """Every pass on buffers that end where their data ends, under AddressSanitizer and UndefinedBehaviorSanitizer; and
    the vector functions against long double."""
    errors, numbers = _driver(
        tmp_path,
        "-O0",
        "-g1",
        "-DPGDPO_QUICK_BUILD",
        "-DPGDPO_BEYOND_CACHE=1000",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    )
    if numbers is None:
        if "asan" in errors or "ubsan" in errors or "sanitize" in errors:
            pytest.skip(f"the compiler lacks the sanitizers' runtime: {errors.splitlines()[0]}")
        pytest.fail(errors)
    assert errors == ""
    ulps = {name: value for name, value in numbers.items() if name.startswith(("exp", "log1p"))}
    assert len(ulps) == 10 and max(ulps.values()) <= 2.0, ulps
    assert numbers["conversions"] == 0 and numbers["not_finite"] == 0 and numbers["calls"] > 700


@needs_native
def test_the_library_needs_nothing_of_torch_but_its_stable_symbols():
    """So one build runs on every torch from 2.11 on."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    found = subprocess.run(["nm", "-D", "-u", native.status().library], capture_output=True, text=True).stdout.split()
    assert "torch_parallel_for" in found
    mangled = [name for name in found if name.startswith("_Z")]
    assert not [name for name in mangled if any(part in name for part in ("2at", "3c10", "5torch"))]


# Building. A script stands in for the compiler, so nothing here waits for one.

COMPILER = """#!/bin/sh
echo "$@" >> {log}
{before}
for last; do :; done
echo "built by call $(wc -l < {log})" > "$last"
"""


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """make(before="") installs a compiler that logs its calls and writes its output; returns the path of the log."""
    monkeypatch.setenv("PGDPO_FAST_CACHE", str(tmp_path / "cache"))

    def make(before=""):
        log, script = tmp_path / "calls.log", tmp_path / "fake-c++"
        script.write_text(COMPILER.format(log=log, before=before))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def _links(log):
    return sum("-shared" in line for line in log.read_text().splitlines())


def test_a_build_is_kept_and_a_damaged_one_made_again(fake_compiler):
    log = fake_compiler()
    path = build.cpu_library().get()
    assert build.cpu_library().get() == path and _links(log) == 1
    path.write_bytes(path.read_bytes()[:5])
    again = build.cpu_library().get()
    assert again != path and not path.exists() and _links(log) == 2
    assert [p.suffix for p in path.parent.iterdir() if p.suffix not in ("", ".so")] == []


def test_a_changed_flag_or_compiler_is_a_new_build(fake_compiler, monkeypatch):
    log = fake_compiler()
    paths = {build.cpu_library().get()}
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    paths.add(build.cpu_library().get())
    monkeypatch.setattr(build, "host_instruction_set", lambda: "generic")
    paths.add(build.cpu_library().get())
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -pipe")
    paths.add(build.cpu_library().get())
    assert len({p.parent for p in paths}) == 4 == _links(log)


def test_a_failed_build_keeps_its_first_error_and_is_not_repeated(fake_compiler):
    log = fake_compiler('echo "x.cpp:1: error: no such thing" >&2; exit 1')
    for _ in range(2):
        with pytest.raises(build.BuildError, match="no such thing"):
            build.cpu_library().get()
        calls = log.read_text()
    assert log.read_text() == calls
    log = fake_compiler("true  # repaired")
    build.cpu_library().get()
    assert _links(log) == 1


@pytest.mark.parametrize(
    "before",
    [
        'echo "x.cpp:1: error: no space left on device" >&2; exit 1',
        'echo "c++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1',
        "kill -9 $$",
    ],
)
def test_a_failure_that_may_pass_is_not_remembered(fake_compiler, before):
    fake_compiler(before)
    with pytest.raises(build.BuildError) as caught:
        build.cpu_library().get()
    assert "remembered" not in str(caught.value)
    compiler = os.environ["CXX"]
    stamp = os.stat(compiler).st_mtime_ns
    script = open(compiler).read().replace(before, "true".ljust(len(before)))
    with open(compiler, "w") as file:  # the same compiler by size and time, now with room
        file.write(script)
    os.utime(compiler, ns=(stamp, stamp))
    assert build.cpu_library().get().exists()


def test_a_failure_for_good_is_remembered_for_a_day_and_the_first_message_tells_the_way_out(fake_compiler):
    log = fake_compiler('echo "x.cpp:1: error: no such thing" >&2; exit 1')
    with pytest.raises(
        build.BuildError, match=r"no such thing.*remembered for a day; to try again at once, delete "
    ) as e:
        build.cpu_library().get()
    failure = Path(str(e.value).rpartition("delete ")[2].rstrip(")"))
    calls = log.read_text()
    with pytest.raises(build.BuildError, match="no such thing.*delete "):
        build.cpu_library().get()
    assert log.read_text() == calls
    os.utime(failure, (time.time() - 90_000,) * 2)
    with pytest.raises(build.BuildError, match="no such thing"):
        build.cpu_library().get()
    assert log.read_text() != calls


def test_a_library_that_somebody_else_could_have_put_there_is_not_loaded(fake_compiler, tmp_path):
    fake_compiler()
    path = build.cpu_library().get()
    folders = [folder for folder in path.parents if folder.is_relative_to(tmp_path / "cache")]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for found in (path, *folders):
        mode = found.stat().st_mode
        found.chmod(0o777)
        with pytest.raises(build.BuildError, match=f"can be changed by other users.*chmod go-w {found},"):
            build.cpu_library().get()
        found.chmod(mode)
    assert build.cpu_library().get() == path
    if os.geteuid() == 0:
        for found in (path, folders[0]):
            os.chown(found, 65534, -1)
            with pytest.raises(build.BuildError, match="owner 65534"):
                build.cpu_library().get()
            os.chown(found, 0, -1)


def test_processes_build_once_between_them(fake_compiler):
    log = fake_compiler("sleep 0.2")
    code = "from pgdpo_fast.backends import build; print(build.cpu_library().get())"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    outputs, told = zip(*(process.communicate() for process in processes), strict=True)
    assert len(set(outputs)) == 1 and _links(log) == 1
    assert "".join(told).count("building the native CPU kernels") == 1  # on stderr, by the one that builds


def test_a_build_says_beforehand_how_long_it_takes_on_these_cores(fake_compiler, monkeypatch, caplog):
    fake_compiler()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(build, "_cores", lambda: 2)
    library = build.cpu_library()
    assert library.is_to_be_built() and library.seconds <= 10
    path = library.get()
    before, after = (record.getMessage() for record in caplog.records)
    assert before.startswith("building the native CPU kernels for ")
    assert f"about {library.seconds:.0f} s on 2 cores" in before and after.startswith("built in ")
    caplog.clear()
    assert not library.is_to_be_built() and library.get() == path and not caplog.records
    monkeypatch.setattr(build, "_cores", lambda: 1)
    alone = build.cpu_library().seconds
    assert sum(build.SECONDS[name] for name in build.cpu_library().sources) < alone < 2.5 * library.seconds
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))  # three others want the core
    assert build.cpu_library().seconds == pytest.approx(4 * alone)


def test_every_source_has_its_seconds():
    compiled = {str(p.relative_to(build.sources())) for p in build.sources().rglob("*.c*") if p.suffix != ".cuh"}
    assert set(build.SECONDS) == {*compiled, "link"}
    assert compiled == {build.CPU_OPERATORS, *build.CPU_PASSES, *build.CUDA_KERNELS, *build.CUDA_HOST}


def test_doctor_looks_without_building_and_builds_ahead_when_asked(fake_compiler, monkeypatch):
    log = fake_compiler()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)  # a script has written it

    def rows(**options):
        monkeypatch.setattr(native, "_library", native._Library())  # as in a process of its own
        monkeypatch.setattr(backends, "_native_loaded", set())
        return {row.area: row for row in doctor.checks(**options)}

    found = rows()
    for area in ("native library cpu", "loss backend native", "reference cache"):
        assert found[area].state == "optional" and found[area].fix == "pgdpo-fast doctor --build"
        assert "not built yet, its first use takes about " in found[area].found
    assert "once it is built" in found["loss backend auto"].found and not log.exists()

    found = rows(build=True)
    assert found["native library cpu"].found.startswith("built in ") and _links(log) == 1
    assert found["loss backend native"] == ("loss backend native", "ok", "runs on cpu", "")
    assert found["loss backend auto"].found == "picks native on cpu"
    for options in ({}, {"build": True}):
        assert rows(**options)["native library cpu"].found.startswith("is there: ") and _links(log) == 1


def test_doctor_shows_why_a_build_failed(fake_compiler, monkeypatch):
    fake_compiler('echo "x.cpp:1: error: no such thing" >&2; exit 1')
    for build_ahead in (True, False):  # the second time from the record of the first
        monkeypatch.setattr(native, "_library", native._Library())
        monkeypatch.setattr(backends, "_native_loaded", set())
        row = next(row for row in doctor.checks(build_ahead) if row.area == "native library cpu")
        assert row.state == "optional" and "no such thing" in row.found


@needs_native
@pytest.mark.slow
def test_a_first_build_is_ten_seconds_on_two_cores(tmp_path, monkeypatch):
    """Torch's headers alone are three to four of the fifteen seconds of processor time, on a machine whose seconds are
    those of `build.SECONDS`; the whole is held to six times them, which holds on any."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        build.compile_library(tmp_path / "library.so", (build.host_instruction_set(),))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    whole = seconds()
    monkeypatch.setattr(build, "CPU_PASSES", ())
    headers = seconds()
    print(f"{whole:.1f} s of processor time, {headers:.1f} s of them for torch's headers")
    assert whole < 6 * headers


def test_no_compiler_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.compiler()
    monkeypatch.setenv("CXX", "nothing-like-it")
    with pytest.raises(build.BuildError, match="CXX=nothing-like-it"):
        build.compiler()


def test_an_unwritable_cache_is_a_reason(fake_compiler, monkeypatch, tmp_path):
    fake_compiler()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PGDPO_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set PGDPO_FAST_CACHE to a writable one"):
        build.cpu_library().get()


USE = """if True:
    import warnings, torch, pgdpo_fast as pf
    from pgdpo_fast.errors import BackendUnavailable
    p = torch.randn(2, 8, requires_grad=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            pf.preference_loss(p, p.detach(), p.detach(), objective=pf.DPO()).loss.backward()
    print(*[w.message for w in seen if "plain torch" in str(w.message)], sep="\\n")
    try:
        pf.preference_loss(p, p.detach(), p.detach(), objective=pf.DPO(), backend="native")
    except BackendUnavailable as error:
        print("refused:", error)
"""


def _use(environment):
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_without_a_build_auto_warns_once_and_an_explicit_choice_is_refused(fake_compiler):
    fake_compiler('echo "x.cpp:1: error: no such thing" >&2; exit 1')
    warning, refusal, _ = _use({})
    assert "no such thing" in warning and "PGDPO_FAST_NATIVE=0" in warning
    assert refusal.startswith("refused: backend='native' cannot run on cpu") and "no such thing" in refusal


def test_switched_off_it_is_silent_and_still_refuses(fake_compiler):
    fake_compiler("exit 1")
    silent, refusal, _ = _use({"PGDPO_FAST_NATIVE": "0"})
    assert silent == "" and "PGDPO_FAST_NATIVE=0" in refusal


@needs_native
def test_auto_is_native_on_the_cpu_and_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("auto", CPU) == "native"
    status = native.status()
    assert status.reason is None and Path(status.library).exists()
    assert status.instruction_set == build.host_instruction_set()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_statistic_has_the_same_bits_whatever_else_is_asked_for(dtype):
    """So errors kept without a reference and those of a call with one have gaps of exactly zero."""
    p, y, q = pair((3, 5, 30, 31), dtypes=(dtype,) * 3)
    alone = pf.paired_errors(p, y, backend="native")
    with_gaps = pf.paired_errors(p, y, q, backend="native")
    with_all = pf.paired_errors(p, y, q, anchor=True, cross=True, backend="native")
    for name in ("policy_chosen", "policy_rejected"):
        assert torch.equal(getattr(alone, name), getattr(with_gaps, name))
        assert torch.equal(getattr(alone, name), getattr(with_all, name))
    for name in ("gap_chosen", "gap_rejected"):
        assert distance(getattr(with_all, name), getattr(with_gaps, name)) <= 1e-6


@needs_native
def test_operators_check_what_they_are_given():
    """Called past `preference_loss`, they refuse what they would read or write wrongly."""
    x = torch.zeros(2, 8)
    arguments = {
        **dict.fromkeys(Operands._fields),
        **dict(policy=x, policy_rejected=x, target=x, target_rejected=x),
        **Reduction(ReferenceForm.NONE, groups=1, length=8, anchor=False, cross=False)._asdict(),
    }
    errors = torch.ops.pgdpo_fast_native.pair_errors
    assert torch.equal(errors(**arguments), torch.zeros(len(pf.GroupErrors._fields), 2, 1))
    for changed in (
        dict(policy=torch.zeros(3, 8)),
        dict(policy_rejected=torch.zeros(2, 7)),
        dict(target=torch.zeros(8, 2)),
        dict(target_rejected=torch.zeros(2, 8).int()),
        dict(reference_form=ReferenceForm.PREDICTION),
        dict(groups=3),
        dict(length=0),
    ):
        with pytest.raises(RuntimeError):
            errors(**{**arguments, **changed})
    with pytest.raises(RuntimeError, match="policy: expected pairs"):
        errors(**{**arguments, "policy": torch.zeros(3, 8), "policy_rejected": None})


def test_a_wheel_with_the_library_fits_its_platform_and_any_python(fake_compiler, tmp_path):
    log = fake_compiler()
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".*_cache"))
    call = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(copy),
        "--no-build-isolation",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path / "wheels"),
    ]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"PGDPO_FAST_BUILD_NATIVE": "1"})
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pgdpo_fast/_native.so" in names and "pgdpo_fast/_csrc/cpu/native.cpp" in names
    compiled = log.read_text()
    assert all(f"PGDPO_ISA={name}" in compiled for name in build.all_instruction_sets())


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_packed_natively_have_the_bytes_of_the_plain_ones(dtype, format):
    reference, target = (torch.randn(4, 3, 5, 7, 9).to(dtype) for _ in range(2))
    plain, native_rows = (pf.PackedReference.pack(reference, target, format, backend=b) for b in ("eager", "native"))
    for name, value in vars(plain).items():
        assert value is None or torch.equal(value, getattr(native_rows, name)), name
