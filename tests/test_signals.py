"""SIGTERM, Ctrl-C and a closed terminal end long commands alike: soon, saved, with exit code 75 and how to go on."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import time

import pytest
import torch

from pgdpo_fast.analysis.figures import charts
from pgdpo_fast.analysis.runs import read_rows
from pgdpo_fast.data.manifest import read_manifest
from pgdpo_fast.data.synthetic import render_pairs
from pgdpo_fast.errors import Preempted
from pgdpo_fast.preemption import Stop, stoppable
from pgdpo_fast.storage import sha256_file, weights_digest
from pgdpo_fast.training.measure import check_weights
from pgdpo_fast.training.trainer import train
from tests.commands import Command, lines_of

LONG = {"steps": 5000, "checkpoint_every": 5000, "evaluation_every": 5000}


@pytest.fixture
def settings(tiny_config, tmp_path):
    """A configuration file of a run that would take many minutes, and its run folder."""
    config = tiny_config(training=LONG)
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    return tmp_path / "settings.yaml", tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_training_saves_the_step_it_made_and_tells_how_to_resume(settings, tmp_path, number):
    path, run = settings
    command = Command(tmp_path, "train", path)
    command.wait_for(lambda: lines_of(run / "metrics.jsonl") > 3)
    command.send(number)
    code, seconds = command.end()
    assert code == 75 and seconds < 5
    steps = lines_of(run / "metrics.jsonl")
    assert (run / f"checkpoints/step_{steps:08d}/manifest.json").is_file()
    assert f"stopped by {number.name} after step {steps}, state saved; resume with: pgdpo-fast train" in command.wrote
    assert "Traceback" not in command.wrote
    again = Command(tmp_path, "train", path, "--set", f"training.steps={steps + 1}")
    assert again.end()[0] == 0 and lines_of(run / "metrics.jsonl") == steps + 1


def test_a_closed_terminal_saves_the_run_although_nothing_can_be_printed_any_more(settings, tmp_path):
    path, run = settings
    ours, theirs = pty.openpty()
    command = Command(tmp_path, "train", path, terminal=os.ttyname(theirs))
    os.close(theirs)
    command.wait_for(lambda: lines_of(run / "metrics.jsonl") > 3)
    os.close(ours)
    assert command.end()[0] == 75
    assert (run / f"checkpoints/step_{lines_of(run / 'metrics.jsonl'):08d}/manifest.json").is_file()
    assert "stopped by SIGHUP" in (run / "log.txt").read_text()


def test_what_was_started_to_survive_a_hangup_survives_it(settings, tmp_path):
    path, run = settings
    command = Command(tmp_path, "train", path, ignored=(signal.SIGHUP, signal.SIGINT))
    command.wait_for(lambda: lines_of(run / "metrics.jsonl") > 1)
    for number in (signal.SIGHUP, signal.SIGINT):
        command.send(number)
    steps = lines_of(run / "metrics.jsonl")
    command.wait_for(lambda: lines_of(run / "metrics.jsonl") > steps + 3)
    command.send(signal.SIGTERM)
    assert command.end()[0] == 75


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_reference_pass_stops_at_once_and_goes_on(settings, tmp_path, number):
    path, _ = settings
    flags = ["--output", tmp_path / "cache", "--draws", 4000]
    command = Command(tmp_path, "cache-reference", path, *flags)
    command.wait_for(lambda: list(tmp_path.glob("cache/staging/*/*-*.safetensors")))
    command.send(number)
    code, seconds = command.end()
    assert code == 75 and seconds < 5, command.wrote
    assert f"stopped by {number.name} with" in command.wrote and "resume with: pgdpo-fast cache-ref" in command.wrote
    assert "Traceback" not in command.wrote


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Many small clips, to be enlarged."""
    return render_pairs(tmp_path_factory.mktemp("clips"), pairs=24, frames=60, height=32, width=32)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_encoding_stops_within_a_clip(clips, tmp_path, number):
    flags = ["--codec", "pixel-unshuffle", "--frames", 57, "--height", 256, "--width", 256, "--fps", 0]
    command = Command(tmp_path, "encode", "-m", clips, "-o", tmp_path / "store", *flags)
    command.wait_for(lambda: list(tmp_path.glob("store/staging/*/*-*.safetensors")))
    command.send(number)
    code, seconds = command.end()
    assert code == 75 and seconds < 5, command.wrote
    assert f"stopped by {number.name}" in command.wrote and "resume with: pgdpo-fast encode" in command.wrote
    assert "Traceback" not in command.wrote


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_again_ends_the_process_at_once(number):
    child = os.fork()
    if child == 0:
        with stoppable(str):
            try:
                os.kill(os.getpid(), number)
            except Stop:
                os.kill(os.getpid(), signal.SIGHUP)  # another one does not
                os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_raised_at_once_but_not_where_things_change_together(number):
    before, changed = signal.getsignal(number), []
    with pytest.raises(Preempted, match=f"^{number.name}$"):
        with stoppable(str) as stopping:
            with stopping.deferred():
                with stopping.deferred():
                    os.kill(os.getpid(), number)
                    changed.append(1)
                changed.append(2)
            changed.append(3)
    assert changed == [1, 2] and signal.getsignal(number) == before
    with pytest.raises(Preempted):
        with stoppable(str):
            os.kill(os.getpid(), number)
            time.sleep(60)


