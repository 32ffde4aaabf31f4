"""A run's settings: every mistake is named at once, every value knows where it came from."""

import inspect
import typing
from pathlib import Path

import pytest
from pgdpo_fast.bench import shapes

import pgdpo_fast as pf
from pgdpo_fast import backends, loss
from pgdpo_fast.cli import bench as bench_command
from pgdpo_fast.cli import cache_reference as cache_command
from pgdpo_fast.cli import encode as encode_command
from pgdpo_fast.cli import train as train_command
from pgdpo_fast.data import manifest
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models.config import ModelConfig
from pgdpo_fast.options import DECISIONS
from pgdpo_fast.reference import rows
from pgdpo_fast.training.config import (
    _DECLARED,
    _KEYS,
    CHANGEABLE,
    TrainConfig,
    TrainingConfig,
    describe_settings,
    load_config,
)
from pgdpo_fast.training.reference_pass import reference_settings
from pgdpo_fast.training.trainer import train

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDED = ["data.store=store", "output.dir=runs/x", "model.architecture={num_layers: 1}"]


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def words_of(kind):
    """The words a `Literal` allows, wherever it stands in a type."""
    if typing.get_origin(kind) is typing.Literal:
        return set(typing.get_args(kind))
    return set().union(*map(words_of, typing.get_args(kind)))


@pytest.mark.parametrize(
    ("owner", "name", "known"),
    [
        (TrainingConfig, "granularity", loss.GRANULARITIES),
        (TrainingConfig, "backend", ("auto", *backends.NAMES)),
        (ModelConfig, "dtype", rows.DTYPES),
        (encode_command.Encode, "format", manifest.FORMATS),
        (encode_command.Encode, "criterion", manifest.CRITERIA),
        (cache_command.CacheReference, "granularity", loss.GRANULARITIES),
        (cache_command.CacheReference, "format", ("auto", *rows.FORMATS)),
        (bench_command.Bench, "shapes", shapes.SHAPES),
        (bench_command.Bench, "granularity", loss.GRANULARITIES),
        (bench_command.Bench, "reference_form", shapes.REFERENCE_FORMS),
    ],
)
def test_the_choices_of_a_setting_or_flag_are_all_there_are(owner, name, known):
    assert words_of(typing.get_type_hints(owner)[name]) == set(known)


def test_the_help_of_change_names_every_setting_that_may_change():
    text = inspect.getsource(train_command).partition("    change: ")[2].partition("    display: ")[0]
    assert all(key.rpartition(".")[2] in text for key in CHANGEABLE)


def test_all_problems_are_reported_at_once_with_what_was_meant(tmp_path):
    path = write(
        tmp_path,
        """
model: {architecture: {num_layers: 1}, dtyp: bf16, train: lor, gradient_checkpointing: 1}
data: {stor: somewhere}
objective: {name: pgdpo, bta: 5}
process: {name: wan, shft: 5}
training: {stepps: 3, pairs_per_step: 3, accumulation: 2, clip_norm: -1, learning_rate: 0, seed: 1.5}
outputs: {dir: x}
""",
    )
    message = problems_of(path, ["nonsense"])
    for expected in (
        "'nonsense': expected key=value", "model.dtyp: unknown key; did you mean model.dtype?",
        "model.train='lor': expected one of lora, full", "model.gradient_checkpointing=1: expected true or false",
        "data.stor: unknown key; did you mean data.store?", "objective.bta", "did you mean 'beta'?",
        "did you mean 'shift'?",
        "training.stepps: unknown key; did you mean training.steps?", "training.accumulation=2: expected a divisor",
        "training.clip_norm=-1.0: expected at least 0", "training.learning_rate=0.0: expected a number above 0",
        "training.seed=1.5: expected a whole number", "outputs: unknown key; did you mean output?",
        "data.store: required", "output.dir: required",
    ):  # fmt: skip
        assert expected in message


def test_a_key_in_the_wrong_section_is_found(tmp_path):
    text = "training: {gradient_checkpointing: true, evaluation_pairs: 3}\n"
    message = problems_of(write(tmp_path, text), NEEDED)
    assert "training.gradient_checkpointing: unknown key; did you mean model.gradient_checkpointing?" in message
    assert "training.evaluation_pairs: unknown key; did you mean data.evaluation_pairs?" in message


