"""Fixtures more than one area uses: a tiny latent store of real clips and a tiny configuration that trains on it.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported, hence
here; tests of compiled code start processes of their own without it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A name that is no folder is looked for in no hub: without a network that takes half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

# Processes of a fork server find the test they are a part of; last, so that the folder `kernels` hides no package.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# A suite started in the background of a shell, or under nohup, inherits these ignored, and with it all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter patches triton.language anew in every nested call, half of its time: once will do. It builds
    a table of dtypes for every operation, a tenth: one table will do."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter._LangPatchScope(), set()
    dtype_of, dtypes, used = interpreter._get_np_dtype, {}, {}

    def dtype_once(kind):
        kind = kind.scalar
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    def patch_once(function):
        nonlocal launch
        names = function.__globals__
        if id(names) not in used:  # of a module, which stays
            language = interpreter.tl, interpreter.tl.core
            used[id(names)] = frozenset(v for v in names.values() if any(v is module for module in language))
        modules = used[id(names)]
        if not launch._changes:  # the last launch has taken its patches back
            done.clear()
            launch = patch(function)
        elif modules in done:
            return interpreter._LangPatchScope()
        else:
            patch(function)
        done.add(modules)
        return launch

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, dtype_once
    yield
    interpreter._patch_lang, interpreter._get_np_dtype = patch, dtype_of


@pytest.fixture(scope="session")
def stored():
    """Makes what `check_store` looks at of a store: shape of its latents, frame rate, shapes of its conditioning."""

    def make(shape, fps=None, **conditioning):
        return SimpleNamespace(shape=shape, fps=fps, conditioning=conditioning, text_rows=dict)

    return make


TINY_WAN = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=12,
    out_channels=12,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """Folder of a latent store: 10 pairs of 12x3x8x8 latents, prompts of 16-wide embeddings."""
    from pgdpo_fast.data.codec import PixelUnshuffleCodec
    from pgdpo_fast.data.encode import encode_manifest
    from pgdpo_fast.data.synthetic import render_pairs
    from pgdpo_fast.data.text import HashTextEncoder

    root = tmp_path_factory.mktemp("tiny")
    manifest = render_pairs(root / "clips", pairs=10, seed=3, frames=3, height=16, width=16)
    encode_manifest(
        manifest,
        root / "store",
        codec=PixelUnshuffleCodec(spatial=2),
        text=HashTextEncoder(16, 16),
        frames=3,
        height=16,
        width=16,
    )
    return root / "store"


@pytest.fixture
def tiny_config(tiny_store, tmp_path):
    """make(**sections) -> TrainConfig of a small LoRA run on `tiny_store` in a folder of the test's own."""
    from pgdpo_fast.training.config import TrainConfig

    def make(run: str = "run", **sections):
        base = {
            "model": {"architecture": TINY_WAN, "dtype": "fp32", "text_tokens": 16, "lora": {"rank": 4, "alpha": 4}},
            "data": {"store": str(tiny_store), "evaluation_pairs": 2},
            "objective": {"name": "pgdpo", "beta": 100},
            "training": {
                "steps": 4,
                "pairs_per_step": 2,
                "learning_rate": 1e-3,
                "evaluation_every": 2,
                "evaluation_draws": 2,
                "checkpoint_every": 2,
                "device": "cpu",
            },
            "output": {"dir": str(tmp_path / run), "tensorboard": False},
        }
        for name, values in sections.items():
            base[name] = values if name in ("process", "objective", "callbacks") else {**base[name], **values}
        return TrainConfig.from_mapping(base)

    return make


@pytest.fixture(scope="session")
def characters():
    """A tokenizer of single characters that ends a text as T5's does."""
    import string

    import tokenizers
    import transformers

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in string.printable[:95]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def rows_stand_alone():
    """check(ours, rows, shape): two rows in one batch of a family's adapter are what each is alone; `more` is what the
    network is told beside what `rows` holds."""
    from pgdpo_fast.models import NoisedBatch

    @torch.no_grad()
    def check(ours, rows, shape, **more):
        model, timestep = ours.load(), torch.tensor([900.0, 30.0])
        noised = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        found = ours.predict(model, NoisedBatch(noised, timestep, {**ours.collate(rows), **more}))
        for row in range(2):
            one = slice(row, row + 1)
            conditioning = {**ours.collate(rows[one]), **{name: values[one] for name, values in more.items()}}
            alone = ours.predict(model, NoisedBatch(noised[one], timestep[one], conditioning))
            torch.testing.assert_close(found[one], alone, atol=1e-6, rtol=1e-5)

    return check


