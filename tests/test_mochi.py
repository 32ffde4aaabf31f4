"""Mochi: encoded, called, trained, exported and resumed as diffusers' own pipeline would have it."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from pgdpo_fast.data.codec import DiffusersVAECodec
from pgdpo_fast.data.text import TransformersTextEncoder
from pgdpo_fast.diffusion import process_from_name
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelConfig, NoisedBatch, adapter_from_config
from pgdpo_fast.models.mochi import Mochi

NETWORK = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=8, in_channels=12,
               text_embed_dim=16, time_embed_dim=8)  # fmt: skip
PROMPT = "A red  square, moving"


@pytest.fixture(scope="module")
def pipeline(characters):
    """All parts, tiny: a VAE of 6 frames and 8 pixels per latent, T5, transformer with positions of its own."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    four = (32,) * 4  # its norms have 32 groups
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=four, decoder_block_out_channels=four, layers_per_block=(1,) * 5,
        add_attention_block=(False,) * 5, scaling_factor=0.5,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(characters), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = MochiTransformer3DModel(**NETWORK).eval()
    torch.nn.init.normal_(transformer.pos_frequencies)
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=characters,
        transformer=transformer,
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("mochi")
    pipeline.save_pretrained(path)
    return path


def adapter(path, **options):
    return adapter_from_config(ModelConfig(**{"family": "mochi", "path": str(path), "dtype": "fp32", **options}))


def told(folder):
    return TransformersTextEncoder(folder, Mochi.text, device="cpu").encode(PROMPT)


@torch.no_grad()
def test_latents_are_normalised_and_decoded_as_in_the_pipeline(pipeline, folder):
    codec, vae = DiffusersVAECodec(folder, Mochi.latents, device="cpu"), pipeline.vae
    video = torch.randint(0, 256, (7, 32, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(video)
    assert tuple(latents.shape) == codec.latent_shape(7, 32, 16) == (12, 2, 4, 2)
    mean, std = (torch.tensor(values).view(12, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    back = latents * std / 0.5 + mean  # as the pipeline does before it decodes
    z = vae.encode((video.permute(3, 0, 1, 2).float() / 127.5 - 1)[None]).latent_dist.mode()
    torch.testing.assert_close(back, z[0], atol=1e-6, rtol=1e-6)
    wanted = ((vae.decode(back[None]).sample[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255)
    assert wanted.shape == video.shape and (codec.decode(latents).float() - wanted).abs().max() <= 0.51
    for size, message in (
        ((8, 32, 32), "frames=8.*6k.1 frames; use 7 or 13"),
        ((7, 24, 32), "height=24.*use 16 or 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            codec.latent_shape(*size)


@torch.no_grad()
def test_prompts_are_the_unpadded_rows_of_the_pipelines_embedding(pipeline, folder):
    embedding, mask, *_ = pipeline.encode_prompt(PROMPT, device=torch.device("cpu"), do_classifier_free_guidance=False)
    found = told(folder)
    assert list(found) == ["text"] and torch.equal(found["text"], embedding[0][mask[0]])
    assert 0 < len(found["text"]) < Mochi.text[0].length == embedding.shape[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_the_network_is_called_as_the_pipeline_calls_it(pipeline, folder, dtype):
    """The same bits but for the sign wherever 1000 - t is exact in float32, and what 6e-5 of a timestep make elsewhere;
    the padding, which the mask hides, is zeros."""
    ours = adapter(folder, dtype=dtype)
    model, conditioning, calls = ours.load(), ours.collate([told(folder)]), []
    hook = model.register_forward_hook(lambda *seen: calls.append(seen[2:]), with_kwargs=True)
    pipe = MochiPipeline(**{**pipeline.components, "transformer": model})
    embedding, mask, *_ = pipe.encode_prompt(PROMPT, device=torch.device("cpu"), dtype=ours.dtype)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(prompt_embeds=embedding, prompt_attention_mask=mask, height=32, width=48, num_frames=13,
                 num_inference_steps=4, guidance_scale=1.0, output_type="latent", return_dict=False)[0]  # fmt: skip
    hook.remove()
    assert len(calls) == 4 and calls[0][0]["timestep"].item() == 0.0
    for given, (expected,) in calls:
        timestep = 1000 - given["timestep"].float()
        batch = NoisedBatch(given["hidden_states"], timestep, conditioning)
        exact = torch.equal(1000 - timestep, given["timestep"].float())
        assert exact or dtype == "fp32" and given["timestep"].item() != 0.0
        torch.testing.assert_close(ours.predict(model, batch), -expected, atol=0.0 if exact else 1e-5, rtol=0.0)
    # The last step ends at the clean latents, which tells the sign and where time is counted from.
    if dtype == "fp32":
        clean = process_from_name(**ours.default_process).clean_from_prediction(
            batch.noised, ours.predict(model, batch), timestep.double() / 1000
        )
        torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)
    other = NoisedBatch(batch.noised, timestep, {**conditioning, "text": conditioning["text"] + 1})
    assert not torch.equal(ours.predict(model, other), -expected)


def test_rows_of_a_batch_keep_their_own_masks(folder, rows_stand_alone):
    generator = torch.Generator().manual_seed(0)
    rows = [{"text": torch.randn(count, 16, generator=generator)} for count in (3, 9)]
    rows_stand_alone(adapter(folder), rows, (12, 2, 4, 4))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_whole_way_from_clips_to_weights_diffusers_loads(pipeline, folder, whole_way, diffusers_loads, kind):
    config, weights = whole_way("mochi", folder, kind, frames=7, height=32, width=32)
    assert config.process["name"] == "flow-matching" and config.build_process().shift == 1.0
    row = {"text": torch.randn(5, 16)}
    diffusers_loads(pipeline, partial(adapter, folder), weights, kind, config.model.lora, row, (12, 2, 4, 4))


def test_gradient_checkpointing_changes_no_bit(folder, checkpointing_changes_no_bit):
    checkpointing_changes_no_bit(partial(adapter, folder), {"text": torch.randn(5, 16)}, (12, 2, 4, 4))


def test_a_store_of_another_model_is_named(folder, stored):
    ours = adapter(folder)
    problems = ours.check_store(ours.load(), stored((4, 2, 3, 2), text=(-1, 12)))
    assert problems == [
        "latent channels 4, expected 12", "text width 12, expected 16", "latent height 3, expected a multiple of 2"
    ]  # fmt: skip
    assert ours.check_store(ours.load(), stored((12, 2, 4, 2), text=(-1, 16))) == []


def test_compiling_is_refused_until_it_has_been_seen_to_work(folder):
    ours = adapter(folder)
    with pytest.raises(ConfigError, match="the mochi family has no repeated blocks"):
        ours.compile(ours.load())