@pytest.mark.parametrize(
    "given, meant",
    [
        ("training.lr", "training.learning_rate"),
        ("lr", "training.learning_rate"),
        ("optimizer", None),
        ("training.batch_size", "training.pairs_per_step"),
        ("training.max_grad_norm", "training.clip_norm"),
        ("model.lora_rank", "model.lora.rank"),
        ("training.xyz", None),
        ("data.shuffle", None),
        ("training.evaluation", "training.evaluation_every"),
        ("training.val_every", "training.evaluation_every"),
        ("data.validation_pairs", "data.evaluation_pairs"),
    ],
)
def test_what_was_meant_is_a_setting_or_left_open_never_the_section_itself(tmp_path, given, meant):
    message = problems_of(write(tmp_path, ""), [*NEEDED, f"{given}=1"])
    assert message.endswith(f"{given}: unknown key" + (f"; did you mean {meant}?" if meant else ""))


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = write(tmp_path, "training: {learning_rate: 1e-4, adam_eps: 1E-7}\nobjective: {name: dpo, beta: 5e3}\n")
    config = load_config(path, NEEDED)
    assert config.training.learning_rate == 1e-4 and config.training.adam_eps == 1e-7
    assert config.objective["beta"] == 5000.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {steps: 1, steps: 2}\n", "'steps' is given twice"),
        ("training: [1, 2]\n", "expected a section"),
        ("- a\n", "expected sections"),
        ("training: {steps: 1\n", "not valid YAML"),
        ("training: {steps: '5'}\n", "training.steps='5': expected a whole number"),
        ("training: {steps: true}\n", "training.steps=True: expected a whole number"),
        ("training: {learning_rate: .inf}\n", "training.learning_rate=inf: expected a number"),
        ("process: {name: ddpm}\n", "was trained with FlowMatching"),
        ("process: {name: wann}\n", "did you mean 'wan'?"),
        ("objective: {name: pgpdo}\n", "did you mean 'pgdpo'?"),
        ("objective: {name: pgdpo, beta: -1}\n", "beta=-1"),
        ("model: {path: somewhere}\n", "exactly one of model.path"),
        ("model: {train: full, reference: adapter-off}\n", "needs model.train='lora'"),
    ],
)
def test_a_mistake_is_one_clear_sentence(tmp_path, text, expected):
    assert expected in problems_of(write(tmp_path, text), NEEDED)


def test_the_command_line_beats_the_file_beats_the_defaults_and_each_value_says_so(tmp_path):
    path = write(tmp_path, "training: {steps: 7, seed: 3}\nobjective: {name: dpo, beta: 10}\n")
    config = load_config(path, [*NEEDED, "training.seed=4", "objective.beta=500"])
    assert (config.training.steps, config.training.seed, config.objective["beta"]) == (7, 4, 500)
    origins = config.origins
    assert origins["training.steps"] == "run.yaml" and origins["training.seed"] == "command line"
    assert origins["training.clip_norm"] == "default" and origins["objective.label_smoothing"] == "default"


