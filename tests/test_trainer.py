"""The loop: a resumed run is the uninterrupted one, references agree, and what goes wrong is named before it hurts."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pgdpo_fast import objectives
from pgdpo_fast.analysis.runs import read_runs
from pgdpo_fast.errors import ConfigError, NonFiniteError, OutOfMemoryError, Preempted
from pgdpo_fast.storage import sha256_file
from pgdpo_fast.training import measure
from pgdpo_fast.training.batches import PairLoader, PairOrder, hold_out
from pgdpo_fast.training.config import load_config
from pgdpo_fast.training.telemetry import PreferenceHealth
from pgdpo_fast.training.trainer import train
from tests.commands import Command, lines_of

EXAMPLES = Path(__file__).parents[1] / "examples"
CLOCK = ("time", "step_seconds", "data_wait_seconds", "peak_memory_gib")
KINDS = {
    "lora": {},
    "full": {"train": "full"},
    "lora-bf16": {"dtype": "bf16"},
    "full-bf16": {"train": "full", "dtype": "bf16"},
}


def rows(run_dir, name="metrics"):
    """Rows of a metric file without what the clock decides."""
    found = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in found]


def state(checkpoint):
    """Every tensor of a checkpoint."""
    return {f"{file.name}:{key}": tensor for file in sorted(checkpoint.rglob("*.safetensors"))
            for key, tensor in load_file(file).items()}  # fmt: skip


def assert_same_run(one, other):
    assert rows(one.run_dir) == rows(other.run_dir)
    assert rows(one.run_dir, "evaluation") == rows(other.run_dir, "evaluation")
    ours, theirs = state(one.checkpoint), state(other.checkpoint)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class Killed(BaseException):
    """What a kill leaves behind: no handler of the trainer's runs."""


def kill_after(step, monkeypatch):
    """Make the run die right after it wrote the row of `step`."""
    from pgdpo_fast.training.run import Run

    record = Run.record

    def dying(self, done, *arguments, **options):
        record(self, done, *arguments, **options)
        if done == step:
            raise Killed

    monkeypatch.setattr(Run, "record", dying)


@pytest.mark.parametrize("kind", KINDS)
def test_n_steps_a_kill_and_m_steps_are_n_plus_m_steps(tiny_config, monkeypatch, kind):
    whole = train(tiny_config("whole", model=KINDS[kind], training={"steps": 7}), display="none")
    config = tiny_config("killed", model=KINDS[kind], training={"steps": 7})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(5, patched)  # the last checkpoint is at step 4
        train(config, display="none")
    assert [row["step"] for row in rows(whole.run_dir.with_name("killed"))] == [1, 2, 3, 4, 5]
    assert_same_run(train(config, display="none"), whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_config, monkeypatch):
    whole = train(tiny_config("whole"), display="none")
    config = tiny_config("killed")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(1, patched)
        train(config, display="none")
    assert_same_run(train(config, display="none"), whole)


def test_a_run_made_longer_is_the_longer_run(tiny_config):
    whole = train(tiny_config("whole", training={"steps": 6}), display="none")
    train(tiny_config("longer", training={"steps": 4}), display="none")
    assert_same_run(train(tiny_config("longer", training={"steps": 6}), display="none"), whole)


def test_kill_9_and_sigterm_in_a_real_process_lose_nothing(tiny_config, tmp_path):
    long = {"steps": 60, "evaluation_every": 20, "checkpoint_every": 5}
    whole = train(tiny_config("whole", training=long), display="none")
    config = tiny_config("stopped", training=long)
    run_dir, settings = whole.run_dir.with_name("stopped"), tmp_path / "settings.yaml"
    settings.write_text(config.to_yaml())

    command = Command(tmp_path, "train", settings)
    command.wait_for(lambda: lines_of(run_dir / "metrics.jsonl") >= 8)
    command.send(signal.SIGKILL)
    assert command.end()[0] == -signal.SIGKILL
    killed_at = len(rows(run_dir))

    command = Command(tmp_path, "train", settings)
    command.wait_for(lambda: lines_of(run_dir / "metrics.jsonl") >= killed_at + 6)
    command.send(signal.SIGTERM)
    assert command.end()[0] == 75, command.wrote
    assert "continues" in command.wrote and "--resume auto" in command.wrote
    assert len(rows(run_dir)) < 60
    assert_same_run(train(config, display="none"), whole)


