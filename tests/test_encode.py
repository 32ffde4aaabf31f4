"""From manifest to latents: codecs follow their families, stores survive kills and damage, and nothing is silent."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import textwrap
import threading
import time

import pytest
import torch

from pgdpo_fast.data.codec import DiffusersVAECodec, PixelUnshuffleCodec
from pgdpo_fast.data.encode import encode_manifest
from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.data.manifest import read_manifest
from pgdpo_fast.data.synthetic import render_pairs
from pgdpo_fast.data.text import HashTextEncoder, TransformersTextEncoder, pad_text
from pgdpo_fast.data.video import read_video
from pgdpo_fast.errors import ConfigError, DataError, Preempted
from pgdpo_fast.models import adapter_class
from pgdpo_fast.storage import open_shard, read_json, write_json, write_shard
from tests.commands import FORK, run_scripts


def video_of(frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


# Codecs


@pytest.mark.parametrize("spatial, temporal, frames", [(1, 1, 3), (4, 1, 6), (8, 4, 9), (2, 3, 1)])
def test_pixel_unshuffle_gives_every_bit_back(spatial, temporal, frames):
    codec, video = PixelUnshuffleCodec(spatial, temporal), video_of(frames, 16, 24)
    latents = codec.encode(video)
    assert latents.dtype == torch.float32 and tuple(latents.shape) == codec.latent_shape(frames, 16, 24)
    assert latents.shape[0] == 3 * temporal * spatial**2 and latents.abs().max() <= 1
    assert torch.equal(codec.decode(latents), video)


def test_a_latent_pixel_holds_the_block_it_stands_for():
    video = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    video[2, 4:8, 0:4] = 255
    latents = PixelUnshuffleCodec(4, 2).encode(video)
    lit = (latents > 0).any(0).nonzero().tolist()
    assert lit == [[1, 1, 0]]  # frames 1 and 2 are the second latent frame


def save_vae(folder, name):
    import diffusers

    torch.manual_seed(0)
    four = (8,) * 4
    vae = {
        "wan": lambda: diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]),
        "cogvideox": lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=four, latent_channels=4, layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4, sample_height=32, sample_width=32, scaling_factor=0.7),
        "unet3d": lambda: diffusers.AutoencoderKL(
            block_out_channels=four, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, sample_size=32),
    }[name]()  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """{family: (folder, vae)} of tiny autoencoders saved as diffusers saves them; Wan's as a `vae` subfolder."""
    root = tmp_path_factory.mktemp("vaes")
    return {name: (root / name, save_vae(root / name / ("vae" if name == "wan" else ""), name))
            for name in ("wan", "cogvideox", "unet3d")}  # fmt: skip


def codec(name, path, **options):
    return DiffusersVAECodec(path, adapter_class(name).latents, device="cpu", **options)


def prompts(name, path, **options):
    return TransformersTextEncoder(path, adapter_class(name).text, device="cpu", **options)


def load(vaes, name, **options):
    return codec(name, vaes[name][0], **options)


@pytest.mark.parametrize("name, frames", [("wan", 5), ("cogvideox", 9), ("unet3d", 3)])
@torch.no_grad()
def test_vae_latents_are_normalised_as_their_transformers_expect(vaes, name, frames):
    codec, vae, video = load(vaes, name), vaes[name][1], video_of(frames, 32, 48)
    latents = codec.encode(video)
    assert latents.dtype == torch.float32 and tuple(latents.shape) == codec.latent_shape(frames, 32, 48)
    pixels = (video.permute(3, 0, 1, 2).float() / 127.5 - 1)[None]
    if name == "wan":
        z = vae.encode(pixels).latent_dist.mode()[0]
        expected = torch.stack([(z[0] - 0.1) / 1.0, (z[1] + 0.2) / 2.0, (z[2] - 0.3) / 0.5, z[3] / 1.5])
        unit = vae.decode(z[None]).sample
    elif name == "cogvideox":
        z = vae.encode(pixels).latent_dist.mode()[0]
        expected, unit = z * 0.7, vae.decode(z[None]).sample
    else:
        z = torch.stack([vae.encode(pixels[:, :, k]).latent_dist.mode()[0] for k in range(frames)], 1)
        expected = z * 0.18215
        unit = torch.stack([vae.decode(z[None, :, k]).sample for k in range(frames)], 2)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape
    wanted = ((unit[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255)
    assert (decoded.float() - wanted).abs().max() <= 0.51


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("wan", (10, 32, 32), "frames=10.*4k.1 frames; use 9 or 13"),
        ("wan", (9, 40, 32), "height=40.*multiples of 16 pixels; use 32 or 48"),
        ("wan", (9, 32, 8), "width=8.*use 16 or 32"),
        ("cogvideox", (13, 32, 32), "frames=13.*8k.1 frames; use 9 or 17"),
        ("unet3d", (4, 32, 36), "width=36.*multiples of 8 pixels; use 32 or 40"),
    ],
)
def test_sizes_a_vae_would_change_in_silence_are_errors_with_the_nearest_valid(vaes, name, size, message):
    codec = load(vaes, name)
    with pytest.raises(ConfigError, match=message):
        codec.latent_shape(*size)
    with pytest.raises(ConfigError, match=message):
        codec.encode(video_of(*size))


