"""3-D U-Nets: `UNet3DConditionModel` (ModelScope) and VideoCrafter2, which is that network plus a frame-rate embedding.

Epsilon-prediction, 77 CLIP text tokens. These networks ship with dropout 0.1, which loading switches off: policy and
reference must see the same network.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch.utils.checkpoint import checkpoint

from pgdpo_fast.families import ClipSize, Geometry, LatentRule, TextRule
from pgdpo_fast.models.base import ModelAdapter

CHECKPOINTED = ("ResnetBlock2D", "TemporalConvLayer", "Transformer2DModel", "TransformerTemporalModel")


def _geometry(vae) -> Geometry:
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    return Geometry("the image VAE", 1, spatial, step=1, multiple=spatial)


class UNet3D(ModelAdapter):
    family = "unet3d"
    subfolder = "unet"
    lora_prefix = "unet"
    latents = LatentRule(
        "AutoencoderKL",
        _geometry,
        per_frame=True,
        published={
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
    )
    text = (TextRule("CLIPTextModel", 77, kept=True),)
    clip = ClipSize(frames=16, height=320, width=512, fps=8.0)
    default_process = {"name": "ddpm"}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def network_class(self):
        from diffusers import UNet3DConditionModel

        return UNet3DConditionModel

    def predict(self, model, batch):
        text = batch.conditioning["text"].to(self.dtype)
        return model(batch.noised.to(self.dtype), batch.model_timestep, text, return_dict=False)[0]

    def widths(self, model):
        return {"text": model.config.cross_attention_dim}

    def _enable_checkpointing(self, model):
        # the class has no checkpointing of its own; wrapping forwards leaves the parameters' names alone
        for module in model.modules():
            if type(module).__name__ in CHECKPOINTED:
                module.forward = partial(_recomputed, module.forward)


class VideoCrafter2(UNet3D):
    family = "videocrafter2"
    default_process = {"name": "videocrafter2"}

    def network_class(self):
        return _videocrafter2_class()

    def collate(self, rows):
        return {**super().collate(rows), "frame_rate": torch.full((len(rows),), self.config.fps)}

    def predict(self, model, batch):
        text, fps = batch.conditioning["text"].to(self.dtype), batch.conditioning["frame_rate"]
        return model(batch.noised.to(self.dtype), batch.model_timestep, text, fps=fps, return_dict=False)[0]


def _recomputed(forward, *arguments, **options):
    if torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False, **options)
    return forward(*arguments, **options)


@lru_cache(maxsize=1)
def _videocrafter2_class():
    """`VideoCrafter2UNet`, made on first use because diffusers is imported only then."""
    import inspect

    from diffusers import UNet3DConditionModel
    from diffusers.models.embeddings import TimestepEmbedding

    class VideoCrafter2UNet(UNet3DConditionModel):
        """UNet3DConditionModel whose time embedding also carries the clip's frame rate (arXiv 2401.09047)."""

        def __init__(self, **config):
            super().__init__(**config)
            width = self.config.block_out_channels[0]
            self.fps_embedding = TimestepEmbedding(width, 4 * width)
            torch.nn.init.zeros_(self.fps_embedding.linear_2.weight)
            torch.nn.init.zeros_(self.fps_embedding.linear_2.bias)
            self.time_embedding.register_forward_hook(self._add_fps)

        # diffusers takes the keys of a saved configuration from the signature
        __init__.__signature__ = inspect.signature(UNet3DConditionModel.__init__)

        def _add_fps(self, module, arguments, embedding):
            return embedding + self.fps_embedding(self.time_proj(self._fps).to(embedding.dtype))

        def forward(self, sample, timestep, encoder_hidden_states, *, fps, return_dict=True):
            """As the parent's, with fps `[B]`, frames per second."""
            self._fps = fps
            try:
                return super().forward(sample, timestep, encoder_hidden_states, return_dict=return_dict)
            finally:
                del self._fps

    return VideoCrafter2UNet
