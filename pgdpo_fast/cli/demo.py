"""`pgdpo-fast demo`: the whole way from clips to report on a laptop CPU, with DPO and PG-DPO side by side."""

from __future__ import annotations

import math
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pgdpo_fast.cli.progress import SECONDS

__all__ = ["Demo"]


@dataclass
class Demo:
    """See likelihood displacement, and PG-DPO avoiding it, in a few minutes on two CPU cores; no network needed.

    Renders clips of moving objects, trains a small video transformer on them, fine-tunes it with DPO and with PG-DPO
    from the same start and on the same draws, and writes report.html and summary.json. Stopping is safe at any moment:
    the same command goes on where it was, in the middle of a training too.
    """

    out: Path = Path("out/demo")
    """folder for everything the demo makes"""
    seed: int = 0
    """of the clips, the first weights, the order of the pairs and the noise"""
    steps: int | None = None
    """fine-tuning steps of each method, unset: 150"""
    pretraining_steps: int | None = None
    """steps of the training from scratch, unset: 800"""
    fast: bool = False
    """seconds instead of minutes, to check an installation: too little training for the effect or for nice clips"""
    fresh: bool = False
    """delete what an earlier demo left in the folder"""

    def run(self) -> int:
        from pgdpo_fast.cli.demo_stages import DemoSettings, discard, run_demo

        settings = DemoSettings.fast(self.seed) if self.fast else DemoSettings(seed=self.seed)
        given = {"steps": self.steps, "pretraining_steps": self.pretraining_steps}
        settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
        if self.fresh:
            discard(self.out)
        started = time.monotonic()
        with _progress() as stage:
            report = run_demo(settings, self.out, stage, resume_command=shlex.join(["pgdpo-fast", *sys.argv[1:]]))
        _print_table(report)
        print(f"\nreport   {report.html}\nsummary  {report.summary}\ntime     {time.monotonic() - started:.0f} s")
        return 0


@contextmanager
def _progress():
    """One line for the whole demo on a terminal, else lines of its stages; yields what `run_demo` takes as `stage`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", style="dim"),
    )
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("Starting", total=1.0, detail="")
        before = 0.0

        def stage(title: str, weight: float):
            nonlocal before
            start, before = before, before + weight
            progress.update(task, description=title, completed=start, detail="")
            told = time.monotonic()
            if progress.disable:
                print(title, flush=True)

            def update(share: float, detail: str) -> None:
                nonlocal told
                progress.update(task, completed=start + weight * share, detail=detail)
                if progress.disable and time.monotonic() - told >= SECONDS:
                    told = time.monotonic()
                    print(f"{title}: {share:.0%}{detail and ', '}{detail}", flush=True)

            return update

        yield stage


def _print_table(report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "method",
        *(("chosen reward", "rejected reward", "margin", "accuracy", "Γ > 0", "s/step")),
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
    )
    for label, found in report.outcomes.items():
        share = "–" if found.gamma_positive_share is None else f"{found.gamma_positive_share:.0%}"
        colour = {"bad": "red", "good": "green"}.get(found.verdict.tone, "default")
        table.add_row(
            escape(label),
            f"[{colour}]{found.chosen_reward:+.4f}[/]",
            f"{found.rejected_reward:+.4f}",
            f"{found.margin:+.4f}",
            f"{found.accuracy:.0%}" if math.isfinite(found.accuracy) else "–",
            share,
            f"{found.step_seconds:.3f}",
        )
    console = Console()
    console.print()
    console.print(report.headline, style="bold", highlight=False, markup=False)
    console.print(table)
