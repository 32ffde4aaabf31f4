"""Codecs between uint8 video and latents, each with a fingerprint of everything that shapes what it returns.

Clips are encoded one at a time, so a clip's latents do not depend on its neighbours. Frame counts and sides that a VAE
would crop or merge without a word are errors here, naming the key and the nearest values that work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from pgdpo_fast.errors import ConfigError, DataError

__all__ = ["CODECS", "Codec", "DiffusersVAECodec", "PixelUnshuffleCodec", "codec_from_name", "weights_hash"]


class Codec(Protocol):
    """What an encoder of latent stores needs from a codec."""

    @property
    def fingerprint(self) -> dict: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]: ...

    def encode(self, video: torch.Tensor) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Geometry:
    """Frames must be step * k + 1 (any number when step is 1), sides multiples of `multiple`."""

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


def _to_unit(video: torch.Tensor) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> fp32 [3, F, H, W] in [-1, 1]."""
    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[-1] != 3:
        raise ConfigError(f"video is {video.dtype} {list(video.shape)}; expected torch.uint8 [F, H, W, 3]")
    return video.permute(3, 0, 1, 2).float() / 127.5 - 1


def _to_uint8(unit: torch.Tensor) -> torch.Tensor:
    """fp32 [3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3], rounding to nearest."""
    return ((unit.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


@dataclass(frozen=True)
class PixelUnshuffleCodec:
    """Pixels rearranged into channels: no parameters, and decode(encode(video)) == video to the last bit.

    Latents are `[3 * temporal * spatial**2, (F - 1) / temporal + 1, H / spatial, W / spatial]` in [-1, 1]. In time
    it follows the causal VAEs' rule F = temporal * k + 1: the first frame is repeated to fill its group.
    """

    spatial: int = 4
    temporal: int = 1

    def __post_init__(self):
        for key in ("spatial", "temporal"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)!r}; expected a whole number of at least 1")

    @property
    def fingerprint(self) -> dict:
        return {"class": "PixelUnshuffleCodec", "spatial": self.spatial, "temporal": self.temporal, "version": 1}

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        geometry = _Geometry("pixel-unshuffle", self.temporal, self.spatial, step=self.temporal, multiple=self.spatial)
        return 3 * self.temporal * self.spatial**2, *geometry.check(frames, height, width)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> fp32 [C, F', H', W']."""
        unit = _to_unit(video)
        channels, groups, height, width = self.latent_shape(*video.shape[:3])
        unit = torch.cat([unit[:, :1].expand(-1, self.temporal - 1, -1, -1), unit], dim=1)
        rows = F.pixel_unshuffle(unit.transpose(0, 1), self.spatial)
        return rows.reshape(groups, channels, height, width).transpose(0, 1).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[C, F', H', W'] -> uint8 [F, H, W, 3]."""
        channels, groups, height, width = latents.shape
        rows = latents.float().transpose(0, 1).reshape(groups * self.temporal, -1, height, width)
        return _to_uint8(F.pixel_shuffle(rows, self.spatial).transpose(0, 1)[:, self.temporal - 1 :])


@dataclass(frozen=True)
class _Family:
    """How one diffusers autoencoder is loaded, laid out and normalised."""

    vae: str
    geometry: Callable[[object], _Geometry]
    per_frame: bool = False
    moments: bool = False  # latents = (z - latents_mean) / latents_std; else latents = z * scaling_factor


def _wan_geometry(config) -> _Geometry:
    temporal, spatial = config.scale_factor_temporal, config.scale_factor_spatial
    return _Geometry("the Wan VAE with its patch-2 transformer", temporal, spatial, step=temporal, multiple=2 * spatial)


def _cogvideox_geometry(config) -> _Geometry:
    # The VAE works on 8 frames at a time: of the 4k+1 counts only 8k+1 come back with the length they had.
    temporal, spatial = config.temporal_compression_ratio, 2 ** (len(config.block_out_channels) - 1)
    return _Geometry(
        "the CogVideoX VAE with its patch-2 transformer", temporal, spatial, step=2 * temporal, multiple=2 * spatial
    )


def _image_geometry(config) -> _Geometry:
    spatial = 2 ** (len(config.block_out_channels) - 1)
    return _Geometry("the image VAE", 1, spatial, step=1, multiple=spatial)


FAMILIES = {
    "wan": _Family("AutoencoderKLWan", _wan_geometry, moments=True),
    "cogvideox": _Family("AutoencoderKLCogVideoX", _cogvideox_geometry),
    "image": _Family("AutoencoderKL", _image_geometry, per_frame=True),
}
CODECS = ("pixel-unshuffle", *FAMILIES)


class DiffusersVAECodec:
    """A diffusers autoencoder as codec: families "wan", "cogvideox", and "image" (AutoencoderKL, frame by frame).

    `path` is a model folder or hub id, with the VAE at its root or in a `vae` subfolder. `mode="mode"` takes the mean
    of the posterior, one fixed latent per clip and the default; "sample" draws from it with a generator seeded by the
    clip's own bytes, so that it too is a pure function of the clip. Weights are held in `dtype` (fp32 by default:
    bf16 changes the latents) and latents leave as fp32 on the CPU, normalised as the family's transformer expects
    them: (z - latents_mean) / latents_std for Wan, z * scaling_factor for the others. CogVideoX 1.5's
    `invert_scale_latents` concerns image-condition latents, not these.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        family: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        mode: str = "mode",
        device: str = "auto",
    ):
        import diffusers

        if family not in FAMILIES:
            raise ConfigError(f"family={family!r}; expected one of {', '.join(FAMILIES)}")
        if mode not in ("mode", "sample"):
            raise ConfigError(f"mode={mode!r}; expected 'mode' or 'sample'")
        self.family, self.mode, self.path, self.revision = FAMILIES[family], mode, str(path), revision
        self.dtype = dtype_from_name(dtype)
        self.device = device_from_name(device)
        subfolder = "vae" if not Path(path).is_dir() or (Path(path) / "vae").is_dir() else None
        try:
            vae = getattr(diffusers, self.family.vae).from_pretrained(
                path, subfolder=subfolder, revision=revision, torch_dtype=self.dtype
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: {self.family.vae} could not be loaded ({str(error).splitlines()[0]}); give a "
                "diffusers model folder or hub id"
            ) from error
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.geometry = self.family.geometry(vae.config)
        config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        self._fingerprint = {
            "class": self.family.vae,
            "mode": mode,
            "dtype": dtype,
            "version": 1,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "weights_sha256": weights_hash(vae),
        }
        if self.family.moments:
            shape = (1, -1, 1, 1, 1)
            self._mean = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
            self._std = torch.tensor(vae.config.latents_std, device=self.device).view(shape)

    @property
    def fingerprint(self) -> dict:
        """Class, mode, dtype and hashes of config and weights: what decides the latents of a clip. Not where it lay."""
        return dict(self._fingerprint)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        config = self.vae.config
        channels = config.z_dim if self.family.moments else config.latent_channels
        return channels, *self.geometry.check(frames, height, width)

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> fp32 [C, F', H', W'] on the CPU."""
        shape = self.latent_shape(*video.shape[:3])
        clip = _to_unit(video)[None].to(self.device, self.dtype)
        generator = None
        if self.mode == "sample":
            digest = hashlib.blake2b(video.contiguous().numpy().tobytes(), digest_size=8).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)

        def latent_of(pixels: torch.Tensor) -> torch.Tensor:
            posterior = self.vae.encode(pixels).latent_dist
            return posterior.mode() if generator is None else posterior.sample(generator)

        if self.family.per_frame:
            latents = torch.stack([latent_of(frame) for frame in clip.unbind(2)], dim=2).float()
        else:
            latents = latent_of(clip).float()
        latents = (
            (latents - self._mean) / self._std if self.family.moments else latents * self.vae.config.scaling_factor
        )
        if tuple(latents.shape[1:]) != shape:
            raise DataError(
                f"{self.path}: the VAE turned {list(video.shape[:3])} frames, height, width into latents "
                f"{list(latents.shape[1:])}, expected {list(shape)}; choose frames and sides of its rule"
            )
        return latents[0].cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[C, F', H', W'] -> uint8 [F, H, W, 3] on the CPU."""
        z = latents[None].to(self.device, torch.float32)
        z = z * self._std + self._mean if self.family.moments else z / self.vae.config.scaling_factor
        z = z.to(self.dtype)
        if self.family.per_frame:
            unit = torch.stack([self.vae.decode(frame).sample for frame in z.unbind(2)], dim=2)
        else:
            unit = self.vae.decode(z).sample
        return _to_uint8(unit[0].cpu())


def codec_from_name(name: str, **options) -> Codec:
    """Make a codec from its name and options.

    "pixel-unshuffle" takes spatial and temporal; "wan", "cogvideox" and "image" take path, revision, dtype, mode and
    device. Raises ConfigError on an unknown name or option, DataError when the VAE cannot be loaded.
    """
    if name not in CODECS:
        raise ConfigError(f"codec {name!r} is not known; expected one of {', '.join(CODECS)}")
    try:
        if name == "pixel-unshuffle":
            return PixelUnshuffleCodec(**options)
        if not options.get("path"):
            raise ConfigError(f"codec {name!r} needs the path or hub id of its VAE")
        return DiffusersVAECodec(family=name, **options)
    except TypeError as error:
        raise ConfigError(f"codec {name!r}: {error}") from None


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's parameters and buffers: independent of file layout."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def dtype_from_name(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"dtype {name!r}; expected one of {', '.join(dtypes)}")
    return dtypes[name]


def device_from_name(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
