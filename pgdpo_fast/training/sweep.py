"""Many configurations over one reference pass: the grid, the caches it needs, the runs, and their comparison.

Configurations that differ in no setting that decides the reference's numbers share a cache; only a setting that does
(seed, draws, process, network, store) costs another pass. Runs go one after the other, or several at once on devices of
their own. Every part resumes where it stood.
"""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.devices import select_device
from pgdpo_fast.errors import ConfigError, NonFiniteError, OutOfMemoryError, PgdpoError, Preempted
from pgdpo_fast.metrics import ACCURACIES, CHOSEN, MARGINS, REJECTED
from pgdpo_fast.objectives import label
from pgdpo_fast.preemption import stoppable
from pgdpo_fast.reference.cache import layout_mapping
from pgdpo_fast.storage import canonical_json, sha256_bytes, write_json
from pgdpo_fast.training.batches import split
from pgdpo_fast.training.config import TrainConfig, load_config
from pgdpo_fast.training.reference_pass import (
    cache_layout,
    cache_reference,
    choose_format,
    reference_settings,
    reference_visits,
)
from pgdpo_fast.training.trainer import train

__all__ = ["Outcome", "expand", "sweep"]

SUMMARY_FILE = "sweep.json"
CHOSEN_BY_SWEEP = ("output.dir", "data.reference_cache", "model.reference")
LONGEST_NAME = 200  # bytes of a run's folder; file systems end at 255


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended.

    Attributes:
        name: of the run, the values that set it apart.
        run_dir: what `train` wrote.
        settings: the run's values of the grid's keys.
        cache: folder of the cache it read.
        seconds: in this call, 0 for a run that an earlier call finished.
        metrics: of the last evaluation, or of the last step without held-out pairs.
        failure: the error that ended it, else None.
    """

    name: str
    run_dir: Path
    settings: dict[str, Any]
    cache: Path
    seconds: float
    metrics: dict[str, float]
    failure: str | None


def expand(path: str | Path, overrides: Sequence[str], grid: Sequence[str], output: Path) -> dict[str, TrainConfig]:
    """The configurations of a grid by run name, each with its folder `output/name`.

    Args:
        overrides: `key=value` laid over the file for all runs.
        grid: `key=value,value,...`; every combination is one run. A list value needs its brackets: `key=[1,2],[3]`.

    Raises:
        ConfigError: a grid that is no grid, or the settings of any combination; a key that a run would not use; two
            equal runs; objectives that would be compared at different defaults of beta.
    """
    import yaml

    axes = []
    for axis in grid:
        key, equals, text = axis.partition("=")
        key = key.strip()
        try:
            values = yaml.load(f"[{text}]", yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError):
            values = []
        if not equals or not values or len(set(map(str, values))) < len(values):
            raise ConfigError(f"--grid {axis!r}: expected key=value,value,... with different values")
        if key in CHOSEN_BY_SWEEP:
            raise ConfigError(f"--grid {key}: the sweep chooses it for every run")
        axes.append([(key, _text(value)) for value in values])
    if not axes or len({axis[0][0] for axis in axes}) < len(axes):
        raise ConfigError("--grid: expected at least one key=value,value,..., and every key once")
    last = [axis[0][0].rpartition(".")[2] for axis in axes]
    short = {axis[0][0]: name if last.count(name) == 1 else axis[0][0] for axis, name in zip(axes, last, strict=True)}
    configs = {}
    for chosen in itertools.product(*axes):
        name = _run_name([(short[key], value) for key, value in chosen])
        config = load_config(path, [*overrides, *(f"{key}={value}" for key, value in chosen)])
        unused = config.unused()
        for key, _ in chosen:
            if key in unused:
                raise ConfigError(
                    f"--grid {key}: the run {name} would not use it, so its name would be wrong; change the other "
                    f"settings, or sweep {key} on its own"
                )
        if name in configs:
            raise ConfigError(f"--grid: two runs would be called {name}; write their values differently")
        configs[name] = replace(config, output=replace(config.output, dir=str(output / name)))
    _check_different(configs)
    _check_beta(configs, [axis[0][0] for axis in axes])
    return configs


def _text(value: Any) -> str:
    """A value of a grid as it was written: BaseLoader leaves scalars alone and opens lists and mappings."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def _run_name(chosen: Sequence[tuple[str, str]]) -> str:
    """A folder's name from the values that set the run apart; a long one is cut and ends in its hash."""
    name = ",".join(f"{key}={value}" for key, value in chosen).replace("/", "_").replace(" ", "")
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    return f"{encoded[: LONGEST_NAME - 9].decode(errors='ignore')}-{sha256_bytes(encoded)[:8]}"


def _check_different(configs: Mapping[str, TrainConfig]) -> None:
    """ConfigError naming two runs that differ in nothing either would use."""
    seen: dict[str, str] = {}
    for name, config in configs.items():
        settings = config.to_mapping()
        for key in config.unused() | set(CHOSEN_BY_SWEEP):
            *sections, last = key.split(".")
            functools.reduce(lambda below, part: below.get(part, {}), sections, settings).pop(last, None)
        other = seen.setdefault(canonical_json(settings), name)
        if other != name:
            raise ConfigError(f"--grid: {other} and {name} are the same run; give every value once")


