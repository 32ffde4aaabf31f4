"""The package stands on torch alone, its floors on the floors below, and no module of it is named `kernels`."""

import ast
import email
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pgdpo_fast as pf

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pgdpo_fast"
FLOORS = {
    "cli": 6,
    "bench": 6,
    "training": 5,
    "analysis": 5,
    "curation": 5,
    "models": 4,
    "data": 4,
    "reference": 4,
    "loss": 3,
    "backends": 2,
    "kernels": 1,
    "_csrc": 1,
    "objectives": 0,
    "named": 0,
    "diffusion": 0,
    "storage": 0,
    "preemption": 0,
    "filling": 0,
    "options": 0,
    "metrics": 0,
    "families": 0,
    "devices": 0,
    "errors": 0,
    "printable": 0,
}
OPTIONAL = (
    "accelerate",
    "av",
    "diffusers",
    "flash_attn",
    "ftfy",
    "jinja2",
    "matplotlib",
    "ninja",
    "numpy",
    "peft",
    "pyarrow",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "transformers",
    "triton",
    "tyro",
    "xformers",
    "yaml",
)


def python(code, *, cwd=None, **environment):
    """Standard output of `code` in a process of its own, without the interpreter or a compiler."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**inherited, "PGDPO_FAST_NATIVE": "0", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_the_loss_needs_torch_alone():
    """Without triton, numpy, a compiler or any trainer dependency: every public name, every objective, both ways."""
    out = python(
        BLOCK
        + """
import warnings; warnings.simplefilter("ignore")     # torch says that numpy is missing
import torch, pgdpo_fast as pf
for name in pf.__all__:
    getattr(pf, name)
torch.manual_seed(0)
p, y, q = torch.randn(3, 4, 2, 3, 4, 4)
p.requires_grad_()
for name in pf.objectives.NAMES:
    for granularity in ("sample", "frame", "element"):
        out = pf.preference_loss(p, y, q, objective=pf.objectives.from_name(name), granularity=granularity,
                                 posterior_scale=torch.ones(2))
        out.loss.backward()
pf.diffusion.FlowMatching().timestep(pf.diffusion.draw_uniform(0, ["a"], [0]))
try:
    pf.preference_loss(p, y, q, objective=pf.DPO(), backend="triton")
except pf.errors.BackendUnavailable as error:
    print(error)
"""
    )
    assert "triton cannot be imported" in out and "pip install" in out


def test_importing_the_package_is_cheap():
    """Less than 0.3 s of processor time on top of torch, with nothing heavy loaded."""
    out = python(f"""
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import pgdpo_fast as pf
pf.preference_loss, pf.PGDPO
print(time.process_time() - start, *(set(sys.modules) - before) & set({OPTIONAL!r}))
""").split()
    assert float(out[0]) < 0.3 and out[1:] == []


@pytest.mark.parametrize("module", ["objectives", "diffusion", "errors"])
def test_modules_users_name_are_reachable_from_a_fresh_start(module):
    assert python(f"import pgdpo_fast as pf; print(pf.{module}.__name__)") == f"pgdpo_fast.{module}"


def test_public_names_are_listed_and_unknown_ones_refused():
    assert set(pf.__all__) <= set(dir(pf)) and {"PGDPO", "preference_loss", "PackedReference"} <= set(pf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'PGDP0'"):
        pf.PGDP0  # noqa: B018


def test_type_checkers_and_editors_see_every_public_name_where_it_is_defined():
    block = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.keys() == set(pf.__all__) and (PACKAGE / "py.typed").exists()
    for name, module in seen.items():
        assert getattr(pf, name) is getattr(importlib.import_module(module), name), name


# The floors.


def sources():
    return [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return (("pgdpo_fast",) if parts[0] == "kernels" else ()) + parts


def imported(path):
    """(line, absolute dotted name) of everything a file imports, at any depth of the file."""
    name = dotted(path)
    package = name[:-1]  # an __init__ is a file of its package too
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def room(parts):
    return parts[1] if len(parts) > 1 else None


def test_every_room_has_a_floor():
    rooms = {room(dotted(path)) for path in sources()} - {"__init__"}
    assert rooms <= set(FLOORS), f"no floor for {rooms - set(FLOORS)}"
    assert {"loss", "backends", "kernels", "objectives"} <= rooms


def test_rooms_import_only_from_their_own_and_lower_floors():
    upward = []
    for path in sources():
        here = room(dotted(path))
        if here == "__init__":
            continue
        for line, name in imported(path):
            parts = name.split(".")
            if parts[0] == "pgdpo_fast" and room(parts) in FLOORS and FLOORS[room(parts)] > FLOORS[here]:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not upward, "\n".join(upward)


def test_the_lower_floors_import_nothing_but_torch_and_triton():
    """Floors 0 to 3 name no third-party module but torch, triton in the kernels and their launchers, and the format of
    the files in storage."""
    foreign = []
    for path in sources():
        here = room(dotted(path))
        if FLOORS.get(here, 0) > 3:
            continue
        allowed = {"torch", "pgdpo_fast", *sys.stdlib_module_names}
        allowed |= {"triton"} if here in ("kernels", "backends") else {"safetensors"} if here == "storage" else set()
        foreign += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imported(path)
            if name.split(".")[0] not in allowed
        ]
    assert not foreign, "\n".join(foreign)


# The name trap: a top-level `kernels` would shadow the package of that name which diffusers and transformers import.


def test_nothing_imports_a_top_level_kernels():
    everything = [
        *sources(),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "bench").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        ROOT / "setup.py",
    ]
    named = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in everything
        for line, name in imported(path)
        if name.split(".")[0] == "kernels"
    ]
    assert not named


def test_the_installed_package_brings_no_top_level_kernels(tmp_path):
    out = python(
        """
