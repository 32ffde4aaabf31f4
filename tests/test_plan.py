"""A plan needs no store: a number of pairs or a manifest, and the size of the clips, stand for it."""

import json

import pytest

from pgdpo_fast.cli import main
from pgdpo_fast.data.codec import planned_shape
from pgdpo_fast.families import FAMILIES
from pgdpo_fast.models import adapter_class
from pgdpo_fast.training.config import load_config
from pgdpo_fast.training.plan import ComingStore


@pytest.fixture
def settings(tiny_config, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(tiny_config().to_yaml())
    return path


def test_a_plan_before_encoding_is_that_of_the_store_to_come(settings, capsys):
    flags = ["--set", "data.store=''", "output.dir=''", "data.evaluation_pairs=0"]
    size = ["--frames", "9", "--height", "32", "--width", "48"]
    assert main(["plan", str(settings), "--pairs", "7", *size, "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 7
    shape = ComingStore.of(load_config(settings), ["a"], 9, 32, 48).shape
    assert shape == (16, 3, 4, 6)  # Wan: 16 channels, 4 frames and 8 pixels to one


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_latents_its_published_vae_makes(family):
    rule, clip = adapter_class(family).latents, adapter_class(family).clip
    channels, frames, height, width = planned_shape(None, rule, clip.frames, clip.height, clip.width)
    others = {"ltx": (128, 8, 32), "mochi": (12, 6, 8), "unet3d": (4, 1, 8), "videocrafter2": (4, 1, 8)}
    compressed = others.get(family, (16, 4, 8))
    assert channels == compressed[0] and frames == (clip.frames - 1) // compressed[1] + 1
    assert (height, width) == (clip.height // compressed[2], clip.width // compressed[2])


def test_a_plan_from_a_manifest_counts_its_pairs(settings, tiny_store, capsys):
    manifest = next((tiny_store.parent / "clips").glob("*.jsonl"))
    assert main(["plan", str(settings), "--json", "--manifest", str(manifest)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["pairs"] == 8 and plan["held_out"] == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pairs", "5", "--frames", "10"], "frames=10"),
        (["--frames", "9"], "--frames: the clips of a store have their size"),
        (["--pairs", "-1"], "--pairs -1"),
        (["--pairs", "2"], "data.evaluation_pairs=2"),
        (["--pairs", "2", "--manifest", "x.csv"], "--pairs and --manifest"),
        (["--pairs", "9", "--set", "model.architecture={}", "model.path=absent"], "absent: no AutoencoderKLWan"),
        (["--set", "data.store=''"], "data.store: required"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(settings, capsys, flags, named):
    assert main(["plan", str(settings), *flags]) in (2, 3)
    assert named in capsys.readouterr().err
