"""`pgdpo-fast sweep`: many training configurations over one pass of the reference model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Sweep:
    """Train every combination of a grid over one reference pass, and compare the results.

    The reference runs once, before the first training, and never again: not for the second run, and not when the sweep
    is repeated or made larger. Only grid keys that change what the reference is asked (seed, draws, process, network)
    cost another pass. Writes a run directory for every combination, sweep.json, and report.html comparing them.
    SIGTERM, Ctrl-C and a closed terminal stop all runs with their state saved; the exit code is 75, and the command
    that resumes the sweep is printed.

    Examples:
        pgdpo-fast sweep wan.yaml --grid objective.beta=100,500,2000 --grid objective.k1=1,2 --output runs/beta-k1
        pgdpo-fast sweep wan.yaml --grid objective.beta=100,500,2000 --devices cuda:0 cuda:1
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings, as for `train`."""
    grid: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE,VALUE,...")]
    """Values of one setting; given several times, every combination is trained."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the sweep; by default the configuration's output.dir."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")
    ] = ()
    """Settings laid over the file for all runs, as for `train`."""
    devices: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEVICE [DEVICE ...]")] = ()
    """Spread the runs over these, such as cuda:0 cuda:1, a process per run and one run per device at a time; a device
    named twice runs two at once. The reference runs on the first. By default one run after the other on
    training.device."""
    display: Literal["auto", "live", "plain", "none"] = "auto"
    """As for `train`; with --devices only the begin and end of each run are printed."""

    def run(self) -> int:
        import shlex
        import sys

        from rich.console import Console

        from pgdpo_fast.analysis.report import render_report
        from pgdpo_fast.cli.progress import rows_progress
        from pgdpo_fast.errors import NonFiniteError
        from pgdpo_fast.storage import make_folder
        from pgdpo_fast.training.config import load_config
        from pgdpo_fast.training.sweep import check_devices, expand, sweep

        overrides = [override for given in self.set for override in given]
        output = self.output or Path(load_config(self.config, overrides).output.dir)
        configs = expand(self.config, overrides, self.grid, output)
        keys = [axis.partition("=")[0].strip() for axis in self.grid]
        check_devices(keys, self.devices)
        make_folder(output)
        console = Console(highlight=False)
        with rows_progress(Console(stderr=True), "reference forwards") as progress:
            outcomes = sweep(
                configs,
                keys,
                output,
                devices=self.devices,
                display=self.display,
                progress=progress,
                note=lambda text: console.print(text, markup=False, soft_wrap=True),
                resume_command=shlex.join(["pgdpo-fast", *sys.argv[1:]]),
            )
        _print_table(console, keys, outcomes)
        finished = [outcome for outcome in outcomes if outcome.failure is None]
        if finished:
            title = f"Sweep of {', '.join(keys)}"
            report = render_report([outcome.run_dir for outcome in finished], output, title=title)
            console.print(f"\nreport   {report.html}\nsummary  {output / 'sweep.json'}", soft_wrap=True)
        return 0 if len(finished) == len(outcomes) else NonFiniteError.exit_code


def _print_table(console, keys, outcomes) -> None:
    from rich.table import Table

    from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, REJECTED

    shown = {
        "loss": "loss",
        ACCURACIES: "accuracy",
        MARGINS: "margin",
        CHOSEN: "chosen",
        REJECTED: "rejected",
    }
    table = Table(*(key.rpartition(".")[2] for key in keys), *shown.values(), "seconds", box=None)
    for outcome in outcomes:
        values = [f"{outcome.metrics[key]:.4g}" if outcome.failure is None else "failed" for key in shown]
        table.add_row(*(str(outcome.settings[key]) for key in keys), *values, f"{outcome.seconds:.0f}")
    console.print(table)
