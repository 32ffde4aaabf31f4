"""The training loop: objective x model adapter x store x configuration.

One step reads pairs, asks the reference, then the policy, takes the loss, and waits for the device once, to see that
everything is finite before any weight changes. Order, timesteps and noise are pure functions of the seed, so the step
number is all a resumed run needs to go on as if nothing had happened.
"""

from __future__ import annotations

import errno
import shlex
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast.errors import DataError, OutOfMemoryError, PgdpoError, Preempted
from pgdpo_fast.loss import ReferenceErrors, preference_loss
from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, MEANS, REJECTED, timestep_bins
from pgdpo_fast.preemption import Stop, stoppable
from pgdpo_fast.storage import exclusive_lock, real_path, remove_temporaries
from pgdpo_fast.training import measure
from pgdpo_fast.training.callbacks import Callback
from pgdpo_fast.training.checkpoint import WEIGHTS
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.run import FILES, Run
from pgdpo_fast.training.telemetry import Display, RunLog, open_display

__all__ = ["RunResult", "train"]


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        run_dir: metrics, checkpoints, configuration and log.
        step: optimizer steps made, those before a resume included.
        checkpoint: the last checkpoint; its `weights/` is what diffusers loads.
        evaluation: the last row of evaluation.jsonl, or None without held-out pairs.
    """

    run_dir: Path
    step: int
    checkpoint: Path
    evaluation: Mapping[str, Any] | None


def train(
    config: TrainConfig,
    *,
    resume: str | Path | None = "auto",
    change: Sequence[str] = (),
    display: str | Display = "auto",
    callbacks: Sequence[Callback | Callable[[int, Run], None]] = (),
    resume_command: str = "",
) -> RunResult:
    """Train, or go on training, into `config.output.dir`.

    Args:
        resume: "auto" (or None) continues the newest whole checkpoint of the run directory if there is one; a path
            continues that checkpoint; "never" wants a run directory without a run.
        change: settings, of `pgdpo_fast.training.config.CHANGEABLE`, that may be others than the checkpoint's: the run
            goes on with the new values, its optimizer's moments kept, and records them in changes.jsonl.
        display: "auto", "live", "plain", "none" or a `Display`.
        callbacks: more of them than `config.callbacks` names; a function is called as function(step, run) with every
            evaluation.
        resume_command: what a message after a signal names to go on with, by default `pgdpo-fast train` of this run.

    Raises:
        ConfigError: settings that do not fit each other, the store or the checkpoint.
        DataError: store or checkpoint missing or damaged, disk full.
        NonFiniteError: a loss or gradient is not finite; the weights are those of the last finished step.
        OutOfMemoryError: names the settings that lower memory.
        Preempted: SIGTERM, SIGINT or SIGHUP came; the state is saved and the message says how to resume.
    """
    root = Path(config.output.dir)

    def stopped(name: str) -> str:
        again = f"resume with: {resume_command}" if resume_command else "run the same command again"
        return f"stopped by {name} before {root} was loaded, nothing is lost; {again}"

    with stoppable(stopped, saves=True) as stopping, exclusive_lock(root):
        for file in FILES:
            real_path(root, file)
        remove_temporaries(root, *FILES)
        log = RunLog(root / "log.txt")
        shown = open_display(display, config.output.log_every) if isinstance(display, str) else display

        def note(text: str) -> None:
            log.write(text)
            shown.note(text)

        try:
            run = Run.assemble(config, note)
            run.stopping = stopping
            run.callbacks += callbacks
            start = run.resume(resume or "auto", change)
            run.announce(start)
            for callback in run.callbacks:
                if isinstance(callback, Callback):
                    callback.start(run)
            again = f"pgdpo-fast train {shlex.quote(str(root / 'config.yaml'))} --resume auto"
            return _loop(run, start, shown, resume_command or again)
        except BaseException as error:
            with suppress(OSError):  # the disk may be what failed
                log.write(str(error) if isinstance(error, Preempted) else traceback.format_exc())
            if _is_out_of_memory(error):
                raise OutOfMemoryError(_memory_advice(config, error)) from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"{root}: {error.strerror}; free space, then run the same command again") from error
            raise
        finally:
            shown.close()


def _loop(run: Run, start: int, display: Display, resume_command: str) -> RunResult:
    options, last = run.config.training, run.config.training.steps
    # a checkpoint of another run directory does not count as this run's own
    saved = run.resumed_from
    if saved and saved.parent.resolve() != run.checkpoints.root.resolve():
        saved = None
    done = start
    try:
        _look(run, start)
        with closing(_read_ahead(run, start, last)) as steps:
            for step, micro_batches, waited in steps:
                run.stopping.check()
                began = time.perf_counter()
                run.optimizer.zero_grad()
                measured = []
                for visits, tensors in micro_batches:
                    batch = run.loader.noise(visits, tensors)
                    reference = run.reference(batch)  # before the policy's forward: see `adapters_off`
                    prediction = run.adapter.predict(run.policy, batch)
                    # a forward's share of the step is a pair weight: fp32, before gradients are rounded
                    out = preference_loss(
                        prediction,
                        batch.target,
                        reference,
                        **run.loss_options(batch),
                        pair_weight=batch.weight / options.accumulation,
                    )
                    out.loss.backward()
                    measured.append(measure.on_device(batch, out))
                norm = run.optimizer.clip(options.clip_norm)
                row = measure.to_row(measured, norm)  # the one wait for the device
                measure.check_finite(row, step, options.seed, run.root)
                with run.stopping.deferred():  # the weights, their row and the count of steps change together
                    run.optimizer.step(step)
                    done = step + 1
                    run.record(done, row, seconds=time.perf_counter() - began + waited, waited=waited)
                    display.step(row, last, run.health)
                if step == start:
                    run.note(run.checkpoints.rehearse(done))
                _look(run, done)
                if done % options.checkpoint_every == 0 or done == last:
                    with run.stopping.deferred():
                        saved = run.save(done)
    except BaseException:  # Stop, or what a compiled library made of it
        if run.stopping.name is None:
            raise
        with suppress(Stop), run.stopping.deferred():
            _save_stopped(run, done, saved)
        raise Preempted(
            f"stopped by {run.stopping.name} after step {done}, state saved; resume with: {resume_command}"
        ) from None
    saved = saved or run.save(last)
    run.tensorboard.close()
    run.note(f"finished at step {last}; weights in {saved / WEIGHTS}")
    return RunResult(run.root, last, saved, run.last_evaluation)


@torch.no_grad()
def _look(run: Run, step: int) -> None:
    """Evaluate and call back, where it is time."""
    evaluated = _evaluate(run, step)
    for callback in run.callbacks:
        every = getattr(callback, "every", 0)
        if evaluated if not every else _is_due(run, step, every):
            with run.stopping.deferred():  # it may have changed weights that it puts back
                callback(step, run)


def _is_due(run: Run, step: int, every: int) -> bool:
    return step % every == 0 or step == run.config.training.steps


def _evaluate(run: Run, step: int) -> bool:
    """Measure the held-out pairs at their fixed draws and return True, if it is time and not done before.

    A signal cuts it short, without a row; the resumed run then makes up for it.
    """
    done = run.last_evaluation is not None and run.last_evaluation["step"] == step
    if done or not _is_due(run, step, run.config.training.evaluation_every):
        return False
    size = run.config.training.pairs_per_step // run.config.training.accumulation
    measured = []
    for place in range(0, len(run.held_out), size):
        run.stopping.check()
        visits = run.held_out[place : place + size]
        batch = run.evaluation_loader.noise(visits, run.evaluation_loader.read(visits))
        reference = run.evaluation_reference.get(place)
        if reference is None:
            reference = run.reference(batch)
            if isinstance(reference, ReferenceErrors):  # fixed draws: a few numbers save every later pass
                run.evaluation_reference[place] = reference
        prediction = run.adapter.predict(run.policy, batch)
        out = preference_loss(prediction, batch.target, reference, **run.loss_options(batch))
        measured.append(measure.on_device(batch, out))
    if measured:
        row = measure.to_row(measured)
        row = {
            "step": step,
            **{key: value for key, value in row.items() if key not in ("pairs", "grad_norm")},
            "loss": statistics.fmean(row["pairs"]["loss"]),
            "by_timestep": _by_timestep(row),
            "pairs": {name: row["pairs"][name] for name in ("id", "draw", "chosen", "rejected", "margin", "timestep")},
        }
        with run.stopping.deferred():
            run.last_evaluation = row
            run.evaluations.append(row)
        run.tensorboard.write(row, "evaluation")
        rewards = ", ".join(f"{name.rpartition('/')[2]} {row[name]:+.2e}" for name in (MARGINS, CHOSEN, REJECTED))
        run.note(f"evaluation at step {step}: accuracy {row[ACCURACIES]:.2f}, {rewards}")
    return True


def _by_timestep(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rewards of a row in the bins of the model's timestep that hold pairs, under the metrics' names."""
    names = {"accuracy": ACCURACIES, **{MEANS[metric]: metric for metric in (CHOSEN, REJECTED, MARGINS)}}
    bins = timestep_bins([row], [MEANS[metric] for metric in (CHOSEN, REJECTED, MARGINS)])
    return [{names.get(key, key): value for key, value in item.items()} for item in bins if item["pairs"]]


