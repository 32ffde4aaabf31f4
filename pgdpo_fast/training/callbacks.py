"""What a run does beside training, every so many steps: sample clips, probe the one-step advantage, or a user's own.

A configuration names callbacks like objectives, by a name of the list below or by import path, each with its own
settings. They look at the run and write files of their own; what is trained never depends on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgdpo_fast.analysis.displacement import FILE, one_step_advantage
from pgdpo_fast.analysis.runs import read_rows
from pgdpo_fast.analysis.sampling import sample
from pgdpo_fast.data.codec import Codec, DiffusersVAECodec, PixelUnshuffleCodec
from pgdpo_fast.data.video import write_video
from pgdpo_fast.diffusion.draw import Visit
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelAdapter
from pgdpo_fast.named import Registry
from pgdpo_fast.objectives import DPO, Objective
from pgdpo_fast.options import setting
from pgdpo_fast.preemption import Stopping
from pgdpo_fast.storage import atomic_file

__all__ = ["CALLBACKS", "AdvantageProbe", "Callback", "SampleClips", "TrainingRun"]


class TrainingRun(Protocol):
    """What callbacks may use of the run they are given, a `pgdpo_fast.training.run.Run`.

    The configuration's checks need the list below, so nothing that knows the configuration is named here.
    """

    config: Any  # TrainConfig
    root: Path
    device: torch.device
    adapter: ModelAdapter
    policy: nn.Module
    reference: Callable[[Any], Any]
    objective: Objective
    optimizer: Any
    order: Any  # PairOrder
    loader: Any  # PairLoader
    held_out: Sequence[Visit]
    last_evaluation: Mapping[str, Any] | None
    stopping: Stopping
    note: Callable[[str], None]

    def read(self, step: int) -> list[tuple[Sequence[Visit], Any]]: ...

    def loss_options(self, batch: Any) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class Callback:
    """Base of all callbacks: a dataclass whose fields are its settings.

    It is called without gradients, before the checkpoint of its step is written; a resumed run calls it again for the
    step it resumes at, so it writes what belongs to a step whole (`pgdpo_fast.storage.atomic_file`) or over.
    """

    every: int = setting(
        0, "steps between calls, and one at the end; 0: with every evaluation", minimum=0, decides="nothing"
    )

    def start(self, run: TrainingRun) -> None:
        """Called once before the first step; raises ConfigError where the settings do not fit the run."""

    def __call__(self, step: int, run: TrainingRun) -> None:
        """Called when `step` steps are made; long work returns once `run.stopping()` is true, which it asks often."""
        raise NotImplementedError


@dataclass(kw_only=True)
class AdvantageProbe(Callback):
    """Measures the one-step advantage over DPO and writes it to `displacement.jsonl`, for the report.

    It uses the pairs of the coming step, DPO with the objective's own beta, and the run's learning rate. A resumed run
    rewrites the rows it makes again.
    """

    baseline_beta: float | None = setting(
        None, "beta of the DPO compared with; unset means the objective's, or 100", above=0, decides="nothing"
    )

    def __call__(self, step: int, run: TrainingRun) -> None:
        visits, tensors = run.read(step)[0]
        batch = run.loader.noise(visits, tensors)
        reference = run.reference(batch)
        trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
        baseline = DPO(beta=self.baseline_beta or getattr(run.objective, "beta", 100.0))

        def predict() -> Tensor:
            return run.adapter.predict(run.policy, batch)

        rate = run.optimizer.learning_rate(step)
        found = one_step_advantage(
            predict,
            trained,
            batch.target,
            reference,
            baseline=baseline,
            learning_rate=rate,
            pair_weight=batch.weight,
            exact=all(parameter.dtype == torch.float32 for parameter in trained),
            **run.loss_options(batch),
        )
        path = run.root / FILE
        rows = [row for row in (read_rows(path) if path.exists() else []) if row["step"] < step]
        rows.append(
            {
                "step": step,
                "ids": [visit.id for visit in visits],
                "learning_rate": rate,
                "baseline_beta": baseline.beta,
                "advantage": found.first_order if found.exact is None else found.exact,
                "first_order": found.first_order,
                "objective_change": found.objective_change,
                "baseline_change": found.baseline_change,
            }
        )
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclass(kw_only=True)
class SampleClips(Callback):
    """Samples the policy and writes `samples/step_NNNNNNNN/NN.mp4`, the same prompts from the same noise every time.

    The prompts are those of the first held-out pairs, or of the first pairs where none are held out; `prompts.json`
    beside the folders lists them by number. Clips that are already there are kept.
    """

    clips: int = setting(4, "prompts that are sampled", minimum=1, decides="nothing")
    steps: int = setting(32, "steps of the deterministic sampler", minimum=1, decides="nothing")
    fps: float = setting(16.0, "frames per second of the files", above=0, decides="nothing")
    vae: str = setting(
        "", "diffusers folder or hub id of the VAE that decodes; empty means model.path", decides="nothing"
    )

    def start(self, run: TrainingRun) -> None:
        if self._codec_settings(run)["class"] != "PixelUnshuffleCodec" and not self._vae(run):
            raise ConfigError(
                "callbacks: sample needs the VAE to decode with and model.path is not set; set vae, the folder or hub "
                "id of a diffusers model"
            )

    def __call__(self, step: int, run: TrainingRun) -> None:
        store = run.loader.store
        ids = list(dict.fromkeys(visit.id for visit in run.held_out)) or run.order.ids
        examples = list({store.row(id)["prompt"]: id for id in reversed(ids)}.values())[::-1][: self.clips]
        folder = run.root / "samples" / f"step_{step:08d}"
        waiting = [n for n in range(len(examples)) if not (folder / f"{n:02d}.mp4").exists()]
        if not waiting:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(run.root / "samples" / "prompts.json") as temporary:
            prompts = [{"id": id, "prompt": store.row(id)["prompt"]} for id in examples]
            temporary.write_text(json.dumps(prompts, ensure_ascii=False, indent=1), encoding="utf-8")
        codec = self._codec(run)
        for number in waiting:
            if run.stopping():
                return
            example = store.get(examples[number])
            latents = sample(
                run.adapter,
                run.policy,
                run.loader.process,
                [example.conditioning],
                store.shape,
                seed=run.config.training.seed,
                ids=[f"sample {example.id}"],
                steps=self.steps,
            )
            write_video(folder / f"{number:02d}.mp4", codec.decode(latents[0]), self.fps)
        run.note(f"sampled {len(waiting)} clips at step {step} into {folder}")

    def _codec_settings(self, run: TrainingRun) -> dict:
        return run.loader.store.settings["codec"]

    def _vae(self, run: TrainingRun) -> str:
        return self.vae or run.config.model.path or ""

    def _codec(self, run: TrainingRun) -> Codec:
        made = self._codec_settings(run)
        if made["class"] == "PixelUnshuffleCodec":
            return PixelUnshuffleCodec(spatial=made["spatial"], temporal=made["temporal"])
        return DiffusersVAECodec(Path(self._vae(run)), run.adapter.latents, device=str(run.device))


CALLBACKS = Registry("callback", Callback, {"sample": SampleClips, "advantage": AdvantageProbe})
