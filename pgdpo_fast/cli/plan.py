"""`pgdpo-fast plan`: what a training configuration takes, and what caching the reference saves of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

MOST = 10_000_000  # pairs, frames or pixels


@dataclass
class Plan:
    """Count memory, disk and compute of a training configuration before it runs, without loading any weights.

    Says what a reference cache would save of this run and, in a table, as a function of how often a draw is used
    again: share * (1 - 1/R) of the compute, where share is the reference's part of a step.

    Before anything is encoded, --pairs or --manifest stand for the store, whose latents are then those that the VAE of
    model.path makes of clips of --frames, --height and --width.

    Examples:
        pgdpo-fast plan wan.yaml
        pgdpo-fast plan wan.yaml --manifest pairs.jsonl --frames 49
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings, as for `train`."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")
    ] = ()
    """Settings laid over the file, as for `train`."""
    manifest: Annotated[Path | None, tyro.conf.arg(aliases=["-m"])] = None
    """Count the pairs of this manifest, without a store."""
    pairs: int = 0
    """Count this many pairs, without a store."""
    frames: int = 0
    """Of the clips, with --pairs or --manifest; by default what the family was trained on, as for height and width."""
    height: int = 0
    """Of the clips."""
    width: int = 0
    """Of the clips."""
    json: bool = False
    """Print the counts as one JSON object instead."""

    def run(self) -> int:
        from dataclasses import asdict
        from json import dumps

        from pgdpo_fast.training.config import load_config
        from pgdpo_fast.training.plan import make_plan

        coming = self._is_coming()
        overrides = [override for given in self.set for override in given]
        config = load_config(self.config, overrides, needed=() if coming else ("data.store",))
        plan = make_plan(config, self._coming_store(config) if coming else None)
        if self.json:
            print(dumps({**asdict(plan), "reuse": plan.reuse, "verdict": plan.verdict()}, indent=2))
        else:
            _show(plan, config)
        return 0

    def _is_coming(self) -> bool:
        """Whether the flags describe a store that is yet to be made."""
        from pgdpo_fast.errors import ConfigError

        sizes = {"--frames": self.frames, "--height": self.height, "--width": self.width}
        for flag, value in {"--pairs": self.pairs, **sizes}.items():
            if not 0 <= value <= MOST:
                raise ConfigError(f"{flag} {value}: expected a number from 1 to {MOST:,}")
        if self.pairs and self.manifest:
            raise ConfigError("--pairs and --manifest both say how many pairs there are; give one of them")
        coming = bool(self.pairs or self.manifest)
        if given := [flag for flag, value in sizes.items() if value and not coming]:
            raise ConfigError(f"{given[0]}: the clips of a store have their size; give --pairs or --manifest too")
        return coming

    def _coming_store(self, config):
        from pgdpo_fast.data.manifest import read_manifest
        from pgdpo_fast.training.plan import ComingStore

        ids = [pair.id for pair in read_manifest(self.manifest).pairs] if self.manifest else range(self.pairs)
        return ComingStore.of(config, list(map(str, ids)), self.frames, self.height, self.width)


def _show(plan, config) -> None:
    from rich.console import Console
    from rich.table import Table

    from pgdpo_fast.storage import describe_bytes as size

    console, options, mode = Console(highlight=False), config.training, config.reference_mode
    console.print(
        f"{config.model.family}, {config.model.train}: trains {plan.trained:,} of {plan.total:,} weights; "
        f"{plan.pairs} pairs, {plan.held_out} held out; {options.steps} steps of {options.pairs_per_step} "
        f"pairs, {plan.visits:.1f} visits per pair with {plan.draws} draws",
        soft_wrap=True,
    )

    memory = Table("memory on the device", "bytes", box=None, title_justify="left")
    for name, count in (
        ("weights", plan.parameters),
        ("gradients (fp32)", plan.gradients),
        ("optimizer (fp32 masters, moments)", plan.optimizer),
    ):
        memory.add_row(name, size(count))
    for name, count in plan.reference.items():
        memory.add_row(f"reference: {name}{' (this configuration)' if name == mode else ''}", size(count))
    memory.add_row("activations", "not counted: depend on kernels; gradient_checkpointing lowers them")
    console.print(memory)

    disk = Table("disk", "bytes", box=None)
    for name, count in plan.cache.items():
        fits = " (enough for this objective)" if name == plan.format else ""
        disk.add_row(f"reference cache: {name}{fits}", size(count))
    disk.add_row("a checkpoint", size(plan.checkpoint))
    console.print(disk)

    table = Table("a draw is used", "compute saved", box=None)
    for reuse in (1, 2, 4, 8, 16):
        table.add_row("once" if reuse == 1 else f"{reuse} times", plan.saved(reuse))
    console.print(table)
    console.print(plan.verdict(), soft_wrap=True)
