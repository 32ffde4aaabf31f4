"""LTX-Video text-to-video (`LTXVideoTransformer3DModel`): flow matching, 128 masked T5 tokens, the frame rate told.

The network takes the latents as a row of tokens; packing and unpacking happen here, so latents are `[B, C, F, H, W]`
everywhere else.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.families import ClipSize, Geometry, LatentRule, Normalisation, TextRule
from pgdpo_fast.models.base import ModelAdapter

FRAMES_PER_LATENT, PIXELS_PER_LATENT = 8, 32  # of the VAE; the rotary positions are in seconds and pixels


def _geometry(vae) -> Geometry:
    temporal, spatial = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    return Geometry("the LTX VAE", temporal, spatial, step=temporal, multiple=spatial)


def _normalisation(vae) -> Normalisation:
    return Normalisation(vae.latents_mean, vae.latents_std, vae.config.scaling_factor)


def _decode(vae, z):
    # from 0.9.1 on the decoder is told how much noise is left in the latents: none
    noise_level = z.new_zeros(len(z)) if vae.config.timestep_conditioning else None
    return vae.decode(z, noise_level).sample


class LTX(ModelAdapter):
    family = "ltx"
    latents = LatentRule("AutoencoderKLLTXVideo", _geometry, _normalisation, decode=_decode)
    text = (TextRule("T5EncoderModel", 128),)  # the encoder sees the padding, the network does not
    clip = ClipSize(frames=121, height=512, width=704, fps=24.0)
    # The published schedule shifts by exp of 0.95 at 1024 tokens to 2.05 at 4096; here the latter.
    default_process = {"name": "flow-matching", "shift": round(math.exp(2.05), 4)}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("LTXVideoTransformerBlock",)

    def network_class(self):
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel

    def collate(self, rows):
        frame_rate = torch.full((len(rows),), self.config.fps)
        return {**super().collate(rows), "text_mask": self.text_mask(rows), "frame_rate": frame_rate}

    def predict(self, model, batch):
        frames, height, width = batch.noised.shape[2:]
        seconds = (FRAMES_PER_LATENT / batch.conditioning["frame_rate"]).view(-1, 1, 1, 1, 1)
        prediction = model(
            hidden_states=batch.noised.to(self.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=batch.conditioning["text"].to(self.dtype),
            timestep=batch.model_timestep,
            encoder_attention_mask=batch.conditioning["text_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds, PIXELS_PER_LATENT, PIXELS_PER_LATENT),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).unflatten(2, (frames, height, width))

    def widths(self, model):
        return {"text": model.config.caption_channels}

    def check_store(self, model: nn.Module, store: LatentStore) -> list[str]:
        problems, config = super().check_store(model, store), model.config
        if (config.patch_size, config.patch_size_t) != (1, 1):
            problems.append(f"patches of {config.patch_size_t}x{config.patch_size}x{config.patch_size}, expected 1x1x1")
        if store.fps is not None and abs(store.fps - self.config.fps) > 0.01:
            problems.append(f"clips at {store.fps:g} frames per second, model.fps={self.config.fps:g}")
        return problems