def test_sampled_latents_are_a_function_of_the_clip(vaes):
    codec, video = load(vaes, "wan", mode="sample"), video_of(5, 32, 32)
    first = codec.encode(video)
    codec.encode(video_of(5, 32, 32, seed=1))
    torch.manual_seed(123)
    assert torch.equal(codec.encode(video), first)
    assert not torch.equal(load(vaes, "wan").encode(video), first)


def test_the_fingerprint_sees_weights_config_mode_and_dtype_but_not_the_place(vaes, tmp_path):
    base = load(vaes, "wan").fingerprint
    shutil.copytree(vaes["wan"][0], tmp_path / "copy")
    assert codec("wan", tmp_path / "copy").fingerprint == base
    assert load(vaes, "wan", mode="sample").fingerprint != base != load(vaes, "wan", dtype="bf16").fingerprint
    config = tmp_path / "copy" / "vae" / "config.json"
    config.write_text(config.read_text().replace("1.5", "1.25"))
    changed = codec("wan", tmp_path / "copy").fingerprint
    assert {key for key in base if base[key] != changed[key]} == {"config_sha256"}
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert codec("wan", tmp_path / "copy").fingerprint["weights_sha256"] != base[
        "weights_sha256"]  # fmt: skip


def test_codecs_and_text_encoders_are_refused_by_name_option_and_path(tmp_path):
    for make in (codec, prompts):
        with pytest.raises(ConfigError, match="expected one of.*did you mean 'wan'"):
            make("wann", tmp_path)
        with pytest.raises(DataError, match=f"{tmp_path}.*could not be loaded"):
            make("wan", tmp_path)
        with pytest.raises(ConfigError, match="dtype='float32': expected one of bf16, fp16, fp32; did you mean 'fp32'"):
            make("wan", tmp_path, dtype="float32")
    with pytest.raises(ConfigError, match="spatial=0"):
        PixelUnshuffleCodec(spatial=0)


# Prompts


def test_hash_embeddings_are_fixed_and_shared_by_equal_words():
    encoder = HashTextEncoder(24, 8)
    text = encoder.encode("A red, red square")["text"]
    assert tuple(text.shape) == (4, 24) and torch.equal(text[1], text[2]) and not torch.equal(text[0], text[3])
    assert torch.equal(encoder.encode("square")["text"][0], text[3])
    many = torch.cat([encoder.encode(f"word{i}")["text"] for i in range(500)])
    assert many.mean().abs() < 0.02 and many.var().sub(1).abs() < 0.03
    assert (
        text[3, :3].tolist() == HashTextEncoder(3).encode("square")["text"][0].tolist()
    )  # a prefix, whatever the width
    long = "one two three four five six seven eight nine"
    assert encoder.truncates(long) and encoder.encode(long)["text"].shape[0] == encoder.token_count(long) == 8
    assert encoder.encode("")["text"].shape == (1, 24)


