"""CogVideoX text-to-video, 1.0 and 1.5 (`CogVideoXTransformer3DModel`): v-prediction, 226 text tokens, rotary or fixed
positions.

The network takes `[B, F, C, H, W]`; the swap of axes happens here, so latents are `[B, C, F, H, W]` everywhere else.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.families import ClipSize, Geometry, LatentRule, TextRule
from pgdpo_fast.models.base import ModelAdapter


def _geometry(vae) -> Geometry:
    # The VAE works on 8 frames at a time: of the 4k+1 counts only 8k+1 come back with the length they had.
    temporal, spatial = vae.config.temporal_compression_ratio, 2 ** (len(vae.config.block_out_channels) - 1)
    return Geometry(
        "the CogVideoX VAE with its patch-2 transformer", temporal, spatial, step=2 * temporal, multiple=2 * spatial
    )


class CogVideoX(ModelAdapter):
    family = "cogvideox"
    latents = LatentRule("AutoencoderKLCogVideoX", _geometry)
    text = (TextRule("T5EncoderModel", 226, kept=True),)
    clip = ClipSize(frames=49, height=480, width=720, fps=8.0)
    default_process = {"name": "cogvideox-2b"}  # 5B and 1.5: cogvideox-5b
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("CogVideoXBlock",)

    def network_class(self):
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel

    def predict(self, model, batch):
        rotary = None
        if model.config.use_rotary_positional_embeddings:
            rotary = _rotary(_Grid.of(model.config, batch.noised.shape), batch.noised.device)
        prediction = model(
            hidden_states=batch.noised.to(self.dtype).transpose(1, 2),
            encoder_hidden_states=batch.conditioning["text"].to(self.dtype),
            timestep=batch.model_timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def widths(self, model):
        return {"text": model.config.text_embed_dim}

    def check_store(self, model: nn.Module, store: LatentStore) -> list[str]:
        problems, config = super().check_store(model, store), model.config
        if config.in_channels != config.out_channels:
            problems.append("an image-to-video network, expected text-to-video")
        if self.text_tokens != config.max_text_seq_length:
            problems.append(f"model.text_tokens={self.text_tokens}, expected {config.max_text_seq_length}")
        return problems + self.check_patches(
            store.shape, (config.patch_size_t or 1, config.patch_size, config.patch_size)
        )


class _Grid(tuple):
    """What the rotary positions depend on: (head size, frames, height, width, base height, base width, sliced)."""

    @classmethod
    def of(cls, config, shape) -> _Grid:
        frames, height, width = shape[2:]
        patch, patch_t = config.patch_size, config.patch_size_t
        base = (config.sample_height // patch, config.sample_width // patch)
        return cls((config.attention_head_dim, frames // (patch_t or 1), height // patch, width // patch, *base,
                    patch_t is not None))  # fmt: skip


@lru_cache(maxsize=8)
def _rotary(grid: _Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions CogVideoXPipeline gives the network, fp32 [tokens, head size] each."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    head, frames, height, width, base_height, base_width, sliced = grid
    if sliced:  # 1.5
        kind = {"crops_coords": None, "grid_type": "slice", "max_size": (base_height, base_width)}
    else:
        kind = {"crops_coords": get_resize_crop_region_for_grid((height, width), base_width, base_height)}
    return get_3d_rotary_pos_embed(
        embed_dim=head, grid_size=(height, width), temporal_size=frames, device=device, **kind
    )
