"""The stages of `pgdpo-fast demo`: clips, store, a small model trained from scratch, one pass of it as the reference,
two fine-tunings, clips from each.

Every stage leaves a folder that is whole or absent, and the trainings keep their state besides, so a demo that was
interrupted goes on where it stood. The numbers below were chosen for two CPU cores, where the 16 tokens a frame makes
keep a training step near a tenth of a second.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgdpo_fast.analysis.report import Clip, ClipRow, Report, render_report
from pgdpo_fast.analysis.sampling import sample
from pgdpo_fast.data.codec import PixelUnshuffleCodec
from pgdpo_fast.data.encode import encode_manifest
from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.data.synthetic import Scene, render_pairs
from pgdpo_fast.data.text import HashTextEncoder
from pgdpo_fast.diffusion import FlowMatching
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.loss import paired_errors
from pgdpo_fast.metrics import CHOSEN, MARGINS
from pgdpo_fast.models import ModelConfig, adapter_from_config
from pgdpo_fast.preemption import check_stop
from pgdpo_fast.reference.cache import ReferenceCache
from pgdpo_fast.storage import describe_bytes, hashed_shard, load_tensors, read_json, write_json, write_shard
from pgdpo_fast.training.batches import PairLoader, PairOrder, hold_out
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.reference_pass import cache_reference
from pgdpo_fast.training.trainer import train

__all__ = ["METHODS", "DemoSettings", "discard", "run_demo"]

Update = Callable[[float, str], None]  # share of the stage that is done, and what it says about itself

FPS, TEXT_DIM, TEXT_TOKENS = 8, 32, 16
STATE_EVERY = 10  # steps, a second's work, that an interrupted training from scratch makes again
BETA = 100.0
METHODS = {"DPO": {"name": "dpo", "beta": BETA}, "PG-DPO": {"name": "pgdpo", "beta": BETA}}
# Pixels are small numbers beside unit noise (standard deviation 0.4), so noise levels are shifted towards clean.
PROCESS = {"name": "flow-matching", "shift": 0.5}


@dataclass(frozen=True)
class DemoSettings:
    """What decides the result of a demo."""

    seed: int = 0
    pairs: int = 240
    held_out: int = 16
    frames: int = 9
    side: int = 24
    rendered_side: int = 96
    width: int = 128
    layers: int = 2
    pretraining_steps: int = 800
    pretraining_pairs: int = 8
    steps: int = 150
    pairs_per_step: int = 4
    learning_rate: float = 3e-5
    evaluations: int = 15
    evaluation_draws: int = 4
    clip_rows: int = 3
    sampler_steps: int = 32

    @classmethod
    def fast(cls, seed: int = 0) -> DemoSettings:
        """Seconds instead of minutes: the same way with so little training that clips show nothing yet."""
        return cls(
            seed=seed,
            pairs=16,
            held_out=4,
            frames=5,
            rendered_side=48,
            width=64,
            layers=1,
            pretraining_steps=30,
            pretraining_pairs=4,
            steps=10,
            pairs_per_step=2,
            evaluations=5,
            evaluation_draws=2,
            clip_rows=1,
            sampler_steps=4,
        )

    @property
    def too_short(self) -> bool:
        """Whether less than a third of the default's training is left, where no method shows anything yet."""
        return 3 * self.steps < DemoSettings.steps or 3 * self.pretraining_steps < DemoSettings.pretraining_steps

    @property
    def codec(self) -> PixelUnshuffleCodec:
        return PixelUnshuffleCodec(spatial=self.side // 4)

    @property
    def process(self) -> FlowMatching:
        options = dict(PROCESS)
        del options["name"]
        return FlowMatching(**options)

    def architecture(self) -> dict[str, Any]:
        """A Wan transformer whose width exceeds a token's latents: a narrower one could not carry the noise through."""
        channels = 3 * self.codec.spatial**2
        return {
            "patch_size": [1, 1, 1],
            "num_attention_heads": 4,
            "attention_head_dim": self.width // 4,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "ffn_dim": 2 * self.width,
            "num_layers": self.layers,
            "rope_max_seq_len": 64,
        }


def run_demo(
    demo: DemoSettings, out: Path, stage: Callable[[str, float], Update], resume_command: str = "the same call again"
) -> Report:
    """Go through all stages into `out`.

    Args:
        stage: called as stage(title, weight) when one begins; returns what its progress is reported to. The
            weights of all stages add up to 1.
        resume_command: what a message after a signal names, whatever the stage.

    Raises:
        ConfigError: `out` holds a demo with other settings. DataError: it holds something else, or is damaged.
        Preempted: a signal came during encoding, the reference's pass or a fine-tuning; elsewhere the caller's block of
            `stoppable` raises it.
    """
    _claim(out, demo)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small lose more to waiting threads than they gain, on a busy machine tenfold
    try:
        return _run_stages(demo, out, stage, resume_command)
    finally:
        torch.set_num_threads(threads)


def _run_stages(demo: DemoSettings, out: Path, stage: Callable[[str, float], Update], resume_command: str) -> Report:
    clips = _render(demo, out / "clips", stage("Rendering clips", 0.04))
    store = _encode(demo, clips, out / "store", stage("Encoding them", 0.02), resume_command)
    base = _pretrain(demo, store, out / "base", stage("Training a video model from scratch", 0.55))
    configs = {label: _config(demo, store, base, out, objective) for label, objective in METHODS.items()}
    cache = _ask_reference(configs["DPO"], stage("Running the reference, once for both", 0.04), resume_command)
    checkpoints = {
        label: _fine_tune(config, stage(f"Fine-tuning with {label}", 0.15), resume_command)
        for label, config in configs.items()
    }
    rows = _sample(demo, store, {"base model": base, **checkpoints}, clips, stage("Sampling clips", 0.03))
    update = stage("Writing the report", 0.02)
    report = _report(demo, store, cache, out, rows)
    update(1.0, "")
    return report


def discard(out: Path) -> None:
    """Delete an earlier demo; a folder that is none is left alone, with a DataError."""
    if out.exists():
        if not (out / "demo.json").exists():
            raise DataError(f"--fresh: {out} holds no demo, nothing was deleted; choose a new folder with --out")
        shutil.rmtree(out)


def _claim(out: Path, demo: DemoSettings) -> None:
    """Make `out` this demo's folder, or see that it already is."""
    wanted, path = json.loads(json.dumps(vars(demo))), out / "demo.json"
    if path.exists():
        if different := [key for key, value in read_json(path).items() if wanted.get(key) != value]:
            raise ConfigError(
                f"--out {out}: holds a demo with another {', '.join(different)}; choose another folder, or "
                "start over with --fresh"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise DataError(f"--out {out}: not empty and no demo; choose a new folder")
    write_json(path, wanted)


def _whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Run `make` on a scratch folder that becomes `folder` once it is complete; nothing to do where it exists."""
    if folder.exists():
        return
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    make(scratch)
    os.replace(scratch, folder)


# -- data


def _scene(draw: random.Random) -> Scene:
    """Few enough kinds of scenes for a model of half a million weights."""
    return Scene(
        shape=draw.choice(("circle", "square")),
        colour=draw.choice(("red", "yellow", "green", "white")),
        texture="plain",
        motion=draw.choice(("right", "left", "up", "down")),
        background="gradient",
        background_colour="blue",
        size=draw.uniform(0.20, 0.22),
        spin=0.0,
        phase=0.5,
    )


def _render(demo: DemoSettings, folder: Path, update: Update) -> Path:
    def make(scratch: Path) -> None:
        render_pairs(
            scratch,
            demo.pairs,
            demo.seed,
            frames=demo.frames,
            height=demo.rendered_side,
            width=demo.rendered_side,
            fps=FPS,
            distance="far",
            scene_of=_scene,
        )

    _whole(folder, make)
    update(1.0, "")
    return folder


def _encode(demo: DemoSettings, clips: Path, folder: Path, update: Update, resume_command: str) -> LatentStore:
    return encode_manifest(
        clips / "manifest.jsonl",
        folder,
        codec=demo.codec,
        text=HashTextEncoder(TEXT_DIM),
        frames=demo.frames,
        height=demo.side,
        width=demo.side,
        fps=FPS,
        progress=lambda done, total: update(done / total, f"{done}/{total} pairs"),
        resume_command=resume_command,
    )


# -- training


def _model(path: Path, subfolder: str = "") -> dict[str, Any]:
    """The model section of a configuration that reads weights from `path`."""
    return {"path": str(path), "subfolder": subfolder, "dtype": "fp32", "train": "full", "text_tokens": TEXT_TOKENS}


def _pretrain(demo: DemoSettings, store: LatentStore, folder: Path, update: Update) -> Path:
    """Plain flow matching on both clips of every training pair: a model of the data as it is, good and bad."""

    def make(scratch: Path) -> None:
        adapter = adapter_from_config(
            ModelConfig(
                architecture=demo.architecture(),
                init_seed=demo.seed,
                dtype="fp32",
                train="full",
                text_tokens=TEXT_TOKENS,
            )
        )
        model = adapter.make_trainable(_align(adapter.load()))
        ids, _ = hold_out(store.ids, demo.held_out, demo.seed)
        order = PairOrder(ids, demo.pretraining_pairs, demo.seed)
        batches = PairLoader(store, demo.process, adapter.collate, demo.seed, torch.device("cpu"))
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        # Muon reaches AdamW's loss in three quarters of the steps here; embeddings, norms and both ends get AdamW.
        optimizers = (
            torch.optim.Muon(matrices, lr=0.03, weight_decay=0.0),
            torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0),
        )
        peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        state = _PretrainingState(folder.with_name(f"{folder.name}.state"), model, optimizers)
        for step in range(state.resume(), demo.pretraining_steps):
            check_stop()
            share = step / demo.pretraining_steps
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = (
                    peak * min(1, (step + 1) / 30) * (0.525 + 0.475 * math.cos(math.pi * share))
                )
            visits = order.visits(step)
            batch = batches.noise(visits, batches.read(visits))
            prediction = adapter.predict(model, batch)
            errors = paired_errors(prediction, batch.target)
            loss = (errors.policy_chosen + errors.policy_rejected).mean() / 2
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step % STATE_EVERY == STATE_EVERY - 1:
                state.save(step + 1)
                update(
                    (step + 1) / demo.pretraining_steps,
                    f"step {step + 1}/{demo.pretraining_steps}  loss {loss.item():.3f}",
                )
        adapter.export(model, scratch / "transformer")

    _whole(folder, make)
    shutil.rmtree(folder.with_name(f"{folder.name}.state"), ignore_errors=True)
    update(1.0, "")
    return folder


@dataclass(frozen=True)
class _PretrainingState:
    """Weights and moments of the training from scratch in one file of a folder, under its hash, by which a damaged one
    is known."""

    folder: Path
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]

    def save(self, step: int) -> None:
        """Keep the state after `step` steps in place of the one before."""
        before = self._files()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"{number}.{place}.{name}": moment for name, moment in moments.items()}
        write_shard(self.folder / "state.safetensors", tensors, description=str(step), durable=False, hashed=True)
        for file in before:
            file.unlink()

    def resume(self) -> int:
        """Take up the newest whole state; returns its number of steps, 0 where there is none."""
        found = [(int(whole[1]), file) for file in self._files() if (whole := hashed_shard(file))]
        if not found:
            return 0
        step, file = max(found)
        tensors = load_tensors(file)
        states: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            states.setdefault(owner, {})[rest] = tensor
        self.model.load_state_dict(states["model"])
        for number, optimizer in enumerate(self.optimizers):
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in states[str(number)].items():
                place, _, moment = name.partition(".")
                moments.setdefault(int(place), {})[moment] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return step

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))


def _align(model: nn.Module) -> nn.Module:
    """Start with the last layer undoing the first, both orthogonal: passing noise through is half of the task."""
    first, last = model.patch_embedding, model.proj_out
    nn.init.orthogonal_(first.weight.data.view(first.out_channels, -1), generator=torch.Generator().manual_seed(0))
    last.weight.data.copy_(first.weight.data.view(first.out_channels, -1).T)
    for bias in (first.bias, last.bias):
        nn.init.zeros_(bias)
    return model


class _Display:
    """The trainer's display, passed on to the demo's one progress line."""

    def __init__(self, update: Update):
        self.update = update

    def note(self, text: str) -> None:
        pass

    def step(self, row: Mapping[str, Any], last: int, health: Any) -> None:
        self.update(
            row["step"] / last,
            f"step {row['step']}/{last}  chosen {row[CHOSEN]:+.3f}  margin {row[MARGINS]:+.3f}",
        )

    def close(self) -> None:
        pass


def _config(demo: DemoSettings, store: LatentStore, base: Path, out: Path, objective: dict) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": _model(base),
            "data": {
                "store": str(store.path),
                "evaluation_pairs": demo.held_out,
                "split": "pair",  # 32 prompts, and clips of their own for every pair
                "reference_cache": str(out / "reference"),
            },
            "process": PROCESS,
            "objective": objective,
            "callbacks": [] if objective["name"] == "dpo" else [{"name": "advantage"}],
            "training": {
                "steps": demo.steps,
                "pairs_per_step": demo.pairs_per_step,
                "learning_rate": demo.learning_rate,
                "seed": demo.seed,
                "checkpoint_every": max(1, demo.steps // 2),
                "checkpoint_keep": 1,
                "evaluation_every": max(1, demo.steps // demo.evaluations),
                "evaluation_draws": demo.evaluation_draws,
                "device": "cpu",
            },
            "output": {"dir": str(out / "runs" / objective["name"]), "tensorboard": False},
        },
        origin="demo",
    )


def _ask_reference(config: TrainConfig, update: Update, resume_command: str) -> ReferenceCache:
    """The reference's errors at every draw the two runs share; neither then loads or runs it."""
    cache = cache_reference(
        config,
        config.data.reference_cache,
        progress=lambda done, total: update(done / total, f"{done}/{total} rows"),
        resume_command=resume_command,
    )
    update(1.0, "")
    return cache


def _fine_tune(config: TrainConfig, update: Update, resume_command: str) -> Path:
    result = train(config, display=_Display(update), resume_command=resume_command)
    update(1.0, "")
    return result.checkpoint


# -- clips and report


def _sample(
    demo: DemoSettings, store: LatentStore, models: Mapping[str, Path], clips: Path, update: Update
) -> list[ClipRow]:
    """Held-out prompts, each model from the same noise."""
    _, held_out = hold_out(store.ids, demo.held_out, demo.seed)
    examples = {example.prompt: example for example in map(store.get, held_out)}  # no prompt twice
    examples = list(examples.values())[: demo.clip_rows]
    columns = [
        ("data: chosen", [example.chosen for example in examples]),
        ("data: rejected", [example.rejected for example in examples]),
    ]
    for number, (label, path) in enumerate(models.items(), 1):
        subfolder = "weights" if (path / "weights").is_dir() else ""
        adapter = adapter_from_config(
            TrainConfig.from_mapping(
                {"model": _model(path, subfolder), "data": {"store": str(store.path)}, "output": {"dir": "-"}}
            ).model
        )
        latents = sample(
            adapter,
            adapter.load(),
            demo.process,
            [example.conditioning for example in examples],
            store.shape,
            seed=demo.seed,
            ids=[f"sample {example.id}" for example in examples],
            steps=demo.sampler_steps,
        )
        columns.append((label, latents))
        update(number / len(models), label)
    return [
        ClipRow(example.prompt, [Clip(label, demo.codec.decode(latents[row])) for label, latents in columns])
        for row, example in enumerate(examples)
    ]


def _report(demo: DemoSettings, store: LatentStore, cache: ReferenceCache, out: Path, rows: list[ClipRow]) -> Report:
    online = len(METHODS) * (demo.steps * demo.pairs_per_step + demo.held_out * demo.evaluation_draws)
    weights = sum(math.prod(shape) for shape in _shapes(out / "base"))
    introduction = (
        f"A Wan video transformer of {weights:,} weights was trained from scratch on pairs of small clips, good ones "
        "and broken ones alike. From that one starting point it was fine-tuned to prefer the good ones, "
        f"{demo.steps} steps with each of {' and '.join(METHODS)}: same pairs, same order, same noise, same learning "
        "rate. Only the loss differs."
    )
    note = (
        "Prompts of held-out pairs. All models start from the same noise; the data clips are shown as the model sees "
        f"them, {demo.side} by {demo.side} pixels."
    )
    facts = {
        "clips": f"{demo.pairs} pairs of H.264 files, {demo.rendered_side}×{demo.rendered_side}, {demo.frames} frames "
        f"at {FPS} frames per second; {demo.held_out} pairs held out",
        "latents": f"{'×'.join(map(str, store.shape))} (channels, frames, height, width), pixel-unshuffle",
        "pre-training": f"{demo.pretraining_steps} steps of {demo.pretraining_pairs} pairs, both clips, flow matching",
        "fine-tuning": f"{demo.steps} steps of {demo.pairs_per_step} pairs, learning rate {demo.learning_rate:g}",
        "reference": f"ran on {len(cache)} (pair, draw) rows once, not {online} times in {len(METHODS)} runs; kept in "
        f"{describe_bytes(cache.bytes)}, and neither run loaded it",
        "weights": weights,
        "sampler": f"{demo.sampler_steps} Euler steps",
    }
    return render_report(
        [out / "runs" / objective["name"] for objective in METHODS.values()],
        out,
        title="PG-DPO and DPO on a small video model",
        introduction=introduction,
        clips=rows,
        clips_note=note,
        fps=FPS,
        facts=facts,
        inconclusive=(
            f"{demo.steps} steps from a model trained for {demo.pretraining_steps} are too few to show anything"
            if demo.too_short
            else ""
        ),
    )


def _shapes(base: Path):
    from safetensors import safe_open

    for file in sorted((base / "transformer").glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():
                yield weights.get_slice(key).get_shape()
