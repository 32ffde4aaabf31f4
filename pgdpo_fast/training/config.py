"""The settings of a training run: frozen dataclasses, a strict YAML overlay and the origin of every value.

A file is laid over the defaults and the command line, in whatever order it was typed, over the file. Every key and type
is checked, a misspelt key is answered with the one that was probably meant, and all problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pgdpo_fast.diffusion import process_from_name
from pgdpo_fast.errors import ConfigError
from pgdpo_fast.families import FAMILIES
from pgdpo_fast.models import adapter_class
from pgdpo_fast.models.config import ModelConfig
from pgdpo_fast.objectives import REGISTRY
from pgdpo_fast.options import close_to, convert, setting, type_name, wrong
from pgdpo_fast.training.callbacks import CALLBACKS, Callback

# A file of settings that is larger is something else.
LONGEST_FILE, MOST_VALUES, DEEPEST = 4 << 20, 100_000, 50
# Entries at the top of a file that hold nothing but what "<<: *name" brings elsewhere begin so.
ANCHORS = "x-"
# Settings that may change where a run goes on from a checkpoint, when that is asked for; "objective" is all of its own.
CHANGEABLE = (
    "objective",
    "training.learning_rate",
    "training.warmup_steps",
    "training.betas",
    "training.adam_eps",
    "training.weight_decay",
    "training.clip_norm",
)
# What a run cannot do without.
NEEDED = ("data.store", "output.dir")
# Settings that are paths: a leading ~ is the home folder.
PATHS = ("data.store", "data.reference_cache", "model.path", "model.start", "output.dir")

__all__ = ["DataConfig", "OutputConfig", "TrainConfig", "TrainingConfig", "describe_settings", "load_config"]


@dataclass(frozen=True)
class DataConfig:
    """Where the encoded pairs are."""

    store: str = setting("", "folder written by `pgdpo-fast encode` (required)", decides="reference", content="store")
    evaluation_pairs: int = setting(
        0, "pairs held out of training and used for evaluation", minimum=0, decides="reference"
    )
    split: Literal["content", "pair"] = setting(
        "content",
        '"content": held-out pairs share no prompt and no clip with those trained on; "pair": they may',
        decides="reference",
    )
    reference_cache: str = setting("", "folder written by `pgdpo-fast cache-reference`; empty: none", decides="nothing")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how many steps of how many pairs, the optimizer, and what is measured and saved on the way."""

    steps: int = setting(1000, "optimizer steps", minimum=1, decides="nothing")
    pairs_per_step: int = setting(8, "pairs in one optimizer step", minimum=1, decides="numbers")
    accumulation: int = setting(
        1, "forwards one step is split into: less memory, same result", minimum=1, decides="nothing"
    )
    draws_per_pair: int = setting(
        0,
        "distinct (timestep, noise) draws a pair cycles through; 0: a new one every visit",
        minimum=0,
        decides="reference",
    )
    granularity: Literal["sample", "frame", "element"] = setting(
        "sample", "the latent elements one reward covers", decides="numbers"
    )
    backend: Literal["auto", "eager", "triton", "native"] = setting(
        "auto", "implementation of the loss", decides="nothing"
    )
    learning_rate: float = setting(1e-5, "of AdamW, after the warm-up", above=0, decides="numbers")
    warmup_steps: int = setting(0, "steps of linear warm-up from 0", minimum=0, decides="numbers")
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW", decides="numbers")
    adam_eps: float = setting(1e-8, "of AdamW", above=0, decides="numbers")
    weight_decay: float = setting(0.0, "of AdamW", minimum=0, decides="numbers")
    clip_norm: float = setting(1.0, "largest global gradient norm; 0 only measures it", minimum=0, decides="numbers")
    seed: int = setting(0, "of the pair order and the draws", decides="reference")
    checkpoint_every: int = setting(
        500, "steps between checkpoints; one is always written at the end", minimum=1, decides="nothing"
    )
    checkpoint_keep: int = setting(2, "newest checkpoints kept", minimum=1, decides="nothing")
    evaluation_every: int = setting(
        100, "steps between evaluations, with data.evaluation_pairs > 0", minimum=1, decides="nothing"
    )
    evaluation_draws: int = setting(
        8,
        "fixed draws of every held-out pair, spread over the timesteps",
        minimum=1,
        maximum=10_000,
        decides="reference",
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", decides="nothing")


@dataclass(frozen=True)
class OutputConfig:
    """What is written where."""

    dir: str = setting("", "run directory (required)", decides="nothing")
    log_every: int = setting(
        10, "steps between lines of the log and of a display that is not a terminal", minimum=1, decides="nothing"
    )
    tensorboard: bool = setting(True, "also write TensorBoard events when it is installed", decides="nothing")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on.

    `process` and `objective` are mappings with a `name` and that name's own settings (`pgdpo_fast.diffusion.PROCESSES`,
    `pgdpo_fast.objectives.LISTED`), or the import path of another objective's class.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    process: dict[str, Any] = setting(
        {}, "diffusion process: a name and its settings; unset means the family's", decides="reference"
    )
    objective: dict[str, Any] = setting(
        {"name": "pgdpo"}, "objective: a name and its hyper-parameters", decides="numbers"
    )
    callbacks: tuple[dict[str, Any], ...] = setting(
        (), "what a run does beside training: mappings with a name and that callback's settings", decides="nothing"
    )
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "program") -> TrainConfig:
        """A configuration from nested mappings, checked like a file.

        Raises:
            ConfigError: naming every unknown key, wrong type and impossible value.
        """
        return _resolve([(values, origin)], origin)

    def to_mapping(self) -> dict[str, Any]:
        """Nested mappings of plain values; `from_mapping` gives the same configuration back."""
        values = dataclasses.asdict(self)
        del values["origins"]
        return values

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key."""
        return dict(_leaves(self.to_mapping()))

    def deciding(self, *what: str, without: Sequence[str] = ()) -> dict[str, Any]:
        """Every value that decides one of `what` (see `setting`), by its dotted key.

        without: left out are settings that only say where this content is ("weights", "store"); a caller that has the
        content at hand puts its digest in their place.
        """
        declared = {key: _DECLARED.get(key) or _DECLARED[key.partition(".")[0]] for key in self.flat()}
        return {
            key: value
            for key, value in self.flat().items()
            if declared[key]["decides"] in what and declared[key]["content"] not in without
        }

    def unused(self) -> set[str]:
        """Dotted keys of settings that nothing in this run reads, as the others stand: another value, the same run."""
        model, data, training = self.model, self.data, self.training
        keys = {f"objective.{name}" for name in self.build_objective().unused_settings}
        if training.granularity == "sample":  # one group: nothing to combine
            keys |= {key for key in ("objective.combine", "objective.base.combine")}
        if model.train == "full":
            keys |= {key for key in _DECLARED if key.startswith("model.lora.")}
            keys |= {"model.init_seed"} if model.path else set()
        if not data.evaluation_pairs:
            keys |= {"training.evaluation_draws", "data.split"} | (
                set() if self.callbacks else {"training.evaluation_every"}
            )
        return keys

    def to_yaml(self) -> str:
        """The configuration as YAML, each value followed by its origin; `load_config` reads it back."""
        import yaml

        lines = []

        def write(values: Mapping, prefix: str, indent: str) -> None:
            for key, value in values.items():
                dotted = f"{prefix}{key}"
                if _is_section(dotted, value):
                    lines.append(f"{indent}{key}:")
                    write(value, f"{dotted}.", indent + "  ")
                else:
                    value = list(value) if isinstance(value, tuple) else value
                    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
                    text = text.removesuffix("...\n").strip()
                    lines.append(f"{indent}{key}: {text}  # {self.origins.get(dotted, 'default')}")

        write(self.to_mapping(), "", "")
        return "\n".join(lines) + "\n"

    def build_process(self):
        """The diffusion process."""
        return process_from_name(**self.process)

    def build_objective(self):
        """The objective."""
        return REGISTRY.build(self.objective, "objective")

    def build_callbacks(self) -> list[Callback]:
        """The callbacks, in the order they are called."""
        return [CALLBACKS.build(given, f"callbacks[{place}]") for place, given in enumerate(self.callbacks)]

    @property
    def reference_mode(self) -> str:
        """`model.reference` with "auto" resolved to the cheapest: cached, else adapter-off, else copy."""
        if self.model.reference != "auto":
            return self.model.reference
        if self.data.reference_cache:
            return "cached"
        return "adapter-off" if self.model.train == "lora" else "copy"

    def check(self, needed: Sequence[str] = NEEDED) -> list[str]:
        """Every contradiction between values, and those of `needed` that are empty; an empty list when all is well."""
        training, problems = self.training, []
        if self.reference_mode == "cached" and not self.data.reference_cache:
            problems.append(
                "model.reference='cached' needs data.reference_cache, a folder written by `pgdpo-fast cache-reference`"
            )
        elif self.reference_mode != "cached" and self.data.reference_cache:
            problems.append(
                f"data.reference_cache is not read with model.reference={self.model.reference!r}; set that "
                "to auto or cached, or data.reference_cache to ''"
            )
        problems += [f"{key}: required, e.g. --set {key}=FOLDER" for key in needed if not self.flat()[key]]
        if not all(0 <= beta < 1 for beta in training.betas):
            problems.append(str(wrong("training.betas", list(training.betas), "two numbers in [0, 1)")))
        if training.pairs_per_step % training.accumulation:
            problems.append(
                f"training.accumulation={training.accumulation}: expected a divisor of "
                f"training.pairs_per_step={training.pairs_per_step}, a pair is never split"
            )
        try:
            adapter_class(self.model.family)(self.model)
        except ConfigError as error:
            problems.append(str(error))
        try:
            process = self.build_process()
        except (ConfigError, TypeError) as error:
            problems.append(str(error) if str(error).startswith("process.") else f"process: {error}")
        else:
            expected = type(process_from_name(**adapter_class(self.model.family).default_process)).__name__
            if type(process).__name__ != expected:
                problems.append(
                    f"process.name={self.process['name']!r}: the {self.model.family} family was trained "
                    f"with {expected}, this is {type(process).__name__}"
                )
        problems += REGISTRY.problems(self.objective, "objective")
        for place, given in enumerate(self.callbacks):
            problems += CALLBACKS.problems(given, f"callbacks[{place}]")
        return problems


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), needed: Sequence[str] = NEEDED
) -> TrainConfig:
    """Defaults, under a YAML file, under `key=value` overrides such as `objective.beta=500` in any order.

    Where an override names another objective or process than the file, the file's settings of the first do not apply,
    but for an objective's beta, which means the same in all.

    Args:
        needed: settings that must be given.

    Raises:
        ConfigError: one message with every unknown key, wrong type, impossible value and override given twice.
    """
    layers, problems, given = [], [], {}
    if path is not None:
        layers.append((_read_yaml(Path(path)), Path(path).name))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"--set {override!r}: expected key=value, such as objective.beta=500")
            continue
        value = _parse_yaml(text, f"--set {key}")
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        _join(given, value, "", problems)
    layers.append((given, "command line"))
    return _resolve(layers, str(path) if path is not None else "command line", problems, needed)


def describe_settings() -> str:
    """Every key with its type, default and meaning, as lines of text."""
    lines = []

    def section(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[item.name]):
                section(hints[item.name], f"{prefix}{item.name}.")
            elif "help" in item.metadata:
                default = _default(item)
                shown = "" if default in ("", None) or default == {} or default == () else f" [{_show(default)}]"
                lines.append(f"  {prefix}{item.name} ({type_name(hints[item.name])}){shown}: {item.metadata['help']}")

    section(TrainConfig, "")
    for key, registry in (("objective", REGISTRY), ("callbacks", CALLBACKS)):
        for name, named in registry.classes.items():
            settings = [f"{item.name} [{_show(_default(item))}]" for item in dataclasses.fields(named)]
            lines.append(f"  {key} {name}: {', '.join(settings) or 'no settings'}")
    return "\n".join(lines)


# -- reading


def _read_yaml(path: Path) -> Mapping[str, Any]:
    expected = "expected a YAML file of settings"
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file in that encoding") from error
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}; {expected}") from error
    if len(content) > LONGEST_FILE:
        raise ConfigError(f"{path}: more than {LONGEST_FILE >> 20} MiB; {expected}")
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' at the top, got a {type(values).__name__}")
    return {key: value for key, value in values.items() if not str(key).startswith(ANCHORS)}


def _parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text: plain ones, as many as a file of settings can have.

    Raises:
        ConfigError: naming `where`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 1e-5 for a string and the last of two equal keys; both are read as people mean them."""

        def compose_mapping_node(self, anchor):
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:  # as written: keys that "<<" brings are laid under these later
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{where}, line {key.start_mark.line + 1}: a key that is no word")
                if (key.tag, key.value) in seen:
                    raise ConfigError(f"{where}, line {key.start_mark.line + 1}: {key.value!r} is given twice")
                seen.add((key.tag, key.value))
            return node

        def construct_scalar_or_number(self, node):
            value = self.construct_scalar(node)
            try:
                return float(value) if node.style is None and value[:1] in "+-.0123456789" and value else value
            except ValueError:
                return value

    Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_scalar_or_number)
    try:
        values = yaml.load(text, Loader)
        _check_plain(values, where, {})
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested deeper than settings are") from error
    except ValueError as error:  # of a number with thousands of digits, a date that does not exist
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: a value cannot be read: {error}") from error
    return values


