"""The network of a configuration as loaded, checked against the store it will be trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelAdapter, adapter_from_config
from pgdpo_fast.training.checkpoint import MANIFEST, WEIGHTS, check_checkpoint, find_checkpoint
from pgdpo_fast.training.config import TrainConfig
from pgdpo_fast.training.measure import check_weights

__all__ = ["open_network", "started_from"]


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


def open_network(config: TrainConfig, store: LatentStore, device: torch.device) -> tuple[ModelAdapter, nn.Module]:
    """The model adapter and its network on `device`: frozen, without adapters, checked against the store.

    Raises:
        ConfigError: weights and settings do not fit each other or the store; all misfits with the store in one message.
        DataError: a shard of the store is damaged.
        NonFiniteError: a weight is NaN or infinite.
    """
    adapter = adapter_from_config(config.model)
    network = adapter.load(device)
    if config.model.start:
        adapter.start_from(network, started_from(config.model.start))
    check_weights(network.named_parameters(), "as loaded")
    problems = adapter.check_store(network, store.shape, store.conditioning, store.fps)
    counts = store.text_rows()
    if long := [id for id, count in counts.items() if count > adapter.text_tokens]:
        longest = max(long, key=counts.__getitem__)
        problems.append(
            f"the texts of {len(long)} of {len(counts)} pairs are longer than model.text_tokens={adapter.text_tokens} "
            f"(the longest {counts[longest]} rows, pair {longest!r}), set model.text_tokens={counts[longest]} or "
            f"encode the prompts with --text {adapter.family}"
        )
    if problems:
        raise ConfigError(f"data.store={config.data.store!r} does not fit the network: {'; '.join(problems)}")
    return adapter, network