def _check_beta(configs: Mapping[str, TrainConfig], keys: Sequence[str]) -> None:
    """ConfigError where objectives would be compared at the different betas they have by default."""
    if not any(key in ("objective", "objective.name", "objective.base", "objective.base.name") for key in keys):
        return
    betas, defaults = {}, False
    for config in configs.values():
        objective = config.build_objective()
        where = "base.beta" if hasattr(objective, "base") else "beta"
        if getattr(objective, "beta", None) is None or where in objective.unused_settings:
            continue
        betas[f"{label(config.objective)} {objective.beta:g}"] = objective.beta
        defaults |= config.origins[f"objective.{where.partition('.')[0]}"] == "default"
    if defaults and len(set(betas.values())) > 1:
        raise ConfigError(
            f"--grid over objectives: beta would be {', '.join(betas)}, and it means the same in all of them; give "
            "one, such as --set objective.beta=500, or one to each: --grid objective='{name: dpo, beta: 500},{...}'"
        )


def check_devices(keys: Sequence[str], devices: Sequence[str]) -> None:
    """Raises ConfigError where one of `devices` cannot be had, or an axis of the grid chooses them as well."""
    if devices and "training.device" in keys:
        raise ConfigError("--grid training.device: --devices chooses it for every run; leave one of them out")
    for device in devices:
        select_device(device, "--devices")


def sweep(
    configs: Mapping[str, TrainConfig],
    keys: Sequence[str],
    output: Path,
    *,
    devices: Sequence[str] = (),
    display: str = "auto",
    note: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
    resume_command: str = "the same call again",
) -> list[Outcome]:
    """Make the caches the runs need, train every configuration, and write `output/sweep.json`.

    A run that ends in NonFiniteError or OutOfMemoryError is recorded and the next one begins.

    Args:
        devices: what runs are spread over, each in a process of its own that has its device to itself; a device named
            twice has two at once. The first one also makes the caches. Empty: one run after the other, in this process,
            on `training.device`.
        display: as for `train`; with `devices` only the begin and end of each run are noted.

    Raises:
        ConfigError, DataError: as `cache_reference` and `train` would; other processes stop with their state saved.
        Preempted: a signal came; the state of every run is saved and the message holds `resume_command`.
    """
    check_devices(keys, devices)
    cache_of, outcomes = {}, {}
    try:
        for folder, representative, names in _caches(configs, output).values():
            began = time.perf_counter()
            if devices:
                representative = _on(representative, devices[0])
            cache = cache_reference(representative, folder, progress=progress, resume_command=resume_command)
            cache_of |= dict.fromkeys(names, folder)
            note(f"reference  {len(cache)} rows in {folder} for {len(names)} runs, {time.perf_counter() - began:.1f} s")
        jobs = [_Job(name, config, tuple(keys), cache_of[name]) for name, config in configs.items()]
        try:
            with closing(_spread(jobs, devices, note) if devices else _in_turn(jobs, display, note)) as ended:
                for outcome in ended:
                    outcomes[outcome.name] = outcome
                    if outcome.failure:
                        note(f"{outcome.name} failed: {outcome.failure}")
        except Preempted as error:
            raise Preempted(f"{error}; or the whole sweep with: {resume_command}") from error
    finally:
        found = [outcomes[name] for name in configs if name in outcomes]
        rows = [{**vars(outcome), "run_dir": str(outcome.run_dir), "cache": str(outcome.cache)} for outcome in found]
        write_json(output / SUMMARY_FILE, {"grid": list(keys), "runs": rows})
    return found


@dataclass(frozen=True)
class _Job:
    """A run to be made, whole enough to be sent to another process."""

    name: str
    config: TrainConfig
    keys: tuple[str, ...]
    cache: Path

    def run(self, display: str) -> Outcome:
        from pgdpo_fast.analysis.runs import read_runs

        config = self.config
        cached = replace(
            config,
            model=replace(config.model, reference="cached"),
            data=replace(config.data, reference_cache=str(self.cache)),
        )
        began, failure, metrics = time.perf_counter(), None, {}
        try:
            train(cached, display=display)
            record = read_runs([config.output.dir])[0]
            last = (record.evaluations or record.metrics)[-1]
            metrics = {key: last[key] for key in ("loss", CHOSEN, REJECTED, MARGINS, ACCURACIES)}
        except (NonFiniteError, OutOfMemoryError) as error:
            failure = str(error)
        return self.ended(time.perf_counter() - began, metrics, failure)

    def ended(self, seconds: float, metrics: dict[str, float], failure: str | None) -> Outcome:
        config = self.config
        return Outcome(
            self.name,
            Path(config.output.dir),
            {key: _value(config, key) for key in self.keys},
            self.cache,
            seconds,
            metrics,
            failure,
        )