def test_merge_keys_bring_a_section_s_values_and_its_own_count(tmp_path):
    text = """
x-short: &short {steps: 7, seed: 3}
training: {<<: *short, seed: 4, pairs_per_step: 2}
callbacks: [&often {name: sample, every: 5, clips: 2}, {<<: *often, every: 9}, {<<: [*often], clips: 1}]
"""
    config = load_config(write(tmp_path, text), NEEDED)
    training = config.training
    assert (training.steps, training.seed, training.pairs_per_step) == (7, 4, 2)
    assert [(found["every"], found["clips"]) for found in config.callbacks] == [(5, 2), (9, 2), (5, 1)]
    twice = "training: &a {steps: 1}\noutput: {<<: *a, log_every: 1, log_every: 2}\n"
    assert "'log_every' is given twice" in problems_of(write(tmp_path, twice), NEEDED)


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, "data: {store: ~/store, reference_cache: '~/cache'}\noutput: {dir: ~/runs/~x}\n")
    config = load_config(path, ["model.path=~/wan"])
    home = str(tmp_path)
    assert (config.data.store, config.data.reference_cache) == (f"{home}/store", f"{home}/cache")
    assert (config.output.dir, config.model.path) == (f"{home}/runs/~x", f"{home}/wan")
    assert "there is no home folder ~nobody-here" in problems_of(path, ["model.path=~nobody-here/wan"])


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{below}: &{below} [{', '.join([f'*{above}'] * 9)}]\n" for above, below in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"training: {{steps: {'9' * 400}}}\n", "expected a whole number"),
        (f"training: {{steps: {'9' * 5000}}}\n", "a value cannot be read: Exceeds the limit"),
        (f"training: {{steps: 0x{'9' * 5000}}}\n", "training.steps=(thousands of digits): expected a whole number"),
        (f"training: {{learning_rate: {'9' * 400}}}\n", "expected a number"),
        (f"objective: {{beta: {'9' * 400}}}\n", "objective.beta"),
        ("[" * 100_000, "nested deeper"),
        ("training: " + "[" * 90 + "]" * 90 + "\n", "nested deeper than 50 levels"),
        (LAUGHS, "stands for more than 100,000 values"),
        ("training: &a {steps: *a}\n", "a value contains itself"),
        ('data: {store: "a\\ud800b"}\n', "a lone surrogate"),
        ('data: {store: "a\\0b"}\n', "a zero byte"),
        ("? [a, b]\n: 1\n", "line 1: a key that is no word"),
        ("training: {betas: [2, 3]}\n", "training.betas=[2.0, 3.0]: expected two numbers in [0, 1)"),
        ("training: {seed: 2001-02-30}\n", "a value cannot be read: day is out of range"),
        ("training: {seed: 2001-02-20}\n", "expected a whole number"),
        ("# " + "x" * (5 << 20), "more than 4 MiB"),
    ],
    ids=range(16),
)
def test_what_no_setting_can_be_is_one_sentence_that_names_the_file(tmp_path, text, expected):
    message = problems_of(write(tmp_path, text), NEEDED if "store" not in text else NEEDED[1:])
    assert expected in message and message.startswith(str(tmp_path / "run.yaml")) and len(message) < 1500


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "cp1252"])
def test_a_file_in_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "run.yaml"
    path.write_bytes("output: {dir: Bücher}\n".encode(encoding))
    assert f"{path}: byte" in problems_of(path) and "is not UTF-8" in problems_of(path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("training: {steps: 7}\n".encode("utf-8-sig"))
    assert load_config(path, NEEDED).training.steps == 7


@pytest.mark.parametrize("name", ["x" * 5000, "folder", "a\0b"])
def test_a_path_that_no_file_has_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    assert "expected a YAML file of settings" in problems_of(tmp_path / name)


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """A module of a user's own on the import path, by its name."""
    name = f"losses_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(
        """
from dataclasses import dataclass
from typing import Literal
import pgdpo_fast as pf

@dataclass(frozen=True)
class SquaredHinge(pf.Objective):
    beta: float = 100.0
    shape: Literal["square", "cube"] = "square"
    margins: tuple[float, ...] = (1.0,)
    inner: pf.Objective = pf.DPO()

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError("beta must be positive")

    def terms(self, errors, posterior_scale=None):
        logits = 0.5 * self.beta * (errors.gap_rejected - errors.gap_chosen)
        return self.result((1 - logits).clamp(min=0) ** 2, logits)

class Undecorated(pf.Objective):
    beta: float = 100.0

@dataclass(frozen=True)
class Needy(pf.Objective):
    width: int
    table: "Missing | None" = None

"""
    )
    (tmp_path / "broken_losses.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_any_objective_is_named_by_its_import_path(tmp_path, losses):
    path = write(tmp_path, f"objective: {{name: '{losses}:SquaredHinge', beta: 7, margins: [1, 2]}}\n")
    config = load_config(path, [*NEEDED, "objective.shape=cube"])
    objective = config.build_objective()
    assert (type(objective).__name__, objective.beta, objective.shape) == ("SquaredHinge", 7.0, "cube")
    assert objective.margins == (1.0, 2.0) and config.origins["objective.shape"] == "command line"
    assert "inner: {beta: 5000.0, label_smoothing: 0.0, name: dpo}  # default" in config.to_yaml()
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config and again.build_objective() == objective


def test_safeguarded_goes_around_any_objective(tmp_path, losses):
    path = write(tmp_path, "objective: {name: safeguarded, mu: 0.2, base: {name: ipo, beta: 50}}\n")
    config = load_config(path, NEEDED)
    assert config.build_objective() == pf.Safeguarded(pf.IPO(50.0), mu=0.2)
    assert config.build_objective().beta == 50.0
    assert load_config(write(tmp_path, config.to_yaml())) == config
    config = load_config(path, [*NEEDED, f"objective.base.name={losses}:SquaredHinge", "objective.base.beta=3"])
    assert config.build_objective().base.beta == 3.0 and config.objective["base"]["name"] == f"{losses}:SquaredHinge"


def test_every_mistake_in_a_nested_objective_is_named(tmp_path, losses):
    base = f"{{name: '{losses}:SquaredHinge', betta: 1, beta: -2, shape: round, margins: 3, inner: {{name: ddpo}}}}"
    message = problems_of(write(tmp_path, f"objective: {{name: safeguarded, mu: 2, mode: x, base: {base}}}\n"), NEEDED)
    for expected in (
        f"objective.base.betta: {losses}:SquaredHinge takes beta, shape, margins, inner; did you mean 'beta'?",
        "objective.base: SquaredHinge refuses, ValueError('beta must be positive')",
        "objective.base.shape='round': expected one of square, cube",
        "objective.base.margins=3: expected a list of numbers",
        "objective.base.inner.name='ddpo': expected one of pgdpo, dpo", "did you mean 'dpo'?",
        "objective.mode: safeguarded takes base, mu", "objective.mu=2.0: expected a number in [0, 1]",
    ):  # fmt: skip
        assert expected in message
    assert "7 problems" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LOSSES:SquaredHing", "has no 'SquaredHing'; did you mean 'SquaredHinge'?"),
        ("LOSSES:Undecorated", "put @dataclass(frozen=True) on it"),
        ("LOSSES:Needy", "an annotation of the class cannot be read, name 'Missing' is not defined"),
        ("absent_losses:Mine", "there is no module 'absent_losses'; install it, or"),
        ("broken_losses:Mine", "importing broken_losses fails, ZeroDivisionError: division by zero"),
        ("math:sqrt", "expected a subclass of pgdpo_fast.objectives.Objective"),
        ("pgdpo_fast.objectives:Objective", "expected a subclass"),
        ("../losses:Mine", "expected an import path such as my_package.module:Class"),
        ("a:b:c", "expected an import path"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_one_clear_sentence(tmp_path, losses, name, expected):
    text = f"objective: {{name: '{name.replace('LOSSES', losses)}'}}\n"
    assert expected in problems_of(write(tmp_path, text), NEEDED)


def test_a_class_with_a_name_keeps_it_when_named_by_its_path():
    assert load_config(None, [*NEEDED, "objective.name=pgdpo_fast.objectives:IPO"]).objective["name"] == "ipo"


def test_another_objective_inherits_beta_alone_of_the_file_s_first(tmp_path):
    path = write(tmp_path, "objective: {name: dpo, beta: 10, label_smoothing: 0.1}\n")
    config = load_config(path, [*NEEDED, "objective.name=ipo"])
    assert config.objective == {"name": "ipo", "beta": 10.0} and config.origins["objective.beta"] == "run.yaml"
    assert load_config(path, [*NEEDED, "objective.name=sft"]).objective == {"name": "sft"}  # has no beta
    path = write(tmp_path, "objective: {name: safeguarded, base: {name: dpo, beta: 10, label_smoothing: 0.1}}\n")
    config = load_config(path, [*NEEDED, "objective.base.name=ipo"])
    assert config.objective["base"] == {"name": "ipo", "beta": 10.0}


@pytest.mark.parametrize("text", ["", "objective: {name: pgdpo, beta: 7, k1: 3}\n", "objective: {beta: 7, k1: 3}\n"])
@pytest.mark.parametrize("order", [1, -1])
def test_values_of_the_command_line_survive_in_any_order(tmp_path, text, order):
    path = write(tmp_path, text)
    config = load_config(path, [*NEEDED, "objective.beta=200", "objective.name=dpo"][::order])
    assert config.objective == {"name": "dpo", "beta": 200.0, "label_smoothing": 0.0}
    assert config.origins["objective.beta"] == config.origins["objective.name"] == "command line"
    config = load_config(path, [*NEEDED, "process.timestep_sampler.name=logit-normal", "process.shift=2",
                                "process.name=flow-matching"][::order])  # fmt: skip
    assert config.process["shift"] == 2.0 and config.process["timestep_sampler"]["name"] == "logit-normal"
    config = load_config(path, [*NEEDED, "objective={name: sdpo, beta: 3}", "objective.clip=0.2"][::order])
    assert (config.objective["name"], config.objective["beta"], config.objective["clip"]) == ("sdpo", 3.0, 0.2)


def test_the_name_a_section_has_by_default_changes_nothing_of_the_file(tmp_path):
    path = write(tmp_path, "objective: {beta: 7, k1: 3}\nprocess: {shift: 5}\n")
    config = load_config(path, [*NEEDED, "objective.name=pgdpo", "process.name=wan"])
    assert (config.objective["beta"], config.objective["k1"], config.process["shift"]) == (7.0, 3.0, 5.0)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective.beta=1", "objective.beta=2"], "objective.beta: given twice on the command line, as 1 and as 2"),
        (["training.steps=3", "training={steps: 4}"], "training.steps: given twice"),
        (["objective.base={name: ipo}", "objective.base=ipo"], "objective.base: given twice"),
        (["objective.base=ipo", "objective.base.beta=2"], "objective.base: given twice"),
        (["objective.name=sft", "objective.beta=2"], "objective.beta: sft takes no settings"),
        (["objective.beta=2", "objective.name=safeguarded"], "objective.beta: safeguarded takes base, mu"),
    ],
)
def test_a_value_of_the_command_line_that_cannot_apply_is_an_error(overrides, named):
    assert named in problems_of(None, [*NEEDED, *overrides])


