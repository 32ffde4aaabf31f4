"""`pgdpo-fast cache-reference`: run the reference model once over every draw a training run will visit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class CacheReference:
    """Run the frozen reference once over every (pair, draw) of a training configuration and keep the results.

    Takes the YAML that `train` takes. Training with `data.reference_cache` set to the folder then computes the same
    numbers without the reference's forward or weights, and so does every further run on the same draws. Safe to
    interrupt anywhere: the same command goes on. Started with torchrun, or several times, processes share the work.

    Examples:
        pgdpo-fast cache-reference wan.yaml --output cache/wan --draws 4
        torchrun --nproc-per-node 8 --no-python pgdpo-fast cache-reference wan.yaml --output cache/wan --draws 4
        pgdpo-fast train wan.yaml --set data.reference_cache=cache/wan training.draws_per_pair=4
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings, as for `train`."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the cache; by default the configuration's data.reference_cache."""
    draws: int | None = None
    """Distinct draws of a pair, short for --set training.draws_per_pair=N. Unset and 0 in the configuration: one for
    every visit."""
    format: Literal["auto", "errors", "predictions", "bf16", "fp8"] = "auto"
    """errors: two numbers per row, exact. predictions: for rewards per element and objectives that look at the
    reference's prediction, in the network's dtype, exact. bf16, fp8: predictions rounded to 2 or 1 bytes per element.
    auto: errors where they are enough, else predictions."""
    granularity: Literal["sample", "frame", "element"] | None = None
    """Short for --set training.granularity=..."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")
    ] = ()
    """Settings laid over the file, as for `train`."""

    def run(self) -> int:
        import shlex
        import sys

        from rich.console import Console

        from pgdpo_fast.cli.processes import share_of_environment
        from pgdpo_fast.cli.progress import rows_progress
        from pgdpo_fast.errors import ConfigError
        from pgdpo_fast.storage import describe_bytes
        from pgdpo_fast.training.config import load_config
        from pgdpo_fast.training.reference_pass import cache_reference

        overrides = [override for given in self.set for override in given]
        overrides += [] if self.draws is None else [f"training.draws_per_pair={self.draws}"]
        overrides += [] if self.granularity is None else [f"training.granularity={self.granularity}"]
        config = load_config(self.config, overrides)
        output = self.output or config.data.reference_cache
        if not output:
            raise ConfigError("--output: required, or data.reference_cache in the configuration")
        share = share_of_environment()
        console = Console(stderr=True)
        with rows_progress(console, "reference forwards", shown=share.rank == 0) as progress:
            cache = cache_reference(
                config,
                output,
                format=self.format,
                **share._asdict(),
                progress=progress,
                resume_command=shlex.join(["pgdpo-fast", *sys.argv[1:]]),
            )
        if share.rank == 0:
            block = cache.blocks[0]
            needed = [override for override in overrides if not override.startswith("data.reference_cache=")]
            needed = shlex.join([f"data.reference_cache={output}", *needed])
            print(
                f"reference cache: {cache.path} ({len(block.ids)} pairs x {block.draws} draws, "
                f"{len(cache) - block.rows} for evaluation; {cache.layout.format}, {describe_bytes(cache.bytes)})"
            )
            print(f"train with: pgdpo-fast train {shlex.quote(str(self.config))} --set {needed}")
        return 0