def _value(config: TrainConfig, key: str) -> Any:
    """A setting by its dotted key, which may go on into a mapping."""
    value: Any = config.to_mapping()
    for part in key.split("."):
        value = value[part]
    return value


def _in_turn(jobs: Sequence[_Job], display: str, note: Callable[[str], None]) -> Iterator[Outcome]:
    for number, job in enumerate(jobs, 1):
        note(f"run {number} of {len(jobs)}: {job.name}")
        yield job.run(display)


def _spread(jobs: Sequence[_Job], devices: Sequence[str], note: Callable[[str], None]) -> Iterator[Outcome]:
    """Outcomes as they come, of one process per run and one run per device at a time.

    A process that dies without a word (killed for host memory, or by a bug) is a failure of its run alone. A signal, an
    error that concerns the whole sweep, and the end of the iteration stop all processes; each saves its state first.
    """
    gc.collect()
    torch.cuda.empty_cache()  # the reference's memory, which a run on the same device needs
    spawn, waiting, free = multiprocessing.get_context("spawn"), deque(enumerate(jobs, 1)), list(devices)
    running: dict[connection.Connection, tuple[multiprocessing.Process, _Job, str, float]] = {}
    errors: list[PgdpoError] = []

    told: set[multiprocessing.Process] = set()

    def stop() -> None:
        waiting.clear()
        for process, *_ in running.values():
            if process not in told:  # a second SIGTERM would end it unsaved
                process.terminate()
                told.add(process)

    def stopped(name: str) -> str:
        folder = shlex.quote(str(Path(jobs[0].config.output.dir).parent))
        return (
            f"stopped by {name}, the state of every run saved; resume one with: pgdpo-fast train "
            f"{folder}/RUN/config.yaml"
        )

    with stoppable(stopped) as stopping, stopping.deferred():
        try:
            while waiting or running:
                while waiting and free:
                    (number, job), device = waiting.popleft(), free.pop(0)
                    note(f"run {number} of {len(jobs)} on {device}: {job.name}")
                    receiver, sender = spawn.Pipe(duplex=False)
                    process = spawn.Process(target=_work, args=(replace(job, config=_on(job.config, device)), sender))
                    process.start()
                    sender.close()
                    running[receiver] = process, job, device, time.perf_counter()
                for receiver in connection.wait(running, timeout=0.2):
                    process, job, device, began = running.pop(receiver)
                    free.append(device)
                    try:
                        result = receiver.recv()
                    except EOFError:
                        result = None
                    process.join()
                    if result is None and not errors:
                        failure = (
                            f"its process ended with exit code {process.exitcode}; see stderr and "
                            f"{Path(job.config.output.dir) / 'log.txt'}"
                        )
                        result = job.ended(time.perf_counter() - began, {}, failure)
                    if isinstance(result, Outcome):
                        yield result
                    elif result is not None:
                        errors.append(result)
                        if len(errors) == 1:
                            stop()
                if stopping() and not errors:
                    errors.append(Preempted(stopped(stopping.name)))
                    stop()
        finally:
            stop()
            for process, *_ in running.values():
                process.join()
        if errors:  # what went wrong says more than that the others were stopped for it
            raise min(errors, key=lambda error: isinstance(error, Preempted))


def _work(job: _Job, sender: connection.Connection) -> None:
    """Body of a process: sends an Outcome, or the error that concerns the whole sweep."""
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the sweep too, which then stops its runs by SIGTERM
        signal.signal(number, signal.SIG_IGN)
    try:
        result: Outcome | PgdpoError = job.run("none")
    except PgdpoError as error:
        result = error
    sender.send(result)


def _on(config: TrainConfig, device: str) -> TrainConfig:
    return replace(config, training=replace(config.training, device=device))


def _reference_key(config: TrainConfig, store: LatentStore) -> str:
    """Equal for configurations that one cache serves: hash of the settings that decide the reference's numbers, and of
    how its rows lie. The number of draws does not count, a cache with more serves all."""
    layout = cache_layout(config, choose_format(config), store.shape)
    settings = reference_settings(config) | split(config, store).setting
    return sha256_bytes(canonical_json([settings, layout_mapping(layout)]).encode())[:8]


def _caches(configs: Mapping[str, TrainConfig], output: Path) -> dict[str, tuple[Path, TrainConfig, list[str]]]:
    """For every different reference key: the cache's folder, the configuration with the most draws, and the runs."""
    stores = {path: LatentStore(path) for path in {config.data.store for config in configs.values()}}
    served: dict[str, list[str]] = {}
    for name, config in configs.items():
        served.setdefault(_reference_key(config, stores[config.data.store]), []).append(name)
    caches = {}
    for key, names in served.items():
        store = stores[configs[names[0]].data.store]
        most = max(
            (configs[name] for name in names),
            key=lambda config: reference_visits(config, split(config, store))[0].draws,
        )
        given = most.data.reference_cache
        folder = Path(given) if given and len(served) == 1 else Path(given or output / "reference") / key
        caches[key] = folder, most, names
    return caches
