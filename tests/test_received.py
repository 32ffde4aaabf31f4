"""What came from someone else cannot reach outside its folder, and what is damaged is found, named and mended."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from pgdpo_fast.data.codec import PixelUnshuffleCodec
from pgdpo_fast.data.encode import encode_manifest
from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.data.manifest import read_manifest
from pgdpo_fast.data.synthetic import render_pairs
from pgdpo_fast.data.text import HashTextEncoder
from pgdpo_fast.errors import DataError
from pgdpo_fast.reference.build import build_cache
from pgdpo_fast.reference.cache import Block, Layout, ReferenceCache
from pgdpo_fast.storage import Shard, read_json, sha256_file, write_json

SIZE = dict(frames=2, height=8, width=8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(render_pairs(tmp_path_factory.mktemp("pairs"), pairs=3, frames=2, height=16, width=16))


def encode(manifest, output, **options):
    options = {"codec": PixelUnshuffleCodec(4), "shard_bytes": 1, **SIZE, **options}
    return encode_manifest(manifest, output, text=HashTextEncoder(4), **options)


def make_cache(path, **options):
    def compute(keys):
        rows = torch.tensor([float(draw) for _, draw in keys])
        return {"chosen": rows, "rejected": rows + 1}

    layout = Layout.of("errors", "sample", (2, 2, 2, 2), "fp32", 1)
    return build_cache(path, fingerprint={"a": 1}, blocks=[Block(("x", "y"), 2)], layout=layout,
                       **{"compute": compute, **options})  # fmt: skip


@pytest.fixture
def received(manifest, tmp_path):
    """A store, with a file beside it that is none of its business."""
    encode(manifest, tmp_path / "store")
    (tmp_path / "victim").write_text("mine")
    return tmp_path / "store"


def resealed(path, change):
    content = read_json(path)
    change(content)
    write_json(path, content)


NAMES = [
    "../victim",
    "/etc/hostname",
    "..",
    ".",
    "",
    "a/../../victim",
    "a\\b",
    "C:x",
    "a\0b",
    "x" * 300,
    7,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_only_ever_named_by_a_plain_name(name):
    with pytest.raises(DataError, match="plain name|no plain"):
        Shard(name, 1, "0" * 64)


@pytest.mark.parametrize("bytes, sha256", [(-1, "0" * 64), (1.5, "0" * 64), (True, "0" * 64), (1, "g" * 64), (1, None)])
def test_a_file_is_only_ever_listed_with_a_size_and_a_hash(bytes, sha256):
    with pytest.raises(DataError, match="size in bytes"):
        Shard("a", bytes, sha256)


@pytest.mark.parametrize("name", ["../victim", "../../victim", "notes.txt", ".lock"])
def test_encode_removes_nothing_that_a_received_store_names(received, manifest, name):
    (received / "notes.txt").write_text("also mine")
    target = received / name

    def change(state):
        state["groups"][0]["file"]["name"] = name
        state["complete"] = False

    resealed(received / "store.json", change)
    before = target.read_bytes() if target.exists() else None
    with pytest.raises(DataError, match="store.json"):
        encode(manifest, received)
    assert (target.read_bytes() if target.exists() else None) == before
    assert (received / "notes.txt").exists() and (received.parent / "victim").read_text() == "mine"


@pytest.mark.parametrize("what", ["groups", "index"])
def test_training_opens_no_shard_or_index_outside_the_store_even_where_the_hash_fits(received, what):
    def change(state):
        entry = state["groups"][1]["file"] if what == "groups" else state["index"]
        shutil.copy(received / entry["name"], received.parent / "outside")
        entry["name"] = "../outside"

    resealed(received / "store.json", change)
    with pytest.raises(DataError, match="store.json.*'../outside'"):
        LatentStore(received)


@pytest.mark.parametrize("which", ["shard-00001-*", "index.parquet"])
def test_a_link_in_a_store_is_not_followed(received, which):
    (path,) = received.glob(which)
    os.replace(path, received.parent / "outside")
    path.symlink_to(received.parent / "outside")
    with pytest.raises(DataError, match="is a link"):
        LatentStore(received).verify()


@pytest.mark.parametrize("finished", [True, False])
def test_a_staging_folder_that_is_a_link_keeps_its_contents(received, manifest, finished):
    outside = received.parent / "outside"
    outside.mkdir()
    for name in ("00000000-aaaa.safetensors", "letter.txt"):
        (outside / name).write_text("mine")
    (received / "staging").symlink_to(outside)
    if not finished:
        resealed(received / "store.json", lambda state: state.update(complete=False, groups=state["groups"][:1]))
    with pytest.raises(DataError, match="staging: is a link"):
        encode(manifest, received)
    assert len(list(outside.iterdir())) == 2


def test_a_lock_that_is_a_link_does_not_empty_what_it_leads_to(received, manifest):
    (received / ".lock").unlink()
    (received / ".lock").symlink_to(received.parent / "victim")
    with pytest.raises(DataError, match="could not be written"):
        encode(manifest, received)
    assert (received.parent / "victim").read_text() == "mine"


def keys_of(value, path=()):
    """Paths of all keys of a nested mapping, the first entry of every list included."""
    found = []
    for key, below in (
        value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else [])
    ):
        found += [(*path, key), *keys_of(below, (*path, key))]
    return found


def changed(content, path, value=...):
    """A copy in which the entry at `path` is `value`, or missing."""
    content = json.loads(json.dumps(content))
    below = content
    for key in path[:-1]:
        below = below[key]
    if value is ...:
        del below[path[-1]]
    else:
        below[path[-1]] = value
    return content


@pytest.mark.parametrize("value", [..., None, "text", -1, [[]], {"name": 3}])
def test_a_resealed_store_is_read_or_refused_by_name_whatever_it_lacks(received, manifest, value):
    content, refused = read_json(received / "store.json"), 0
    examples = [example.chosen for example in LatentStore(received)]
    for path in keys_of(content):
        write_json(received / "store.json", changed(content, path, value))
        for use in (lambda: [example.chosen for example in LatentStore(received)], lambda: encode(manifest, received)):
            try:
                result = use()
            except DataError as error:
                assert "store" in str(error)
                refused += 1
            else:
                if isinstance(result, list) and len(result) == len(examples):
                    assert all(map(torch.equal, result, examples))
    assert refused > 20


@pytest.mark.parametrize("value", [..., None, "text", -1, [[]], {"name": 3}])
def test_a_resealed_cache_is_read_or_refused_by_name_whatever_it_lacks(tmp_path, value):
    rows = make_cache(tmp_path / "cache").table()
    content, refused = read_json(tmp_path / "cache/cache.json"), 0
    for path in keys_of(content):
        write_json(tmp_path / "cache/cache.json", changed(content, path, value))
        for use in (lambda: ReferenceCache(tmp_path / "cache"), lambda: make_cache(tmp_path / "cache")):
            try:
                found = use().table()
            except DataError as error:
                assert "cache" in str(error)
                refused += 1
            else:
                assert all(torch.equal(found[name], rows[name]) for name in rows)
    assert refused > 8


@pytest.mark.parametrize("where", [("index", "name"), ("shards", 0, "name")])
def test_a_received_cache_opens_nothing_outside_its_folder(tmp_path, where):
    make_cache(tmp_path / "cache")
    content = read_json(tmp_path / "cache/cache.json")
    entry = content["index"] if where[0] == "index" else content["shards"][0]
    shutil.copy(tmp_path / "cache" / entry["name"], tmp_path / "outside")
    write_json(tmp_path / "cache/cache.json", changed(content, where, "../outside"))
    with pytest.raises(DataError, match="cache.json.*'../outside'"):
        ReferenceCache(tmp_path / "cache")


@pytest.mark.parametrize("link", ["staging", "staging/00000"])
def test_a_caches_staging_folder_that_is_a_link_keeps_its_contents(tmp_path, link):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/0000000000-a.safetensors").write_text("mine")
    (tmp_path / "cache" / link).parent.mkdir(parents=True)
    (tmp_path / "cache" / link).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="is a link"):
        make_cache(tmp_path / "cache")
    assert (tmp_path / "outside/0000000000-a.safetensors").read_text() == "mine"


def test_what_a_killed_writer_left_half_written_is_cleaned_up(tmp_path, manifest):
    make_cache(tmp_path / "cache")
    encode(manifest, tmp_path / "store")
    strays = [
        tmp_path / "cache/.cache.json.123.tmp",
        tmp_path / "cache/.index.json.4.tmp",
        tmp_path / "store/.store.json.5.tmp",
    ]
    for stray in strays:
        stray.write_text("{")
    make_cache(tmp_path / "cache")
    encode(manifest, tmp_path / "store")
    assert not any(stray.exists() for stray in strays)


def test_a_store_or_cache_whose_sealed_file_is_damaged_or_lost_is_made_of_its_shards_again(
    tmp_path, manifest, monkeypatch
):
    """No clip is decoded and no forward run again: whole shards are found by the hashes in their names."""
    store = encode(manifest, tmp_path / "store")
    make_cache(tmp_path / "cache")
    notes, whole = [], {name: sha256_file(tmp_path / name) for name in ("store/store.json", "cache/cache.json")}
    monkeypatch.setattr("pgdpo_fast.data.encode.read_video", None)
    for name in whole:
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
    assert encode(manifest, tmp_path / "store", tell=notes.append).fingerprint == store.fingerprint
    make_cache(tmp_path / "cache", compute=None, tell=notes.append)
    assert [note.count(".damaged") for note in notes] == [1, 1]
    assert {name: sha256_file(tmp_path / name) for name in whole} == whole
    for name in whole:
        (tmp_path / name).unlink()
    encode(manifest, tmp_path / "store")
    make_cache(tmp_path / "cache", compute=None)
    assert {name: sha256_file(tmp_path / name) for name in whole} == whole


def test_pairs_dropped_before_store_json_was_lost_are_dropped_again_with_their_reasons(tmp_path, manifest):
    source = tmp_path / "pairs"
    shutil.copytree(manifest.path.parent, source)
    pairs = read_manifest(source / manifest.path.name)
    data = bytearray(pairs.pairs[1].chosen.read_bytes())
    data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
    pairs.pairs[1].chosen.write_bytes(data)
    told = []
    store = encode(pairs, tmp_path / "store", shard_bytes=1 << 20, tell=told.append)
    assert [item.where for item in store.dropped] == [f"pair {pairs.pairs[1].id}"]
    assert len(told) == 1 and pairs.pairs[1].id in told[0]
    (tmp_path / "store/store.json").unlink()
    again = encode(pairs, tmp_path / "store", shard_bytes=1 << 20)
    assert again.dropped == store.dropped and again.fingerprint == store.fingerprint


def test_whole_shards_of_other_settings_are_not_removed_where_store_json_is_lost(tmp_path, manifest):
    encode(manifest, tmp_path / "store")
    (tmp_path / "store/store.json").unlink()
    with pytest.raises(DataError, match="other settings, whose store.json is lost"):
        encode(manifest, tmp_path / "store", frames=1)
    assert len(list((tmp_path / "store").glob("shard-*"))) == 3
