"""A run that reads its reference from a cache is the run that computes it, and never holds the reference's weights."""

import gc
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from pgdpo_fast.cli import main
from pgdpo_fast.data.latent_store import LatentStore
from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.reference.cache import ReferenceCache
from pgdpo_fast.training.batches import PairOrder, split
from pgdpo_fast.training.config import TrainConfig, load_config
from pgdpo_fast.training.plan import make_plan, reference_share, saved_share
from pgdpo_fast.training.reference_pass import cache_reference, reference_visits
from pgdpo_fast.training.trainer import train
from tests.commands import Command

CLOCK = ("time", "step_seconds", "data_wait_seconds", "peak_memory_gib")
# A network for the latents of `tiny_store`, and what it predicts.
FAMILIES = {
    "wan": ({}, "flow"),
    "unet3d": (
        {
            "family": "unet3d",
            "architecture": dict(
                sample_size=8,
                in_channels=12,
                out_channels=12,
                down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"],
                up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"],
                block_out_channels=[8, 16],
                layers_per_block=1,
                norm_num_groups=4,
                cross_attention_dim=16,
                attention_head_dim=4,
            ),
        },
        "epsilon",
    ),
    "cogvideox": (
        {
            "family": "cogvideox",
            "architecture": dict(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=12,
                out_channels=12,
                time_embed_dim=16,
                text_embed_dim=16,
                num_layers=2,
                sample_width=8,
                sample_height=8,
                sample_frames=9,
                patch_size=2,
                max_text_seq_length=16,
                use_rotary_positional_embeddings=False,
            ),
        },
        "v",
    ),
}


def rows(run_dir, name="metrics"):
    """Rows of a metric file without what the clock decides."""
    found = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in found]


def weights(run_dir):
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return {
        f"{file.name}:{key}": value
        for file in sorted(newest.rglob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def assert_same_run(one, other):
    assert rows(one) == rows(other) and rows(one)
    assert rows(one, "evaluation") == rows(other, "evaluation")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def cli(tmp_path):
    """cli(verb, config, *flags): run a command on a configuration, from a YAML file, and return its exit code."""

    def run(verb, config, *flags):
        file = tmp_path / "settings.yaml"
        file.write_text(config.to_yaml())
        return main([verb, str(file), *map(str, flags)])

    return run


# -- equality


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_run_is_the_online_run_bit_for_bit_through_the_command_line(tiny_config, tmp_path, cli, family, kind):
    model, predicts = FAMILIES[family]
    sections = {"model": {**model, "train": kind}, "training": {"draws_per_pair": 2, "steps": 9}}
    config = tiny_config("online", **sections)
    assert predicts == getattr(config.build_process(), "prediction", "flow") or config.process["prediction"] == predicts
    quiet, cache = ("--display", "none"), tmp_path / "cache"
    assert cli("train", config, *quiet) == 0
    assert cli("cache-reference", config, "--output", cache) == 0
    assert ReferenceCache(cache).blocks[0].draws == 2  # 4.5 visits per pair: fewer rows than the run visits
    changes = f"output.dir={tmp_path / 'cached'}", f"data.reference_cache={cache}"
    assert cli("train", config, *quiet, "--set", *changes) == 0
    assert_same_run(tmp_path / "cached", tmp_path / "online")


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"granularity": "frame", "steps": 5}},
        {
            "training": {"pairs_per_step": 3, "steps": 5}
        },  # a step spans two epochs, the pass's last forward is filled up
        {"training": {"pairs_per_step": 4, "accumulation": 2, "draws_per_pair": 3, "steps": 5}},
        {"objective": {"name": "sdpo", "beta": 100}},
        {"data": {"evaluation_pairs": 3}, "training": {"evaluation_draws": 3}},  # a last evaluation batch of one
        {"model": {"gradient_checkpointing": True}},
    ],
    ids=["frame", "odd", "accumulation", "posterior-scale", "evaluation", "checkpointing"],
)
def test_cached_and_online_runs_agree_in_every_shape_of_run(tiny_config, tmp_path, sections):
    train(tiny_config("online", **sections), display="none")
    cache = cache_reference(tiny_config("unused", **sections), tmp_path / "cache")
    sections["data"] = {**sections.get("data", {}), "reference_cache": str(cache.path)}
    train(tiny_config("cached", **sections), display="none")
    assert_same_run(tmp_path / "cached", tmp_path / "online")


