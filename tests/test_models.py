"""Model adapters: the same network as diffusers', bit for bit, under a checked dtype policy."""

import copy

import pytest
import torch

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.models import LoraConfig, ModelConfig, NoisedBatch, adapter_from_config, adapters_off

WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
           text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32)  # fmt: skip


def wan(**options):
    return adapter_from_config(ModelConfig(**{"architecture": WAN, "dtype": "fp32", "text_tokens": 8, **options}))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    noised, timestep = torch.randn(2, 4, 3, 8, 8, generator=generator), 1000 * torch.rand(2, generator=generator)
    return NoisedBatch(noised, timestep, {"text": torch.randn(2, 8, 16, generator=generator)})


def trained_lora(adapter):
    """A policy whose adapters do something."""
    policy = adapter.make_trainable(adapter.load())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_full_export_loads_in_diffusers_and_computes_the_same_bits(tmp_path, inputs, dtype):
    from diffusers import WanTransformer3DModel

    adapter = wan(train="full", dtype=dtype)
    policy = adapter.make_trainable(adapter.load())
    adapter.export(policy, tmp_path / "transformer")
    adapter.check_export(policy, tmp_path / "transformer")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=adapter.dtype)
    assert {n: p.dtype for n, p in theirs.named_parameters()} == {n: p.dtype for n, p in policy.named_parameters()}
    again = wan(architecture={}, path=str(tmp_path), dtype=dtype).load()
    with torch.no_grad():
        expected = adapter.predict(policy, inputs)
        assert torch.equal(adapter.predict(theirs, inputs), expected)
        assert torch.equal(adapter.predict(again, inputs), expected)


def test_a_lora_export_loads_in_the_wan_pipeline_and_computes_the_same_bits(tmp_path, inputs):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    adapter = wan(lora=LoraConfig(rank=4, alpha=8.0, targets=("to_q", "ffn.net.0.proj")))
    policy = trained_lora(adapter)
    adapter.export(policy, tmp_path)
    adapter.check_export(policy, tmp_path)
    base = wan().load()
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=base,
                           scheduler=FlowMatchEulerDiscreteScheduler())  # fmt: skip
    pipeline.load_lora_weights(tmp_path)
    peft_config = base.peft_config[next(iter(base.peft_config))]
    assert (peft_config.r, peft_config.lora_alpha) == (4, 8.0)
    with torch.no_grad():
        assert torch.equal(adapter.predict(base, inputs), adapter.predict(policy, inputs))
        with adapters_off(policy):
            assert not torch.equal(adapter.predict(base, inputs), adapter.predict(policy, inputs))


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_restore_puts_back_what_export_wrote(tmp_path, train, dtype):
    adapter = wan(train=train, dtype=dtype)
    policy = adapter.make_trainable(adapter.load())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapter.export(policy, tmp_path)
    other = adapter.make_trainable(adapter.load())
    adapter.restore(other, tmp_path)
    for (name, ours), (_, theirs) in zip(policy.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_export_of_another_network_is_refused(tmp_path):
    adapter = wan(train="full")
    adapter.export(adapter.load(), tmp_path)
    wider = wan(train="full", architecture={**WAN, "ffn_dim": 64})
    with pytest.raises(DataError, match="ffn"):
        wider.restore(wider.load(), tmp_path)
    deeper = wan(train="full", architecture={**WAN, "num_layers": 3})
    with pytest.raises(DataError, match="blocks.2.* is missing"):
        deeper.restore(deeper.load(), tmp_path)
    with pytest.raises(DataError, match="read back differs"):
        adapter.check_export(wan(train="full", init_seed=1).load(), tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_off_is_the_frozen_network_bit_for_bit_and_comes_back(inputs, dtype):
    adapter = wan(dtype=dtype)
    frozen = adapter.load()
    policy = trained_lora(adapter)
    with torch.no_grad():
        on = adapter.predict(policy, inputs)
        trained = [parameter.requires_grad for parameter in policy.parameters()]
        with adapters_off(policy):
            off = adapter.predict(policy, inputs)
        assert torch.equal(off, adapter.predict(frozen, inputs)) and not torch.equal(off, on)
        assert torch.equal(adapter.predict(policy, inputs), on)
    assert trained == [parameter.requires_grad for parameter in policy.parameters()] and any(trained)


def test_adapters_come_back_after_an_error():
    adapter = wan()
    policy = trained_lora(adapter)
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    with pytest.raises(RuntimeError), adapters_off(policy):
        raise RuntimeError
    assert trained == [parameter.requires_grad for parameter in policy.parameters()]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradient_checkpointing_changes_no_bit(inputs, train):
    gradients = []
    for checkpointing in (False, True):
        adapter = wan(train=train, gradient_checkpointing=checkpointing)
        policy = trained_lora(adapter) if train == "lora" else adapter.make_trainable(adapter.load())
        assert policy.training and policy.gradient_checkpointing == checkpointing
        if train == "lora":
            with torch.no_grad(), adapters_off(policy):
                adapter.predict(policy, inputs)
        adapter.predict(policy, inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.parameters() if parameter.requires_grad])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_lora_trains_fp32_adapters_of_the_named_layers_and_nothing_else():
    adapter = wan(dtype="bf16", lora=LoraConfig(rank=2, targets=("attn1.to_q", "to_out.0")))
    policy = adapter.make_trainable(adapter.load())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0] for name in trained}
    assert layers == {f"blocks.{b}.{x}" for b in (0, 1) for x in ("attn1.to_q", "attn1.to_out.0", "attn2.to_out.0")}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    counts = adapter.count_dtypes(policy)
    assert counts["fp32 trained"] == sum(p.numel() for p in trained.values()) and counts["bf16 frozen"] > 0


