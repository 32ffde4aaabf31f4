"""Wan 2.1 and 2.2 text-to-video (`WanTransformer3DModel`): flow matching, latents `[B, C, F, H, W]`, 512 text tokens.

The text is zero-padded and not masked, as the pipeline does.
"""

from __future__ import annotations

import html
import re

from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.families import ClipSize, Geometry, LatentRule, Normalisation, TextRule
from pgdpo_fast.models.base import ModelAdapter


def clean_prompt(prompt: str) -> str:
    """Repaired encoding, HTML entities resolved twice, runs of white space made one space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def _geometry(vae) -> Geometry:
    temporal, spatial = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    return Geometry("the Wan VAE with its patch-2 transformer", temporal, spatial, step=temporal, multiple=2 * spatial)


def _normalisation(vae) -> Normalisation:
    return Normalisation(vae.config.latents_mean, vae.config.latents_std)


class Wan(ModelAdapter):
    family = "wan"
    latents = LatentRule("AutoencoderKLWan", _geometry, _normalisation, channels="z_dim")
    text = (TextRule("UMT5EncoderModel", 512, masked=True, prepare=clean_prompt),)
    clip = ClipSize(frames=81, height=480, width=832, fps=16.0)
    default_process = {"name": "wan"}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("WanTransformerBlock",)

    def network_class(self):
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel

    def predict(self, model, batch):
        return model(
            hidden_states=batch.noised.to(self.dtype),
            timestep=batch.model_timestep,
            encoder_hidden_states=batch.conditioning["text"].to(self.dtype),
            return_dict=False,
        )[0]

    def widths(self, model):
        return {"text": model.config.text_dim}

    def check_store(self, model: nn.Module, store: LatentStore) -> list[str]:
        problems, patch = super().check_store(model, store), model.config.patch_size
        problems += self.check_patches(
            store.shape, patch
        )  # the network would crop a remainder without a word: 5 rows to 4
        for name, size, step in zip(("frames", "height", "width"), store.shape[1:], patch, strict=True):
            if size // step > model.config.rope_max_seq_len:
                problems.append(
                    f"latent {name} {size}, the network's positions end at {model.config.rope_max_seq_len * step}"
                )
        return problems
