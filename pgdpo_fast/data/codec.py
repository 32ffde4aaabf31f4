"""Codecs between uint8 video and latents, each with a fingerprint of everything that shapes what it returns.

Clips are encoded one at a time, so a clip's latents do not depend on its neighbours. Frame counts and sides that a VAE
would crop or merge without a word are errors here, naming the key and the nearest values that work.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from pgdpo_fast.devices import select_device, select_dtype
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.families import Geometry, LatentRule
from pgdpo_fast.storage import weights_digest

__all__ = ["Codec", "DiffusersVAECodec", "PixelUnshuffleCodec", "planned_shape"]


class Codec(Protocol):
    """What an encoder of latent stores needs from a codec."""

    @property
    def fingerprint(self) -> dict: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]: ...

    def encode(self, video: torch.Tensor) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...


def planned_shape(
    path: str | None, rule: LatentRule, frames: int, height: int, width: int, revision: str | None = None
) -> tuple[int, int, int, int]:
    """(C, F, H, W) of the latents that the VAE of the model at `path` will make of such clips, without its weights.

    Without a path, as for networks of random weights, that of the VAE the family was published with.

    Raises:
        ConfigError: the VAE takes no such clips. DataError: there is no VAE at `path`.
    """
    import diffusers

    network = getattr(diffusers, rule.vae)
    try:
        given = network.load_config(path, subfolder="vae", revision=revision) if path else rule.published or {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no {rule.vae} in its folder vae ({str(error).splitlines()[0]}); give a diffusers model folder or "
            "hub id, or encode first"
        ) from error
    with torch.device("meta"):
        vae = network.from_config(dict(given))
    return vae.config[rule.channels], *rule.geometry(vae).check(frames, height, width)


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
    it follows the causal VAEs' rule F = temporal * k + 1: the first frame is repeated to fill its latent frame.
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
        geometry = Geometry("pixel-unshuffle", self.temporal, self.spatial, step=self.temporal, multiple=self.spatial)
        return 3 * self.temporal * self.spatial**2, *geometry.check(frames, height, width)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> fp32 [C, F', H', W']."""
        unit = _to_unit(video)
        channels, frames, height, width = self.latent_shape(*video.shape[:3])
        unit = torch.cat([unit[:, :1].expand(-1, self.temporal - 1, -1, -1), unit], dim=1)
        rows = F.pixel_unshuffle(unit.transpose(0, 1), self.spatial)
        return rows.reshape(frames, channels, height, width).transpose(0, 1).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[C, F', H', W'] -> uint8 [F, H, W, 3]."""
        channels, frames, height, width = latents.shape
        rows = latents.float().transpose(0, 1).reshape(frames * self.temporal, -1, height, width)
        return _to_uint8(F.pixel_shuffle(rows, self.spatial).transpose(0, 1)[:, self.temporal - 1 :])


class DiffusersVAECodec:
    """A diffusers autoencoder as codec, under a family's rule.

    `path` is a model folder or hub id, with the VAE at its root or in a `vae` subfolder. `mode="mode"` takes the mean
    of the posterior, one fixed latent per clip and the default; "sample" draws from it with a generator seeded by the
    clip's own bytes, so that it too is a pure function of the clip. Weights are held in `dtype` (fp32 by default:
    bf16 changes the latents) and latents leave as fp32 on the CPU, normalised as the family's network expects them
    (`LatentRule.normalisation`). CogVideoX 1.5's `invert_scale_latents` concerns image-condition latents, not these.

    Raises ConfigError on an unknown dtype, mode or device, DataError when the VAE cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        rule: LatentRule,
        *,
        revision: str | None = None,
        dtype: str = "fp32",
        mode: str = "mode",
        device: str = "auto",
    ):
        import diffusers

        if mode not in ("mode", "sample"):
            raise ConfigError(f"mode={mode!r}; expected 'mode' or 'sample'")
        self.rule, self.mode, self.path, self.revision = rule, mode, str(path), revision
        self.dtype, self.device = select_dtype(dtype), select_device(device)
        subfolder = "vae" if not Path(path).is_dir() or (Path(path) / "vae").is_dir() else None
        try:
            vae = getattr(diffusers, rule.vae).from_pretrained(
                path, subfolder=subfolder, revision=revision, torch_dtype=self.dtype
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: {rule.vae} could not be loaded ({str(error).splitlines()[0]}); give a "
                "diffusers model folder or hub id"
            ) from error
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.geometry = rule.geometry(vae)
        config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        self._fingerprint = {
            "class": rule.vae,
            "mode": mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "version": 2,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "weights_sha256": weights_digest(vae),
        }
        mean, std, self._scaling = rule.normalisation(vae)
        self._mean, self._std = (
            torch.as_tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
            for values in (mean, std)
        )

    @property
    def fingerprint(self) -> dict:
        """Class, mode, dtype and hashes of config and weights: what decides the latents of a clip. Not where it lay."""
        return dict(self._fingerprint)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return self.vae.config[self.rule.channels], *self.geometry.check(frames, height, width)

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

        if self.rule.per_frame:
            latents = torch.stack([latent_of(frame) for frame in clip.unbind(2)], dim=2).float()
        else:
            latents = latent_of(clip).float()
        latents = (latents - self._mean) * self._scaling / self._std
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
        z = (z * self._std / self._scaling + self._mean).to(self.dtype)
        if self.rule.per_frame:
            unit = torch.stack([self.rule.decode(self.vae, frame) for frame in z.unbind(2)], dim=2)
        else:
            unit = self.rule.decode(self.vae, z)
        return _to_uint8(unit[0].cpu())