def test_sigterm_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(tiny_config):
    whole = train(tiny_config("whole"), display="none")
    config = tiny_config("stopped")

    def stop(step, run):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="--resume auto"):
        train(config, display="none", callbacks=[stop])
    assert [row["step"] for row in rows(whole.run_dir.with_name("stopped"))] == [1, 2]
    assert_same_run(train(config, display="none"), whole)


@pytest.mark.parametrize("granularity", ["sample", "frame", "element"])
def test_the_policy_without_adapters_and_a_frozen_copy_are_the_same_reference(tiny_config, granularity):
    runs = [train(tiny_config(reference, model={"reference": reference}, training={"granularity": granularity}),
                  display="none") for reference in ("adapter-off", "copy")]  # fmt: skip
    assert_same_run(*runs)


def test_an_objective_named_by_its_import_path_trains_resumes_and_is_recorded(tiny_config, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    objective = {"name": "safeguarded", "base": {"name": "new_objective:SquaredHinge", "beta": 50}}
    whole = train(tiny_config("whole", objective=objective), display="none")
    train(tiny_config("parts", objective=objective, training={"steps": 2}), display="none")
    resumed = train(load_config(whole.run_dir.with_name("parts") / "config.yaml", ["training.steps=4"]), display="none")
    assert_same_run(resumed, whole)
    assert (
        read_runs([whole.run_dir])[0].label == "Safeguarded SquaredHinge" and read_runs([whole.run_dir])[0].beta == 50
    )
    recorded = json.loads((whole.run_dir / "environment.json").read_text())["sources"]
    assert recorded == {"new_objective:SquaredHinge": sha256_file(EXAMPLES / "new_objective.py")}
    with pytest.raises(ConfigError, match="objective.base"):
        train(tiny_config("parts", objective={**objective, "base": {"name": "dpo"}}), display="none")


def test_gradient_checkpointing_changes_no_bit_of_a_run(tiny_config):
    runs = [train(tiny_config(str(on), model={"gradient_checkpointing": on}), display="none") for on in (False, True)]
    assert_same_run(*runs)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_accumulation_is_one_big_batch(tiny_config, kind):
    options = {"pairs_per_step": 4, "steps": 1, "learning_rate": 1e-4}
    one, four = (train(tiny_config(f"accumulate{n}", model=KINDS[kind], training={**options, "accumulation": n}),
                       display="none") for n in (1, 4))  # fmt: skip
    ours, theirs = state(one.checkpoint), state(four.checkpoint)
    # after one step the first moment is (1 - beta1) times the clipped gradient
    gradients = [torch.cat([run[key].flatten() for key in ours if "exp_avg/" in key]) for run in (ours, theirs)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()
    first, second = rows(one.run_dir)[0], rows(four.run_dir)[0]
    assert first["pairs"]["id"] == second["pairs"]["id"]
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-6)


def test_bf16_accumulates_and_updates_in_fp32(tiny_config):
    result = train(tiny_config("bf16", model=KINDS["full-bf16"], training={"accumulation": 2, "learning_rate": 1e-6}),
                   display="none")  # fmt: skip
    saved = state(result.checkpoint)
    masters = {key.split("master/")[1]: value for key, value in saved.items() if "master/" in key}
    weights = {key.split(":")[1]: value for key, value in saved.items() if "diffusion_pytorch_model" in key}
    assert masters and all(value.dtype == torch.float32 for value in masters.values())
    assert all(torch.equal(value.bfloat16(), weights[name]) for name, value in masters.items())
    # a step of 1e-6 is far below what bf16 can hold next to a weight of 0.1: only the masters see it
    assert any(not torch.equal(value.bfloat16().float(), value) for value in masters.values())


@pytest.mark.parametrize("name", objectives.NAMES)
def test_every_objective_trains(tiny_config, name):
    result = train(tiny_config(name, objective={"name": name}, training={"steps": 2}), display="none")
    assert all(row["grad_norm"] > 0 for row in rows(result.run_dir) if name != "dpo-clip-mask")


@pytest.mark.parametrize("options", [{"ipr": "anchor"}, {"ratio": "signed", "k1": 10, "k2": 10}])
def test_pgdpo_variants_train(tiny_config, options):
    train(tiny_config("variant", objective={"name": "pgdpo", **options}, training={"steps": 2}), display="none")


def test_training_raises_the_reward_it_asks_for(tiny_config):
    config = tiny_config(
        "learns", model=KINDS["full"], training={"steps": 60, "evaluation_every": 60, "checkpoint_every": 60}
    )
    first, last = rows(train(config, display="none").run_dir, "evaluation")
    assert first["step"] == 0 and first["rewards/chosen"] == 0.0 and first["loss"] > last["loss"]
    assert last["rewards/chosen"] > 0.1


def test_a_row_holds_the_step_and_every_pair(tiny_config):
    result = train(tiny_config(), display="none")
    row = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "time", "loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds", "timestep", "alarms",
            "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logits", "gradient_factor",
            "weights/alpha", "weights/gamma", "errors/policy_chosen", "errors/policy_rejected",
            "errors/reference_chosen", "errors/reference_rejected"} <= row.keys()  # fmt: skip
    pairs = row["pairs"]
    assert {len(values) for values in pairs.values()} == {2}
    assert row["rewards/margins"] == pytest.approx(sum(pairs["margin"]) / 2)
    assert [row["step"] for row in rows(result.run_dir, "evaluation")] == [0, 2, 4]
    assert result.evaluation["step"] == 4
    assert {"config.yaml", "environment.json", "log.txt", "checkpoints"} <= {
        path.name for path in result.run_dir.iterdir()
    }


