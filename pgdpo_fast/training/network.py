"""The network of a configuration as loaded, checked against the store it will be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelAdapter, adapter_from_config
from pgdpo_fast.training.batches import Split, split
from pgdpo_fast.training.checkpoint import MANIFEST, WEIGHTS, check_checkpoint, find_checkpoint
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.measure import check_weights

__all__ = ["Opened", "open_network"]


def started_from(start: str) -> Path:
    """The folder of exported weights that `model.start` names, of a run's newest whole checkpoint.

    Raises:
        ConfigError: there are none. DataError: the checkpoint is damaged.
    """
    path = Path(start)
    if (path / "checkpoints").is_dir() and (found := find_checkpoint(path / "checkpoints", lambda text: None)):
        return found[0] / WEIGHTS
    if (path / MANIFEST).is_file():
        check_checkpoint(path)
        return path / WEIGHTS
    if not list(path.glob("*.safetensors")):
        raise ConfigError(
            f"model.start={start!r}: expected a run with a checkpoint, a checkpoint, or a folder of exported weights"
        )
    return path


class Opened(NamedTuple):
    """What a configuration names, as opened: the store with its pairs divided, the network on its device, frozen and
    without the adapters to be trained, and the folder of the weights of `model.start`, where there is one."""

    store: LatentStore
    split: Split
    adapter: ModelAdapter
    network: nn.Module
    start: Path | None


def open_network(config: TrainConfig, device: torch.device) -> Opened:
    """Open store and network and check them against each other.

    Raises:
        ConfigError: weights and settings do not fit each other or the store, all misfits with the store in one message;
            or too few pairs to hold some out.
        DataError: the store is missing or damaged.
        NonFiniteError: a weight is NaN or infinite.
    """
    store = LatentStore(config.data.store)
    adapter = adapter_from_config(config.model)
    network = adapter.load(device)
    start = started_from(config.model.start) if config.model.start else None
    if start:
        adapter.start_from(network, start)
    check_weights(network.named_parameters(), "as loaded")
    if problems := adapter.check_store(network, store):
        raise ConfigError(f"data.store={config.data.store!r} does not fit the network: {'; '.join(problems)}")
    return Opened(store, split(config, store), adapter, network, start)
