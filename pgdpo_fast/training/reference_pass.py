"""The pass that runs the frozen reference once over all a configuration will ask of it, and keeps the rows in a cache.

Same draws, same number of pairs per forward and same kernel for the errors as in a run that asks the reference itself,
so that both see the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from pgdpo_fast.devices import select_device
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.reference.build import build_cache
from pgdpo_fast.reference.cache import Block, Layout, ReferenceCache
from pgdpo_fast.reference.fingerprint import architecture_digest
from pgdpo_fast.reference.rows import FORMATS, Rows, pack
from pgdpo_fast.storage import weights_digest
from pgdpo_fast.training.batches import PairLoader, Split, Visit
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.network import Opened, open_network
from pgdpo_fast.training.reference import needs_predictions

__all__ = [
    "cache_layout",
    "cache_reference",
    "choose_format",
    "reference_fingerprint",
    "reference_settings",
    "reference_visits",
]


def reference_visits(config: TrainConfig, split: Split) -> list[Block]:
    """Every (pair, draw) a run asks its reference for: training pairs, then held-out ones if there are any."""
    options = config.training
    visits = -(-options.steps * options.pairs_per_step // len(split.training))
    blocks = [Block(tuple(split.training), options.draws_per_pair or visits)]
    return blocks + [Block(tuple(split.held_out), options.evaluation_draws)] * bool(split.held_out)


def reference_settings(config: TrainConfig, without: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that decide the reference's numbers, as far as they do: of the draws per pair only the strata of
    their timesteps, of the process what its name stands for. `without`: see `TrainConfig.deciding`."""
    found = config.deciding("reference", without=without)
    settings = {key: value for key, value in found.items() if not key.startswith("process.")}
    draws = settings.pop("training.draws_per_pair")
    del settings["data.split"]  # decides with the store: `Split.setting`
    return settings | {
        "process": repr(config.build_process()),
        "training.draws_per_pair (strata of the timesteps)": max(1, draws),
        "training.evaluation_draws": config.training.evaluation_draws if config.data.evaluation_pairs else 0,
    }


def reference_fingerprint(config: TrainConfig, opened: Opened) -> dict[str, Any]:
    """Everything the rows depend on, from a network as opened: without adapters, before any training."""
    store, split, adapter, network, _ = opened
    return reference_settings(config, without=["store", "weights"]) | {
        "model.architecture": architecture_digest(network.config),
        "model.weights": weights_digest(network),
        "model.adapters": "off",
        "model.text_tokens": adapter.text_tokens,
        "data.store (content)": store.fingerprint,
        **split.setting,
    }


def cache_layout(config: TrainConfig, format: str, shape: Sequence[int]) -> Layout:
    """How the rows of `format` lie for latents of `shape`: as many pairs per forward as in training."""
    options = config.training
    size = options.pairs_per_step // options.accumulation
    return Layout.of(format, options.granularity, shape, config.model.dtype, size)


def choose_format(config: TrainConfig, format: str = "auto") -> str:
    """The format asked for, or the smallest that is exact: errors where two numbers per group do, else predictions.

    Raises:
        ConfigError: the format cannot serve the configuration's objective.
    """
    predictions = needs_predictions(config.build_objective(), config.training.granularity)
    if format == "auto":
        return "predictions" if predictions else "errors"
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: expected auto, {', '.join(FORMATS)}")
    if predictions and format == "errors":
        raise ConfigError(
            f"format='errors': objective {config.objective['name']} at training.granularity="
            f"{config.training.granularity} needs the reference's predictions; use --format predictions"
        )
    return format


def cache_reference(
    config: TrainConfig,
    output: str | os.PathLike,
    *,
    format: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    progress: Callable[[int, int], None] | None = None,
    resume_command: str = "the same call again",
) -> ReferenceCache:
    """Run the frozen reference over every (pair, draw) that `config` visits, once, and keep the results in `output`.

    Chosen and rejected go through one forward of `pairs_per_step / accumulation` pairs, as in training. Finished work
    is kept; ranks share what is left.

    Raises:
        ConfigError, DataError: settings, store, network and folder do not fit each other; the disk is too small.
        NonFiniteError: a prediction is not finite; names the pair.
        Preempted: SIGTERM came; the message holds `resume_command`.
    """
    options, format = config.training, choose_format(config, format)
    device = select_device(options.device, "training.device")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    opened = open_network(config, device)
    store, split, adapter, network, _ = opened
    fingerprint = reference_fingerprint(config, opened)
    network.eval()
    if config.model.compile:
        adapter.compile(network)
    blocks, size = reference_visits(config, split), options.pairs_per_step // options.accumulation
    held_out = frozenset(blocks[1].ids) if len(blocks) > 1 else frozenset()
    loader, evaluation_loader = (
        PairLoader(store, config.build_process(), adapter.collate, options.seed, device, strata)
        for strata in (max(1, options.draws_per_pair), options.evaluation_draws)
    )

    @torch.inference_mode()
    def compute(visits: Sequence[Visit]) -> Rows:
        if visits[0].id in held_out:  # evaluation runs its last, smaller batch as it is
            batch = evaluation_loader.noise(visits, evaluation_loader.read(visits))
        else:  # training has none: its batches are always full
            full = list(islice(cycle(visits), size))
            batch = loader.noise(full, loader.read(full))
        prediction = adapter.predict(network, batch)
        rows = pack(prediction, batch.target, format, options.granularity, options.backend)
        return {name: values[: len(visits)] for name, values in rows.items()}

    provenance = {
        "model.path": config.model.path,
        "model.revision": config.model.revision,
        "device": str(device),
        "store": str(store.path),
        "attention_backend": config.model.attention_backend,
        "compile": config.model.compile,
    }
    return build_cache(
        output,
        fingerprint=fingerprint,
        blocks=blocks,
        compute=compute,
        provenance=provenance,
        layout=cache_layout(config, format, store.shape),
        progress=progress,
        rank=rank,
        world_size=world_size,
        resume_command=resume_command,
    )
