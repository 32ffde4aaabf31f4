"""Model families: each adapter knows how to load, adapt, call, check and export one kind of network."""

from __future__ import annotations

from importlib import import_module

from pgdpo_fast.families import FAMILIES
from pgdpo_fast.models.base import ModelAdapter, NoisedBatch, adapters_off
from pgdpo_fast.models.config import LoraConfig, ModelConfig
from pgdpo_fast.options import choice

__all__ = [
    "FAMILIES",
    "LoraConfig",
    "ModelAdapter",
    "ModelConfig",
    "NoisedBatch",
    "adapter_class",
    "adapter_from_config",
    "adapters_off",
]


def adapter_class(family: str) -> type[ModelAdapter]:
    """The adapter class of a family of `FAMILIES`; ConfigError for any other name."""
    module, name = FAMILIES[choice("model.family", family, FAMILIES)]
    return getattr(import_module(f"{__name__}.{module}"), name)


def adapter_from_config(config: ModelConfig) -> ModelAdapter:
    """The adapter of `config.family`.

    Raises:
        ConfigError: settings of the model section contradict each other.
    """
    return adapter_class(config.family)(config)
