"""Checkpoints: never a wrong load, always a usable older state, and nothing of a run is lost in silence."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from pgdpo_fast.errors import ConfigError, DataError, NonFiniteError
from pgdpo_fast.training import checkpoint
from pgdpo_fast.training.trainer import train


def rows(run_dir, name="metrics"):
    return [json.loads(line)["step"] for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path):
    path.unlink()


DAMAGE = [flip, truncate, zero, delete]


@pytest.fixture(params=["lora", "full"])
def finished(request, tiny_config):
    """(config, run directory) of four steps with checkpoints at 2 and 4."""
    config = tiny_config(model={"train": request.param})
    return config, train(config, display="none").run_dir


def resumed_from(config):
    """The step a run of six steps goes on from."""
    from dataclasses import replace

    notes = []

    class Listener:
        def note(self, text):
            notes.append(text)

        def step(self, row, last, health):
            pass

        def close(self):
            pass

    result = train(replace(config, training=replace(config.training, steps=6)), display=Listener())
    assert result.step == 6 and rows(result.run_dir) == [1, 2, 3, 4, 5, 6]
    (state,) = [note for note in notes if note.startswith("state")]
    return int(state.rsplit(" ", 1)[1]), "\n".join(notes)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(finished, damage, tmp_path):
    config, run_dir = finished
    newest = run_dir / "checkpoints" / "step_00000004"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 3
    backup = shutil.copytree(run_dir, tmp_path / "backup")
    for file in files:
        damage(newest / file)
        step, notes = resumed_from(config)
        assert step == 2 and "step_00000004 is damaged and passed over" in notes and str(file.name) in notes
        shutil.rmtree(run_dir)
        shutil.copytree(backup, run_dir)
    assert resumed_from(config)[0] == 4


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(finished):
    config, run_dir = finished
    newest = run_dir / "checkpoints" / "step_00000004"
    flip(newest / "optimizer-00000.safetensors")
    with pytest.raises(DataError, match="optimizer-00000.safetensors: damaged"):
        train(config, resume=newest, display="none")
    with pytest.raises(DataError, match="no such file"):
        train(config, resume=run_dir / "checkpoints" / "step_00000003", display="none")


def test_with_every_checkpoint_damaged_the_run_does_not_start_over(finished):
    config, run_dir = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    for path in (run_dir / "checkpoints").iterdir():
        flip(path / "optimizer-00000.safetensors")
    with pytest.raises(DataError, match="all 2 checkpoints are damaged"):
        train(config, display="none")
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("moment", ["optimizer", "weights", "manifest", "rename"])
def test_a_kill_at_any_moment_of_a_save_leaves_the_older_checkpoint(finished, monkeypatch, moment):
    config, run_dir = finished

    class Killed(BaseException):
        pass

    def die(*arguments, **options):
        raise Killed

    from dataclasses import replace

    longer = replace(config, training=replace(config.training, steps=6))
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint.Checkpoints, "rehearse", lambda *arguments: "rehearsal skipped")
        if moment == "rename":
            replace_file = os.replace
            patched.setattr(checkpoint.os, "replace", lambda source, target: die() if target.name == "step_00000006"
                            else replace_file(source, target))  # fmt: skip
        else:
            name = {"optimizer": "write_shard", "weights": "fsync_path", "manifest": "write_json"}[moment]
            patched.setattr(checkpoint, name, die)
        train(longer, display="none")
    assert ".writing_step_00000006" in checkpoints(run_dir)
    step, _ = resumed_from(config)
    assert step == 4
    assert checkpoints(run_dir) == ["step_00000004", "step_00000006"]


def test_a_file_that_cannot_be_written_is_a_data_error_and_the_older_checkpoint_stays(finished):
    config, run_dir = finished
    from dataclasses import replace

    longer = replace(config, training=replace(config.training, steps=6))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))  # larger files fail as on a full disk
    try:
        with pytest.raises(DataError, match="free space"):
            train(longer, display="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert resumed_from(config)[0] == 4


def test_a_save_in_many_files_is_the_same_save(tiny_config, monkeypatch):
    whole = train(tiny_config("whole"), display="none")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 500)
    train(tiny_config("parts", training={"steps": 2}), display="none")
    parts = train(tiny_config("parts"), display="none")
    assert len(list(parts.checkpoint.glob("optimizer-*.safetensors"))) > 10
    assert (parts.run_dir / "metrics.jsonl").read_text().count("\n") == 4
    last = [json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["pairs"] for run in (whole, parts)]
    assert last[0] == last[1]


def test_an_export_that_cannot_be_written_is_a_data_error(finished, monkeypatch):
    from dataclasses import replace

    from safetensors import SafetensorError

    from pgdpo_fast.models import ModelAdapter

    def fail(*arguments):
        raise SafetensorError("No space left on device")

    config, _ = finished
    with monkeypatch.context() as patched, pytest.raises(DataError, match="No space left"):
        patched.setattr(ModelAdapter, "export", fail)
        train(replace(config, training=replace(config.training, steps=6)), display="none")
    assert resumed_from(config)[0] == 4


def test_a_disk_that_fills_up_between_checkpoints_is_a_data_error(finished, monkeypatch):
    from dataclasses import replace

    from pgdpo_fast.training.telemetry import MetricsFile, RunLog

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    config, _ = finished
    with monkeypatch.context() as patched, pytest.raises(DataError, match="No space left on device; free space"):
        patched.setattr(MetricsFile, "append", full)
        patched.setattr(RunLog, "write", lambda log, text: full() if "Traceback" in text else None)
        train(replace(config, training=replace(config.training, steps=6)), display="none")
    assert resumed_from(config)[0] == 4


def test_a_disk_too_small_is_noticed_before_the_first_step(tiny_config, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1 << 20))
    config = tiny_config()
    with pytest.raises(DataError, match="2 checkpoints of .* and one being written needs"):
        train(config, display="none")
    assert not os.path.exists(f"{config.output.dir}/checkpoints/step_00000002")


def test_a_disk_that_changes_what_is_written_is_noticed_at_the_rehearsal(tiny_config, monkeypatch):
    write = checkpoint.write_shard

    def bad_disk(path, tensors, *arguments):
        shard = write(path, tensors, *arguments)
        flip(path)
        return shard

    monkeypatch.setattr(checkpoint, "write_shard", bad_disk)
    with pytest.raises(DataError, match="damaged"):
        train(tiny_config(), display="none")


def test_the_rehearsal_of_a_large_run_writes_a_part(tiny_config, monkeypatch):
    monkeypatch.setattr(checkpoint, "REHEARSED_BYTES", 2000)
    config = tiny_config(model={"train": "full"})
    train(config, display="none")
    assert "a part of the state" in open(f"{config.output.dir}/log.txt").read()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(tiny_config, keep):
    result = train(tiny_config(training={"steps": 5, "checkpoint_every": 1, "checkpoint_keep": keep}), display="none")
    assert checkpoints(result.run_dir) == [f"step_{step:08d}" for step in range(6 - keep, 6)]


def test_settings_that_decide_the_numbers_cannot_change_half_way(finished, tiny_config):
    config, _ = finished
    values = config.to_mapping()
    values["objective"]["beta"] = 500
    values["training"]["seed"] = 1
    values["training"]["checkpoint_every"] = 1
    with pytest.raises(ConfigError) as caught:
        train(type(config).from_mapping(values), display="none")
    message = str(caught.value)
    assert "objective.beta was 100, is 500" in message and "training.seed was 0, is 1" in message
    assert "checkpoint_every" not in message


@pytest.mark.parametrize("poison", ["loaded", "trained"])
def test_weights_that_are_nan_are_told_as_such_and_not_as_a_failing_disk(tiny_config, monkeypatch, poison):
    from pgdpo_fast.models import ModelAdapter
    from pgdpo_fast.training.optimizer import MasterAdamW

    method = {"loaded": ModelAdapter.load, "trained": MasterAdamW.step}[poison]

    def poisoned(self, argument):
        result = method(self, argument)
        weights = result.parameters() if poison == "loaded" else self.parameters.values()
        next(iter(weights)).detach().view(-1)[0] = torch.nan
        return result

    monkeypatch.setattr(*{"loaded": (ModelAdapter, "load"), "trained": (MasterAdamW, "step")}[poison], poisoned)
    config = tiny_config()
    with pytest.raises(NonFiniteError, match="NaN or infinite numbers .*first: "):
        train(config, display="none")
    assert not list(Path(config.output.dir).glob("checkpoints/step_*"))


def test_another_store_under_the_same_name_is_refused(finished, monkeypatch):
    from pgdpo_fast.data.latent_store import LatentStore

    config, _ = finished
    monkeypatch.setattr(LatentStore, "fingerprint", property(lambda store: "another"))
    with pytest.raises(ConfigError, match="store.fingerprint was"):
        train(config, display="none")


def test_a_run_directory_is_never_overwritten_unasked(finished):
    config, run_dir = finished
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, resume="never", display="none")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train(config, display="none").step == 4
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_two_processes_cannot_write_one_run(finished):
    from pgdpo_fast.storage import exclusive_lock

    config, run_dir = finished
    with exclusive_lock(run_dir), pytest.raises(DataError, match="another process"):
        train(config, display="none")


def test_a_lock_whose_last_holder_removes_the_folder_meanwhile_is_taken(tmp_path, monkeypatch):
    from pgdpo_fast.storage import exclusive_lock

    folder, make, met = tmp_path / "staging" / "00001", os.mkdir, []

    def removed_in_between(path, *args, **kwargs):
        if str(path) == str(folder) and not met:
            met.append(path)
            raise FileExistsError(path)  # it was there, and is gone when looked at again
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", removed_in_between)
    with exclusive_lock(folder):
        assert met and (folder / ".lock").exists()


def test_going_back_to_an_older_checkpoint_drops_what_came_after(finished):
    config, run_dir = finished
    from dataclasses import replace

    older = replace(config, training=replace(config.training, steps=3))
    result = train(older, resume=run_dir / "checkpoints" / "step_00000002", display="none")
    assert rows(run_dir) == [1, 2, 3] and result.checkpoint.name == "step_00000003"
    assert checkpoints(run_dir) == ["step_00000002", "step_00000003"]


def test_a_run_can_go_on_from_a_checkpoint_of_another_run_directory(finished, tiny_config):
    from dataclasses import replace

    config, run_dir = finished
    elsewhere = replace(config, output=replace(config.output, dir=str(run_dir.with_name("elsewhere"))))
    result = train(elsewhere, resume=run_dir / "checkpoints" / "step_00000004", display="none")
    assert result.checkpoint == run_dir.with_name("elsewhere") / "checkpoints" / "step_00000004"
    assert (result.checkpoint / "manifest.json").exists()


def test_fewer_steps_than_were_made_is_refused(finished):
    config, _ = finished
    from dataclasses import replace

    with pytest.raises(ConfigError, match="training.steps=3: .* is at step 4 already"):
        train(replace(config, training=replace(config.training, steps=3)), display="none")


def test_a_row_cut_short_by_a_kill_is_dropped(finished):
    config, run_dir = finished
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0.')
    assert resumed_from(config)[0] == 4


def test_a_checkpoint_that_cannot_be_renamed_leaves_an_error(finished, monkeypatch):
    config, run_dir = finished
    from dataclasses import replace

    replace_file = os.replace

    def full(source, target):
        if os.path.basename(target).startswith("step_"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as patched, pytest.raises(DataError, match="No space left on device"):
        patched.setattr(checkpoint.os, "replace", full)
        train(replace(config, training=replace(config.training, steps=6)), display="none")
    assert resumed_from(config)[0] == 4


def test_beta_and_learning_rate_change_from_a_checkpoint_when_that_is_asked_for(tiny_config, tmp_path, capsys):
    from pgdpo_fast.cli import main

    ran = train(tiny_config(), display="none")
    settings = [str(ran.run_dir / "config.yaml"), "--display", "none", "--set", "training.steps=6"]
    changed = [*settings, "objective.beta=7", "training.learning_rate=1e-4"]
    assert main(["train", *changed]) == 2
    said = capsys.readouterr().err
    assert "objective.beta was 100, is 7" in said and "--change objective training.learning_rate" in said
    assert main(["train", *changed, "--change", "objective"]) == 2
    assert "training.learning_rate was 0.001, is 0.0001" in capsys.readouterr().err
    assert not (ran.run_dir / "changes.jsonl").exists()
    assert main(["train", *changed, "--change", "objective", "training.learning_rate"]) == 0
    rows = [json.loads(line) for line in (ran.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [1e-3] * 4 + [1e-4] * 2
    (recorded,) = [json.loads(line) for line in (ran.run_dir / "changes.jsonl").read_text().splitlines()]
    assert recorded["step"] == 4
    assert recorded["changed"] == {"objective.beta": [100.0, 7.0], "training.learning_rate": [1e-3, 1e-4]}
    assert "changed at step 4: objective.beta 100 -> 7" in (ran.run_dir / "log.txt").read_text()
    # the checkpoints now are those of the new values
    assert main(["train", str(ran.run_dir / "config.yaml"), "--display", "none", "--set", "training.steps=7"]) == 0
    assert main(["train", *settings, "training.seed=5", "--change", "training.seed"]) == 2
    assert "--change='training.seed': expected one of objective" in capsys.readouterr().err
    assert main(["train", *settings, "training.seed=5", "--change", "objective"]) == 2
    assert "--change" not in capsys.readouterr().err


def test_another_objective_goes_on_from_the_weights_and_moments_of_the_first(tiny_config, tmp_path):
    first = train(tiny_config(objective={"name": "sft"}), display="none")
    longer = tiny_config(objective={"name": "dpo", "beta": 50}, training={"steps": 5})
    with pytest.raises(ConfigError, match="--change objective$"):
        train(longer, display="none")
    assert train(longer, change=["objective"], display="none").step == 5
    assert first.run_dir == tmp_path / "run"
