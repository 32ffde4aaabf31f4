"""HunyuanVideo text-to-video (`HunyuanVideoTransformer3DModel`): flow matching with shift 7, a prompt told twice, as
256 masked tokens of a language model and as one pooled CLIP vector, and the guidance its weights were distilled for.
"""

from __future__ import annotations

import torch
from torch import nn

from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.families import ClipSize, Geometry, LatentRule, TextRule
from pgdpo_fast.models.base import ModelAdapter

GUIDANCE = 6.0


def as_question(prompt: str) -> str:
    """The text whose states over the prompt the weights were trained on, as the diffusers pipeline puts it."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)


def _geometry(vae) -> Geometry:
    temporal, spatial = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    owner = "the HunyuanVideo VAE with its patch-2 transformer"
    return Geometry(owner, temporal, spatial, step=temporal, multiple=2 * spatial)


class HunyuanVideo(ModelAdapter):
    family = "hunyuan-video"
    latents = LatentRule("AutoencoderKLHunyuanVideo", _geometry)
    text = (
        TextRule("LlamaModel", 256, masked=True, layer=-3, prepare=as_question, crop=95),
        TextRule(
            "CLIPTextModel", 77, name="pooled_text", folder="text_encoder_2", tokenizer="tokenizer_2", pooled=True
        ),
    )
    clip = ClipSize(frames=129, height=720, width=1280, fps=24.0)
    default_process = {"name": "hunyuan-video"}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")

    def network_class(self):
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel

    def collate(self, rows):
        guidance = torch.full((len(rows),), self.config.guidance or GUIDANCE)
        return {**super().collate(rows), "text_mask": self.text_mask(rows), "guidance": guidance}

    def predict(self, model, batch):
        told = batch.conditioning
        return model(
            hidden_states=batch.noised.to(self.dtype),
            timestep=batch.model_timestep,
            encoder_hidden_states=told["text"].to(self.dtype),
            encoder_attention_mask=told["text_mask"].to(self.dtype),
            pooled_projections=told["pooled_text"].to(self.dtype),
            guidance=told["guidance"].to(self.dtype) * 1000,  # in this order: 6000 is no bf16 number
            return_dict=False,
        )[0]

    def widths(self, model):
        return {"text": model.config.text_embed_dim, "pooled_text": model.config.pooled_projection_dim}

    def check_store(self, model: nn.Module, store: LatentStore) -> list[str]:
        problems, config = super().check_store(model, store), model.config
        if config.image_condition_type:
            problems.append("an image-to-video network, expected text-to-video")
        if self.config.guidance and not config.guidance_embeds:
            problems.append(f"model.guidance={self.config.guidance:g}, which this network is not told")
        return problems + self.check_patches(store.shape, (config.patch_size_t, config.patch_size, config.patch_size))