@pytest.fixture(scope="module")
def text_models(characters, tmp_path_factory):
    """{family: folder} of tiny text encoders with a tokenizer of single characters."""
    import transformers

    root = tmp_path_factory.mktemp("text")
    size = dict(vocab_size=len(characters), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folders = {}
    for name, config, model in (("wan", transformers.UMT5Config, transformers.UMT5EncoderModel),
                                ("cogvideox", transformers.T5Config, transformers.T5EncoderModel)):  # fmt: skip
        torch.manual_seed(0)
        characters.save_pretrained(root / name / "tokenizer")
        model(config(**size)).save_pretrained(root / name / "text_encoder")
        folders[name] = root / name
    return folders


PROMPT = "A red  square &amp; a blue\tcircle"


def pipeline_embedding(family, encoder, length):
    """The prompt embedding of the diffusers pipeline built on the same tokenizer and model."""
    from diffusers import CogVideoXPipeline, WanPipeline

    part = encoder.parts["text"]
    parts = dict(tokenizer=part.tokenizer, text_encoder=part.model, transformer=None, vae=None, scheduler=None)
    pipe = (WanPipeline if family == "wan" else CogVideoXPipeline)(**parts)
    return pipe._get_t5_prompt_embeds(PROMPT, max_sequence_length=length, device=torch.device("cpu"))[0].detach()


@pytest.mark.parametrize("family, length", [("wan", 512), ("cogvideox", 226)])
def test_prompt_embeddings_equal_the_diffusers_pipelines(text_models, family, length):
    encoder = prompts(family, text_models[family])
    text = encoder.encode(PROMPT)["text"]
    assert text.shape[0] == encoder.token_count(PROMPT) and text.dtype == torch.float32
    assert torch.equal(pad_text([text], length)[0], pipeline_embedding(family, encoder, length))
    if family == "wan":
        assert text.shape[0] == len("A red square & a blue circle") + 2  # one mark before the text, one end after it
    else:
        assert text.shape[0] == 226 and text[200:].abs().min() > 0


def test_text_encoders_tell_truncation_and_their_rules(text_models):
    encoder = prompts("wan", text_models["wan"], max_length=10)
    assert (
        encoder.truncates(PROMPT)
        and encoder.encode(PROMPT)["text"].shape == (10, 16)
        and not encoder.truncates("a cat")
    )
    whole = prompts("wan", text_models["wan"])
    whole, short = whole.fingerprint["text"], encoder.fingerprint["text"]
    assert {key for key in whole if whole[key] != short[key]} == {"max_length"}
    with pytest.raises(ConfigError, match="1 to 512"):
        prompts("wan", text_models["wan"], max_length=513)


def test_padding_puts_zeros_after_each_prompt():
    batch = pad_text([torch.ones(2, 3), torch.ones(4, 3)], 5)
    assert batch.shape == (2, 5, 3) and batch.sum((1, 2)).tolist() == [6, 12] and batch[0, 2:].abs().sum() == 0
    with pytest.raises(DataError, match="max_length=3"):
        pad_text([torch.ones(4, 3)], 3)


# Stores

SIZE = dict(frames=3, height=16, width=16)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(render_pairs(tmp_path_factory.mktemp("pairs"), pairs=7, seed=2, **SIZE))


def encode(manifest, output, **changes):
    options = dict(codec=PixelUnshuffleCodec(4), text=HashTextEncoder(8), shard_bytes=2 * 2 * 4 * 48 * 3 * 16, **SIZE)
    return encode_manifest(manifest, output, **{**options, **changes})


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def store(manifest, tmp_path_factory):
    """A finished store of 7 pairs in 4 shards. Read only."""
    return encode(manifest, tmp_path_factory.mktemp("store") / "s")


def test_a_store_gives_back_what_was_encoded(store, manifest):
    assert len(store) == 7 and store.ids == [pair.id for pair in manifest.pairs] and store.shape == (48, 3, 4, 4)
    codec, text = PixelUnshuffleCodec(4), HashTextEncoder(8)
    for pair, example in zip(manifest.pairs, store, strict=True):
        assert (example.id, example.prompt, example.weight) == (pair.id, pair.prompt, 1.0)
        assert torch.equal(codec.decode(example.chosen), read_video(pair.chosen))
        assert torch.equal(example.rejected, codec.encode(read_video(pair.rejected)))
        assert torch.equal(example.conditioning["text"], text.encode(pair.prompt)["text"])
    names = [name[:11] if name.startswith("shard") else name for name in sorted(files_of(store.path))]
    assert names == [".lock", "index.parquet", *(f"shard-{k:05d}" for k in range(4)), "store.json"]
    assert store.row(store.ids[0])["chosen"] == "clips/0000_chosen.mp4"
    with pytest.raises(DataError, match="no pair 'x'"):
        store.get("x")


def test_pairs_of_different_size_and_rate_share_one_store(tmp_path):
    from pgdpo_fast.data.manifest import Pair, write_manifest
    from pgdpo_fast.data.video import write_video

    chosen = write_video(tmp_path / "a.mp4", video_of(12, 64, 96), 12)
    rejected = write_video(tmp_path / "b.mp4", video_of(40, 80, 48), 30)
    path = write_manifest(tmp_path / "m.jsonl", [Pair("p", "a cat", chosen, rejected, weight=0.5)])
    example = encode(path, tmp_path / "s", frames=5, height=32, width=32, fps=6).get("p")
    assert example.chosen.shape == example.rejected.shape == (48, 5, 8, 8) and example.weight == 0.5


def test_half_precision_stores_are_half_as_large_and_read_as_fp32(manifest, store, tmp_path):
    half = encode(manifest, tmp_path / "s", dtype="bf16")
    assert half.get(half.ids[0]).chosen.dtype == torch.float32
    assert torch.equal(half.get(half.ids[0]).chosen, store.get(store.ids[0]).chosen.bfloat16().float())
    shards = [sum(path.stat().st_size for path in s.path.glob("shard*")) for s in (half, store)]
    assert shards[0] < 0.6 * shards[1] and half.fingerprint != store.fingerprint


def test_encoding_twice_elsewhere_gives_the_same_files_and_fingerprint(manifest, store, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(manifest.path.parent, moved)
    again = encode(moved / "manifest.jsonl", tmp_path / "s")
    assert files_of(again.path) == files_of(store.path) and again.fingerprint == store.fingerprint


def test_a_finished_store_is_not_encoded_again(manifest, store, tmp_path):
    class Forbidden(PixelUnshuffleCodec):
        def encode(self, video):
            raise AssertionError("encoded again")

    shutil.copytree(store.path, tmp_path / "s")
    calls = []
    encode(manifest, tmp_path / "s", codec=Forbidden(4), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(7, 7)] and files_of(tmp_path / "s") == files_of(store.path)


def test_a_store_opened_in_another_process_reads_the_same(store):
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.get(store.ids[5]).chosen, store.get(store.ids[5]).chosen)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"frames": 2}, "clip.frames=3, now clip.frames=2"),
        ({"fps": 4}, "clip.fps=None, now clip.fps='4'"),
        ({"codec": PixelUnshuffleCodec(2)}, "codec.spatial=4, now codec.spatial=2"),
        ({"text": HashTextEncoder(9)}, "text.dim=8, now text.dim=9"),
        ({"dtype": "fp16"}, "dtype='float32', now dtype='float16'"),
    ],
)
def test_other_settings_over_a_store_name_the_field_and_touch_nothing(manifest, store, change, field):
    before = files_of(store.path)
    with pytest.raises(DataError, match=f"{field}.*choose another output folder"):
        encode(manifest, store.path, **change)
    assert files_of(store.path) == before


