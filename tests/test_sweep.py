"""A sweep pays the reference once, trains what separate runs would have trained, and goes on where it stopped."""

import json

import pytest
import torch

from pgdpo_fast.cli import main
from pgdpo_fast.errors import ConfigError, NonFiniteError, Preempted
from pgdpo_fast.training.sweep import expand
from pgdpo_fast.training.trainer import train

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

    forwards, forward, predict = [], Wan.forward, reference._NetworkReference._predict

    def counted(self, model, noised, *arguments):
        if torch.is_inference_mode_enabled():
            forwards.append(len(noised) // 2)
        return forward(self, model, noised, *arguments)

    def counted_online(self, batch):
        forwards.append(len(batch.draws))
        return predict(self, batch)

    monkeypatch.setattr(Wan, "forward", counted)
    monkeypatch.setattr(reference._NetworkReference, "_predict", counted_online)
    return forwards


def sweep(settings, *grid, flags=()):
    return main(["sweep", str(settings), *(f"--grid={axis}" for axis in grid), "--display", "none", *flags])


def test_only_the_first_run_of_a_sweep_pays_a_reference_pass(settings, reference_forwards, tmp_path, capsys):
    assert sweep(settings, "objective.beta=100,500", "objective.k1=1,2") == 0
    # 8 training pairs x 1 visit and 2 held-out pairs x 2 draws, two pairs a forward, for four runs together
    assert reference_forwards == [2] * (4 + 2)
    assert sweep(settings, "objective.beta=100,500,1000", "objective.k1=1,2") == 0
    assert len(reference_forwards) == 6
    assert "for 6 runs" in capsys.readouterr().out
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert report["grid"] == ["objective.beta", "objective.k1"]
    assert [run["settings"] for run in report["runs"]] == [
        {"objective.beta": beta, "objective.k1": k1} for beta in (100.0, 500.0, 1000.0) for k1 in (1.0, 2.0)]
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
    assert reference_forwards == [2] * (8 + 2)  # 2 visits a pair


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


@pytest.mark.parametrize("grid, named", [
    (["objective.beta"], "expected key=value,value"), (["objective.beta=1,1"], "different values"),
    (["objective.beta=1,2", "objective.beta=3"], "every key once"), (["output.dir=a,b"], "the sweep chooses it"),
    (["objective.bta=1,2"], "bta"), (["training.steps=4,many"], "training.steps='many'"),
])
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