def test_a_pair_that_is_not_finite_is_named_and_no_weight_changes(tiny_config, monkeypatch):
    config = tiny_config(training={"steps": 5, "checkpoint_every": 1})
    noise, seen = PairLoader.noise, []

    def poisoned(self, draws, tensors):
        batch = noise(self, draws, tensors)
        seen.append(batch)
        if len(seen) == 4:  # two evaluation batches, then step 1, then this
            batch.target.clean[1] = float("nan")
        return batch

    with monkeypatch.context() as patched, pytest.raises(NonFiniteError) as caught:
        patched.setattr(PairLoader, "noise", poisoned)
        train(config, display="none")
    guilty = seen[3].ids[1]
    run_dir = tiny_config().output.dir
    assert f"step 2: the loss of pair(s) {guilty} is not finite; no weight was changed" in str(caught.value)
    with open(f"{run_dir}/nonfinite_step_00000002.json") as file:
        dumped = json.load(file)
    assert dumped["seed"] == 0 and dumped["pairs"]["id"] == seen[3].ids and dumped["pairs"]["loss"][1] == "nan"
    assert len(dumped["pairs"]["timestep"]) == 2
    whole = train(tiny_config("whole", training={"steps": 5, "checkpoint_every": 1}), display="none")
    assert_same_run(train(config, display="none"), whole)


def test_a_gradient_that_is_not_finite_stops_the_step(tmp_path):
    row = {"loss": 1.0, "grad_norm": float("inf"), "pairs": {"id": ["a", "b"], "loss": [1.0, 1.0]}}
    with pytest.raises(NonFiniteError, match="gradient norm is inf with finite losses, pairs a, b"):
        measure.check_finite(row, 3, 0, tmp_path)


