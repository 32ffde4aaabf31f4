"""Preference pairs of moving shapes: a clean clip against the same scene broken the way video models break it.

Everything follows from (seed, pair number): scene, prompt, fault and severity. The clips are real H.264 files with a
plain manifest, so the whole way from file to report can be walked, and tested, without any download.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from pgdpo_fast.data.manifest import Pair, write_manifest
from pgdpo_fast.data.video import write_video
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.options import choice
from pgdpo_fast.preemption import check_stop

__all__ = ["DISTANCES", "FAULTS", "Scene", "make_scene", "render_pairs", "render_scene"]

COLOURS = {
    "red": (0.90, 0.16, 0.18),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.97, 0.86, 0.20),
    "green": (0.15, 0.68, 0.30),
    "cyan": (0.15, 0.75, 0.80),
    "blue": (0.16, 0.32, 0.88),
    "purple": (0.56, 0.24, 0.76),
    "white": (0.96, 0.96, 0.94),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted")
MOTIONS = {
    "right": "moves from left to right",
    "left": "moves from right to left",
    "up": "rises from the bottom to the top",
    "down": "falls from the top to the bottom",
    "orbit": "circles around the centre",
    "bounce": "bounces across the floor",
    "zoom": "comes closer and grows",
}
BACKGROUNDS = {
    "gradient": "a smooth {} background",
    "checker": "a {} checkered background",
    "waves": "a wavy {} background",
}
FAULTS = ("flicker", "jitter", "freeze", "blur", "morph")
DISTANCES = {"near": (0.15, 0.45), "far": (0.65, 1.0), "mixed": (0.15, 1.0)}  # range of the severity of a fault


@dataclass(frozen=True)
class Scene:
    """One shape with a colour and a texture, moving in front of a background. `size` is a share of the short side."""

    shape: str
    colour: str
    texture: str
    motion: str
    background: str
    background_colour: str
    size: float
    spin: float
    phase: float

    @property
    def prompt(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        background = BACKGROUNDS[self.background].format(self.background_colour)
        article = "an" if self.colour.startswith("o") else "a"
        return f"{article} {self.colour} {texture}{self.shape} {MOTIONS[self.motion]} over {background}"


@dataclass(frozen=True)
class _Frames:
    """Per-frame state, each `[F]`: place of the shape, its scale, turn and morph, and place of the camera."""

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    turn: torch.Tensor
    morph: torch.Tensor
    camera_x: torch.Tensor
    camera_y: torch.Tensor


def render_pairs(
    directory: str | os.PathLike,
    pairs: int = 96,
    seed: int = 0,
    *,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    fps: float = 8,
    distance: str = "far",
    scene_of: Callable[[random.Random], Scene] | None = None,
) -> Path:
    """Render preference pairs to `directory/clips/*.mp4` and return the path of `directory/manifest.jsonl`.

    The chosen clip is clean, with score 1; the rejected one shows the same scene with one of FAULTS at a severity s
    drawn from the range of `distance` ("near": mild, "far": gross, "mixed": both) and has score 1 - s. `scene_of`
    draws the scene in place of `make_scene`. Same arguments, same bytes. Raises ConfigError on impossible arguments.
    """
    choice("distance", distance, DISTANCES)
    for name, value, least in (
        ("pairs", pairs, 1),
        ("frames", frames, 2),
        ("height", height, 16),
        ("width", width, 16),
    ):
        if value < least:
            raise ConfigError(f"{name}={value}; expected at least {least}")
    directory = Path(directory).absolute()
    rows = []
    for number in range(pairs):
        check_stop()
        draw = random.Random(hashlib.blake2b(f"{seed}|{number}".encode(), digest_size=16).digest())
        scene = (scene_of or make_scene)(draw)
        fault = FAULTS[number % len(FAULTS)]
        severity = round(draw.uniform(*DISTANCES[distance]), 4)
        noise = torch.Generator().manual_seed(draw.getrandbits(62))
        clips = directory / "clips"
        chosen = write_video(clips / f"{number:04d}_chosen.mp4", render_scene(scene, frames, height, width), fps)
        broken = render_scene(scene, frames, height, width, fault=fault, severity=severity, noise=noise)
        rejected = write_video(clips / f"{number:04d}_rejected.mp4", broken, fps)
        rows.append(
            Pair(
                id=f"{number:04d}-{fault}",
                prompt=scene.prompt,
                chosen=chosen,
                rejected=rejected,
                chosen_score=1.0,
                rejected_score=round(1 - severity, 4),
            )
        )
    return write_manifest(directory / "manifest.jsonl", rows)


def make_scene(draw: random.Random) -> Scene:
    """Draw a scene; shape and background never share their colour."""
    colour, background_colour = draw.sample(list(COLOURS), 2)
    return Scene(
        draw.choice(SHAPES),
        colour,
        draw.choice(TEXTURES),
        draw.choice(list(MOTIONS)),
        draw.choice(list(BACKGROUNDS)),
        background_colour,
        draw.uniform(0.17, 0.25),
        draw.choice((-1, 1)) * draw.uniform(0.2, 0.5),
        draw.random(),
    )


def render_scene(
    scene: Scene,
    frames: int,
    height: int,
    width: int,
    *,
    fault: str | None = None,
    severity: float = 0.0,
    noise: torch.Generator | None = None,
) -> torch.Tensor:
    """uint8 [frames, height, width, 3] of a scene, clean or with a fault at a severity in (0, 1] drawn from `noise`.

    flicker: brightness and tint jump from frame to frame. jitter: the shape leaves its path at random and the camera
    shakes. freeze: frames stand still and then jump. blur: detail is lost, more as time goes on. morph: the shape
    swells, wobbles and turns into another one on its way.
    """
    if fault is not None and (fault not in FAULTS or not 0 < severity <= 1 or noise is None):
        raise ConfigError(
            f"fault={fault!r}, severity={severity}; expected one of {', '.join(FAULTS)}, a severity in (0, 1] "
            "and a noise generator"
        )
    state = _motion(scene, torch.linspace(0, 1, frames))
    if fault == "jitter":
        x, y, camera_x, camera_y = severity * torch.randn(4, frames, generator=noise) / 10
        state = replace(state, x=state.x + 2 * x, y=state.y + 2 * y, camera_x=camera_x, camera_y=camera_y)
    if fault == "morph":
        wobble = 1 + 0.45 * severity * torch.sin(torch.linspace(0, 4 * math.pi, frames))
        state = replace(state, scale=state.scale * wobble, morph=severity * torch.linspace(0, 1, frames).sqrt())
    if fault == "freeze":
        state = _held(state, 1 + round(severity * max(2, frames // 3)), noise)
    video = _paint(scene, state, height, width)  # fp32 [F, 3, H, W] in [0, 1]
    if fault == "flicker":
        gain = 1 + 0.5 * severity * torch.randn(frames, generator=noise).clamp(-1.5, 1.5)
        tint = 0.18 * severity * torch.randn(frames, 3, generator=noise)
        video = video * gain.view(-1, 1, 1, 1) + tint.view(-1, 3, 1, 1)
    if fault == "blur":
        video = _blurred(video, 0.06 * severity * min(height, width))
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _motion(scene: Scene, time: torch.Tensor) -> _Frames:
    """Positions in units of half the short side around the centre, y downwards, for times in [0, 1]."""
    across, still = 1.3 * time - 0.65, torch.full_like(time, 0.5 * scene.phase - 0.25)
    x, y, scale = still, still, torch.ones_like(time)
    if scene.motion in ("right", "left"):
        x = across if scene.motion == "right" else -across
    elif scene.motion in ("up", "down"):
        y = across if scene.motion == "down" else -across
    elif scene.motion == "orbit":
        angle = 2 * math.pi * (time + scene.phase)
        x, y = 0.5 * angle.cos(), 0.5 * angle.sin()
    elif scene.motion == "bounce":
        x, y = across, 0.55 - 1.1 * (2.5 * math.pi * time).sin().abs()
    elif scene.motion == "zoom":
        scale = 0.6 + 1.2 * time
    turn = 2 * math.pi * (scene.phase + scene.spin * time)
    still = torch.zeros_like(time)
    return _Frames(x, y, scale, turn, still, still, still)


def _held(state: _Frames, longest: int, noise: torch.Generator) -> _Frames:
    """Freeze: runs of up to `longest` + 1 frames repeat their first one, so motion stops and jumps."""
    source, frames = [], len(state.x)
    while len(source) < frames:
        run = int(torch.randint(longest, longest + 2, (), generator=noise))
        source += [len(source)] * run
    picks = torch.tensor(source[:frames])
    return _Frames(*(getattr(state, field.name)[picks] for field in fields(state)))


def _paint(scene: Scene, state: _Frames, height: int, width: int) -> torch.Tensor:
    """fp32 [F, 3, H, W]: background, soft shadow, and the shape with an antialiased edge one pixel wide."""
    half = min(height, width) / 2
    rows = ((torch.arange(height) + 0.5) - height / 2) / half
    columns = ((torch.arange(width) + 0.5) - width / 2) / half
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    y, x = y + state.camera_y.view(-1, 1, 1), x + state.camera_x.view(-1, 1, 1)
    background = _background(scene, x, y)

    def local(offset: float) -> tuple[torch.Tensor, torch.Tensor]:
        dx, dy = x - (state.x + offset).view(-1, 1, 1), y - (state.y + offset).view(-1, 1, 1)
        cos, sin = state.turn.cos().view(-1, 1, 1), state.turn.sin().view(-1, 1, 1)
        size = (2 * scene.size * state.scale).view(-1, 1, 1)
        return (cos * dx + sin * dy) / size, (cos * dy - sin * dx) / size

    edge = (2 * scene.size * state.scale).view(-1, 1, 1) * half
    u, v = local(0.0)
    other = SHAPES[(SHAPES.index(scene.shape) + 3) % len(SHAPES)]
    morph = state.morph.view(-1, 1, 1)
    distance = torch.lerp(_distance(scene.shape, u, v), _distance(other, u, v), morph)
    cover = (0.5 - distance * edge).clamp(0, 1)[:, None]
    shadow = (0.5 - _distance(scene.shape, *local(0.08)) * edge / 4).clamp(0, 1)[:, None]
    paint = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1)
    shade = (1.05 - 0.25 * (u + v)).clamp(0.75, 1.25)[:, None] * _texture(scene.texture, u, v)[:, None]
    video = background * (1 - 0.35 * shadow)
    return torch.lerp(video, (paint * shade).clamp(0, 1), cover)


def _background(scene: Scene, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """fp32 [F, 3, H, W], dim enough for any shape to stand out."""
    colour = torch.tensor(COLOURS[scene.background_colour]).view(3, 1, 1)
    if scene.background == "checker":
        level = 0.30 + 0.14 * ((x * 2).floor() + (y * 2).floor()).remainder(2)
    elif scene.background == "waves":
        level = 0.36 + 0.10 * (6 * y + 1.5 * (3 * x + 6 * scene.phase).sin()).sin()
    else:
        level = 0.36 + 0.16 * (y * math.cos(6 * scene.phase) + x * math.sin(6 * scene.phase)) / 1.4
    return colour * level[:, None]


def _texture(texture: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if texture == "striped":
        return 0.68 + 0.42 * torch.sigmoid(8 * (7 * u).sin())
    if texture == "dotted":
        return 1.08 - 0.48 * torch.sigmoid(6 * ((6 * u).sin() * (6 * v).sin() - 0.35) * 3)
    return torch.ones_like(u)


def _distance(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Distance to the outline of a shape of about unit radius, negative inside (exact or a close bound)."""
    if shape == "circle":
        return torch.hypot(u, v) - 1
    if shape == "ring":
        return (torch.hypot(u, v) - 0.75).abs() - 0.27
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.85
    if shape == "cross":
        a, b = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
        return torch.maximum(a - 1, b - 0.36)
    if shape == "triangle":
        return torch.maximum(math.sqrt(3) / 2 * u.abs() - 0.5 * v, v) - 0.55
    angle, radius = torch.atan2(u, -v), torch.hypot(u, v)  # star
    folded = (angle.remainder(2 * math.pi / 5) - math.pi / 5).abs()
    return radius * (folded + 0.70).cos() / math.cos(math.pi / 5) - 0.42


def _blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur whose width grows from 40% of `sigma` pixels in the first frame to all of it in the last."""
    reach = max(1, math.ceil(2.5 * sigma))
    offsets = torch.arange(-reach, reach + 1).float()
    out = []
    for frame, share in zip(video, torch.linspace(0.4, 1, len(video)), strict=True):
        kernel = torch.exp(-0.5 * (offsets / (sigma * float(share))) ** 2)
        kernel = kernel / kernel.sum()
        padded = F.pad(frame[:, None], (reach, reach, reach, reach), mode="replicate")
        rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
        out.append(F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0])
    return torch.stack(out)
