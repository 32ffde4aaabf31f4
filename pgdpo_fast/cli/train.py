"""`pgdpo-fast train`: preference optimization of a video diffusion model from a store of encoded pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Train:
    """Train a video diffusion model on preference pairs, or go on training where a run stopped.

    The settings come from a YAML file, `--set` overrides them one by one; `--list-settings` shows them all with
    their defaults. The run directory then holds config.yaml (every value and where it came from), metrics.jsonl
    (one line per step, with every pair's rewards, alpha and gamma), evaluation.jsonl (held-out pairs at fixed draws),
    checkpoints/step_*/weights (what diffusers loads) and log.txt.

    Stopping is safe at any moment: SIGTERM, Ctrl-C and a closed terminal save, exit with code 75 and print the command
    that resumes; after a kill the same command continues from the newest whole checkpoint, with the numbers of an
    uninterrupted run.

    Examples:
        pgdpo-fast train examples/tiny.yaml
        pgdpo-fast train wan.yaml --set objective.beta=500 --set training.steps=2000 output.dir=runs/beta500
        pgdpo-fast train runs/beta500/config.yaml --set objective.beta=200 --change objective
        pgdpo-fast train runs/beta500/config.yaml --resume runs/beta500/checkpoints/step_00001000
    """

    config: tyro.conf.Positional[Path | None] = None
    """YAML file of settings; a run's own config.yaml is one."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]")
    ] = ()
    """Settings laid over the file, such as objective.beta=500; may be given several times."""
    resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
    """auto continues the newest whole checkpoint of output.dir if there is one, a path continues that checkpoint,
    never wants an output.dir without a run."""
    change: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY [KEY ...]")] = ()
    """Settings that may be others than those of the checkpoint the run goes on from: objective, and of training
    learning_rate, warmup_steps, betas, adam_eps, weight_decay, clip_norm. What changed is a line of changes.jsonl."""
    display: Literal["auto", "live", "plain", "none"] = "auto"
    """live: one line and the preference-health panel in place; plain: a line every output.log_every steps; auto:
    live on a terminal."""
    list_settings: bool = False
    """Print every setting with its type, default and meaning, and stop."""

    def run(self) -> None:
        from pgdpo_fast.training.config import describe_settings, load_config

        if self.list_settings:
            print(describe_settings())
            return
        config = load_config(self.config, [override for given in self.set for override in given])
        from pgdpo_fast.training.trainer import train

        train(config, resume=self.resume, change=self.change, display=self.display)