def test_an_error_that_a_library_made_of_a_signal_is_told_as_the_signal():
    with pytest.raises(Preempted, match="^SIGTERM$"), stoppable(str):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stop:
            raise RuntimeError("callback failed") from None
    with pytest.raises(OSError, match="no space"), stoppable(str, saves=True):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stop:
            raise OSError("no space to save") from None


@pytest.mark.parametrize(("verb", "number"), [("report", signal.SIGINT), ("bench", signal.SIGTERM)])
def test_commands_that_keep_nothing_stop_at_once_and_name_themselves(tiny_config, tmp_path, verb, number):
    flags = ["--shapes", "videocrafter2", "--batch", 1, "--seconds", 600]
    if verb == "report":
        run = train(tiny_config(), display="none").run_dir
        flags = [shutil.copytree(run, tmp_path / f"run-{number}") for number in range(8)]
    command = Command(tmp_path, verb, *flags, "--out", tmp_path / "page")
    command.wait_for((tmp_path / "page").exists)
    command.send(number)
    code, seconds = command.end()
    assert code == 75 and seconds < 5, command.wrote
    assert command.wrote.startswith(f"error: stopped by {number.name}; go on with: pgdpo-fast {verb} ")
    assert command.wrote.count("\n") == 1 and not list((tmp_path / "page").iterdir())


def test_a_sweep_in_turn_stops_at_once_and_tells_how_to_go_on(settings, tmp_path):
    path, run = settings
    grid = ["--grid", "objective.beta=1,2", "--set", "training.draws_per_pair=1"]
    command = Command(tmp_path, "sweep", path, *grid, "--display", "none")
    command.wait_for(lambda: lines_of(run / "beta=1/metrics.jsonl") > 3)
    command.send(signal.SIGINT)
    code, seconds = command.end()
    assert code == 75 and seconds < 5, command.wrote
    assert "or the whole sweep with: pgdpo-fast sweep" in command.wrote and "Traceback" not in command.wrote


def test_long_loops_see_a_signal_whose_exception_was_lost(tmp_path):
    """As Python loses it that comes while it collects garbage, and as threads do that read for the main thread."""
    (tmp_path / "large").write_bytes(bytes(1000))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"step": 1}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "a.mp4", "rejected": "b.mp4"}\n')
    network = torch.nn.Linear(2, 2)
    loops = [
        lambda: sha256_file(tmp_path / "large"),
        lambda: weights_digest(network),
        lambda: check_weights(network.named_parameters(), "now"),
        lambda: read_rows(rows),
        lambda: read_manifest(tmp_path / "pairs.jsonl"),
        lambda: charts([]),
        lambda: render_pairs(tmp_path / "clips", pairs=1, frames=3, height=16, width=16),
    ]
    ended = []
    for number, loop in enumerate(loops):
        with pytest.raises(Preempted, match="^SIGTERM$"), stoppable(str):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Stop:
                loop()
                ended.append(number)
    assert not ended
    loops[0]()  # nothing is left of it outside
    with pytest.raises(Preempted), stoppable(str) as stopping:  # what changes together is not cut
        with stopping.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            digest = sha256_file(tmp_path / "large")
    assert digest == sha256_file(tmp_path / "large")
