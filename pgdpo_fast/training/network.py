"""The network of a configuration as loaded, checked against the store it will be trained on."""

from __future__ import annotations

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelAdapter, adapter_from_config
from pgdpo_fast.training.config import TrainConfig

__all__ = ["open_network"]


def open_network(config: TrainConfig, store: LatentStore, device: torch.device) -> tuple[ModelAdapter, nn.Module]:
    """The model adapter and its network on `device`: frozen, without adapters, checked against the store.

    Raises:
        ConfigError: weights and settings do not fit each other or the store; all misfits with the store in one message.
    """
    adapter = adapter_from_config(config.model)
    network = adapter.load(device)
    if problems := adapter.check_store(network, store.shape, store.conditioning, store.fps):
        raise ConfigError(f"data.store={config.data.store!r} does not fit the network: {'; '.join(problems)}")
    return adapter, network