def _read_ahead(run: Run, start: int, last: int) -> Iterator[tuple[int, list, float]]:
    """(step, its host tensors, seconds spent waiting for them); one other thread reads the next step meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(run.read, start) if start < last else None
        for step in range(start, last):
            began = time.perf_counter()
            tensors = upcoming.result()
            waited = time.perf_counter() - began
            if step + 1 < last:
                upcoming = pool.submit(run.read, step + 1)
            yield step, tensors, waited


def _save_stopped(run: Run, step: int, saved: Path | None) -> None:
    for parameter in run.optimizer.parameters.values():  # off while the reference runs, and an export asks it
        parameter.requires_grad_(True)
    if saved is None or not saved.name.endswith(f"{step:08d}"):
        run.save(step)
    run.tensorboard.close()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, PgdpoError):
        return False
    host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return host or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _memory_advice(config: TrainConfig, error: BaseException) -> str:
    model, training = config.model, config.training
    size = training.pairs_per_step // training.accumulation
    advice = []
    if size > 1:
        divisor = next(
            n for n in range(training.accumulation + 1, training.pairs_per_step + 1) if training.pairs_per_step % n == 0
        )
        advice.append(f"training.accumulation={divisor}")
    if not model.gradient_checkpointing:
        advice.append("model.gradient_checkpointing=true")
    if model.dtype == "fp32":
        advice.append("model.dtype=bf16")
    if model.train == "lora" and config.reference_mode == "copy":
        advice.append("model.reference=adapter-off")
    if model.train == "full":
        advice.append("model.train=lora")
    return (
        f"out of memory with {size} pair(s) in one forward; "
        f"set {', then '.join(advice) or 'fewer frames or a smaller size'} ({' '.join(str(error).split())[:200]})"
    )
