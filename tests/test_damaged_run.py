"""A run folder with damaged, foreign or linked files: told by name, whole rows are kept, and the run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat

import pytest

from pgdpo_fast.cli import main
from pgdpo_fast.errors import DataError
from pgdpo_fast.storage import read_json, write_json
from pgdpo_fast.training.telemetry import MetricsFile
from pgdpo_fast.training.trainer import train


def row(step):
    return {"step": step, "loss": 1.0, "pairs": {"id": ["a"], "margin": [0.5]}}


DAMAGE = {
    "a flipped bit in a brace": lambda line: b"[" + line[1:],
    "a flipped bit in a key": lambda line: line.replace(b"margin", b"mbrgin"),
    "a flipped bit that is no UTF-8": lambda line: line[:20] + bytes([line[20] ^ 0x80]) + line[21:],
    "an empty list": lambda line: b"[]",
    "a number": lambda line: b"7",
    "nothing": lambda line: b"",
    "a text for a number": lambda line: line.replace(b"0.5", b'"x"'),
    "unequal lists": lambda line: line.replace(b"[0.5]", b"[0.5, 1]"),
    "a step too early": lambda line: line.replace(b'"step": 3', b'"step": 1'),
    "100,000 brackets": lambda line: b"[" * 100_000,
    "zeros": lambda line: bytes(len(line)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_line_costs_that_row_alone(tmp_path, damage):
    file, notes = MetricsFile(tmp_path / "metrics.jsonl", ("loss",), ("margin",)), []
    for step in range(1, 7):
        file.append(row(step))
    lines = file.path.read_bytes().split(b"\n")
    lines[2] = DAMAGE[damage](lines[2])
    file.path.write_bytes(b"\n".join(lines))
    assert [kept["step"] for kept in file.keep_until(5, notes.append)] == [1, 2, 4, 5]
    assert "line 3" in notes[0] and "metrics.jsonl.damaged" in notes[0]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 4, 5]
    assert [kept["step"] for kept in file.keep_until(5, notes.append)] == [1, 2, 4, 5] and len(notes) == 1


def test_a_last_line_that_a_kill_cut_short_is_no_damage(tmp_path):
    file, notes = MetricsFile(tmp_path / "metrics.jsonl", ("loss",), ("margin",)), []
    for step in (1, 2):
        file.append(row(step))
    file.path.write_bytes(file.path.read_bytes()[:-9])
    assert [kept["step"] for kept in file.keep_until(9, notes.append)] == [1] and not notes
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.fixture
def half(tiny_config):
    """A run of two steps of four, and the configuration that goes on."""
    config = tiny_config()
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=2)), display="none")
    return config


def folder_of(config):
    from pathlib import Path

    return Path(config.output.dir)


def test_a_run_goes_on_over_damaged_rows(half):
    run = folder_of(half)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        lines = (run / name).read_bytes().split(b"\n")
        (run / name).write_bytes(b"\n".join([b"[]", *lines[1:]]))
    train(half, display="none")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 3, 4]
    assert [json.loads(line)["step"] for line in (run / "evaluation.jsonl").read_text().splitlines()] == [2, 4]
    assert (run / "metrics.jsonl.damaged").exists() and "evaluation.jsonl.damaged" in (run / "log.txt").read_text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt", "checkpoints", "config.yaml"])
def test_a_link_in_a_received_run_is_not_written_through(half, tmp_path, name):
    run, outside = folder_of(half), tmp_path / "outside"
    os.replace(run / name, outside)
    (run / name).symlink_to(outside)
    before = sorted(outside.rglob("*")) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(DataError, match=f"{name}: is a link"):
        train(half, display="none")
    assert (sorted(outside.rglob("*")) if outside.is_dir() else outside.read_bytes()) == before


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "weights/../../outside"])
def test_a_received_checkpoint_names_nothing_outside_itself(half, name):
    (checkpoint,) = (folder_of(half) / "checkpoints").glob("step_*")
    content = read_json(checkpoint / "manifest.json")
    content["files"][0]["name"] = name
    write_json(checkpoint / "manifest.json", content)
    with pytest.raises(DataError, match="all 1 checkpoints are damaged"):
        train(half, display="none")
    with pytest.raises(DataError, match=r"manifest.json.*plain name"):
        train(half, display="none", resume=checkpoint)


@pytest.mark.parametrize("key", ["files", "step", "identity"])
def test_a_resealed_checkpoint_without_a_key_is_named(half, key):
    (checkpoint,) = (folder_of(half) / "checkpoints").glob("step_*")
    content = read_json(checkpoint / "manifest.json")
    del content[key]
    write_json(checkpoint / "manifest.json", content)
    with pytest.raises(DataError, match=f"manifest.json.*no '{key}'"):
        train(half, display="none", resume=checkpoint)


def test_weights_that_a_checkpoint_does_not_list_are_not_loaded(half):
    (checkpoint,) = (folder_of(half) / "checkpoints").glob("step_*")
    (checkpoint / "weights/more.safetensors").write_bytes(b"anything")
    with pytest.raises(DataError, match="weights/more.safetensors: is not of this checkpoint"):
        train(half, display="none", resume=checkpoint)


def test_a_file_named_like_a_checkpoint_is_an_error_before_the_first_step(half):
    (folder_of(half) / "checkpoints/step_00000004").write_text("not a folder")
    with pytest.raises(DataError, match="step_00000004: is a file where a folder is expected"):
        train(half, display="none")
    with pytest.raises(DataError, match="step_00000004"):
        train(half, display="none", resume=folder_of(half) / "checkpoints/step_00000004")


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_a_text_longer_than_the_network_takes_is_told_before_the_first_step(tiny_config, tmp_path, capfd, command):
    config = tiny_config(model={"text_tokens": 5})
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    flags = ["--output", str(tmp_path / "cache")] if command == "cache-reference" else []
    assert main([command, str(tmp_path / "settings.yaml"), *flags]) == 2
    said = capfd.readouterr().err
    assert re.search(r"the texts of \d+ of 10 pairs are longer than model.text_tokens=5", said)
    longest = re.search(r"set model.text_tokens=(\d+)", said).group(1)
    assert not (folder_of(config) / "metrics.jsonl").exists()
    assert main([command, str(tmp_path / "settings.yaml"), *flags, "--set", f"model.text_tokens={longest}"]) == 0


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_every_file_of_a_run_follows_the_umask(tiny_config, mask):
    previous = os.umask(mask)
    try:
        config = tiny_config(training={"steps": 1})
        train(config, display="none")
    finally:
        os.umask(previous)
    files = [path for path in folder_of(config).rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(0o666 & ~mask)}