def test_another_manifest_over_a_store_is_refused(manifest, store, tmp_path):
    shutil.copytree(manifest.path.parent, tmp_path / "m")
    lines = (tmp_path / "m/manifest.jsonl").read_text().splitlines()
    (tmp_path / "m/manifest.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match="manifest.pairs=7, now manifest.pairs=6"):
        encode(tmp_path / "m/manifest.jsonl", store.path)
    (tmp_path / "m/manifest.jsonl").write_text("\n".join(lines).replace(" over ", " under "))
    with pytest.raises(DataError, match="manifest.sha256"):
        encode(tmp_path / "m/manifest.jsonl", store.path)


def test_a_folder_with_other_files_is_left_alone(manifest, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="no store .it holds thesis.tex"):
        encode(manifest, tmp_path)
    with pytest.raises(DataError, match="no such store"):
        LatentStore(tmp_path / "nothing")
    with pytest.raises(DataError, match="store.json: no such file"):
        LatentStore(tmp_path)


def test_geometry_errors_come_before_any_work(manifest, tmp_path):
    with pytest.raises(ConfigError, match="height=18"):
        encode(manifest, tmp_path / "s", height=18)
    assert not (tmp_path / "s").exists()


def test_too_small_a_disk_is_an_error_before_anything_is_encoded(manifest, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match="needs .* KiB, 1000 B are free"):
        encode(manifest, tmp_path / "s")
    assert not (tmp_path / "s/store.json").exists() and not list((tmp_path / "s").glob("s*"))


@pytest.fixture
def faulty(manifest, tmp_path):
    """The manifest with the second pair's rejected clip cut short and the fifth's chosen clip replaced by text."""
    shutil.copytree(manifest.path.parent, tmp_path / "m")
    clip = tmp_path / "m/clips/0001_rejected.mp4"
    clip.write_bytes(clip.read_bytes()[:-200])
    (tmp_path / "m/clips/0004_chosen.mp4").write_text("no video")
    return tmp_path / "m/manifest.jsonl"


def test_unusable_clips_drop_their_pairs_with_reasons_and_keep_the_others(faulty, manifest, store, tmp_path):
    partial = encode(faulty, tmp_path / "s")
    kept = [pair.id for index, pair in enumerate(manifest.pairs) if index not in (1, 4)]
    assert partial.ids == kept
    assert [(item.where, item.reason) for item in partial.dropped] == [
        (f"pair {manifest.pairs[1].id}", "rejected clip unusable"),
        (f"pair {manifest.pairs[4].id}", "chosen clip unusable")]  # fmt: skip
    assert "0004_chosen.mp4" in partial.dropped[1].detail
    assert all(torch.equal(partial.get(id).chosen, store.get(id).chosen) for id in kept)
    assert encode(faulty, tmp_path / "s").dropped == partial.dropped


def test_strict_encoding_stops_at_the_first_unusable_clip(faulty, tmp_path):
    with pytest.raises(DataError, match="0001-jitter: rejected clip unusable.*0001_rejected.mp4"):
        encode(faulty, tmp_path / "s", strict=True)


def test_too_many_unusable_pairs_are_an_error_before_anything_is_encoded(faulty, tmp_path):
    class Forbidden(PixelUnshuffleCodec):
        def encode(self, video):
            raise AssertionError("encoded")

    told = []
    with pytest.raises(DataError, match=r"2 of 7 rows.*1 x rejected clip unusable.*--max-dropped 0.29"):
        encode(faulty, tmp_path / "s", codec=Forbidden(4), max_dropped=0.28, tell=told.append)
    assert [line.split(":")[1] for line in told] == [" pair 0001-jitter", " pair 0004-morph"]
    assert not (tmp_path / "s/store.json").exists()
    assert len(encode(faulty, tmp_path / "s", max_dropped=0.29)) == 5
    with pytest.raises(ConfigError, match="max_dropped=10"):
        encode(faulty, tmp_path / "s", max_dropped=10)


def test_missing_clips_count_as_unusable_and_ties_do_not(manifest, tmp_path):
    rows = [json.loads(line) for line in manifest.path.read_text().splitlines()]
    shutil.copytree(manifest.path.parent, tmp_path / "m")
    rows[0] |= {"chosen_score": 1, "rejected_score": 1}
    rows[1] |= {"chosen": "nowhere.mp4"}
    (tmp_path / "m/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[2]]))
    with pytest.raises(DataError, match="1 of 8 rows.*1 x chosen file missing.*--max-dropped 0.13"):
        encode(tmp_path / "m/manifest.jsonl", tmp_path / "s", max_dropped=0)
    store = encode(tmp_path / "m/manifest.jsonl", tmp_path / "s", max_dropped=0.13)
    listed = [json.loads(line) for line in (store.path / "dropped.jsonl").read_text().splitlines()]
    assert [item["where"] for item in listed] == ["manifest.jsonl:1", "manifest.jsonl:2", "manifest.jsonl:8"]
    assert [item["reason"] for item in listed] == ["tie: scores are equal", "chosen file missing", "same pair again"]


def test_pictures_damaged_inside_stop_the_encoding_once_they_are_too_many(manifest, tmp_path, monkeypatch):
    def damaged(path, **options):
        raise DataError(f"{path}: damaged")

    monkeypatch.setattr("pgdpo_fast.data.encode.read_video", damaged)
    told = []
    with pytest.raises(DataError, match="2 of 7 rows cannot be used"):
        encode(manifest, tmp_path / "s", max_dropped=0.2, tell=told.append)
    assert len(told) == 2


@pytest.mark.parametrize("restamped", [False, True])
def test_a_clip_replaced_by_one_of_equal_size_is_noticed(manifest, tmp_path, restamped):
    shutil.copytree(manifest.path.parent, tmp_path / "m")
    clip = tmp_path / "m/clips/0003_chosen.mp4"

    def terminate(done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        encode(tmp_path / "m/manifest.jsonl", tmp_path / "s", progress=terminate)
    data, times = bytearray(clip.read_bytes()), clip.stat()
    data[len(data) // 2] ^= 1
    clip.write_bytes(data)
    if restamped:
        os.utime(clip, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match="manifest.sha256.*because a row or a clip changed"):
        encode(tmp_path / "m/manifest.jsonl", tmp_path / "s")


def test_a_resumed_run_does_not_read_the_clips_again_to_know_them(manifest, tmp_path, monkeypatch):
    with pytest.raises(Preempted):
        encode(manifest, tmp_path / "s", progress=lambda done, total: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("pgdpo_fast.data.clips.hashlib", None)
    encode(manifest, tmp_path / "s")


def test_what_the_clips_lose_is_told_with_how_many_do(manifest, tmp_path, monkeypatch):
    from pgdpo_fast.data import video

    probe, told = video.probe_video, []
    monkeypatch.setattr("pgdpo_fast.data.encode.probe_video", lambda path, **options: dataclasses.replace(
        probe(path, **options), notes=("interlaced",) if "0002" in path.name else ()))  # fmt: skip
    encode(manifest, tmp_path / "s", tell=told.append)
    assert told == [f"note: 2 clip(s) are interlaced; first: {manifest.pairs[2].chosen}"]


def test_no_usable_pair_is_an_error(manifest, tmp_path):
    with pytest.raises(DataError, match="none of 7 pairs could be encoded; first: pair 0000-flicker.*99 needed"):
        encode(manifest, tmp_path / "s", frames=99)


def test_latents_that_are_not_finite_never_reach_a_store(manifest, store, tmp_path):
    class Overflowing(PixelUnshuffleCodec):
        def encode(self, video):
            latents = super().encode(video)
            return latents * 1e5 if torch.equal(video, read_video(manifest.pairs[2].chosen)) else latents

    partial = encode(manifest, tmp_path / "s", codec=Overflowing(4), dtype="fp16")
    assert len(partial) == 6 and partial.dropped[0].reason == "chosen not finite once encoded"


# Interruptions


def test_sigterm_stops_between_pairs_and_the_rest_is_done_on_resume(manifest, store, tmp_path):
    def terminate(done, total):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="3 of 7 pairs.*resume with: do it again"):
        encode(manifest, tmp_path / "s", progress=terminate, resume_command="do it again")
    with pytest.raises(DataError, match="2 of 7 pairs.*same encode command"):
        LatentStore(tmp_path / "s")
    seen = []
    encode(manifest, tmp_path / "s", progress=lambda done, total: seen.append(done))
    assert seen == [2, 3, 4, 5, 6, 7] and files_of(tmp_path / "s") == files_of(store.path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_staged_row_damaged_between_two_runs_is_encoded_again(manifest, store, tmp_path):
    def terminate(done, total):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        encode(manifest, tmp_path / "s", progress=terminate)
    (staged,) = tmp_path.glob("s/staging/*/*.safetensors")
    data = bytearray(staged.read_bytes())
    data[-5] ^= 4
    staged.write_bytes(data)
    encode(manifest, tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(store.path)


@pytest.mark.parametrize("phase", ["read_video", "probe_video"])
def test_sigterm_is_seen_within_a_second_whatever_a_clip_takes(manifest, tmp_path, monkeypatch, phase):
    def endless(path, *, stop, **options):
        if threading.active_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(time.monotonic())
        while not stop() and time.monotonic() < started[0] + 30:
            time.sleep(0.01)
        raise Preempted("asked to")

    started = []
    monkeypatch.setattr(f"pgdpo_fast.data.encode.{phase}", endless)
    with pytest.raises(Preempted, match="stopped by SIGTERM with 0 of 7 pairs encoded"):
        encode(manifest, tmp_path / "s")
    assert time.monotonic() - started[0] < 1


@pytest.mark.parametrize("impossible", [{"fps": 1e9}, {"frames": 10**9}, {"height": 10**6, "width": 10**6}], ids=str)
def test_impossible_clip_settings_are_errors_before_any_clip_is_opened(manifest, tmp_path, impossible):
    with pytest.raises(ConfigError, match=f"{next(iter(impossible))}=.*at most"):
        encode(manifest, tmp_path / "s", **impossible)


KILLER = """
    import os, pathlib, signal, sys
    import torch
    from pgdpo_fast.data.codec import PixelUnshuffleCodec
    from pgdpo_fast.data.encode import encode_manifest
    from pgdpo_fast.data.text import HashTextEncoder
    import pyarrow.parquet, safetensors.torch, av

    torch.set_num_threads(1)
    manifest, output = sys.argv[1:]
    attempts = 0
    while True:
        attempts += 1
        child = os.fork()
        if child == 0:
            calls = 0
            def counted(function, torn=False):
                def call(*args, **kwargs):
                    global calls
                    calls += 1
                    if calls == attempts:
                        if torn:
                            args[0].open("wb").write(args[1][: len(args[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)
                return call
            os.replace, os.fsync = counted(os.replace), counted(os.fsync)
            pathlib.Path.write_bytes = counted(pathlib.Path.write_bytes, torn=True)
            pathlib.Path.unlink = counted(pathlib.Path.unlink)
            try:
                encode_manifest(manifest, output, codec=PixelUnshuffleCodec(4), text=HashTextEncoder(8), frames=3,
                                height=16, width=16, shard_bytes=2 * 2 * 4 * 48 * 3 * 16)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(attempts)
            sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_killed_at_any_write_and_resumed_equals_never_killed(manifest, store, tmp_path):
    output = tmp_path / "s"
    (tmp_path / "killer.py").write_text(textwrap.dedent(KILLER))
    (printed,) = run_scripts(tmp_path, [tmp_path / "killer.py", manifest.path, output])
    # So many runs were killed on the way; from Python 3.12 on, os.fork() may warn of threads besides.
    assert int(re.findall(r"^\d+$", printed, re.MULTILINE)[-1]) > 10
    assert files_of(output) == files_of(store.path)


class SlowCodec(PixelUnshuffleCodec):
    """Writes how many clips it encoded."""

    def __init__(self, counter):
        super().__init__(4)
        self.counter, self.encoded = counter, 0

    def encode(self, video):
        self.encoded += 1
        self.counter.write_text(str(self.encoded))
        time.sleep(0.1)
        return super().encode(video)


def encode_as(rank, manifest, output):
    """Body of one of two processes that begin together."""
    counters = [output.with_name(f"{output.name}-{number}") for number in (0, 1)]
    counters[rank].write_text("0")
    while not counters[1 - rank].exists():
        time.sleep(0.01)
    options = {"frames": 3, "height": 16, "width": 16, "shard_bytes": 2 * 2 * 4 * 48 * 3 * 16}
    codec, text = SlowCodec(counters[rank]), HashTextEncoder(8)
    encode_manifest(manifest, output, codec=codec, text=text, rank=rank, world_size=2, **options)


def share(manifest, output):
    """Clips that each of two processes encoded."""
    processes = [FORK.Process(target=encode_as, args=(rank, manifest, output)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [int(output.with_name(f"{output.name}-{rank}").read_text()) for rank in (0, 1)]


def test_processes_share_the_work_and_leave_the_store_of_one(manifest, store, tmp_path):
    encoded = share(manifest.path, tmp_path / "s")
    assert sum(encoded) == 2 * 7 and min(encoded) >= 2  # both clips of every pair once, and both processes took part
    assert files_of(tmp_path / "s") == files_of(store.path)


def test_processes_that_share_the_work_tell_what_each_of_them_dropped(faulty, tmp_path):
    path = faulty.parent / "clips/0006_chosen.mp4"  # alone in the last shard, and damaged inside: seen when decoded
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3] + bytes(len(data) - len(data) // 3))
    alone = encode(faulty, tmp_path / "alone")
    assert len(alone.dropped) == 3
    share(faulty, tmp_path / "shared")
    assert files_of(tmp_path / "shared") == files_of(alone.path)


def test_of_the_processes_of_the_command_only_the_first_speaks(manifest, store, tmp_path, capfd, monkeypatch):
    from pgdpo_fast.cli import main

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["-m", manifest.path, "-o", tmp_path / "s", "--codec", "pixel-unshuffle", "--frames", 3]
    assert main([*map(str, ["encode", *flags, "--height", 16, "--width", 16])]) == 0
    assert capfd.readouterr() == ("", "") and LatentStore(tmp_path / "s").ids == store.ids


# Damage


def read_all(path):
    store = LatentStore(path)
    return [store.get(id) for id in store.ids]


def test_a_flipped_bit_anywhere_is_found_before_a_row_is_handed_out(tmp_path):
    source = render_pairs(tmp_path / "pairs", pairs=2, frames=2, height=16, width=16)
    small = encode(source, tmp_path / "s", frames=1, codec=PixelUnshuffleCodec(8), text=HashTextEncoder(2, 4),
                   dtype="fp16", shard_bytes=1)  # fmt: skip
    assert len(read_all(small.path)) == 2
    tried = 0
    for path in sorted(small.path.glob("*")):
        data = path.read_bytes()
        for position in range(0, len(data), 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=path.name):
                read_all(small.path)
            tried += 1
        path.write_bytes(data)
    assert tried > 1000 and len(read_all(small.path)) == 2


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove", "extend", "zero"])
@pytest.mark.parametrize("name", ["shard-00002-*", "index.parquet", "store.json"])
def test_harmed_files_are_named_and_encoding_again_mends_the_store(manifest, store, tmp_path, name, harm):
    folder = tmp_path / "s"
    shutil.copytree(store.path, folder)
    (path,) = folder.glob(name)
    data = path.read_bytes()
    harmed = {"truncate": data[:-9], "empty": b"", "extend": data + b"\n", "zero": bytes(len(data))}
    path.unlink() if harm == "remove" else path.write_bytes(harmed[harm])
    with pytest.raises(DataError, match=path.name):
        read_all(folder)
    notes = []
    encode(manifest, folder, tell=notes.append)
    if name == "store.json" and harm != "remove":
        assert "store.json.damaged" in notes[0]
        assert (folder / "store.json.damaged").read_bytes() == harmed[harm]
        (folder / "store.json.damaged").unlink()
    assert files_of(folder) == files_of(store.path)


def test_verify_reads_every_shard(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "s")
    copy = LatentStore(tmp_path / "s")
    copy.verify()
    (path,) = (tmp_path / "s").glob("shard-00003-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="shard-00003"):
        copy.verify()


def test_sealed_json_refuses_every_change_and_every_other_writer(tmp_path):
    value = {"name": "é", "list": [1, 2.5, None, True], "map": {"b": 1, "a": 2}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    data = (tmp_path / "a.json").read_bytes()
    for position in range(len(data)):
        (tmp_path / "a.json").write_bytes(data[:position] + bytes([data[position] ^ 32]) + data[position + 1 :])
        with pytest.raises(DataError, match="a.json"):
            read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(json.loads(data)))
    with pytest.raises(DataError, match="damaged"):
        read_json(tmp_path / "a.json")


def test_a_reader_keeps_the_old_file_while_a_new_one_takes_its_place(tmp_path):
    old = write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(1000)})
    mapped = open_shard(tmp_path, old)
    write_shard(tmp_path / "x.safetensors", {"a": torch.ones(1000)})
    assert mapped.get_tensor("a").sum() == 0
    with pytest.raises(DataError, match="damaged"):
        open_shard(tmp_path, old)


def test_shards_are_bytewise_repeatable_and_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    tensors = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(3, dtype=torch.int64)}
    first = write_shard(tmp_path / "x.safetensors", tensors, "what it is")
    assert write_shard(tmp_path / "x.safetensors", dict(reversed(tensors.items())), "what it is") == first
    handle = open_shard(tmp_path, first)
    assert torch.equal(handle.get_tensor("b"), tensors["b"]) and handle.metadata() == {"description": "what it is"}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="x.safetensors: could not be written .No space left"):
        write_shard(tmp_path / "x.safetensors", {"c": torch.zeros(1)})
    open_shard(tmp_path, first)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# Command line


def run(*arguments):
    from pgdpo_fast.cli import main

    return main(["encode", *map(str, arguments)])


def test_the_command_encodes_shows_what_was_dropped_and_where_the_store_is(faulty, tmp_path, capsys):
    arguments = ("--manifest", faulty, "--output", tmp_path / "s", "--codec", "pixel-unshuffle", "--frames", 3,
                 "--height", 16, "--width", 16, "--fps", 0)  # fmt: skip
    assert run(*arguments) == 3
    out, err = capsys.readouterr()
    assert err.index("dropped: pair 0001-jitter: rejected clip unusable") < err.index("2 of 7 rows cannot be used")
    assert "--max-dropped 0.29" in err and not (tmp_path / "s/store.json").exists()
    assert run(*arguments, "--max-dropped", 0.29) == 0
    out, err = capsys.readouterr()
    assert "5 of 7" in out and "chosen clip unusable" in out and "rejected clip unusable" in out
    assert "5 pairs, latents 48x3x4x4" in err and str(tmp_path / "s") in err and "KiB" in err
    assert LatentStore(tmp_path / "s").settings["clip"]["fps"] is None
    assert len((tmp_path / "s/dropped.jsonl").read_text().splitlines()) == 2 and "dropped.jsonl" in err
    assert run(*arguments, "--frames", 2) == 3
    assert "clip.frames=3, now clip.frames=2" in capsys.readouterr().err
    assert run(*arguments[:4], "--codec", "pixel-unshuffle", "--frames", 3, "--height", 18) == 2
    assert run(*arguments[:4], "--codec", "wan") == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("--criterion", "TA"), ("--model", "somewhere"), ("--revision", "main"), ("--vae-dtype", "bf16"),
     ("--vae-mode", "sample"), ("--text-dtype", "fp32"), ("--text-dim", 10**8), ("--fps", 1e9), ("--frames", 10**9),
     ("--max-clip-frames", 0), ("--max-dropped", 2)],
    ids=str,
)  # fmt: skip
def test_flags_that_do_not_apply_or_ask_for_too_much_are_errors(manifest, tmp_path, capsys, flags):
    small = ("--codec", "pixel-unshuffle", "--frames", 3, "--height", 16, "--width", 16)
    arguments = dict(zip(small[::2], small[1::2], strict=True)) | {flags[0]: flags[1]}
    given = [part for item in arguments.items() for part in item]
    assert run("-m", manifest.path, "-o", tmp_path / "s", *given) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and not (tmp_path / "s/store.json").exists()


def test_text_from_outside_is_shown_and_not_obeyed(manifest, tmp_path, capsys):
    shutil.copytree(manifest.path.parent, tmp_path / "m")
    rows = [json.loads(line) for line in manifest.path.read_text().splitlines()]
    rows[0] |= {"id": "[/red]\x1b[31m", "chosen": "x[/v2].mp4"}
    (tmp_path / "m/x[").mkdir()
    (tmp_path / "m/x[/v2].mp4").write_text("no video")
    (tmp_path / "m/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("-m", tmp_path / "m/manifest.jsonl", "-o", tmp_path / "s", "--codec", "pixel-unshuffle", "--frames", 3,
               "--height", 16, "--width", 16, "--fps", 0, "--max-dropped", 0.2) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "pair [/red]\\x1b[31m: chosen clip unusable" in err
    assert "/v2].mp4" in out and "x[/v2].mp4" in err


def test_the_command_encodes_with_a_model_folder(manifest, text_models, vaes, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(vaes["wan"][0], model)
    shutil.copytree(text_models["wan"], model, dirs_exist_ok=True)
    assert run("-m", manifest.path, "-o", tmp_path / "s", "--model", model, "--device", "cpu",
               "--frames", 1, "--height", 16, "--width", 16, "--fps", 8) == 0  # fmt: skip
    store = LatentStore(tmp_path / "s")
    assert store.shape == (4, 1, 2, 2) and store.conditioning == {"text": (-1, 16)} and len(store) == 7
    assert (
        store.settings["codec"]["class"] == "AutoencoderKLWan" and store.settings["text"]["text"]["padding"] == "zeros"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--device", "banana"), "--device='banana': expected auto, cpu, cuda or cuda:N"),
        (("--device", "meta"), "--device='meta': expected auto, cpu, cuda or cuda:N"),
        (("--dtype", "float16"), "--dtype='float16': expected one of bf16, fp16, fp32; did you mean 'fp16'?"),
        (("--vae-dtype", "int8"), "--vae-dtype='int8': expected one of bf16, fp16, fp32"),
    ],
)
def test_a_device_or_dtype_that_is_none_is_one_line_and_leaves_no_folder(manifest, tmp_path, capsys, flags, message):
    assert run("-m", manifest.path, "-o", tmp_path / "s", "--codec", "pixel-unshuffle", *flags) == 2
    assert capsys.readouterr().err == f"error: {message}\n" and not (tmp_path / "s").exists()


# Conditioning beside the text


class PooledToo(HashTextEncoder):
    """A second tensor for each prompt, of a fixed size."""

    @property
    def shapes(self):
        return {**super().shapes, "pooled_text": (3,)}

    def encode(self, prompt):
        return {**super().encode(prompt), "pooled_text": torch.tensor([float(len(prompt)), 1.0, 2.0])}


def test_a_store_carries_whatever_tensors_the_text_encoder_names(manifest, store, tmp_path):
    more = encode_manifest(manifest, tmp_path / "s", codec=PixelUnshuffleCodec(4), text=PooledToo(8), **SIZE)
    assert more.conditioning == {"text": (-1, 8), "pooled_text": (3,)} and store.conditioning == {"text": (-1, 8)}
    for pair in manifest.pairs:
        found, plain = more.get(pair.id), store.get(pair.id)
        assert found.conditioning["pooled_text"].tolist() == [len(pair.prompt), 1, 2]
        assert torch.equal(found.conditioning["text"], plain.conditioning["text"])
        assert list(plain.conditioning) == ["text"] and torch.equal(found.chosen, plain.chosen)
    assert "conditioning" not in store.metadata  # the layout of a store without extras has not changed