def test_out_of_memory_names_the_settings_that_lower_it(tiny_config, monkeypatch):
    def exhausted(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    from pgdpo_fast.training.reference import AdapterOffReference

    monkeypatch.setattr(AdapterOffReference, "__call__", exhausted)
    config = tiny_config()
    with pytest.raises(OutOfMemoryError) as caught:
        train(config, display="none")
    for setting in ("training.accumulation=2", "model.gradient_checkpointing=true", "model.dtype=bf16", "20.00 GiB"):
        assert setting in str(caught.value)
    assert "Traceback" in open(f"{config.output.dir}/log.txt").read()


def test_a_store_that_does_not_fit_the_network_is_refused(tiny_config):
    architecture = {**tiny_config().model.architecture, "in_channels": 8, "text_dim": 8}
    with pytest.raises(ConfigError, match="latent channels 12, expected 8; text width 16, expected 8"):
        train(tiny_config(model={"architecture": architecture}), display="none")


def test_holding_out_everything_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="data.evaluation_pairs=10: the store has 10 pairs"):
        train(tiny_config(data={"evaluation_pairs": 10}), display="none")


def test_every_epoch_visits_every_pair_once_in_an_order_of_its_own():
    ids = [f"pair {i}" for i in range(10)]
    order = PairOrder(ids, pairs_per_step=4, seed=0)
    visits = [visit for step in range(5) for visit in order.visits(step)]
    first, second = visits[:10], visits[10:]
    assert sorted(v.id for v in first) == sorted(v.id for v in second) == sorted(ids)
    assert [v.id for v in first] != [v.id for v in second]
    assert {v.draw for v in first} == {0} and {v.draw for v in second} == {1}


def test_the_order_depends_on_neither_the_batch_size_nor_the_order_of_the_store():
    ids = [f"pair {i}" for i in range(7)]
    big, small = PairOrder(ids, 6, seed=1), PairOrder(ids[::-1], 2, seed=1)
    assert [v for s in range(3) for v in big.visits(s)] == [v for s in range(9) for v in small.visits(s)]
    assert big.visits(0) != PairOrder(ids, 6, seed=2).visits(0)