def test_an_empty_mapping_takes_the_place_of_the_file_s(tmp_path):
    path = write(tmp_path, "model: {architecture: {num_layers: 2}}\n")
    config = load_config(path, [*NEEDED[:2], "model.architecture={}", "model.path=weights"])
    assert config.model.architecture == {} and config.model.path == "weights"


def test_one_constructor_argument_can_be_overridden(tmp_path):
    path = write(tmp_path, "model: {architecture: {num_layers: 2, ffn_dim: 8}}\n")
    config = load_config(path, [*NEEDED[:2], "model.architecture.num_layers=5"])
    assert config.model.architecture == {"num_layers": 5, "ffn_dim": 8}


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    config = load_config(None, [*NEEDED, "process.timestep_sampler.name=logit-normal", "training.learning_rate=3e-7",
                                "model.lora.targets=[to_q, 'yes']", "objective={name: sdpo, clip: 0.2}"])  # fmt: skip
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config and again.to_mapping() == config.to_mapping()
    assert TrainConfig.from_mapping(config.to_mapping()) == config
    assert "beta: 5000.0  # default" in config.to_yaml() and "clip: 0.2  # command line" in config.to_yaml()


def test_every_setting_says_what_it_decides():
    lacking = [key for key, declared in _DECLARED.items() if declared.get("decides") not in DECISIONS]
    assert not lacking