def _check_plain(value: Any, where: str, sizes: dict[int, int | None], depth: int = 0) -> int:
    """How many values `value` stands for, each alias of YAML written out.

    Raises:
        ConfigError: too many or too deep ones, one that contains itself, or a text that no file or path can hold.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: {value!r} holds half a character, a lone surrogate") from None
        if "\0" in value:
            raise ConfigError(f"{where}: {value!r} holds a zero byte")
        return 1
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = None
        if depth > DEEPEST:
            raise ConfigError(f"{where}: nested deeper than {DEEPEST} levels, which no setting is")
        items = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_check_plain(item, where, sizes, depth + 1) for item in items)
    size = sizes[id(value)]
    if size is None:
        raise ConfigError(f"{where}: a value contains itself")
    if size > MOST_VALUES:
        raise ConfigError(f"{where}: stands for more than {MOST_VALUES:,} values, which no file of settings does")
    return size


# -- checking


def _resolve(
    layers: Sequence[tuple[Mapping, str]], where: str, problems: Sequence[str] = (), needed: Sequence[str] = NEEDED
) -> TrainConfig:
    problems, origins, merged = list(problems), {}, {}
    for values, origin in layers:
        _merge(merged, values, "", origin, origins, _implied_names([values for values, _ in layers]))
    config = _construct(TrainConfig, merged, "", problems)
    usual = adapter_class(config.model.family).default_process  # its settings are another process's no more
    process = config.process if "name" in config.process else {**usual, **config.process}
    config = dataclasses.replace(config, process=process, objective={"name": "pgdpo", **config.objective})
    problems += config.check(needed)
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    if problems:
        said = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"{where}: {len(problems)} problems: {said}")
    config = dataclasses.replace(
        config,
        process=_with_defaults(config.process, config.build_process()),
        objective=REGISTRY.describe(config.build_objective()),
        callbacks=tuple(map(CALLBACKS.describe, config.build_callbacks())),
    )
    return dataclasses.replace(config, origins={key: origins.get(key, "default") for key in config.flat()})


def _implied_names(layers: Sequence[Mapping]) -> dict[str, str]:
    """What `objective` and `process` are called where nothing names them."""
    families = [values["model"].get("family") for values in layers if isinstance(values.get("model"), Mapping)]
    family = next((name for name in reversed(families) if isinstance(name, str) and name in FAMILIES), "wan")
    return {"objective": "pgdpo", "process": adapter_class(family).default_process["name"]}


def _join(into: dict, values: Mapping, prefix: str, problems: list[str]) -> None:
    """Add values of the command line to those already there; two for one setting are a problem."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.setdefault(key, {}), dict):
            _join(into[key], value, f"{prefix}{key}.", problems)
        elif key in into:
            problems.append(
                f"{prefix}{key}: given twice on the command line, as {into[key]!r} and as {value!r}; give it once"
            )
        else:
            into[key] = value


