"""A command line that does not fit ends in one line that names the flag, what it was given and what it takes."""

import shlex

import pytest

from pgdpo_fast.cli import main
from pgdpo_fast.cli.processes import Share, share_of_environment
from pgdpo_fast.errors import ConfigError

REQUIRED, ENCODE = "required by pgdpo-fast", "encode -m a.jsonl -o store"
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{ENCODE} --framez 3", "--framez: no flag of pgdpo-fast encode; did you mean '--frames'?"),
        ("encode -m a.jsonl --outptu store", "--outptu: no flag of pgdpo-fast encode; did you mean '--output'?"),
        ("demo --fastt", "--fastt: no flag of pgdpo-fast demo; did you mean '--fast'?"),
        ("train -q", "-q: no flag of pgdpo-fast train; see pgdpo-fast train --help"),
        (f"{ENCODE} --frames x", "--frames x: expected a whole number; see pgdpo-fast encode --help"),
        (f"{ENCODE} --frames=[/red]", "--frames=[/red]: expected a whole number; see pgdpo-fast encode --help"),
        (f"{ENCODE} --max_dropped 0.x", "--max_dropped 0.x: expected a number; see pgdpo-fast encode --help"),
        ("bench --batch 1 x", "--batch 1 x: expected a list of whole numbers; see pgdpo-fast bench --help"),
        ("train --display plan", "--display plan: expected one of auto, live, plain, none; did you mean 'plain'?"),
        (f"{ENCODE} --frames", "--frames: expected a whole number after it; see pgdpo-fast encode --help"),
        ("demo --out --fast", "--out: expected a path after it; see pgdpo-fast demo --help"),
        ("encode", f"--manifest and --output: {REQUIRED} encode and not given; see pgdpo-fast encode --help"),
        ("plan", "CONFIG: required by pgdpo-fast plan and not given; see pgdpo-fast plan --help"),
        ("train a.yaml b", "'b': pgdpo-fast train takes no further argument here; see pgdpo-fast train --help"),
        ("demo --fast=3", "'3': pgdpo-fast demo takes no further argument here; see pgdpo-fast demo --help"),
        ("trian a.yaml", "no command 'trian'; did you mean 'train'?"),
        ("demo --seed '1\x1b[31m'", "--seed 1\\x1b[31m: expected a whole number; see pgdpo-fast demo --help"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_line(capsys, monkeypatch, command, said):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(shlex.split(command)) == ConfigError.exit_code
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_value_of_any_length_is_one_line_that_is_no_longer_than_needed(capsys):
    for value in ("9" * 5000, "x" * 5000, "x " * 2500):
        assert main(["demo", "--seed", value]) == ConfigError.exit_code
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: --seed ") and len(said) < 1000


def test_help_is_as_wide_as_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main(["encode", "--help"])
    flags = capsys.readouterr().out.partition("--help")[2].splitlines()
    assert not stopped.value.code and "--manifest" in "".join(flags) and max(map(len, flags)) <= 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "first"}, "environment RANK='first': expected a whole number from 0 on"),
        ({"RANK": "-1"}, "environment RANK='-1': expected a whole number from 0 on"),
        ({"WORLD_SIZE": "0"}, "environment WORLD_SIZE='0': expected a whole number from 1 on"),
        ({"WORLD_SIZE": ""}, "environment WORLD_SIZE='': expected a whole number from 1 on"),
        ({"LOCAL_RANK": "9" * 5000}, "environment LOCAL_RANK='999"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "environment RANK=2: expected a rank below WORLD_SIZE=2"),
        ({"RANK": "1"}, "environment RANK=1: expected a rank below WORLD_SIZE=1"),
    ],
)
@pytest.mark.parametrize("verb", ["encode", "cache-reference"])
def test_an_environment_of_no_process_is_one_line(tiny_config, tmp_path, capsys, monkeypatch, verb, given, said):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "settings.yaml").write_text(tiny_config().to_yaml())
    command = {"encode": ENCODE.split(), "cache-reference": [verb, str(tmp_path / "settings.yaml"), "-o", "cache"]}
    assert main(command[verb]) == ConfigError.exit_code
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {said}") and printed.count("\n") == 1
    assert "start with torchrun" in printed and not (tmp_path / "cache").exists()


def test_the_environment_of_torchrun_is_taken_and_an_empty_one_is_the_only_process(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    assert share_of_environment() == Share(0, 1, 0)
    for name, value in zip(RANKS, "350", strict=True):
        monkeypatch.setenv(name, value)
    assert share_of_environment() == Share(3, 5, 0)
