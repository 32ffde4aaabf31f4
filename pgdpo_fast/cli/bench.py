"""`pgdpo-fast bench`: how fast the fused loss is on this machine, against eager torch and torch.compile.

What it times and how stands in the repository's `bench/` folder, installed as `pgdpo_fast.bench`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Shape = Literal["videocrafter2", "cogvideox-480p", "wan2.1-480p", "wan2.1-720p", "hunyuanvideo-720p"]


@dataclass
class Bench:
    """Time the loss and its gradients at the latents of five video models, after checking them against float64.

    Prints a table with ratios to eager torch and to torch.compile, the share of this machine's copy bandwidth and the
    memory beyond the gradients; writes the same as JSON, Markdown and two figures. A contender that disagrees with
    float64 gets no figure. Runs on the CUDA device when there is one, else on the CPU.

    Examples:
        pgdpo-fast bench --quick
        pgdpo-fast bench --shapes wan2.1-480p --batch 1 4 --granularity sample frame --reference-form errors
        pgdpo-fast bench --quick --compare bench/results/h200/quick.json
    """

    quick: bool = False
    """Wan2.1 480p at one pair, element and sample form, bf16: under three minutes on two cores. Ignores the five
    flags that choose cases."""
    shapes: tuple[Shape, ...] = ("videocrafter2", "cogvideox-480p", "wan2.1-480p", "wan2.1-720p", "hunyuanvideo-720p")
    """Video shapes to time."""
    batch: tuple[int, ...] = (1, 4, 16)
    """Pairs per batch."""
    granularity: tuple[Literal["sample", "frame", "element"], ...] = ("sample", "element")
    """What one reward covers."""
    reference_form: tuple[Literal["errors", "predictions", "bf16", "fp8"], ...] = ("predictions", "errors")
    """How the reference is given: cached errors, whole predictions, or packed rows. Errors have no element form."""
    dtype: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{bf16|fp16|fp32}")] = ("bf16",)
    """Precision of the predictions."""
    seconds: float = 10.0
    """Seconds of timing a case gets on a CPU."""
    seed: int | None = None
    """Seed of the random inputs; a fresh one by default, kept in the results."""
    device: Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda|cuda:N")] = "auto"
    """Where to run."""
    compare: Path | None = None
    """An earlier results file to set the new figures against."""
    out: Path | None = None
    """Folder of the results; by default bench/results/<device> in a clone, else bench-results/<device> here."""

    def run(self) -> None:
        import json
        import secrets

        from pgdpo_fast.bench import harness, report, table
        from pgdpo_fast.devices import select_device, select_dtype
        from pgdpo_fast.errors import ConfigError, DataError
        from pgdpo_fast.storage import make_folder

        device = select_device(self.device, "--device")
        dtypes = [str(select_dtype(name, "--dtype")).removeprefix("torch.") for name in self.dtype]
        if not self.batch or min(self.batch) < 1 or self.seconds <= 0:
            raise ConfigError(
                f"--batch {' '.join(map(str, self.batch))} --seconds {self.seconds:g}: expected numbers above 0"
            )
        previous = None
        if self.compare is not None:
            try:
                previous = json.loads(self.compare.read_text())
                previous["cases"], previous["copy"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"--compare {self.compare}: expected results of this command ({error!r})") from error
        cases = (
            table.QUICK
            if self.quick
            else table.cases(self.shapes, self.batch, self.granularity, self.reference_form, dtypes=dtypes)
        )
        if not cases:
            raise ConfigError(
                "nothing to time: granularity element has no errors form; add --reference-form predictions"
            )
        if self.out is not None:
            make_folder(self.out)
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        with _progress() as progress:
            result = table.run(cases, device, seed=seed, budget=harness.Budget(self.seconds), progress=progress)
        changes = None if previous is None else report.compare(previous, result)
        report.show(result, changes)
        print(report.summary(result))
        kept = Path(table.__file__).parent / "results"  # a clone's; a wheel has none
        folder = self.out or (kept if kept.is_dir() else Path("bench-results")) / result["environment"]["slug"]
        for path in report.write(result, folder, "quick" if self.quick else "loss", changes):
            print(f"wrote {path}")


def _progress():
    """A context whose value shows one line of progress, on a terminal alone."""
    from contextlib import contextmanager

    from rich.console import Console

    @contextmanager
    def shown():
        console = Console(stderr=True)
        if not console.is_terminal:
            yield lambda line: None
            return
        with console.status("starting") as status:
            yield status.update

    return shown()