def _merge(
    into: dict, values: Mapping, prefix: str, origin: str, origins: dict[str, str], implied: Mapping[str, str]
) -> None:
    """Lay `values` over `into`. `implied`: see `_implied_names`."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        below = into.get(key)
        if not isinstance(value, Mapping) or (not value and dotted in _DECLARED):  # {} leaves nothing of what was there
            into[key] = value
            _forget(origins, dotted)
            origins[dotted] = origin
            continue
        named = isinstance(below, dict) and "name" in value
        # another name has other settings: those of the layer below do not apply
        if not isinstance(below, dict) or (named and value["name"] != below.get("name", implied.get(dotted))):
            into[key] = {}
            if named and dotted.partition(".")[0] == "objective" and "beta" in below and _takes_beta(value["name"]):
                into[key]["beta"] = below["beta"]
            _forget(origins, dotted, kept=into[key])
        _merge(into[key], value, f"{dotted}.", origin, origins, implied)
        if not _is_section(dotted, value):
            origins[dotted] = origin


def _forget(origins: dict[str, str], dotted: str, kept: Mapping = types.MappingProxyType({})) -> None:
    """Drop the origins of all settings below `dotted` but those `kept`."""
    for key in [key for key in origins if key.startswith(f"{dotted}.") and key[len(dotted) + 1 :] not in kept]:
        del origins[key]


def _takes_beta(name: Any) -> bool:
    """Whether the objective of this name has a beta; False for a name nobody knows, which is answered elsewhere."""
    try:
        return "beta" in {item.name for item in dataclasses.fields(REGISTRY.find(name, "objective"))}
    except (ConfigError, TypeError):
        return False


def _is_section(dotted: str, value: Any) -> bool:
    return isinstance(value, Mapping) and dotted in _SECTIONS


def _leaves(values: Mapping, prefix: str = ""):
    for key, value in values.items():
        if _is_section(f"{prefix}{key}", value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _construct(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """A `cls` of the valid values; what is wrong with the others is appended to `problems`."""
    if not isinstance(values, Mapping):
        problems.append(str(wrong(prefix.rstrip("."), values, "a section of settings")))
        return cls()
    hints = typing.get_type_hints(cls)
    known = [item for item in dataclasses.fields(cls) if item.name != "origins"]
    names = [item.name for item in known]
    given = {}
    for key in values:
        if key not in names:
            problems.append(f"{prefix}{key}: unknown key{_suggest(f'{prefix}{key}')}")
    for item in known:
        if item.name not in values:
            continue
        dotted, value, kind = f"{prefix}{item.name}", values[item.name], hints[item.name]
        if dataclasses.is_dataclass(kind):
            given[item.name] = _construct(kind, value, f"{dotted}.", problems)
            continue
        try:
            given[item.name] = convert(dotted, value, kind, item.metadata)
            if dotted in PATHS and value is not None:
                given[item.name] = _expanded(dotted, value)
        except ConfigError as error:
            problems.append(str(error))
    return cls(**given)


def _expanded(where: str, path: str) -> str:
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise wrong(where, path, f"a path; there is no home folder {path.partition('/')[0]}, write ./{path} for a name")
    return found


def _with_defaults(given: Mapping[str, Any], built: Any) -> dict[str, Any]:
    """A named section with every setting of the object it builds, as plain values."""
    from pgdpo_fast.diffusion import SAMPLERS

    settings = {"name": given["name"]}
    for item in dataclasses.fields(built):
        value = getattr(built, item.name)
        if dataclasses.is_dataclass(value):
            name = next(name for name, (cls, _) in SAMPLERS.items() if type(value) is cls)
            value = {"name": name, **dataclasses.asdict(value)}
        settings[item.name] = list(value) if isinstance(value, tuple) else value
    return settings


def _declarations(cls: type = TrainConfig, prefix: str = "") -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """(what `setting` declared of every setting, by dotted key; dotted keys of sections)."""
    declared, sections = {}, []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        dotted = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            below, below_sections = _declarations(hints[item.name], f"{dotted}.")
            declared, sections = declared | below, [*sections, dotted, *below_sections]
        elif dotted != "origins":
            declared[dotted] = item.metadata
            if dotted in ("process", "objective"):  # a name and its own settings, all of one kind
                sections.append(dotted)
    return declared, sections


_DECLARED, _SECTIONS = _declarations()
_KEYS = [key for key in _DECLARED if key not in _SECTIONS]


# What other trainers call a setting, where the letters do not tell.
_ELSEWHERE = {
    "lr": "learning_rate",
    "batch_size": "pairs_per_step",
    "gradient_accumulation_steps": "accumulation",
    "grad_accum": "accumulation",
    "max_grad_norm": "clip_norm",
    "grad_clip": "clip_norm",
    "save_every": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "eval_every": "evaluation_every",
    "eval_steps": "evaluation_every",
    "eval_pairs": "evaluation_pairs",
    "val_every": "evaluation_every",
    "validation_every": "evaluation_every",
    "validation_steps": "evaluation_every",
    "val_pairs": "evaluation_pairs",
    "validation_pairs": "evaluation_pairs",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "output_dir": "dir",
}


def _suggest(dotted: str) -> str:
    section, _, word = dotted.rpartition(".")
    word = _ELSEWHERE.get(word, word)
    words = {key: key.rpartition(".")[2] for key in _KEYS + _SECTIONS}
    close = [key for key in _KEYS if words[key] == word]  # the right word in the wrong section
    if not close:  # a word of the same section before those of others, and these only when they are very like it
        here = {words[key]: key for key in words if key.rpartition(".")[0] == section}
        near = close_to(word, here)
        everywhere = {name: key for key, name in words.items()}
        close = [here[near]] if near else [everywhere[near]] if (near := close_to(word, everywhere, 0.75)) else []
    return f"; did you mean {close[0]}?" if close else ""


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default is not dataclasses.MISSING else item.default_factory()


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
