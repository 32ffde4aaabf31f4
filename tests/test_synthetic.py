"""The demo clips are real files, repeatable, described by their prompts, and broken as much as their scores say."""

from __future__ import annotations

import random

import pytest
import torch

from pgdpo_fast.data.manifest import read_manifest
from pgdpo_fast.data.synthetic import FAULTS, MOTIONS, SHAPES, Scene, make_scene, render_pairs, render_scene
from pgdpo_fast.data.video import probe_video, read_video
from pgdpo_fast.errors import ConfigError

SCENE = Scene("square", "red", "plain", "right", "checker", "blue", 0.2, 0.3, 0.1)


def render(fault=None, severity=0.0, scene=SCENE, seed=0, size=64):
    noise = torch.Generator().manual_seed(seed)
    return render_scene(scene, 17, size, size, fault=fault, severity=severity, noise=noise).float()


def test_rendered_pairs_are_a_valid_manifest_of_h264_clips(tmp_path):
    manifest = read_manifest(render_pairs(tmp_path, pairs=5, seed=1, frames=9, height=32, width=48, fps=12))
    assert len(manifest) == 5 and not manifest.dropped
    for pair in manifest.pairs:
        for path in (pair.chosen, pair.rejected):
            info = probe_video(path)
            assert (info.frames, info.fps, info.height, info.width) == (9, 12, 32, 48)
        assert pair.chosen_score == 1.0 and 0 <= pair.rejected_score < 1
        assert not torch.equal(read_video(pair.chosen), read_video(pair.rejected))
    assert {pair.id.split("-")[1] for pair in manifest.pairs} == set(FAULTS)


def test_the_seed_decides_every_byte_and_the_number_of_pairs_changes_none(tmp_path):
    size = dict(frames=5, height=16, width=16)
    first, second, other = (render_pairs(tmp_path / name, pairs, seed, **size).parent
                            for name, pairs, seed in (("a", 2, 7), ("b", 3, 7), ("c", 2, 8)))  # fmt: skip
    clips = sorted(path.name for path in (first / "clips").iterdir())
    assert all((first / "clips" / name).read_bytes() == (second / "clips" / name).read_bytes() for name in clips)
    assert any((first / "clips" / name).read_bytes() != (other / "clips" / name).read_bytes() for name in clips)
    assert (second / "manifest.jsonl").read_text().startswith((first / "manifest.jsonl").read_text())


def test_near_pairs_are_closer_than_far_ones_in_scores_and_pixels(tmp_path):
    gaps, pixels = {}, {}
    for distance in ("near", "far"):
        pairs = read_manifest(render_pairs(tmp_path / distance, 10, frames=9, distance=distance)).pairs
        gaps[distance] = [pair.chosen_score - pair.rejected_score for pair in pairs]
        clips = [(read_video(pair.chosen).float(), read_video(pair.rejected).float()) for pair in pairs]
        pixels[distance] = sum((chosen - rejected).abs().mean() for chosen, rejected in clips)
    assert max(gaps["near"]) < min(gaps["far"]) and pixels["near"] < 0.7 * pixels["far"]
    with pytest.raises(ConfigError, match="near, far, mixed"):
        render_pairs(tmp_path, distance="middling")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_grows_with_its_severity(fault):
    clean = render()
    change = [sum((render(fault, severity, seed=seed) - clean).abs().mean() for seed in range(4)) / 4
              for severity in (0.2, 0.6, 1.0)]  # fmt: skip
    assert 0.1 < change[0] < change[1] < change[2]


def motion_of(video):
    return (video[1:] - video[:-1]).abs().mean((1, 2, 3))


def sharpness_of(video):
    return (video[:, 1:] - video[:, :-1]).square().mean((1, 2, 3))


def red_in(video):
    return ((video[..., 0] > 100) & (video[..., 2] < 90)).float()


def column_of(video):
    return (red_in(video) * torch.arange(64)).sum((1, 2)) / red_in(video).sum((1, 2))


def test_each_fault_is_the_failure_it_is_named_after():
    clean = render()
    assert render("flicker", 0.8).mean((1, 2, 3)).std() > 10 * clean.mean((1, 2, 3)).std()
    assert (motion_of(render("freeze", 0.8)) == 0).sum() >= 6 and (motion_of(clean) == 0).sum() == 0
    blurred = sharpness_of(render("blur", 0.8))
    assert blurred[0] < 0.8 * sharpness_of(clean)[0] and blurred[-1] < 0.6 * blurred[0]
    assert column_of(render("jitter", 0.8)).diff(n=2).abs().mean() > 5 * column_of(clean).diff(n=2).abs().mean()
    area = red_in(render("morph", 0.8)).sum((1, 2))
    assert area.max() > 1.6 * area.min()
    assert red_in(clean).sum((1, 2)).std() < 0.1 * red_in(clean).sum((1, 2)).mean()


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_shape_moves_as_the_prompt_says(motion):
    scene = Scene("circle", "red", "plain", motion, "gradient", "blue", 0.2, 0.3, 0.1)
    video = render(scene=scene)
    red = red_in(video)
    area = red.sum((1, 2))
    x, y = ((red * grid).sum((1, 2)) / area for grid in (torch.arange(64), torch.arange(64).view(-1, 1)))
    moved = {"right": x[-1] - x[0], "left": x[0] - x[-1], "up": y[0] - y[-1], "down": y[-1] - y[0],
             "zoom": area[-1].sqrt() - area[0].sqrt(), "bounce": y.max() - y.min(),
             "orbit": x.max() - x.min()}  # fmt: skip
    assert moved[motion] > 8 and MOTIONS[motion] in scene.prompt and "red circle" in scene.prompt


def test_scenes_use_every_shape_and_prompts_tell_them_apart():
    scenes = [make_scene(random.Random(seed)) for seed in range(200)]
    assert {scene.shape for scene in scenes} == set(SHAPES) and len({scene.prompt for scene in scenes}) > 180
    assert all(scene.colour != scene.background_colour for scene in scenes)
    assert all(scene.prompt.startswith("an o") == scene.colour.startswith("o") for scene in scenes)
