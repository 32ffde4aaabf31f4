"""A run that reads its reference from a cache is the run that computes it, and never holds the reference's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.training.cached import cache_reference
from pgdpo_fast.training.trainer import train

CLOCK = ("time", "step_seconds", "data_wait_seconds", "peak_memory_gib")


def rows(run_dir, name="metrics"):
    found = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in found]


def weights(result):
    return {f"{file.name}:{key}": value for file in sorted((result.checkpoint / "weights").glob("*.safetensors"))
            for key, value in load_file(file).items()}


def assert_same_run(one, other):
    assert rows(one.run_dir) == rows(other.run_dir)
    assert rows(one.run_dir, "evaluation") == rows(other.run_dir, "evaluation")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("draws", [0, 2])
@pytest.mark.parametrize("granularity", ["sample", "frame"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cached_run_equals_online_run_bit_for_bit(tiny_config, tmp_path, kind, granularity, draws):
    sections = {"model": {"train": kind}, "training": {"granularity": granularity, "draws_per_pair": draws, "steps": 9}}
    online = train(tiny_config("online", **sections), display="none")
    cache = cache_reference(tiny_config("unused", **sections), tmp_path / "cache")
    assert cache.layout.format == "errors" and cache.blocks[0].draws == (draws or 3)
    sections["data"] = {"reference_cache": str(tmp_path / "cache")}
    assert_same_run(train(tiny_config("cached", **sections), display="none"), online)
