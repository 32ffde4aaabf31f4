"""What a run computes on and with: its device, and the network of its configuration as loaded."""

from __future__ import annotations

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelAdapter, adapter_from_config
from pgdpo_fast.training.config import TrainConfig

__all__ = ["open_network", "select_device"]


def select_device(name: str) -> torch.device:
    """The device of `training.device`; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"training.device={name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"training.device={name!r}: no CUDA device is visible; use cpu, or check the driver")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"training.device={name!r}: expected an index below {torch.cuda.device_count()}, the "
            "number of visible CUDA devices"
        )
    return device


def open_network(config: TrainConfig, store: LatentStore, device: torch.device) -> tuple[ModelAdapter, nn.Module]:
    """The model adapter and its network on `device`: frozen, without adapters, checked against the store.

    Raises:
        ConfigError: weights and settings do not fit each other or the store; all misfits with the store in one message.
    """
    adapter = adapter_from_config(config.model)
    network = adapter.load(device)
    if problems := adapter.check_store(network, store.shape, store.text_dim):
        raise ConfigError(f"data.store={config.data.store!r} does not fit the network: {'; '.join(problems)}")
    return adapter, network
