"""LTX-Video: encoded, called, trained, exported and resumed as diffusers' own pipeline would have it."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

from pgdpo_fast.data.codec import DiffusersVAECodec
from pgdpo_fast.data.text import TransformersTextEncoder
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelConfig, NoisedBatch, adapter_from_config
from pgdpo_fast.models.ltx import LTX

NETWORK = dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
               num_layers=2, caption_channels=16)  # fmt: skip
PROMPT = "A red  square, moving"


@pytest.fixture(scope="module")
def pipeline(characters):
    """All parts, tiny: a VAE of 8 frames and 32 pixels per latent with statistics of its own, T5, transformer."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    four = (8,) * 4
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=four, decoder_block_out_channels=four, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False), patch_size=4, scaling_factor=0.5,
    )  # fmt: skip
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    t5 = T5Config(vocab_size=len(characters), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=characters,
        transformer=LTXVideoTransformer3DModel(**NETWORK).eval(),
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("ltx")
    pipeline.save_pretrained(path)
    return path


def adapter(path, **options):
    return adapter_from_config(ModelConfig(**{"family": "ltx", "path": str(path), "dtype": "fp32", **options}))


@torch.no_grad()
def test_latents_are_normalised_and_decoded_as_in_the_pipeline(pipeline, folder):
    codec, vae = DiffusersVAECodec(folder, LTX.latents, device="cpu"), pipeline.vae
    video = torch.randint(0, 256, (9, 64, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(video)
    z = vae.encode((video.permute(3, 0, 1, 2).float() / 127.5 - 1)[None]).latent_dist.mode()
    assert tuple(latents.shape) == codec.latent_shape(9, 64, 32) == (8, 2, 2, 1)
    assert torch.equal(latents[None], pipeline._normalize_latents(z, vae.latents_mean, vae.latents_std, 0.5))
    back = pipeline._denormalize_latents(latents[None], vae.latents_mean, vae.latents_std, 0.5)
    wanted = ((vae.decode(back).sample[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255)
    assert (codec.decode(latents).float() - wanted).abs().max() <= 0.51
    for size, message in (((8, 64, 64), "frames=8.*8k.1 frames; use 1 or 9"), ((9, 48, 64), "height=48.*use 32 or 64")):
        with pytest.raises(ConfigError, match=message):
            codec.latent_shape(*size)


@torch.no_grad()
def test_prompts_are_the_unpadded_rows_of_the_pipelines_embedding(pipeline, folder):
    found = TransformersTextEncoder(folder, LTX.text, device="cpu").encode(PROMPT)
    embedding, mask = pipeline._get_t5_prompt_embeds(PROMPT, device=torch.device("cpu"))
    assert list(found) == ["text"] and torch.equal(found["text"], embedding[0][mask[0]])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_the_network_is_called_as_the_pipeline_calls_it(pipeline, folder, dtype):
    """The pipeline's padded embedding and ours with zeros in place of padding give the same bits: the mask hides it."""
    ours = adapter(folder, dtype=dtype, fps=30.0)
    model = ours.load()
    text = TransformersTextEncoder(folder, LTX.text, device="cpu").encode(PROMPT)
    calls = []
    hook = model.register_forward_hook(lambda *seen: calls.append(seen[2:]), with_kwargs=True)
    pipe = LTXPipeline(**{**pipeline.components, "transformer": model})
    embedding, mask = pipe._get_t5_prompt_embeds(PROMPT, device=torch.device("cpu"), dtype=ours.dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt_embeds=embedding, prompt_attention_mask=mask, height=64, width=96, num_frames=17, frame_rate=30,
         num_inference_steps=1, guidance_scale=1.0, output_type="latent")  # fmt: skip
    hook.remove()
    (given, (tokens,)) = calls[0]
    noised = pipe._unpack_latents(given["hidden_states"], 3, 2, 3)
    batch = NoisedBatch(noised, given["timestep"], ours.collate([text]))
    assert torch.equal(ours.predict(model, batch), pipe._unpack_latents(tokens, 3, 2, 3))
    slower = NoisedBatch(noised, given["timestep"], {**batch.conditioning, "frame_rate": torch.tensor([8.0])})
    assert not torch.equal(ours.predict(model, slower), ours.predict(model, batch))


def test_rows_of_a_batch_keep_their_own_masks_and_frame_rates(folder, rows_stand_alone):
    generator = torch.Generator().manual_seed(0)
    rows = [{"text": torch.randn(count, 16, generator=generator)} for count in (3, 9)]
    rows_stand_alone(adapter(folder), rows, (8, 2, 2, 2), frame_rate=torch.tensor([8.0, 24.0]))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_whole_way_from_clips_to_weights_diffusers_loads(pipeline, folder, whole_way, diffusers_loads, kind):
    config, weights = whole_way("ltx", folder, kind, frames=9, height=64, width=64)
    assert config.process["name"] == "flow-matching" and config.process["shift"] == pytest.approx(7.768, abs=1e-3)
    row = {"text": torch.randn(5, 16)}
    diffusers_loads(pipeline, partial(adapter, folder), weights, kind, config.model.lora, row, (8, 2, 2, 2))


def test_gradient_checkpointing_changes_no_bit(folder, checkpointing_changes_no_bit):
    checkpointing_changes_no_bit(partial(adapter, folder), {"text": torch.randn(5, 16)}, (8, 2, 2, 2))


def test_a_store_of_another_model_is_named(folder, stored):
    ours = adapter(folder)
    problems = ours.check_store(ours.load(), stored((4, 2, 2, 2), text=(-1, 12)))
    assert problems == ["latent channels 4, expected 8", "text width 12, expected 16"]
    for fps in (24.0, None):
        assert ours.check_store(ours.load(), stored((8, 2, 2, 2), fps=fps, text=(-1, 16))) == []
    other = stored((8, 2, 2, 2), fps=8.0, text=(-1, 16))
    assert ours.check_store(ours.load(), other) == ["clips at 8 frames per second, model.fps=24"]
