"""What the repository promises about itself: claimed Pythons are tested, tools are pinned, one `lint` is every lint."""

import dataclasses
import importlib
import inspect
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from pgdpo_fast import cli, errors
from pgdpo_fast.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
MATRIX = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
PRE_COMMIT = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [canonical(line.split("==")[0]) for line in lines if line and not line.startswith("#")]


def test_the_workflow_runs_the_ci_script_on_every_claimed_python_and_the_oldest_claimed_torch():
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert MATRIX["python"] == claimed
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + claimed[0].replace(".", "")
    (torch,) = [name for name in PROJECT["project"]["dependencies"] if name.startswith("torch")]
    assert [row["torch"] for row in MATRIX["include"]] == [torch.removeprefix("torch>=") + ".0"]
    assert ".ci/run" in [step.get("run") for step in WORKFLOW["jobs"]["test"]["steps"]]


def test_every_dependency_that_make_installs_is_pinned_once():
    found = pins()
    assert len(found) == len(set(found))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {
        canonical(re.match(r"[\w.-]+", requirement)[0])
        for requirement in [*PROJECT["project"]["dependencies"], *extras["train"], *extras["bench"], *extras["dev"]]
    }
    assert wanted - set(found) <= {"setuptools", "wheel"}  # what builds the package, not what runs it


def test_the_contributing_page_lists_every_command_of_the_makefile_and_the_pages_name_no_other():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    assert targets == set(re.findall(r"^([\w.-]+):.*##", makefile, re.M)) | {"clean"}
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^\| `make ([\w.-]+)` \|", contributing, re.M)) == targets - {"clean"}
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`make ([\w.-]+)", text) + re.findall(r"^make ([\w.-]+)", text, re.M)
        assert {name for name in named if not name.startswith(".venv")} <= targets, page


def test_the_readme_names_every_family_among_the_models_and_where_none_was_loaded():
    readme = (ROOT / "README.md").read_text()
    models = readme.partition("\nIt implements")[2].partition("\n## ")[0]
    (weights,) = [line for line in readme.splitlines() if line.startswith("| real weights")]
    for _, name in FAMILIES.values():
        assert name in models and name in weights, name


def test_the_readme_explains_every_exit_code():
    table = (ROOT / "README.md").read_text().partition("| exit code |")[2].partition("\n\n")[0]
    codes = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    assert sorted(map(int, re.findall(r"^\| (\d+) ", table, re.M))) == sorted({0, cli.INTERNAL} | codes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_commands_and_flags_that_exist(page):
    for command, rest in re.findall(r"pgdpo-fast +([a-z][a-z-]+)([^`#|;\n]*)", page.read_text().replace("\\\n", " ")):
        assert command in cli.COMMANDS, command
        module, name = cli.COMMANDS[command]
        module = importlib.import_module(f"pgdpo_fast.cli.{module}")
        known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(getattr(module, name))}
        known |= {alias.strip('"') for alias in re.findall(r'"-\w"', inspect.getsource(module))}
        assert set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)) <= known, rest


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_lint_and_the_commit_hooks_run_the_same_pinned_tools():
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", "lint", "VENV=.venv"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (local,) = PRE_COMMIT["repos"]
    assert local["repo"] == "local"  # works without a network
    hooks = [hook["entry"].split() for hook in local["hooks"]]
    for tool, *rest in hooks:
        assert f"{tool} {rest[0]}" in recipe if tool.endswith("ruff") else tool in recipe
        assert canonical(Path(tool).name) in pins()
    commands = [line for line in recipe.splitlines() if line.startswith(".venv/bin/") and "pip" not in line]
    assert len(commands) == len(hooks)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_lint_and_the_commit_hook_format_every_c_file():
    (hook,) = [hook for hook in PRE_COMMIT["repos"][0]["hooks"] if hook["id"] == "clang-format"]
    recipe = subprocess.run(
        ["make", "--dry-run", "lint", "VENV=.venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    sources = [p for end in ("h", "cuh", "cpp", "cu") for p in (ROOT / "csrc").rglob(f"*.{end}")]
    for path in [*sources, *(ROOT / "tests").glob("*.cpp")]:
        name = str(path.relative_to(ROOT))
        assert f" {name}" in recipe and re.search(hook["files"], name), name