def test_a_run_may_change_to_a_cache_half_way(tiny_config, tmp_path):
    train(tiny_config("online", training={"steps": 8}), display="none")
    train(tiny_config("changed", training={"steps": 4}), display="none")
    cache = cache_reference(tiny_config("unused", training={"steps": 8}), tmp_path / "cache")
    train(tiny_config("changed", data={"reference_cache": str(cache.path)}, training={"steps": 8}), display="none")
    assert_same_run(tmp_path / "changed", tmp_path / "online")


@pytest.mark.parametrize("format, errors, loss", [("bf16", 2e-4, 0.1), ("fp8", 1e-6, 1e-3)])
def test_packed_caches_stay_within_their_tolerance(tiny_config, tmp_path, format, errors, loss):
    # bf16 rounds every element, which these videos of 2304 elements hardly average out; fp8 keeps the sum of squares
    online = train(tiny_config("online"), display="none")
    cache = cache_reference(tiny_config("unused"), tmp_path / format, format=format)
    cached = train(tiny_config("cached", data={"reference_cache": str(cache.path)}), display="none")
    for ours, theirs in zip(rows(cached.run_dir), rows(online.run_dir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=loss)
        for key in ("errors/reference_chosen", "errors/reference_rejected"):
            assert ours[key] == pytest.approx(theirs[key], rel=errors)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"granularity": "element"}},
        {"training": {"granularity": "element"}, "model": {"dtype": "bf16"}},
        {"objective": {"name": "pgdpo", "beta": 100, "ipr": "anchor"}},
    ],
)
def test_objectives_that_look_at_predictions_get_them_exactly(tiny_config, tmp_path, sections):
    online = train(tiny_config("online", **sections), display="none")
    cache = cache_reference(tiny_config("unused", **sections), tmp_path / "cache")
    assert cache.layout.format == "predictions"
    train(tiny_config("cached", data={"reference_cache": str(cache.path)}, **sections), display="none")
    assert_same_run(tmp_path / "cached", online.run_dir)
    with pytest.raises(ConfigError, match="needs the reference's predictions"):
        cache_reference(tiny_config("unused", **sections), tmp_path / "errors", format="errors")


# -- what a cache saves


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_with_a_cache_the_reference_is_neither_loaded_nor_run(tiny_config, tmp_path, monkeypatch, capsys, kind):
    from pgdpo_fast.models import base
    from pgdpo_fast.models.wan import Wan
    from pgdpo_fast.training import reference

    sections = {"model": {"train": kind}, "training": {"draws_per_pair": 1}}
    cache = cache_reference(tiny_config("unused", **sections), tmp_path / "cache")
    gc.collect()
    loaded, forwards, networks = [], [], []
    load, forward = Wan.load, Wan.predict

    def counted_load(self, *arguments):
        loaded.append(load(self, *arguments))
        return loaded[-1]

    def counted_forward(self, model, batch):
        forwards.append(torch.is_grad_enabled())
        networks.append(sum(type(item) is type(loaded[0]) for item in gc.get_objects()))
        return forward(self, model, batch)

    monkeypatch.setattr(Wan, "load", counted_load)
    monkeypatch.setattr(Wan, "predict", counted_forward)
    for module in (reference, base):
        monkeypatch.setattr(module, "adapters_off", lambda model: pytest.fail("adapters switched off"))
    monkeypatch.setattr(reference.CopyReference, "__init__", lambda *arguments: pytest.fail("network copied"))
    config = tiny_config("cached", data={"reference_cache": str(cache.path)}, **sections)
    train(config, display="plain")
    assert len(loaded) == 1 and set(networks) == {1}
    steps, evaluations = config.training.steps, 3 * 2
    assert forwards.count(True) == steps and forwards.count(False) == evaluations  # the policy's, none of a reference
    assert "cached: no forward and no weights; 12 rows of errors per sample" in capsys.readouterr().out


def test_auto_is_the_cheapest_reference_that_is_possible(tiny_config):
    assert tiny_config(model={"train": "lora"}).reference_mode == "adapter-off"
    assert tiny_config(model={"train": "full"}).reference_mode == "copy"
    assert tiny_config(data={"reference_cache": "somewhere"}).reference_mode == "cached"
    with pytest.raises(ConfigError, match="data.reference_cache"):
        tiny_config(model={"reference": "cached"})
    with pytest.raises(ConfigError, match="not read with model.reference='adapter-off'"):
        tiny_config(model={"reference": "adapter-off"}, data={"reference_cache": "somewhere"})


