"""Wan 2.1 and 2.2 text-to-video (`WanTransformer3DModel`): flow matching, latents `[B, C, F, H, W]`, 512 text tokens.

The text is zero-padded and not masked, as the pipeline does.
"""

from __future__ import annotations

from pgdpo_fast.models.base import ModelAdapter


class Wan(ModelAdapter):
    family = "wan"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_length = 512
    process_class = "FlowMatching"
    default_process = "wan"
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

    def text_dim(self, model):
        return model.config.text_dim

    def check_store(self, model, shape, text_dim):
        problems, patch = super().check_store(model, shape, text_dim), model.config.patch_size
        for name, size, step in zip(("frames", "height", "width"), shape[1:], patch, strict=True):
            if size % step:  # the network would crop the remainder without a word: 5 rows in, 4 out
                problems.append(f"latent {name} {size}, expected a multiple of {step}")
            elif size // step > model.config.rope_max_seq_len:
                problems.append(
                    f"latent {name} {size}, the network's positions end at {model.config.rope_max_seq_len * step}"
                )
        return problems
