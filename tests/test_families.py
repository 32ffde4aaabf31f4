"""CogVideoX, UNet3D and VideoCrafter2: called as diffusers calls them, trained, exported and read back."""

import ast
import copy
from pathlib import Path

import pytest
import torch

import pgdpo_fast
from pgdpo_fast.diffusion import process_from_name
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.families import FAMILIES as EVERY
from pgdpo_fast.models import ModelConfig, NoisedBatch, adapter_class, adapter_from_config, adapters_off
from pgdpo_fast.training.trainer import train

COG2B = dict(num_attention_heads=2, attention_head_dim=8, in_channels=12, out_channels=12, time_embed_dim=16,
             text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
             max_text_seq_length=16, use_rotary_positional_embeddings=False)  # fmt: skip
COG5B = COG2B | dict(attention_head_dim=16, use_rotary_positional_embeddings=True)
COG15 = COG5B | dict(patch_size_t=2, patch_bias=False)
UNET = dict(sample_size=8, in_channels=12, out_channels=12, down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
            up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"], block_out_channels=[8, 16], layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4)  # fmt: skip
FAMILIES = {
    "cogvideox-2b": ("cogvideox", COG2B),
    "cogvideox-5b": ("cogvideox", COG5B),
    "unet3d": ("unet3d", UNET),
    "videocrafter2": ("videocrafter2", UNET),
}
PROCESS = {
    "cogvideox-2b": "cogvideox-2b",
    "cogvideox-5b": "cogvideox-5b",
    "unet3d": "ddpm",
    "videocrafter2": "videocrafter2",
}


def adapter(name, **options):
    family, architecture = FAMILIES[name]
    base = {"family": family, "architecture": architecture, "dtype": "fp32", "text_tokens": 16}
    return adapter_from_config(ModelConfig(**{**base, **options}))


def predict(ours, model, noised, model_timestep, text):
    batch = NoisedBatch(noised, model_timestep, ours.collate([{"text": rows} for rows in text]))
    return ours.predict(model, batch)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 12, 3, 8, 8, generator=generator), torch.tensor([700, 20]),
            torch.randn(2, 16, 16, generator=generator))  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_steps_train_and_resume(tiny_config, name, kind):
    family, architecture = FAMILIES[name]
    sections = {
        "model": {"family": family, "architecture": architecture, "train": kind},
        "process": {"name": PROCESS[name]},
    }
    result = train(tiny_config(**sections, training={"steps": 2}), display="none")
    assert result.step == 2 and result.evaluation["rewards/chosen"] != 0.0
    assert train(tiny_config(**sections, training={"steps": 3}), display="none").step == 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_off_is_the_frozen_network(name, dtype, inputs):
    ours = adapter(name, dtype=dtype)
    frozen = ours.load()
    policy = ours.make_trainable(copy.deepcopy(frozen))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
        expected = predict(ours, frozen, *inputs)
        assert expected.dtype == ours.dtype and expected.shape == inputs[0].shape
        with adapters_off(policy):
            assert torch.equal(predict(ours, policy, *inputs), expected)
        assert not torch.equal(predict(ours, policy, *inputs), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_bit_and_no_name(name, inputs):
    gradients = []
    for checkpointing in (False, True):
        ours = adapter(name, train="full", gradient_checkpointing=checkpointing)
        policy = ours.make_trainable(ours.load())
        predict(ours, policy, *inputs).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in policy.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert gradient is gradients[1][key] is None or torch.equal(gradient, gradients[1][key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_export_loads_through_diffusers(name, inputs, tmp_path):
    ours = adapter(name, train="full", init_seed=5)
    policy = ours.make_trainable(ours.load())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
        ours.export(policy, tmp_path / ours.subfolder)
        ours.check_export(policy, tmp_path / ours.subfolder)
        theirs = ours.network_class().from_pretrained(tmp_path / ours.subfolder)
        for other in (theirs, adapter(name, architecture={}, path=str(tmp_path)).load()):
            # some CPU kernels round differently for weights that may need a gradient
            frozen = [model.requires_grad_(False).eval() for model in (policy, other)]
            assert torch.equal(*(predict(ours, model, *inputs) for model in frozen))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_export_is_read_back(name, inputs, tmp_path):
    ours = adapter(name)
    policy = ours.make_trainable(ours.load())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        ours.export(policy, tmp_path)
        other = ours.make_trainable(ours.load())
        ours.restore(other, tmp_path)
        assert torch.equal(predict(ours, policy, *inputs), predict(ours, other, *inputs))


def test_cogvideox_gets_the_positions_its_pipeline_gives(inputs):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

    vae = AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
                                 temporal_compression_ratio=4, sample_height=32, sample_width=32)  # fmt: skip
    for architecture, frames in ((COG5B, 3), (COG15, 4)):
        ours = adapter("cogvideox-5b", architecture=architecture)
        model = ours.load()
        pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=model,
                                     scheduler=CogVideoXDDIMScheduler())  # fmt: skip
        rotary = pipeline._prepare_rotary_positional_embeddings(64, 48, frames, torch.device("cpu"))
        noised = torch.randn(2, 12, frames, 8, 6)
        with torch.no_grad():
            expected = model(noised.transpose(1, 2), inputs[2], inputs[1], image_rotary_emb=rotary)[0].transpose(1, 2)
            assert torch.equal(predict(ours, model, noised, *inputs[1:]), expected)


def test_unets_have_no_dropout_left_in_training(inputs):
    ours = adapter("unet3d", train="full")
    policy = ours.make_trainable(ours.load())
    assert policy.training
    with torch.no_grad():
        assert torch.equal(predict(ours, policy, *inputs), predict(ours, policy, *inputs))


def test_videocrafter2_is_told_the_frame_rate(inputs):
    ours, faster = adapter("videocrafter2", fps=8.0), adapter("videocrafter2", fps=24.0)
    model = ours.load()
    plain = adapter("unet3d").load()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "fps" not in key})
    with torch.no_grad():
        assert torch.equal(predict(ours, model, *inputs), predict(adapter("unet3d"), plain, *inputs))  # starts at zero
        model.fps_embedding.linear_2.weight.normal_()
        assert not torch.equal(predict(ours, model, *inputs), predict(faster, model, *inputs))
        twin = copy.deepcopy(model)
        twin.fps_embedding.linear_2.weight.zero_()
        assert torch.equal(predict(ours, twin, *inputs), predict(adapter("unet3d"), plain, *inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_backends_these_networks_ignore_are_refused(name):
    with pytest.raises(ConfigError, match="ignore it; use 'native'"):
        adapter(name, attention_backend="_native_math").load()


def test_a_store_cogvideox_cannot_take_is_named(stored):
    ours = adapter("cogvideox-5b", text_tokens=8)
    assert ours.check_store(ours.load(), stored((12, 3, 7, 8), text=(-1, 16))) == [
        "model.text_tokens=8, expected 16", "latent height 7, expected a multiple of 2",
    ]  # fmt: skip
    ours = adapter("cogvideox-5b", architecture={**COG5B, "in_channels": 24})
    assert "an image-to-video network, expected text-to-video" in ours.check_store(
        ours.load(), stored((24, 3, 8, 8), text=(-1, 16))
    )


def test_a_process_the_family_was_not_trained_with_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="the cogvideox family was trained with DDPM, this is FlowMatching"):
        tiny_config(model={"family": "cogvideox", "architecture": COG2B}, process={"name": "wan"})


@pytest.mark.parametrize("name", EVERY)
def test_a_family_states_everything_the_machines_ask_for(name):
    import diffusers
    import transformers

    family = adapter_class(name)
    assert family.family == name and [rule.name for rule in family.text].count("text") == 1
    assert hasattr(diffusers, family.latents.vae) and issubclass(family.network_class(family), torch.nn.Module)
    assert all(hasattr(transformers, rule.encoder) and rule.length > 0 for rule in family.text)
    assert process_from_name(**family.default_process) and family.lora_targets and family.clip.fps > 0


def test_families_are_listed_in_one_place():
    """Whoever names two of them keeps a list of his own: only the registry, and the named diffusion processes."""
    lists = []
    for path in Path(pgdpo_fast.__file__).parent.rglob("*.py"):
        literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if len(literals & set(EVERY)) > 1:
            lists.append(path.name)
    assert sorted(lists) == ["families.py", "process.py", "unet3d.py"]  # the last defines two