def test_identity_fingerprint_and_sweep_key_follow_from_what_a_setting_decides():
    config = load_config(None, [*NEEDED, "process.shift=5"])
    numbers, reference = config.deciding("numbers"), config.deciding("reference")
    assert {**numbers, **reference, **config.deciding("nothing")} == config.flat()
    assert "objective.beta" in numbers and "process.shift" in reference and "training.seed" in reference
    assert "data.store" in reference and "data.store" not in config.deciding("reference", without=["store"])
    # the names and values under which caches have been kept since the first version
    assert reference_settings(config, without=["store", "weights"]) == {
        "model.family": "wan",
        "model.dtype": "bf16",
        "model.text_tokens": None,
        "model.fps": 24.0,
        "model.guidance": None,  # came later: left unset, it is equal to not being there
        "data.evaluation_pairs": 0,
        "process": repr(config.build_process()),
        "training.seed": 0,
        "training.draws_per_pair (strata of the timesteps)": 1,
        "training.evaluation_draws": 0,
    }


def test_every_setting_is_explained():
    listing = describe_settings()
    assert [key for key in _KEYS if f"  {key} (" not in listing] == []


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(example):
    load_config(example)


def test_the_command_reports_mistakes_with_exit_code_2_and_lists_settings(tmp_path, capsys):
    from pgdpo_fast.cli import main

    assert main(["train", str(write(tmp_path, "trainin: {}\n")), "--set", *NEEDED]) == 2
    assert "did you mean training?" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert main(["train", "--list-settings"]) == 0
    assert "training.steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["banana", "meta", "cuda:x"])
def test_a_training_device_that_is_none_is_one_line(tiny_config, name):
    with pytest.raises(ConfigError, match=f"training.device='{name}': expected auto, cpu, cuda or cuda:N"):
        train(tiny_config(training={"device": name}), display="none")


@pytest.mark.parametrize("betas", ["[2,3]", "[0.9,1]", "[-0.1,0.9]"])
def test_betas_that_adamw_cannot_take_are_an_error_before_anything_is_loaded(betas):
    with pytest.raises(ConfigError, match="training.betas=.*two numbers in"):
        load_config(None, ["data.store=s", "output.dir=o", "model.path=p", f"training.betas={betas}"])


def test_a_file_of_settings_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes("output: {dir: süß}".encode("latin-1"))
    with pytest.raises(ConfigError, match="a.yaml: byte 15 is not UTF-8"):
        load_config(tmp_path / "a.yaml")
