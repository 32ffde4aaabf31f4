"""`pgdpo-fast plan`: what a training configuration takes, and what caching the reference saves of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Plan:
    """Count memory, disk and compute of a training configuration before it runs, without loading any weights.

    Says what a reference cache would save of this run and, in a table, as a function of how often a draw is used
    again: share * (1 - 1/R) of the compute, where share is the reference's part of a step.
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings, as for `train`."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")
    ] = ()
    """Settings laid over the file, as for `train`."""
    json: bool = False
    """Print the counts as one JSON object instead."""

    def run(self) -> int:
        from dataclasses import asdict
        from json import dumps

        from pgdpo_fast.training.config import load_config
        from pgdpo_fast.training.plan import make_plan

        config = load_config(self.config, [override for group in self.set for override in group])
        plan = make_plan(config)
        if self.json:
            print(dumps({**asdict(plan), "reuse": plan.reuse, "verdict": plan.verdict()}, indent=2))
        else:
            _show(plan, config)
        return 0


def _show(plan, config) -> None:
    from rich.console import Console
    from rich.table import Table

    from pgdpo_fast.storage import describe_bytes as size

    console, options, mode = Console(highlight=False), config.training, config.reference_mode
    console.print(
        f"{config.model.family}, {config.model.train}: trains {plan.trained:,} of {plan.total:,} weights; "
        f"{plan.pairs} pairs, {plan.held_out} held out; {options.steps} steps of {options.pairs_per_step} "
        f"pairs, {plan.visits:.1f} visits a pair with {plan.draws} draws",
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
