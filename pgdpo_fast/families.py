"""The list of model families, and the vocabulary in which a family states how its clips and prompts are encoded.

Definitions only: the machines in `data` take such rules as values, and each family's own stand in its one file under
`models`. To add a family, write that file and add a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pgdpo_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAMILIES", "ClipSize", "Geometry", "LatentRule", "Normalisation", "TextRule"]

# family -> (module under pgdpo_fast.models, class in it)
FAMILIES = {
    "wan": ("wan", "Wan"),
    "cogvideox": ("cogvideox", "CogVideoX"),
    "unet3d": ("unet3d", "UNet3D"),
    "videocrafter2": ("unet3d", "VideoCrafter2"),
    "ltx": ("ltx", "LTX"),
    "hunyuan-video": ("hunyuan_video", "HunyuanVideo"),
    "mochi": ("mochi", "Mochi"),
}


class ClipSize(NamedTuple):
    """What a family was trained on: frames, pixels, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Geometry:
    """Which clips a VAE takes: step * k + 1 frames (any number when step is 1), sides that are multiples of `multiple`.

    temporal, spatial: frames and pixels per latent frame and latent side.
    """

    owner: str
    temporal: int
    spatial: int
    step: int
    multiple: int

    def check(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width; ConfigError naming the key and its nearest valid values."""
        step = self.step
        if frames < 1 or (frames - 1) % step:
            below = max(1, (frames - 1) // step * step + 1)
            raise ConfigError(f"frames={frames}: {self.owner} takes {step}k+1 frames; use {below} or {below + step}")
        for key, value in (("height", height), ("width", width)):
            if value < 1 or value % self.multiple:
                below = max(value // self.multiple, 1) * self.multiple
                raise ConfigError(
                    f"{key}={value}: {self.owner} takes multiples of {self.multiple} pixels; use {below} or "
                    f"{below + self.multiple}"
                )
        return (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial


class Normalisation(NamedTuple):
    """latents = (z - mean) * scaling / std of the z a VAE's encoder gives; mean and std are per channel, or numbers."""

    mean: Any = 0.0
    std: Any = 1.0
    scaling: float = 1.0


def _scaled(vae: Any) -> Normalisation:
    return Normalisation(scaling=vae.config.scaling_factor)


def _decoded(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z).sample


@dataclass(frozen=True)
class LatentRule:
    """How a family's VAE turns a clip into the latents its network expects, and back.

    Attributes:
        vae: its diffusers class.
        geometry: the clips a given VAE takes.
        normalisation: of a given VAE; by default its `scaling_factor` alone.
        channels: the key of the VAE's configuration that holds the number of latent channels.
        per_frame: an image VAE, used frame by frame.
        decode: (vae, z) -> pixels in [-1, 1].
        published: arguments of the published VAE where they are not its class's defaults; for counting.
    """

    vae: str
    geometry: Callable[[Any], Geometry]
    normalisation: Callable[[Any], Normalisation] = _scaled
    channels: str = "latent_channels"
    per_frame: bool = False
    decode: Callable[[Any, Tensor], Tensor] = _decoded
    published: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TextRule:
    """How one of a family's text encoders turns a prompt into one tensor of the conditioning.

    Attributes:
        encoder: its transformers class.
        length: tokens the prompt is padded and cut to.
        name: of the tensor; every family has one rule called "text".
        folder, tokenizer: subfolders of the model.
        masked: the encoder does not attend to padding.
        kept: padded rows are part of the embedding, because the network attends to them. Otherwise they are cut, and
            the network gets zeros in their place.
        pooled: the encoder's pooled output `[D]` instead of one row per token.
        layer: of `hidden_states`, instead of the last layer after its final norm.
        prepare: applied to the prompt first: cleaning, or a text it is put into.
        crop: the first tokens of that text, cut from the result and not counted in `length`.
    """

    encoder: str
    length: int
    name: str = "text"
    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    masked: bool = False
    kept: bool = False
    pooled: bool = False
    layer: int | None = None
    prepare: Callable[[str], str] | None = None
    crop: int = 0