def test_draws_per_pair_cycles_through_that_many_draws():
    order = PairOrder(["a", "b"], 2, seed=0, draws_per_pair=3)
    assert [order.visits(step)[0].draw for step in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_held_out_pairs_are_the_same_whatever_else_is_in_the_store():
    ids = [f"pair {i}" for i in range(30)]
    training, held = hold_out(ids, 5, seed=0)
    assert len(held) == 5 and set(training) | set(held) == set(ids) and not set(training) & set(held)
    assert hold_out(ids[::-1], 5, seed=0)[1] == held[::-1]


def test_what_shares_a_prompt_or_a_clip_is_held_out_together(tmp_path):
    from pgdpo_fast.data.latent_store import LatentStore

    rows = {"a": ("cat", "1", "2"), "b": ("cat", "3", "4"), "c": ("dog", "4", "5"), "d": ("owl", "6", "7"),
            "e": ("fox", "8", "9"), "f": ("elk", "9", "10")}  # fmt: skip
    store = LatentStore.__new__(LatentStore)
    store._rows = {id: dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for id, row in rows.items()}
    assert store.kin == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e", "f": "e"}
    for seed in range(20):
        for count in range(1, 6):
            training, held = hold_out(store.ids, count, seed, store.kin)
            assert 0 < len(held) <= count and not {store.kin[i] for i in held} & {store.kin[i] for i in training}
    with pytest.raises(ConfigError, match="evaluation_pairs=2: no pairs can be held out.*at least 3"):
        hold_out(["a", "b", "c", "x", "y", "z"], 2, 0, dict(zip("abcxyz", "aaaxxx", strict=True)))


def test_a_run_holds_out_by_content_unless_told_otherwise(tiny_config):
    from pgdpo_fast.data.latent_store import LatentStore
    from pgdpo_fast.training.batches import split

    config, by_pair = tiny_config(), tiny_config(data={"split": "pair"})
    store = LatentStore(config.data.store)
    own = {id: row | {"prompt": id} for id, row in store._rows.items()}
    store._rows = own
    assert split(config, store) == split(by_pair, store)
    assert split(config, store).setting == {}  # folders of either serve both

    store = LatentStore(config.data.store)
    held = split(by_pair, store).held_out
    trained = next(id for id in own if id not in held)
    store._rows = own | {held[0]: own[held[0]] | {"prompt": trained}}
    assert store.kin[held[0]] == store.kin[trained]
    training, kept, setting = split(config, store)
    assert len({held[0], trained} & set(kept)) in (0, 2) and len(training) + len(kept) == 10
    assert setting == {"data.split": "content"} and split(by_pair, store).setting == {}

    store = LatentStore(config.data.store)
    store._rows = {id: row | {"prompt": "the same"} for id, row in own.items()}
    with pytest.raises(ConfigError, match="data.split=pair"):
        split(config, store)
    assert [len(part) for part in split(by_pair, store)] == [8, 2, 0]


def test_evaluation_draws_have_a_limit(tiny_config):
    with pytest.raises(ConfigError, match="evaluation_draws=100000000"):
        tiny_config(training={"evaluation_draws": 10**8})


def health_of(chosen, margins, factor=0.4, beta=100.0):
    health = PreferenceHealth(beta)
    for step, (c, m) in enumerate(zip(chosen, margins, strict=True)):
        wobble = 0.01 * (-1) ** step
        pairs = {"margin": [m], "timestep": [25.0 * step], "alpha": [0.5], "gamma": [0.5]}
        health.update({"rewards/chosen": c + wobble, "rewards/margins": m + wobble, "gradient_factor": factor,
                       "logits": 0.5 * beta * m, "pairs": pairs})  # fmt: skip
    return health


def test_displacement_is_the_chosen_reward_falling_while_the_margin_grows():
    up, down, flat = [0.01 * i for i in range(40)], [-0.01 * i for i in range(40)], [0.3] * 40
    assert health_of(down, up).alarms() == ["displacement"]
    assert "DISPLACEMENT" in health_of(down, up).advice()[0]
    for chosen, margins in ((up, up), (flat, up), (down, flat), (down, down)):
        assert health_of(chosen, margins).alarms() == []
    assert health_of(down[:39], up[:39]).alarms() == []  # not before the window is full


def test_saturation_and_a_flat_loss_are_noticed_and_a_beta_is_suggested():
    flat = [0.0] * 40
    assert health_of(flat, [0.2] * 40, factor=0.01).alarms() == ["saturation"]
    assert health_of(flat, [1e-4] * 40, factor=0.5).alarms() == ["flat"]
    assert health_of(flat, [0.2] * 40).suggested_beta() == pytest.approx(10.0)
    assert [count for _, _, count, _ in health_of(flat, [0.2] * 40).by_timestep()] == [8] * 5


def test_the_displays_show_a_run(tiny_config, capsys):
    train(tiny_config("plain", output={"log_every": 2}), display="plain")
    plain = capsys.readouterr().out
    assert "step 2/4  loss" in plain and "reference  adapter-off" in plain and "evaluation at step 4" in plain
    train(tiny_config("live"), display="live")
    live = capsys.readouterr().out
    assert "step 4/4" in live and "accuracy by timestep" in live


def test_tensorboard_gets_the_scalars(tiny_config):
    pytest.importorskip("tensorboard")
    result = train(tiny_config(output={"tensorboard": True}), display="none")
    assert list((result.run_dir / "tensorboard").glob("events*"))
