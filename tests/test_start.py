"""A run that starts from another run's weights: they are its policy and its reference."""

import json

import pytest
from safetensors.torch import load_file

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.training.network import started_from
from pgdpo_fast.training.reference_pass import cache_reference
from pgdpo_fast.training.trainer import train

CLOCK = ("time", "step_seconds", "data_wait_seconds", "peak_memory_gib")


def rows(run, name="metrics"):
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in found]


@pytest.fixture(params=["lora", "full"])
def kind(request):
    return request.param


@pytest.fixture
def first(tiny_config, kind):
    """A supervised run."""
    config = tiny_config("first", model={"train": kind}, objective={"name": "sft"}, training={"learning_rate": 1e-2})
    return train(config, display="none")


def test_policy_and_reference_are_the_weights_it_starts_from(tiny_config, tmp_path, first, kind):
    model = {"train": kind, "start": str(first.run_dir)}
    second = train(tiny_config("second", model=model), display="none")
    start = rows(second.run_dir, "evaluation")[0]
    assert start["step"] == 0 and set(start["pairs"]["chosen"]) == {0.0}
    plain = train(tiny_config("plain", model={"train": kind}), display="none")
    assert rows(plain.run_dir)[0]["grad_norm"] != rows(second.run_dir)[0]["grad_norm"]
    # a step of no size leaves the weights of the first run, in a file that stands on its own
    still = tiny_config("still", model=model, training={"learning_rate": 1e-30, "steps": 1})
    weights = train(still, display="none").checkpoint / "weights"
    for file in (first.checkpoint / "weights").glob("*.safetensors"):
        before, after = load_file(file), load_file(weights / file.name)
        assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    # a cache holds that reference, and is of no use for a run that starts elsewhere
    config = tiny_config("cached", model=model, data={"reference_cache": str(tmp_path / "cache")})
    cache_reference(config, tmp_path / "cache")
    assert rows(train(config, display="none").run_dir) == rows(second.run_dir)
    with pytest.raises(DataError, match="model.weights"):
        other = tiny_config("other", model={"train": kind}, data={"reference_cache": str(tmp_path / "cache")})
        train(other, display="none")


def test_a_run_does_not_go_on_when_what_it_started_from_has_changed(tiny_config, first, kind):
    model = {"train": kind, "start": str(first.run_dir)}
    train(tiny_config("second", model=model), display="none")
    sft = {"name": "sft"}
    train(tiny_config("first", model={"train": kind}, objective=sft,
                      training={"learning_rate": 1e-2, "steps": 6}), display="none")  # fmt: skip
    with pytest.raises(ConfigError, match=r"model.start \(content\) was"):
        train(tiny_config("second", model=model, training={"steps": 6}), display="none")


def test_every_name_of_the_weights_leads_to_them(first):
    weights = first.checkpoint / "weights"
    assert {started_from(str(path)) for path in (first.run_dir, first.checkpoint, weights)} == {weights}


@pytest.mark.parametrize("kind", ["lora"], indirect=True)
def test_a_start_that_does_not_fit_is_an_error(tiny_config, tmp_path, first):
    start = str(first.run_dir)
    with pytest.raises(ConfigError, match="model.train='full' trains no adapters"):
        train(tiny_config("a", model={"train": "full", "start": start}), display="none")
    with pytest.raises(DataError, match="the network has"):
        train(tiny_config("b", model={"start": start, "lora": {"rank": 2, "alpha": 4}}), display="none")
    with pytest.raises(ConfigError, match="expected a run with a checkpoint"):
        train(tiny_config("c", model={"start": str(tmp_path / "absent")}), display="none")