def test_casting_the_network_afterwards_breaks_the_dtype_policy_loudly():
    adapter = wan(dtype="bf16")
    with pytest.raises(ConfigError, match="dtype policy: .* expected torch.float32"):
        adapter.make_trainable(adapter.load().to(torch.bfloat16))


def test_random_weights_follow_their_seed():
    first, again, other = (wan(train="full", init_seed=seed).load() for seed in (0, 0, 1))
    weights = [model.proj_out.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention_backend": "flash"}, "attention_backend='flash'"),
        ({"attention_backend": "fastest"}, "attention_backend='fastest'"),
        ({"architecture": {**WAN, "num_layer": 2}}, "num_layer"),
        ({"architecture": {}, "path": "/nowhere"}, "/nowhere"),
        ({"lora": LoraConfig(targets=("to_q", "to_qq"))}, "no linear layer is called 'to_qq'"),
    ],
)
def test_settings_the_network_cannot_honour_are_refused(options, expected):
    with pytest.raises(ConfigError, match=expected):
        adapter = wan(**options)
        adapter.make_trainable(adapter.load())


def test_a_folder_of_another_network_is_refused(tmp_path):
    from diffusers import CogVideoXTransformer3DModel

    CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=8,
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    with pytest.raises(ConfigError, match="holds a CogVideoXTransformer3DModel"):
        wan(architecture={}, path=str(tmp_path)).load()
    with pytest.raises(ConfigError, match="no missing/config.json"):
        wan(architecture={}, path=str(tmp_path), subfolder="missing").load()


def test_the_attention_backend_is_in_force_and_does_not_leak():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()[0]
    model = wan(attention_backend="_native_math").load()
    assert {processor._attention_backend.value for processor in model.attn_processors.values()} == {"_native_math"}
    assert _AttentionBackendRegistry.get_active_backend()[0] == before


@pytest.mark.parametrize(
    ("shape", "text_dim", "expected"),
    [
        ((4, 3, 8, 8), 16, []),
        ((4, 3, 7, 8), 16, ["latent height 7, expected a multiple of 2"]),
        ((4, 3, 8, 5), 16, ["latent width 5, expected a multiple of 2"]),
        ((5, 40, 8, 8), 32, ["latent channels 5, expected 4", "text width 32, expected 16", "latent frames 40"]),
    ],
)
def test_latents_the_network_would_crop_or_misread_are_named(shape, text_dim, expected, stored):
    adapter = wan()
    problems = adapter.check_store(adapter.load(), stored(shape, text=(-1, text_dim)))
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))


def test_a_deep_copy_is_the_same_network(inputs):
    adapter = wan(dtype="bf16")
    model = adapter.load()
    with torch.no_grad():
        assert torch.equal(adapter.predict(model, inputs), adapter.predict(copy.deepcopy(model), inputs))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_within_rounding_and_keep_their_names(inputs):
    adapter = wan()
    policy = trained_lora(adapter)
    names = [name for name, _ in policy.named_parameters()]
    with torch.no_grad():
        plain = adapter.predict(policy, inputs)
        adapter.compile(policy)
        assert torch.allclose(adapter.predict(policy, inputs), plain, atol=1e-5)
    assert names == [name for name, _ in policy.named_parameters()]