@pytest.fixture(scope="session")
def checkpointing_changes_no_bit():
    """check(adapter, row, shape): `adapter(**options)` gives the same gradients with and without checkpointing."""
    from pgdpo_fast.models import NoisedBatch

    def check(adapter, row, shape):
        gradients = []
        noised = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        for checkpointing in (False, True):
            ours = adapter(train="full", gradient_checkpointing=checkpointing)
            policy = ours.make_trainable(ours.load())
            batch = NoisedBatch(noised, torch.tensor([500.0]), ours.collate([row]))
            ours.predict(policy, batch).square().mean().backward()
            gradients.append([parameter.grad for parameter in policy.parameters()])
        assert any(gradient is not None for gradient in gradients[0])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True) if pair[0] is not None)

    return check


@pytest.fixture(scope="session")
def diffusers_loads():
    """check(pipeline, adapter, weights, train, lora, row, shape): diffusers makes of exported weights the network that
    `restore` makes of them, which is not the one training began with."""
    from pgdpo_fast.models import NoisedBatch

    def check(pipeline, adapter, weights, kind, lora, row, shape):
        ours = adapter(train=kind, lora=lora)
        policy = ours.make_trainable(ours.load())
        ours.restore(policy, weights)
        if kind == "full":
            theirs = type(pipeline.transformer).from_pretrained(weights)
        else:
            theirs = adapter().load()
            type(pipeline)(**{**pipeline.components, "transformer": theirs}).load_lora_weights(weights)
        batch = NoisedBatch(torch.randn(1, *shape), torch.tensor([500.0]), ours.collate([row]))
        policy, theirs = (model.requires_grad_(False).eval() for model in (policy, theirs))
        assert torch.equal(ours.predict(policy, batch), ours.predict(theirs, batch))
        assert not torch.equal(ours.predict(policy, batch), ours.predict(adapter().load(), batch))

    return check


@pytest.fixture
def whole_way(tmp_path):
    """go(family, model, train, **size) walks a family from clips to a resumed run and returns its configuration and
    its checkpoint: encode, cache-reference, a cached and an online run with the same bits, and a run in two parts."""
    from safetensors import safe_open

    from pgdpo_fast.analysis.runs import read_rows
    from pgdpo_fast.cli import main
    from pgdpo_fast.data.synthetic import render_pairs
    from pgdpo_fast.training.config import TrainConfig
    from pgdpo_fast.training.reference_pass import cache_reference
    from pgdpo_fast.training.trainer import train

    def go(family, model, kind, **size):
        clips = render_pairs(tmp_path / "clips", pairs=4, seed=1, fps=24, **size)
        flags = [text for key, value in size.items() for text in (f"--{key}", str(value))]
        folders = ["-m", str(clips), "-o", str(tmp_path / "store"), "--model", str(model)]
        assert main(["encode", *folders, "--codec", family, "--device", "cpu", "--text-dtype", "fp32", *flags]) == 0

        def config(run, steps=4, **data):
            return TrainConfig.from_mapping(
                {
                    "model": {
                        "family": family,
                        "path": str(model),
                        "dtype": "fp32",
                        "train": kind,
                        "lora": {"rank": 2},
                    },
                    "data": {"store": str(tmp_path / "store"), "evaluation_pairs": 1, **data},
                    "objective": {"name": "pgdpo", "beta": 100},
                    "training": {
                        "steps": steps,
                        "pairs_per_step": 2,
                        "learning_rate": 1e-3,
                        "evaluation_every": 2,
                        "evaluation_draws": 1,
                        "checkpoint_every": 2,
                        "device": "cpu",
                    },
                    "output": {"dir": str(tmp_path / run), "tensorboard": False},
                }
            )

        def measured(run):
            rows = read_rows(tmp_path / run / "metrics.jsonl")
            return [(row["step"], row["grad_norm"], row["pairs"]) for row in rows]

        def weights(result):
            (file,) = (result.checkpoint / "weights").glob("*.safetensors")
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key).numpy().tobytes() for key in stored.keys()}

        cache = cache_reference(config("unused"), tmp_path / "reference")
        online = train(config("online"), display="none")
        cached = train(config("cached", reference_cache=str(cache.path)), display="none")
        train(config("parts", steps=2), display="none")
        parts = train(config("parts"), display="none")
        assert online.evaluation["rewards/chosen"] != 0.0
        assert measured("online") == measured("cached") == measured("parts")
        assert weights(online) == weights(cached) == weights(parts)
        return config("online"), online.checkpoint / "weights"

    return go
