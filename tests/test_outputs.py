"""An output folder that cannot be written is one line that names it, exit 3, before any work, in every command."""

from __future__ import annotations

import pytest

from pgdpo_fast.cli import main
from pgdpo_fast.data.synthetic import render_pairs
from pgdpo_fast.training.trainer import train


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return render_pairs(tmp_path_factory.mktemp("clips"), pairs=2, frames=3, height=16, width=16)


@pytest.fixture
def commands(clips, tiny_config, tmp_path):
    """Flags of every command that writes, but for where to."""
    (tmp_path / "settings.yaml").write_text(tiny_config().to_yaml())
    settings, small = str(tmp_path / "settings.yaml"), ["--frames", "3", "--height", "16", "--width", "16"]
    return {
        "demo": ["demo", "--fast", "--out"],
        "encode": ["encode", "-m", str(clips), "--codec", "pixel-unshuffle", *small, "-o"],
        "cache-reference": ["cache-reference", settings, "-o"],
        "train": ["train", settings, "--set"],
        "sweep": ["sweep", settings, "--grid", "objective.beta=1,2", "-o"],
        "report": ["report", str(tmp_path / "run"), "--out"],
        "bench": ["bench", "--seconds", "0.001", "--out"],
    }


def place_of(kind, tmp_path):
    """A path where no folder can be made, even by root, whom permissions do not hold back."""
    (tmp_path / "file").write_text("mine")
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file/deep/er", "read-only": "/proc/1/made"}[kind]


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
@pytest.mark.parametrize("verb", ["demo", "encode", "cache-reference", "train", "sweep", "report", "bench"])
def test_an_output_folder_that_cannot_be_written_is_one_line(commands, tiny_config, tmp_path, capfd, verb, kind):
    place = place_of(kind, tmp_path)
    if verb == "report":
        train(tiny_config(training={"steps": 1}), display="none")
    where = f"output.dir={place}" if verb == "train" else str(place)
    assert main([*commands[verb], where]) == 3
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert [line.startswith("error: ") for line in said] == [True] and str(place)[:12] in said[0], said
    assert (tmp_path / "file").read_text() == "mine"
