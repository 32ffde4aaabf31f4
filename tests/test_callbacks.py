"""Callbacks: named in the configuration, checked like every setting, called when they say, never felt by the run."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from pgdpo_fast.data.video import read_video
from pgdpo_fast.errors import ConfigError, Preempted
from pgdpo_fast.storage import sha256_file
from pgdpo_fast.training.callbacks import CALLBACKS
from pgdpo_fast.training.config import describe_settings, load_config
from pgdpo_fast.training.trainer import train

DOCS = Path(__file__).parents[1] / "docs/callbacks.md"
MINE = '''
from dataclasses import dataclass
from pgdpo_fast.training.callbacks import Callback

@dataclass
class Steps(Callback):
    """Writes the steps it is called at."""
    path: str
    word: str = "step"

    def start(self, run):
        (run.root / self.path).open("a").write("start ")

    def __call__(self, step, run):
        (run.root / self.path).open("a").write(f"{self.word} {step} ")
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Name of a module of a user's own with the callback `Steps`."""
    name = "callbacks_of_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_callback_of_ones_own_is_called_when_it_says(tiny_config, mine):
    callbacks = [
        {"name": f"{mine}:Steps", "path": "with_evaluations"},
        {"name": f"{mine}:Steps", "every": 3, "path": "threes", "word": "at"},
    ]
    run_dir = train(tiny_config(callbacks=callbacks), display="none").run_dir
    assert (run_dir / "with_evaluations").read_text() == "start step 0 step 2 step 4 "
    assert (run_dir / "threes").read_text() == "start at 0 at 3 at 4 "
    recorded = json.loads((run_dir / "environment.json").read_text())["sources"]
    assert recorded == {f"{mine}:Steps": sha256_file(run_dir.parent / f"{mine}.py")}
    again = load_config(run_dir / "config.yaml")
    assert again.callbacks[1] == {"name": f"{mine}:Steps", "every": 3, "path": "threes", "word": "at"}


def test_callbacks_change_no_number_and_may_come_and_go_between_the_parts_of_a_run(tiny_config, mine):
    plain = train(tiny_config("plain"), display="none").run_dir
    watched = [{"name": "advantage", "every": 1}, {"name": "sample", "every": 3, "clips": 1, "steps": 2}]
    train(tiny_config("parts", callbacks=watched, training={"steps": 2}), display="none")
    parts = train(tiny_config("parts"), display="none").run_dir
    assert losses(parts) == losses(plain)
    assert sorted(path.name for path in (parts / "samples").iterdir()) == [
        "prompts.json", "step_00000000", "step_00000002",
    ]  # fmt: skip


def test_a_callback_that_sigterm_kept_from_its_step_is_called_on_resume(tiny_config, mine):
    def stop(step, run):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    callbacks = [{"name": f"{mine}:Steps", "every": 1, "path": "steps"}]
    run_dir = tiny_config().output.dir
    with pytest.raises(Preempted):
        train(tiny_config(), display="none", callbacks=[stop, *tiny_config(callbacks=callbacks).build_callbacks()])
    assert Path(run_dir, "steps").read_text() == "start step 0 step 1 "
    train(tiny_config(callbacks=callbacks), display="none")
    assert Path(run_dir, "steps").read_text() == "start step 0 step 1 start step 2 step 3 step 4 "


def test_sampled_clips_are_videos_of_held_out_prompts_from_the_same_noise(tiny_config):
    callbacks = [{"name": "sample", "every": 4, "clips": 2, "steps": 3, "fps": 8}]
    run_dir = train(tiny_config(callbacks=callbacks), display="none").run_dir
    prompts = json.loads((run_dir / "samples" / "prompts.json").read_text())
    assert len(prompts) == 2 and all(item["prompt"] and item["id"] for item in prompts)
    for step in (0, 4):
        for number in (0, 1):
            clip = read_video(run_dir / "samples" / f"step_{step:08d}" / f"{number:02d}.mp4")
            assert clip.shape == (3, 16, 16, 3)
    other = train(tiny_config("other", callbacks=callbacks, training={"seed": 0}), display="none").run_dir
    first = "samples/step_00000000/00.mp4"
    assert (other / first).read_bytes() == (run_dir / first).read_bytes()


def test_every_mistake_in_callbacks_is_named_at_once(tiny_config, mine):
    callbacks = [
        {"name": "sampel"},
        {"name": "sample", "evry": 3, "clips": 0, "steps": "many"},
        {"name": f"{mine}:Steps"},
        {"every": 1},
        {"name": f"{mine}:Stepz"},
        {"name": "pgdpo_fast.objectives:DPO"},
    ]
    with pytest.raises(ConfigError) as caught:
        tiny_config(callbacks=callbacks)
    for expected in (
        "callbacks[0].name='sampel': expected one of sample, advantage, or the import path of another callback",
        "did you mean 'sample'?",
        "callbacks[1].evry: sample takes every, clips, steps, fps, vae; did you mean 'every'?",
        "callbacks[1].clips=0: expected at least 1", "callbacks[1].steps='many': expected a whole number",
        f"callbacks[2].path: required by {mine}:Steps",
        "callbacks[3]={'every': 1}: expected a mapping with the key 'name'",
        "has no 'Stepz'; did you mean 'Steps'?",
        "callbacks[5].name='pgdpo_fast.objectives:DPO': expected a subclass of pgdpo_fast.training.callbacks.Callback",
    ):  # fmt: skip
        assert expected in str(caught.value)
    assert "8 problems" in str(caught.value)


def test_callbacks_are_given_on_the_command_line_too(tiny_config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(tiny_config().to_yaml())
    config = load_config(path, ["callbacks=[{name: advantage, every: 50}]"])
    assert config.callbacks == ({"name": "advantage", "every": 50, "baseline_beta": None},)
    with pytest.raises(ConfigError, match="callbacks='advantage': expected a list of mappings"):
        load_config(path, ["callbacks=advantage"])


def test_the_docs_list_every_name_with_its_defaults():
    rows = [line.split("|") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")][1:]
    defaults = {
        name: [f"`{key}: {_as_yaml(value)}`" for key, value in CALLBACKS.describe(cls()).items() if key != "name"]
        for name, cls in CALLBACKS.classes.items()
    }
    assert {row[1].strip(" `"): row[3].strip().split(", ") for row in rows} == defaults


def _as_yaml(value):
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_every_callback_that_has_a_name_is_listed_with_its_settings():
    listing = describe_settings()
    for name, cls in CALLBACKS.classes.items():
        assert f"  callbacks {name}: " in listing
        for key in CALLBACKS.describe(cls()):
            assert key in listing
