"""HunyuanVideo: encoded, called, trained, exported and resumed as diffusers' own pipeline would have it."""

import copy
from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from pgdpo_fast.data.codec import DiffusersVAECodec
from pgdpo_fast.data.text import TransformersTextEncoder
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import ModelConfig, NoisedBatch, adapter_from_config
from pgdpo_fast.models.hunyuan_video import HunyuanVideo

NETWORK = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
               num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
               pooled_projection_dim=8, rope_axes_dim=(2, 4, 4))  # fmt: skip
PROMPT = "A red square, moving"


def word_tokenizer():
    """Words and signs, so that the question the prompt is put into takes about as many tokens as the real one."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers

    text = DEFAULT_PROMPT_TEMPLATE["template"] + " a red square circle moving , from left to right"
    words = [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *words]))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def pipeline(characters):
    """All parts, tiny: VAE, a language model of three layers, CLIP, transformer."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    words = word_tokenizer()
    llama = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                        num_attention_heads=2, pad_token_id=0)  # fmt: skip
    clip = CLIPTextConfig(vocab_size=len(characters), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                          num_attention_heads=2, eos_token_id=1, bos_token_id=2)  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=words,
        transformer=HunyuanVideoTransformer3DModel(**NETWORK).eval(),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=characters,
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("hunyuan")
    pipeline.save_pretrained(path)
    return path


def adapter(path, **options):
    return adapter_from_config(
        ModelConfig(**{"family": "hunyuan-video", "path": str(path), "dtype": "fp32", **options})
    )


def told(path):
    return TransformersTextEncoder(path, HunyuanVideo.text, device="cpu")


@torch.no_grad()
def test_latents_are_scaled_and_decoded_as_in_the_pipeline(pipeline, folder):
    codec, vae = DiffusersVAECodec(folder, HunyuanVideo.latents, device="cpu"), pipeline.vae
    video = torch.randint(0, 256, (5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(video)
    z = vae.encode((video.permute(3, 0, 1, 2).float() / 127.5 - 1)[None]).latent_dist.mode()
    assert tuple(latents.shape) == codec.latent_shape(5, 32, 48) == (4, 2, 4, 6)
    assert torch.equal(latents, z[0] * 0.476986)
    wanted = ((vae.decode(latents[None] / 0.476986).sample[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255)
    assert (codec.decode(latents).float() - wanted).abs().max() <= 0.51
    for size, message in (((6, 32, 32), "frames=6.*4k.1 frames; use 5 or 9"), ((5, 24, 32), "height=24.*use 16 or 32")):
        with pytest.raises(ConfigError, match=message):
            codec.latent_shape(*size)


@torch.no_grad()
def test_prompts_are_told_twice_as_in_the_pipeline(pipeline, folder):
    encoder = told(folder)
    found = encoder.encode(PROMPT)
    embedding, pooled, mask = pipeline.encode_prompt(PROMPT, device=torch.device("cpu"))
    assert torch.equal(found["text"], embedding[0][mask[0].bool()]) and torch.equal(found["pooled_text"], pooled[0])
    assert encoder.shapes == {"text": (-1, 16), "pooled_text": (8,)}
    assert 0 < len(found["text"]) == encoder.token_count(PROMPT) < 256 and not encoder.truncates(PROMPT)
    assert encoder.truncates("square " * 300) and len(encoder.encode("square " * 300)["text"]) == 256
    assert not torch.equal(found["text"][-5:], encoder.encode("a circle from left to right")["text"][-5:])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_the_network_is_called_as_the_pipeline_calls_it(pipeline, folder, dtype):
    """The pipeline's padded embedding and ours with zeros in place of padding give the same bits: the mask hides it."""
    ours = adapter(folder, dtype=dtype, guidance=4.5)
    model = ours.load()
    calls = []
    hook = model.register_forward_hook(lambda *seen: calls.append(seen[2:]), with_kwargs=True)
    embedding, pooled, mask = pipeline.encode_prompt(PROMPT, device=torch.device("cpu"))
    pipe = HunyuanVideoPipeline(**{**pipeline.components, "transformer": model})
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt_embeds=embedding, pooled_prompt_embeds=pooled, prompt_attention_mask=mask, height=32, width=48,
         num_frames=5, num_inference_steps=1, guidance_scale=4.5, output_type="latent")  # fmt: skip
    hook.remove()
    (given, (expected,)) = calls[0]
    batch = NoisedBatch(given["hidden_states"], given["timestep"], ours.collate([told(folder).encode(PROMPT)]))
    assert torch.equal(ours.predict(model, batch), expected)
    for name in ("guidance", "pooled_text", "text"):
        other = NoisedBatch(batch.noised, batch.model_timestep,
                            {**batch.conditioning, name: batch.conditioning[name] + 1})  # fmt: skip
        assert not torch.equal(ours.predict(model, other), expected), name


def test_rows_of_a_batch_keep_their_own_masks(folder, rows_stand_alone):
    generator = torch.Generator().manual_seed(0)
    rows = [{"text": torch.randn(count, 16, generator=generator), "pooled_text": torch.ones(8)} for count in (3, 9)]
    rows_stand_alone(adapter(folder), rows, (4, 2, 4, 4))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_whole_way_from_clips_to_weights_diffusers_loads(pipeline, folder, whole_way, diffusers_loads, kind):
    config, weights = whole_way("hunyuan-video", folder, kind, frames=5, height=32, width=32)
    assert config.build_process().shift == 7.0
    row = {"text": torch.randn(5, 16), "pooled_text": torch.randn(8)}
    diffusers_loads(pipeline, partial(adapter, folder), weights, kind, config.model.lora, row, (4, 2, 4, 4))


def test_gradient_checkpointing_changes_no_bit(folder, checkpointing_changes_no_bit):
    checkpointing_changes_no_bit(
        partial(adapter, folder), {"text": torch.randn(5, 16), "pooled_text": torch.randn(8)}, (4, 2, 4, 4)
    )


def test_a_store_or_network_that_does_not_fit_is_named(folder, stored):
    ours = adapter(folder, guidance=5.0)
    model = ours.load()
    assert ours.check_store(model, stored((4, 2, 3, 4), text=(-1, 16))) == [
        "no pooled_text in it, encode the prompts with --text hunyuan-video",
        "latent height 3, expected a multiple of 2",
    ]
    other = copy.deepcopy(model)
    other.register_to_config(guidance_embeds=False, image_condition_type="token_replace")
    fitting = stored((4, 2, 4, 4), text=(-1, 16), pooled_text=(8,))
    assert ours.check_store(model, fitting) == []
    assert ours.check_store(other, fitting) == [
        "an image-to-video network, expected text-to-video",
        "model.guidance=5, which this network is not told",
    ]


def test_attention_backends_the_token_refiner_ignores_are_refused(folder):
    with pytest.raises(ConfigError, match="of the hunyuan-video family ignore it; use 'native'"):
        adapter(folder, attention_backend="_native_math").load()
