"""Mochi text-to-video (`MochiTransformer3DModel`): flow matching counted from noise to clip, 256 masked T5 tokens.

The network is told 1000 (1 - sigma) and predicts clean - noise; both are turned round here, so a timestep is 1000 sigma
and a velocity noise - clean everywhere else.
"""

from __future__ import annotations

from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.families import ClipSize, Geometry, LatentRule, Normalisation, TextRule
from pgdpo_fast.models.base import ModelAdapter


def _geometry(vae) -> Geometry:
    temporal, spatial = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    owner = "the Mochi VAE with its patch-2 transformer"
    return Geometry(owner, temporal, spatial, step=temporal, multiple=2 * spatial)


def _normalisation(vae) -> Normalisation:
    return Normalisation(vae.config.latents_mean, vae.config.latents_std, vae.config.scaling_factor)


class Mochi(ModelAdapter):
    family = "mochi"
    latents = LatentRule("AutoencoderKLMochi", _geometry, _normalisation)
    text = (TextRule("T5EncoderModel", 256, masked=True),)
    clip = ClipSize(frames=163, height=480, width=848, fps=30.0)
    default_process = {"name": "flow-matching"}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    # no repeated_blocks: attention picks the prompt's own tokens by nonzero, and that has not been seen compiled

    def network_class(self):
        from diffusers import MochiTransformer3DModel

        return MochiTransformer3DModel

    def collate(self, rows):
        return {**super().collate(rows), "text_mask": self.text_mask(rows)}

    def predict(self, model, batch):
        return -model(
            hidden_states=batch.noised.to(self.dtype),
            encoder_hidden_states=batch.conditioning["text"].to(self.dtype),
            timestep=1000 - batch.model_timestep,
            encoder_attention_mask=batch.conditioning["text_mask"],
            return_dict=False,
        )[0]

    def widths(self, model):
        return {"text": model.config.text_embed_dim}

    def check_store(self, model: nn.Module, store: LatentStore) -> list[str]:
        patch = model.config.patch_size
        return super().check_store(model, store) + self.check_patches(store.shape, (1, patch, patch))
