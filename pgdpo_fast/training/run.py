"""Everything one run is made of, put together and checked once, and what it writes: rows, checkpoints, settings."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgdpo_fast.devices import select_device
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.loss import FRAME_DIM, ReferenceErrors
from pgdpo_fast.metrics import CHOSEN, MARGINS
from pgdpo_fast.models import ModelAdapter
from pgdpo_fast.objectives import REGISTRY, Objective
from pgdpo_fast.options import as_typed, choice
from pgdpo_fast.preemption import Stopping
from pgdpo_fast.storage import atomic_file, sha256_file
from pgdpo_fast.training.batches import Batch, HostBatch, PairLoader, PairOrder, Visit
from pgdpo_fast.training.cached_reference import CachedReference
from pgdpo_fast.training.callbacks import CALLBACKS
from pgdpo_fast.training.checkpoint import Checkpoints, check_checkpoint, find_checkpoint
from pgdpo_fast.training.config import CHANGEABLE, TrainConfig
from pgdpo_fast.training.network import open_network
from pgdpo_fast.training.optimizer import MasterAdamW
from pgdpo_fast.training.reference import AdapterOffReference, CopyReference, ReferenceProvider
from pgdpo_fast.training.telemetry import MetricsFile, PreferenceHealth, TensorBoard

__all__ = ["FILES", "Run"]

# What a run writes right into its folder; none may be a link to somewhere else.
FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "evaluation.jsonl",
    "displacement.jsonl",
    "log.txt",
    "checkpoints",
    "samples",
    "tensorboard",
)


@dataclass
class Run:
    """The parts of a run; `assemble` makes them, the loop in `trainer` uses them."""

    config: TrainConfig
    root: Path
    note: Callable[[str], None]
    device: torch.device
    adapter: ModelAdapter
    policy: nn.Module
    reference: ReferenceProvider
    objective: Objective
    optimizer: MasterAdamW
    order: PairOrder
    loader: PairLoader
    held_out: list[Visit]
    evaluation_loader: PairLoader
    checkpoints: Checkpoints
    health: PreferenceHealth
    metrics: MetricsFile
    evaluations: MetricsFile
    callbacks: list[Callable[[int, Run], None]]
    tensorboard: TensorBoard | None = None
    stopping: Stopping = field(default_factory=Stopping)
    resumed_from: Path | None = None
    last_evaluation: Mapping[str, Any] | None = None
    evaluation_reference: dict[int, ReferenceErrors] = field(default_factory=dict)

    @classmethod
    def assemble(cls, config: TrainConfig, note: Callable[[str], None]) -> Run:
        """Open the store, load and check the network, and put everything on its device.

        Raises:
            ConfigError, DataError: the parts do not fit each other; all misfits of store and network in one message.
        """
        options, device = config.training, select_device(config.training.device, "training.device")
        opened = open_network(config, device)
        store, split, adapter, network, start = opened
        objective, process = config.build_objective(), config.build_process()
        loss = {"objective": objective, "granularity": options.granularity, "backend": options.backend}
        reference = None
        if config.reference_mode == "cached":
            reference = CachedReference.open(config, opened, device)
        elif config.reference_mode == "copy":
            reference = CopyReference(adapter, network, **loss)
        policy = adapter.make_trainable(network)
        reference = reference or AdapterOffReference(adapter, policy, **loss)
        if config.model.compile:
            for model in {id(model): model for model in (policy, *reference.networks)}.values():
                adapter.compile(model)
        optimizer = MasterAdamW(
            policy,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            warmup_steps=options.warmup_steps,
        )
        root = Path(config.output.dir)
        loader = partial(PairLoader, store, process, adapter.collate, options.seed, device)
        # what decides nothing may change between the parts of a run
        identity = config.deciding("numbers", "reference", without=["store"])
        del identity["data.split"]
        identity |= {"store.fingerprint": store.fingerprint, **split.setting}
        if start:
            identity["model.start (content)"] = [sha256_file(file) for file in sorted(start.glob("*.safetensors"))]
        checkpoints = Checkpoints(
            root / "checkpoints", adapter, policy, optimizer, json.loads(json.dumps(identity)), options.checkpoint_keep
        )
        return cls(
            config=config,
            root=root,
            note=note,
            device=device,
            adapter=adapter,
            policy=policy,
            reference=reference,
            objective=objective,
            optimizer=optimizer,
            order=PairOrder(split.training, options.pairs_per_step, options.seed, options.draws_per_pair),
            loader=loader(strata=max(1, options.draws_per_pair)),
            evaluation_loader=loader(strata=options.evaluation_draws),
            held_out=[Visit(pair, draw) for draw in range(options.evaluation_draws) for pair in split.held_out],
            checkpoints=checkpoints,
            health=PreferenceHealth(getattr(objective, "beta", None)),
            metrics=MetricsFile(root / "metrics.jsonl", PreferenceHealth.NUMBERS, PreferenceHealth.PAIR_NUMBERS),
            evaluations=MetricsFile(root / "evaluation.jsonl", (CHOSEN, MARGINS), ("chosen", "margin", "timestep")),
            callbacks=config.build_callbacks(),
        )

    # -- going on

    def resume(self, resume: str | Path, change: Sequence[str] = ()) -> int:
        """Take up the state `resume` asks for and return the number of steps already made.

        Args:
            change: settings that may be others than the checkpoint's; what did change is a line of changes.jsonl.

        Raises:
            ConfigError: the run directory is taken, or a setting differs from the checkpoint's.
            DataError: the checkpoint is missing or damaged, or the disk cannot hold the coming ones.
        """
        step, found, changed = 0, None, {}
        for key in change:
            choice("--change", key, CHANGEABLE)
        if resume == "never":
            if self.metrics.path.exists() or self.checkpoints.root.exists():
                raise ConfigError(
                    f"output.dir={str(self.root)!r} already holds a run; choose another one, or --resume auto"
                )
        elif resume == "auto":
            found = find_checkpoint(self.checkpoints.root, self.note)
        else:
            found = Path(resume), check_checkpoint(Path(resume))
        if found:
            self.resumed_from, manifest = found
            step, changed = self.checkpoints.load(self.resumed_from, manifest, change)
            if step > self.config.training.steps:
                raise ConfigError(
                    f"training.steps={self.config.training.steps}: {self.resumed_from} is at step {step} already"
                )
        self.checkpoints.check_space()
        # rows after the checkpoint describe steps that will be made again
        for row in self.metrics.keep_until(step, self.note):
            self.health.update(row)
        for row in self.evaluations.keep_until(step if self.resumed_from else -1, self.note):
            self.last_evaluation = row
        self.tensorboard = TensorBoard(self.root / "tensorboard", self.config.output.tensorboard, purge_step=step + 1)
        with atomic_file(self.root / "config.yaml") as temporary:
            temporary.write_text(self.config.to_yaml(), encoding="utf-8")
        if changed:
            said = ", ".join(f"{key} {as_typed(was)} -> {as_typed(now)}" for key, (was, now) in changed.items())
            self.note(f"changed at step {step}: {said}")
            with (self.root / "changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "from": str(self.resumed_from), "changed": changed}) + "\n")
        # code named in the configuration is no package with a version
        sources = REGISTRY.sources(self.objective)
        for callback in self.config.build_callbacks():
            sources |= CALLBACKS.sources(callback)
        with atomic_file(self.root / "environment.json") as temporary:
            temporary.write_text(
                json.dumps(_environment(self.device) | {"sources": sources}, indent=1), encoding="utf-8"
            )
        return step

    def announce(self, step: int) -> None:
        """Say what is about to run."""
        model, options = self.config.model, self.config.training
        trained = sum(parameter.numel() for parameter in self.optimizer.parameters.values())
        total = sum(parameter.numel() for parameter in self.policy.parameters())
        weights = ", ".join(f"{count:,} {kind}" for kind, count in self.adapter.count_dtypes(self.policy).items())
        pairs, held = len(self.order.ids), len(self.held_out) // options.evaluation_draws
        chosen = [
            key
            for key in self.config.objective
            if key == "beta" or (key != "name" and self.config.origins[f"objective.{key}"] != "default")
        ]
        objective = ", ".join(f"{key}={as_typed(self.config.objective[key])}" for key in chosen)
        visits = options.steps * options.pairs_per_step / pairs
        lines = [
            f"run        {self.root} on {_device_name(self.device)}",
            f"model      {model.family} {model.path or 'with random weights'}, {model.train}: "
            f"trains {trained:,} of {total:,} weights ({weights})",
            f"reference  {self.reference.cost()}",
            f"objective  {self.config.objective['name']} ({objective}), {options.granularity} granularity",
            f"data       {pairs} pairs of latents {'x'.join(map(str, self.loader.store.shape))}, {held} held out; "
            f"{options.steps} steps of {options.pairs_per_step} pairs in {options.accumulation} forward(s), "
            f"{visits:.1f} visits per pair",
            f"state      continues {self.resumed_from} at step {step}" if step else "state      starts at step 0",
        ]
        if model.compile:
            lines.append("compiling the repeated blocks: the first steps take longer")
        for line in lines:
            self.note(line)

    # -- the parts of a step

    def read(self, step: int) -> list[tuple[list[Visit], HostBatch]]:
        """The visits of a step and their tensors on the host, one entry per forward."""
        visits, count = self.order.visits(step), self.config.training.accumulation
        size = len(visits) // count
        parts = [visits[i * size : (i + 1) * size] for i in range(count)]
        for part in parts:
            self.reference.prefetch(part)
        return [(part, self.loader.read(part)) for part in parts]

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        """Arguments of `preference_loss` that stay the same from step to step, and the timestep's posterior scale."""
        scale = self.loader.process.posterior_scale(batch.timestep) if self.objective.needs_posterior_scale else None
        return {
            "objective": self.objective,
            "granularity": self.config.training.granularity,
            "frame_dim": FRAME_DIM,
            "backend": self.config.training.backend,
            "posterior_scale": scale,
        }

    def record(self, step: int, row: dict[str, Any], seconds: float, waited: float) -> None:
        """Complete the row of a finished step in place and write it."""
        row |= {
            "step": step,
            "time": time.time(),
            "lr": self.optimizer.learning_rate(step - 1),
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "peak_memory_gib": _peak_memory(self.device) / 2**30,
        }
        self.health.update(row)
        row["alarms"] = self.health.alarms()
        self.metrics.append(row)
        self.tensorboard.write(row, "train")

    def save(self, step: int) -> Path:
        """Write a checkpoint of `step` finished steps."""
        self.metrics.sync()
        started = time.perf_counter()
        path = self.checkpoints.save(step)
        self.note(f"saved {path} in {time.perf_counter() - started:.1f} s")
        return path


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of the process: device memory on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _environment(device: torch.device) -> dict[str, Any]:
    packages = {}
    for name in ("pgdpo-fast", "torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "packages": packages,
    }
