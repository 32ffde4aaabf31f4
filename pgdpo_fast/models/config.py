"""What a configuration file may say about the network: a frozen dataclass whose fields carry their own help text.

It lives on the models' floor so that adapters can be used without a trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pgdpo_fast.families import FAMILIES
from pgdpo_fast.options import setting

__all__ = ["LoraConfig", "ModelConfig"]

NAMES = tuple(FAMILIES)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the network's linear layers; their weights are always fp32."""

    rank: int = setting(32, "rank of every adapter", minimum=1, decides="numbers")
    alpha: float = setting(32.0, "the update is scaled by alpha / rank", above=0, decides="numbers")
    targets: tuple[str, ...] = setting(
        (), "names of the adapted layers; empty means the family's attention projections", decides="numbers"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The network that is trained, and the reference it is compared with."""

    family: Literal[NAMES] = setting("wan", "architecture", decides="reference")
    path: str | None = setting(
        None, "diffusers folder or hub id of the weights", decides="reference", content="weights"
    )
    subfolder: str = setting(
        "",
        "folder of the network inside path; empty means the family's usual one",
        decides="reference",
        content="weights",
    )
    revision: str | None = setting(None, "revision of a hub id", decides="reference", content="weights")
    architecture: dict[str, Any] = setting(
        {},
        "instead of path: constructor arguments of a network with random weights",
        decides="reference",
        content="weights",
    )
    start: str | None = setting(
        None,
        "run, checkpoint or folder of exported weights that policy and reference start from: another run's LoRA or "
        "network, on top of path or architecture",
        decides="reference",
        content="weights",
    )
    init_seed: int = setting(
        0, "seed of random weights (architecture, LoRA)", minimum=0, decides="reference", content="weights"
    )
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16", "compute dtype; the family's fp32 layers stay fp32", decides="reference"
    )
    train: Literal["lora", "full"] = setting("lora", "train low-rank adapters or every weight", decides="numbers")
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: Literal["auto", "cached", "adapter-off", "copy"] = setting(
        "auto",
        "cached reads data.reference_cache, adapter-off runs the policy without its adapters, copy keeps frozen "
        "weights; auto: the first that is possible",
        decides="nothing",
    )
    text_tokens: int | None = setting(
        None, "length the text is zero-padded to; unset means the family's", minimum=1, decides="reference"
    )
    fps: float = setting(
        24.0, "frame rate the network is told, for families that take one", above=0, decides="reference"
    )
    guidance: float | None = setting(
        None,
        "guidance scale the network is told, for families that take one; unset means the family's",
        above=0,
        decides="reference",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward: less memory, about 30% more time", decides="nothing"
    )
    attention_backend: str = setting("native", "diffusers attention backend; native is torch's SDPA", decides="nothing")
    compile: bool = setting(
        False, "torch.compile of the repeated blocks; the first steps take minutes longer", decides="nothing"
    )
