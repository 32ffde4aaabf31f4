"""What a configuration file may say about the network: a frozen dataclass whose fields carry their own help text.

It lives on the models' floor so that adapters can be used without a trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["LoraConfig", "ModelConfig", "setting"]


def setting(default: Any, help: str, *, minimum: float | None = None, above: float | None = None) -> Any:
    """A dataclass field with its help text and, for numbers, the smallest allowed value or an exclusive lower bound."""
    metadata = {"help": help, "minimum": minimum, "above": above}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the network's linear layers; their weights are always fp32."""

    rank: int = setting(32, "rank of every adapter", minimum=1)
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = setting(
        (), "names of the adapted layers; empty means the family's attention projections"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained, and the reference it is compared with."""

    family: Literal["wan", "cogvideox", "unet3d", "videocrafter2"] = setting("wan", "architecture")
    path: str | None = setting(None, "diffusers folder or hub id of the weights")
    subfolder: str = setting("", "folder of the network inside path; empty means the family's usual one")
    revision: str | None = setting(None, "revision of a hub id")
    architecture: dict[str, Any] = setting(
        {}, "instead of path: constructor arguments of a network with random weights"
    )
    init_seed: int = setting(0, "seed of random weights (architecture, LoRA)", minimum=0)
    dtype: Literal["bf16", "fp32"] = setting("bf16", "compute dtype; the family's fp32 layers stay fp32")
    train: Literal["lora", "full"] = setting("lora", "train low-rank adapters or every weight")
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: Literal["auto", "cached", "adapter-off", "copy"] = setting(
        "auto",
        "cached reads data.reference_cache, adapter-off runs the policy without its adapters, copy keeps frozen "
        "weights; auto: the first that is possible",
    )
    text_tokens: int | None = setting(None, "length the text is zero-padded to; unset means the family's", minimum=1)
    fps: float = setting(24.0, "frame rate the network is told, for families that take one (videocrafter2)", above=0)
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward: less memory, about 30% more time"
    )
    attention_backend: str = setting("native", "diffusers attention backend; native is torch's SDPA")
    compile: bool = setting(False, "torch.compile of the repeated blocks; the first steps take minutes longer")