# -- truth


@pytest.mark.parametrize(
    "change, named",
    [
        ({"training": {"seed": 1}}, "training.seed was 0, is now 1"),
        ({"training": {"draws_per_pair": 4}}, "training.draws_per_pair (strata of the timesteps) was 2, is now 4"),
        ({"training": {"evaluation_draws": 3}}, "training.evaluation_draws was 2, is now 3"),
        ({"data": {"evaluation_pairs": 3}}, "data.evaluation_pairs was 2, is now 3"),
        ({"model": {"init_seed": 1}}, "model.weights was "),
        ({"model": {"dtype": "bf16"}}, "model.dtype was 'fp32', is now 'bf16'"),
        ({"model": {"text_tokens": 20}}, "model.text_tokens was 16, is now 20"),
        ({"process": {"name": "wan", "shift": 5.0}}, "process was 'FlowMatching(shift=3.0"),
        ({"training": {"granularity": "frame"}}, "training.granularity was 'sample', is now 'frame'"),
        ({"training": {"granularity": "element"}}, "needs the reference's predictions"),
    ],
)
def test_a_cache_made_for_something_else_is_refused_by_name(tiny_config, tmp_path, cli, capsys, change, named):
    base = {"training": {"draws_per_pair": 2}}
    cache = cache_reference(tiny_config("unused", **base), tmp_path / "cache")
    sections = {name: {**base.get(name, {}), **change.get(name, {})} for name in {*base, *change}}
    sections["data"] = {**sections.get("data", {}), "reference_cache": str(cache.path)}
    assert cli("train", tiny_config("run", **sections), "--display", "none") == DataError.exit_code
    error = capsys.readouterr().err
    assert named in error and str(cache.path) in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_store_is_refused(tiny_config, tmp_path):
    from pgdpo_fast.data.codec import PixelUnshuffleCodec
    from pgdpo_fast.data.encode import encode_manifest
    from pgdpo_fast.data.synthetic import render_pairs
    from pgdpo_fast.data.text import HashTextEncoder

    manifest = render_pairs(tmp_path / "clips", pairs=10, seed=4, frames=3, height=16, width=16)
    encode_manifest(
        manifest,
        tmp_path / "store",
        codec=PixelUnshuffleCodec(spatial=2),
        text=HashTextEncoder(16, 16),
        frames=3,
        height=16,
        width=16,
    )
    cache = cache_reference(tiny_config("unused"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"data.store \(content\) was"):
        train(
            tiny_config("run", data={"store": str(tmp_path / "store"), "reference_cache": str(cache.path)}),
            display="none",
        )


def test_the_cache_of_a_lora_run_serves_full_training_of_the_same_network(tiny_config, tmp_path):
    cache = cache_reference(tiny_config("unused", model={"train": "lora"}), tmp_path / "cache")
    train(tiny_config("online", model={"train": "full"}), display="none")
    train(tiny_config("cached", model={"train": "full"}, data={"reference_cache": str(cache.path)}), display="none")
    assert_same_run(tmp_path / "cached", tmp_path / "online")


def test_a_shorter_run_uses_the_cache_of_a_longer_one_and_a_longer_run_does_not(tiny_config, tmp_path):
    options = {"steps": 9}  # 2.25 visits per pair
    cache = cache_reference(tiny_config("unused", training=options), tmp_path / "cache")
    assert cache.blocks[0].draws == 3
    data = {"reference_cache": str(cache.path)}
    train(tiny_config("shorter", data=data, training={"steps": 5}), display="none")
    with pytest.raises(DataError, match="holds 3 draws per pair, this run visits 4"):
        train(tiny_config("longer", data=data, training={"steps": 13}), display="none")


@pytest.mark.parametrize("steps, pairs_per_step, draws", [(1, 1, 0), (7, 3, 0), (8, 2, 0), (9, 3, 2), (2, 5, 4)])
def test_the_cache_covers_every_visit_of_the_run(tiny_config, steps, pairs_per_step, draws):
    config = tiny_config(training={"steps": steps, "pairs_per_step": pairs_per_step, "draws_per_pair": draws})
    block = reference_visits(config, split(config, LatentStore(config.data.store)))[0]
    order = PairOrder(block.ids, pairs_per_step, config.training.seed, draws)
    visited = {(visit.id, visit.draw) for step in range(steps) for visit in order.visits(step)}
    assert {id for id, _ in visited} <= set(block.ids)
    assert max(draw for _, draw in visited) < block.draws and (draws or block.draws == 1 + max(d for _, d in visited))


# -- processes


def command(config, tmp_path, *flags, **options):
    file = tmp_path / "settings.yaml"
    file.write_text(config.to_yaml())
    return Command(tmp_path, "cache-reference", file, *flags, **options)


def test_two_ranks_share_the_pass_and_write_the_bytes_of_one(tiny_config, tmp_path):
    config = tiny_config(training={"draws_per_pair": 40})
    ranks = [
        command(
            config,
            tmp_path,
            "--output",
            tmp_path / "two",
            environment={"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            output=f"printed-{rank}.txt",
        )
        for rank in (0, 1)
    ]
    assert [rank.end()[0] for rank in ranks] == [0, 0], [rank.wrote for rank in ranks]
    assert "40 draws" in ranks[0].wrote and ranks[1].wrote == ""
    one = cache_reference(config, tmp_path / "one")
    assert len(one.shards) == 4 and ReferenceCache(tmp_path / "two").shards == one.shards


def test_sigterm_ends_the_pass_with_its_resume_command(tiny_config, tmp_path):
    asked = command(tiny_config(training={"draws_per_pair": 400}), tmp_path, "--output", tmp_path / "cache")
    asked.wait_for(lambda: list(tmp_path.glob("cache/staging/*/*.safetensors")))
    asked.send(signal.SIGTERM)
    assert asked.end()[0] == 75 and "resume with: pgdpo-fast cache-reference" in asked.wrote, asked.wrote
    with pytest.raises(DataError, match="not finished"):
        ReferenceCache(tmp_path / "cache")


# -- the plan


def test_the_plan_counts_what_a_run_really_has(tiny_config, tmp_path, cli, capsys):
    from pgdpo_fast.training.run import Run

    for kind, dtype in (("lora", "fp32"), ("full", "bf16")):
        config = tiny_config(f"{kind}", model={"train": kind, "dtype": dtype}, training={"draws_per_pair": 2})
        plan, run = make_plan(config), Run.assemble(config, print)
        parameters = list(run.policy.parameters())
        assert plan.total == sum(p.numel() for p in parameters)
        assert plan.parameters == sum(p.numel() * p.element_size() for p in parameters)
        assert plan.trained == sum(p.numel() for p in parameters if p.requires_grad)
        masters = sum(4 * m.numel() for n, m in run.optimizer.masters.items() if m is not run.optimizer.parameters[n])
        assert plan.optimizer == masters + 8 * plan.trained
        if kind == "full":
            assert plan.reference["copy"] == sum(p.numel() * p.element_size() for p in run.reference.model.parameters())
        for format in ("errors", "predictions", "bf16", "fp8"):
            cache = cache_reference(config, tmp_path / f"{kind}-{format}", format=format)
            assert 0 <= cache.bytes - plan.cache[format] < 2000 * len(cache.shards)  # headers
        capsys.readouterr()
        assert cli("plan", config, "--json") == 0
        assert json.loads(capsys.readouterr().out)["trained"] == plan.trained


def test_what_a_cache_saves_follows_from_how_often_a_draw_is_used():
    assert reference_share("full", False) == (0.25, 0.25) and reference_share("full", True) == (0.2, 0.2)
    low, high = reference_share("lora", False)
    assert 0.27 <= low < high <= 0.32
    assert saved_share(0.25, 1) == 0 and saved_share(0.25, 4) == 0.1875 and saved_share(0.25, 0.5) == -0.25


def test_the_plan_says_when_a_cache_saves_only_memory(tiny_config, tmp_path, cli, capsys):
    once, often = ({"steps": 4, "pairs_per_step": 8}, {"steps": 4, "pairs_per_step": 8, "draws_per_pair": 1})
    for kind, training, verdict in (
        ("full", once, "saves only memory"),
        ("lora", once, "saves nothing"),
        ("full", often, "used 4.0 times: a cache saves 19% of this run's compute and"),
    ):
        assert cli("plan", tiny_config(model={"train": kind}, training=training)) == 0
        assert verdict in " ".join(capsys.readouterr().out.split())


def test_examples_can_name_a_cache():
    config = load_config(None, ["data.store=s", "output.dir=o", "model.path=m", "data.reference_cache=c"])
    assert isinstance(config, TrainConfig) and config.reference_mode == "cached"
