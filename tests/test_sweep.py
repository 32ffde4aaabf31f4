"""A sweep pays the reference once, trains what separate runs would have trained, and goes on where it stopped."""

import json
import multiprocessing
import signal

import pytest
import torch

from pgdpo_fast.cli import main
from pgdpo_fast.errors import ConfigError, NonFiniteError, Preempted
from pgdpo_fast.training.sweep import expand
from pgdpo_fast.training.trainer import train
from tests.commands import FORK, Command, lines_of

CLOCK = ("time", "step_seconds", "data_wait_seconds", "peak_memory_gib")


def rows(run_dir, name="metrics"):
    found = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in found]


@pytest.fixture
def settings(tiny_config, tmp_path):
    """A file of settings whose output.dir is `tmp_path / "sweep"`."""
    path = tmp_path / "settings.yaml"
    path.write_text(tiny_config("sweep", model={"train": "full"}).to_yaml())
    return path


@pytest.fixture
def reference_forwards(monkeypatch):
    """Pairs in every forward of a reference: one made in inference mode by the pass, or online by a provider."""
    from pgdpo_fast.models.wan import Wan
    from pgdpo_fast.training import reference

    forwards, forward, predict = [], Wan.predict, reference._NetworkReference._predict

    def counted(self, model, batch):
        if torch.is_inference_mode_enabled():
            forwards.append(len(batch.noised) // 2)
        return forward(self, model, batch)

    def counted_online(self, batch):
        forwards.append(len(batch.visits))
        return predict(self, batch)

    monkeypatch.setattr(Wan, "predict", counted)
    monkeypatch.setattr(reference._NetworkReference, "_predict", counted_online)
    return forwards


def sweep(settings, *grid, flags=()):
    return main(["sweep", str(settings), *(f"--grid={axis}" for axis in grid), "--display", "none", *flags])


def test_only_the_first_run_of_a_sweep_pays_a_reference_pass(settings, reference_forwards, tmp_path, capsys):
    assert sweep(settings, "objective.beta=100,500", "objective.k1=1,2") == 0
    # 8 training pairs x 1 visit and 2 held-out pairs x 2 draws, two pairs per forward, for four runs together
    assert reference_forwards == [2] * (4 + 2)
    assert sweep(settings, "objective.beta=100,500,1000", "objective.k1=1,2") == 0
    assert len(reference_forwards) == 6
    assert "for 6 runs" in capsys.readouterr().out
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert report["grid"] == ["objective.beta", "objective.k1"]
    assert [run["settings"] for run in report["runs"]] == [
        {"objective.beta": beta, "objective.k1": k1} for beta in (100.0, 500.0, 1000.0) for k1 in (1.0, 2.0)
    ]
    assert len({run["metrics"]["loss"] for run in report["runs"]}) == 6
    assert (tmp_path / "sweep" / "report.html").exists()


def test_a_run_of_a_sweep_is_the_run_made_alone(settings, tiny_config, tmp_path):
    assert sweep(settings, "objective.beta=100,500") == 0
    config = tiny_config("alone", model={"train": "full"}, objective={"name": "pgdpo", "beta": 500})
    alone = train(config, display="none")
    assert rows(tmp_path / "sweep" / "beta=500") == rows(alone.run_dir)
    assert rows(tmp_path / "sweep" / "beta=500", "evaluation") == rows(alone.run_dir, "evaluation")


def test_settings_that_change_the_questions_get_a_pass_of_their_own(settings, reference_forwards, tmp_path):
    assert sweep(settings, "training.seed=0,1", "training.learning_rate=1e-3,1e-4") == 0
    assert reference_forwards == [2] * 12  # two seeds
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len({run["cache"] for run in report["runs"]}) == 2


def test_runs_of_different_length_share_the_longest_pass(settings, reference_forwards):
    assert sweep(settings, "training.steps=2,6") == 0
    assert reference_forwards == [2] * (8 + 2)  # 2 visits per pair


def test_a_run_that_diverges_is_reported_and_the_others_finish(settings, tmp_path, monkeypatch, capsys):
    from pgdpo_fast.training import measure

    check = measure.check_finite

    def diverging(row, step, seed, root):
        if "beta=500" in str(root) and step == 1:
            raise NonFiniteError("step 2: the loss is not finite")
        check(row, step, seed, root)

    monkeypatch.setattr(measure, "check_finite", diverging)
    assert sweep(settings, "objective.beta=100,500,1000") == NonFiniteError.exit_code
    runs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert [run["failure"] for run in runs] == [None, "step 2: the loss is not finite", None]
    assert "failed" in capsys.readouterr().out
    monkeypatch.undo()
    assert sweep(settings, "objective.beta=100,500,1000") == 0


def test_sigterm_ends_the_sweep_with_the_command_that_resumes_it(settings, monkeypatch, capsys):
    from pgdpo_fast.training import sweep as module

    def stopped(config, display):
        raise Preempted("stopped by SIGTERM after step 1, state saved; resume with: pgdpo-fast train x")

    with monkeypatch.context() as patched:
        patched.setattr(module, "train", stopped)
        assert sweep(settings, "objective.beta=100,500") == 75
    assert "or the whole sweep with: pgdpo-fast" in capsys.readouterr().err
    assert sweep(settings, "objective.beta=100,500") == 0


# Several devices.


@pytest.fixture
def forked(monkeypatch):
    """Runs on several devices come from a server that has imported what they need, where one thread adds up."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def report_of(output):
    """sweep.json without its seal, clock and folders."""
    found = json.loads((output / "sweep.json").read_text().replace(str(output), "OUTPUT"))
    return found["grid"], [(run["name"], run["settings"], run["metrics"], run["failure"]) for run in found["runs"]]


def test_runs_spread_over_devices_are_those_made_in_turn_and_one_that_diverges_stops_no_other(
    settings, forked, tmp_path, capsys
):
    grid = "training.learning_rate=1e30,1e-3,1e-4"
    for folder, flags in (("turn", []), ("spread", ["--devices", "cpu", "cpu"])):
        assert sweep(settings, grid, flags=["--output", str(tmp_path / folder), *flags]) == NonFiniteError.exit_code
    printed = capsys.readouterr().out
    assert all(f"run {number} of 3 on cpu" in printed for number in (1, 2, 3))
    failures = [run[3] for run in report_of(tmp_path / "turn")[1]]
    assert "not finite" in failures[0] and failures[1:] == [None, None]
    assert report_of(tmp_path / "spread") == report_of(tmp_path / "turn")
    for name in ("learning_rate=1e-3", "learning_rate=1e-4"):
        turn, spread = tmp_path / "turn" / name, tmp_path / "spread" / name
        assert rows(spread) == rows(turn) and rows(spread, "evaluation") == rows(turn, "evaluation")
        weights = [sorted((run / "checkpoints").glob("*/weights/*.safetensors"))[-1] for run in (turn, spread)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sigterm_stops_the_runs_on_all_devices_with_their_state_saved(settings, tmp_path):
    beta, devices = "--grid=objective.beta=100,500", ["--devices", "cpu", "cpu"]
    steps = [f"training.{key}=5000" for key in ("steps", "checkpoint_every", "evaluation_every")]
    command = Command(tmp_path, "sweep", settings, beta, *devices, "--set", *steps, "training.draws_per_pair=1")
    metrics = [tmp_path / "sweep" / f"beta={beta}" / "metrics.jsonl" for beta in (100, 500)]
    command.wait_for(lambda: all(lines_of(path) > 1 for path in metrics))
    command.send(signal.SIGTERM)
    assert command.end()[0] == 75, command.wrote
    assert "the state of every run saved" in command.wrote and "or the whole sweep with: pgdpo-fast" in command.wrote
    assert "Traceback" not in command.wrote
    for path in metrics:
        steps = len(path.read_text().splitlines())
        assert steps < 5000 and (path.parent / "checkpoints" / f"step_{steps:08d}").is_dir()
    assert report_of(tmp_path / "sweep")[1] == []


def test_a_process_that_dies_is_a_failure_of_its_run_alone(settings, forked, tmp_path):
    from pgdpo_fast.training.sweep import sweep

    def kill_the_first(text):
        if text.startswith("run 2 "):
            multiprocessing.active_children()[0].kill()

    configs = expand(settings, [], ["objective.beta=100,500"], tmp_path)
    outcomes = sweep(configs, ["objective.beta"], tmp_path, devices=["cpu", "cpu"], note=kill_the_first)
    assert "exit code -9" in outcomes[0].failure and outcomes[1].failure is None
    assert report_of(tmp_path)[1][1][2] == outcomes[1].metrics


def test_devices_that_cannot_be_had_are_refused_before_anything_runs(settings, tmp_path, capsys):
    assert sweep(settings, "objective.beta=1,2", flags=["--devices", "cpu", "gpu7"]) == ConfigError.exit_code
    assert "gpu7" in capsys.readouterr().err
    assert sweep(settings, "training.device=cpu,cuda", flags=["--devices", "cpu"]) == ConfigError.exit_code
    assert "--grid training.device" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "grid, named",
    [
        (["objective.beta"], "expected key=value,value"),
        (["objective.beta=1,1"], "different values"),
        (["objective.beta=1,2", "objective.beta=3"], "every key once"),
        (["output.dir=a,b"], "the sweep chooses it"),
        (["objective.bta=1,2"], "bta"),
        (["training.steps=4,many"], "training.steps='many'"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_refused_before_anything_runs(settings, capsys, tmp_path, grid, named):
    assert sweep(settings, *grid) == ConfigError.exit_code
    assert named in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_grid_may_hold_lists_and_names(settings, tmp_path):
    grid = ["training.betas=[0.9,0.99],[0.8,0.9]", "objective.name=dpo,pgdpo"]
    configs = expand(settings, ["training.steps=3"], grid, tmp_path)
    found = [(config.training.betas, config.objective["name"], config.training.steps) for config in configs.values()]
    assert found == [(betas, name, 3) for betas in ((0.9, 0.99), (0.8, 0.9)) for name in ("dpo", "pgdpo")]
    assert len({config.output.dir for config in configs.values()}) == 4


@pytest.fixture
def plain(tmp_path):
    """A file of settings that says nothing of the objective."""
    path = tmp_path / "plain.yaml"
    path.write_text("data: {store: store}\noutput: {dir: out}\nmodel: {architecture: {num_layers: 1}}\n")
    return path


@pytest.mark.parametrize("order", [1, -1])
def test_a_grid_over_beta_and_objective_trains_what_its_names_say(plain, order):
    grid = ["objective.beta=100,500", "objective.name=dpo,pgdpo"][::order]
    configs = expand(plain, [], grid, plain.parent)
    assert len(configs) == 4
    for name, config in configs.items():
        said = dict(part.split("=") for part in name.split(","))
        assert (config.objective["name"], config.objective["beta"]) == (said["name"], float(said["beta"]))


def test_objectives_are_compared_at_one_beta(plain):
    with pytest.raises(ConfigError, match="beta would be DPO 5000, PG-DPO 100, and it means the same in all of them"):
        expand(plain, [], ["objective.name=dpo,pgdpo"], plain.parent)
    for overrides, text in ((["objective.beta=300"], ""), ([], "objective: {name: pgdpo, beta: 300}\n")):
        plain.write_text(plain.read_text() + text)
        configs = expand(plain, overrides, ["objective.name=dpo,pgdpo,ipo"], plain.parent)
        assert [config.objective["beta"] for config in configs.values()] == [300.0] * 3
    assert len(expand(plain, [], ["objective={name: dpo, beta: 5},{name: ipo, beta: 6}"], plain.parent)) == 2


@pytest.mark.parametrize(
    ("overrides", "grid", "named"),
    [
        (["objective.beta=5"], ["objective.beta=1,2"], "objective.beta: given twice"),
        ([], ["objective.beta=100,1e2"], "beta=100 and beta=1e2 are the same run"),
        (
            ["objective.name=slic"],
            ["objective.beta=100,500"],
            "--grid objective.beta: the run beta=100 would not use it",
        ),
        (["objective.ars=false"], ["objective.k1=1,2"], "--grid objective.k1: the run k1=1 would not use it"),
        (
            ["objective={name: safeguarded, base: {name: pgdpo, ipr: none}}"],
            ["objective.base.k2=1,2"],
            "would not use it",
        ),
        ([], ["objective.name=pgdpo,sft", "objective.beta=100,500"], "objective.beta: sft takes no settings"),
        (["model.train=full"], ["model.lora.rank=1,2"], "--grid model.lora.rank: the run rank=1 would not use it"),
        ([], ["training.evaluation_draws=1,2"], "would not use it"),
        ([], ["model.reference=copy,adapter-off"], "the sweep chooses it for every run"),
        (["model.architecture={}"], ["model.path=a/b,a_b"], "two runs would be called path=a_b"),
        (["objective.ipr=none"], ["objective={k1: 1, k2: 5},{k1: 1, k2: 6}"], "are the same run"),
    ],
)
def test_a_sweep_makes_no_two_equal_runs_and_no_name_that_says_what_a_run_does_not_use(plain, overrides, grid, named):
    with pytest.raises(ConfigError) as caught:
        expand(plain, overrides, grid, plain.parent)
    assert named in str(caught.value)


def test_a_sweep_over_nested_settings_reports_them(settings, tmp_path):
    assert sweep(settings, "process.timestep_sampler.name=uniform,logit-normal") == 0
    runs = report_of(tmp_path / "sweep")[1]
    assert [run[1] for run in runs] == [{"process.timestep_sampler.name": name} for name in ("uniform", "logit-normal")]


def test_a_run_s_folder_has_a_name_that_file_systems_take(plain):
    paths = [f"{letter * 150}/{letter * 100}" for letter in "ab"]
    names = expand(plain, ["model.architecture={}"], [f"model.path={','.join(paths)}"], plain.parent)
    assert len(names) == 2 and all(len(name) <= 200 for name in names)
