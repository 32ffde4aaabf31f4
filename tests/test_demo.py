"""`pgdpo-fast demo` goes the whole way, shows what it did, and can be interrupted."""

import base64
import json
import math
import os
import re
import shutil
import signal

import pytest

from pgdpo_fast.cli import demo_stages, main
from pgdpo_fast.data.video import read_video
from pgdpo_fast.errors import ConfigError, DataError, Preempted

METHODS = ("DPO", "PG-DPO")
FIGURES = ("chosen_reward", "rejected_reward", "margin", "accuracy", "step_seconds")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder of a finished demo, a much smaller one than the default."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--fast", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(demo):
    return (demo / "report.html").read_text()


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_the_summary_holds_every_figure_of_both_methods(demo):
    summary = json.loads((demo / "summary.json").read_text())
    assert tuple(summary["methods"]) == METHODS and summary["seed"] == 0
    for found in summary["methods"].values():
        assert all(math.isfinite(found[key]) for key in FIGURES)
        assert found["rewards_from"] == "held-out pairs" and found["steps"] == 10
        assert [step for step, _ in found["curves"]["chosen_reward"]] == [0, 2, 4, 6, 8, 10]
    assert 0 <= summary["methods"]["PG-DPO"]["gamma_positive_share"] <= 1
    assert summary["versions"]["torch"] and summary["settings"]["process.name"] == "flow-matching"
    assert all(math.isfinite(value) for value in leaves(summary) if isinstance(value, float))


def test_a_fast_demo_says_that_it_is_too_short_and_not_that_a_method_failed(demo, page):
    said = json.loads((demo / "summary.json").read_text())["headline"]
    assert said.endswith("is unknown: 10 steps from a model trained for 30 are too few to show anything.")
    assert "did not learn" not in page and page.count("unknown: 10 steps") >= 3


def test_both_methods_saw_the_same_draws_from_the_same_start(demo):
    rows = [[json.loads(line) for line in (demo / "runs" / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("dpo", "pgdpo")]  # fmt: skip
    for ours, theirs in zip(*rows, strict=True):
        for name in ("id", "draw", "timestep"):
            assert ours["pairs"][name] == theirs["pairs"][name]
    assert rows[0][0]["pairs"]["policy_chosen_error"] == rows[1][0]["pairs"]["policy_chosen_error"]
    assert rows[0][-1]["pairs"]["policy_chosen_error"] != rows[1][-1]["pairs"]["policy_chosen_error"]


def test_the_page_has_all_its_sections_and_needs_nothing_else(page):
    for section in ('id="clips"', 'id="figures"', 'id="settings"', *(f"<h3>{label}</h3>" for label in METHODS)):
        assert section in page
    for figure in ("chosen", "rejected", "margin", "accuracy", "alpha", "gamma", "advantage", "timestep-accuracy",
                   "timestep-chosen", "loss", "seconds"):  # fmt: skip
        assert f'id="figure-{figure}"' in page
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]+)"', page))
    assert "@media print" in page and "prefers-color-scheme: dark" in page


def test_the_numbers_in_the_page_are_those_of_the_summary(demo, page):
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["headline"] in page
    for found in summary["methods"].values():
        assert f"{100 * found['accuracy']:.0f}%" in page and f"{1000 * found['step_seconds']:,.0f} ms" in page


def test_every_model_and_the_data_play_side_by_side(page, tmp_path):
    labels = re.findall(r"<span>([^<]+)</span>\s*<video", page)
    assert labels == ["data: chosen", "data: rejected", "base model", *METHODS]
    for number, video in enumerate(re.findall(r"data:video/mp4;base64,([\w+/=]+)", page)):
        clip = tmp_path / f"{number}.mp4"
        clip.write_bytes(base64.b64decode(video))
        assert read_video(clip).shape == (5, 192, 192, 3)