import importlib.util, pgdpo_fast, pgdpo_fast.kernels
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
print(pgdpo_fast.kernels.__name__)
""",
        cwd=tmp_path,
    ).splitlines()
    assert str(ROOT) not in out[0] and out[1] == "pgdpo_fast.kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built beside it so that no build folder is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pgdpo_fast", "kernels", "csrc", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            str(tree / "dist"),
            str(tree),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_a_wheel_holds_the_whole_package_and_nothing_beside_it(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (email.message_from_bytes(archive.read(n)) for n in names if n.endswith("/METADATA"))
        archive.extractall(tmp_path / "site")
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"pgdpo_fast"}
    modules = {"/".join(dotted(path)) + ".py" for path in sources()}
    assert modules <= names, modules - names
    csrc = ROOT / "csrc"
    others = {f"pgdpo_fast/_csrc/{p.relative_to(csrc)}" for p in csrc.rglob("*") if p.is_file()}
    others |= {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.html")}
    assert others <= names, others - names
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(required) == 1 and required[0].startswith("torch")
    code = "import pgdpo_fast.kernels; print(pgdpo_fast.__file__, pgdpo_fast.kernels.__file__)"
    site = tmp_path / "site"
    assert python(code, cwd=tmp_path, PYTHONPATH=str(site)).split() == [
        str(site / "pgdpo_fast" / "__init__.py"),
        str(site / "pgdpo_fast" / "kernels" / "__init__.py"),
    ]


def test_the_benchmark_runs_from_a_wheel(wheel, tmp_path):
    """`pgdpo-fast bench` outside any clone: its modules are there, its scripts and tests are not."""
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name).stem for name in archive.namelist() if name.startswith("pgdpo_fast/bench/")}
        archive.extractall(tmp_path / "site")
    assert held == {"__init__", "contenders", "harness", "report", "shapes", "table"}
    python(
        """
from pgdpo_fast.bench import contenders, harness, shapes, table
from pgdpo_fast.cli.bench import Bench
table.QUICK = (shapes.Case(shapes.SMALL_SHAPES[1], 1),)
eager = tuple(c for c in contenders.CONTENDERS if c.name == "eager")
table.measure = lambda case, device, **options: harness.measure(case, device, contenders=eager, **options)
Bench(quick=True, seconds=0.01, seed=1, device="cpu").run()
""",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert [path.name for path in (tmp_path / "bench-results").glob("*/quick.json")] == ["quick.json"]