def test_a_finished_demo_is_not_done_again(demo):
    stages = [demo / "base" / "transformer" / "config.json", demo / "clips" / "manifest.jsonl",
              demo / "runs" / "pgdpo" / "metrics.jsonl"]  # fmt: skip
    before = [stage.read_bytes() for stage in stages], (demo / "base").stat().st_mtime_ns
    summary = json.loads((demo / "summary.json").read_text())
    assert main(["demo", "--fast", "--out", str(demo)]) == 0
    assert ([stage.read_bytes() for stage in stages], (demo / "base").stat().st_mtime_ns) == before
    again = json.loads((demo / "summary.json").read_text())
    assert again["methods"] == summary["methods"]


def test_without_a_terminal_a_long_stage_prints_lines(monkeypatch, capsys):
    from pgdpo_fast.cli import demo as command

    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    with command._progress() as stage:
        update = stage("Training", 0.5)
        for second in range(0, 40, 2):
            now[0] = float(second)
            update(second / 40, f"step {second}")
    assert capsys.readouterr().out.splitlines() == ["Training", "Training: 40%, step 16", "Training: 80%, step 32"]


def test_work_cut_short_is_thrown_away_not_read(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    render = demo_stages.render_pairs

    def killed(folder, *arguments, **options):
        render(folder, 2, 0, frames=5, height=16, width=16)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(demo_stages, "render_pairs", killed)
        assert main(["demo", "--fast", "--out", str(out)]) == Preempted.exit_code
    assert not (out / "clips").exists()

    def stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(demo_stages, "encode_manifest", stop)
    assert main(["demo", "--fast", "--out", str(out)]) == Preempted.exit_code
    assert len((out / "clips" / "manifest.jsonl").read_text().splitlines()) == 16


def test_a_folder_of_another_demo_or_of_something_else_is_left_alone(demo, tmp_path, capsys):
    assert main(["demo", "--fast", "--seed", "1", "--out", str(demo)]) == ConfigError.exit_code
    assert "seed" in (message := capsys.readouterr().err) and "--fresh" in message
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["demo", "--fast", "--out", str(tmp_path)]) == DataError.exit_code
    assert main(["demo", "--fast", "--fresh", "--out", str(tmp_path)]) == DataError.exit_code
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture
def again(demo, tmp_path):
    """A copy of the finished demo that stages can be taken from."""
    shutil.copytree(demo, tmp_path / "again")
    for store in ("store", "base", "reference", "runs", "summary.json", "report.html"):
        path = tmp_path / "again" / store
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "again"


def test_a_stopped_demo_goes_on_where_it_was_whatever_its_stage(demo, again, capsys, monkeypatch):
    command = ["demo", "--fast", "--out", str(again)]
    monkeypatch.setattr("sys.argv", ["pgdpo-fast", *command])

    def stopped_at(number, owner, name, when):
        """Run the demo until `when` says that a call of `owner.name` is the last; returns what was printed."""
        called = getattr(owner, name)

        def call(*arguments, **options):
            result = called(*arguments, **options)
            if when(*arguments):
                os.kill(os.getpid(), number)
            return result

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, call)
            assert main(command) == Preempted.exit_code
        said = capsys.readouterr().err
        assert said.startswith(f"error: stopped by {number.name}") and said.count("\n") == 1
        assert re.search(f"(resume|go on) with: pgdpo-fast {re.escape(' '.join(command))}$", said)

    stopped_at(signal.SIGTERM, demo_stages._PretrainingState, "save", lambda state, step: step == 20)
    assert not (again / "base").exists()
    resumed, resume = [], demo_stages._PretrainingState.resume

    def noted(state):
        resumed.append(resume(state))
        return resumed[-1]

    monkeypatch.setattr(demo_stages._PretrainingState, "resume", noted)
    stopped_at(signal.SIGINT, demo_stages._Display, "step", lambda display, row, last, health: row["step"] == 7)
    assert resumed == [20]
    assert not list(again.glob("base.*")) and (again / "runs/dpo/checkpoints/step_00000007").is_dir()
    stopped_at(signal.SIGHUP, demo_stages, "sample", lambda *arguments: True)
    assert main(command) == 0
    for weights in (
        "base/transformer",
        *(f"runs/{name}/checkpoints/step_00000010/weights" for name in ("dpo", "pgdpo")),
    ):
        (ours,), (theirs,) = ((root / weights).glob("*.safetensors") for root in (again, demo))
        assert ours.read_bytes() == theirs.read_bytes(), weights
