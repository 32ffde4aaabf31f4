"""The settings of a training run: frozen dataclasses, a strict YAML overlay and the origin of every value.

A file is laid over the defaults and `--set key=value` over the file. Every key and type is checked, a misspelt key is
answered with the one that was probably meant, and all problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pgdpo_fast.errors import ConfigError
from pgdpo_fast.models import adapter_class
from pgdpo_fast.models.config import ModelConfig, setting

__all__ = ["DataConfig", "OutputConfig", "TrainConfig", "TrainingConfig", "describe_settings", "load_config"]


@dataclass(frozen=True)
class DataConfig:
    """Where the encoded pairs are."""

    store: str = setting("", "folder written by `pgdpo-fast encode` (required)")
    evaluation_pairs: int = setting(0, "pairs held out of training and used for evaluation", minimum=0)
    reference_cache: str = setting("", "folder written by `pgdpo-fast cache-reference`; empty: none")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how many steps of how many pairs, the optimizer, and what is measured and saved on the way."""

    steps: int = setting(1000, "optimizer steps", minimum=1)
    pairs_per_step: int = setting(8, "pairs in one optimizer step", minimum=1)
    accumulation: int = setting(1, "forwards one step is split into: less memory, same result", minimum=1)
    draws_per_pair: int = setting(
        0, "distinct (timestep, noise) draws a pair cycles through; 0: a new one every visit", minimum=0
    )
    granularity: Literal["sample", "frame", "element"] = setting("sample", "the latent elements one reward covers")
    backend: Literal["auto", "eager", "triton", "native"] = setting("auto", "implementation of the loss")
    learning_rate: float = setting(1e-5, "of AdamW, after the warm-up", above=0)
    warmup_steps: int = setting(0, "steps of linear warm-up from 0", minimum=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW")
    adam_eps: float = setting(1e-8, "of AdamW", above=0)
    weight_decay: float = setting(0.0, "of AdamW", minimum=0)
    clip_norm: float = setting(1.0, "largest global gradient norm; 0 only measures it", minimum=0)
    seed: int = setting(0, "of the pair order and the draws")
    checkpoint_every: int = setting(500, "steps between checkpoints; one is always written at the end", minimum=1)
    checkpoint_keep: int = setting(2, "newest checkpoints kept", minimum=1)
    evaluation_every: int = setting(100, "steps between evaluations, with data.evaluation_pairs > 0", minimum=1)
    evaluation_draws: int = setting(8, "fixed draws of every held-out pair, spread over the timesteps", minimum=1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class OutputConfig:
    """What is written where."""

    dir: str = setting("", "run directory (required)")
    log_every: int = setting(10, "steps between lines of the log and of a display that is not a terminal", minimum=1)
    tensorboard: bool = setting(True, "also write TensorBoard events when it is installed")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on.

    `process` and `objective` are mappings with a `name` and that name's own settings (`pgdpo_fast.diffusion.PROCESSES`,
    `pgdpo_fast.objectives.NAMES`).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    process: dict[str, Any] = setting({}, "diffusion process: a name and its settings; unset means the family's")
    objective: dict[str, Any] = setting({"name": "pgdpo"}, "objective: a name and its hyper-parameters")
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
        from pgdpo_fast.diffusion import process_from_name

        return process_from_name(**self.process)

    def build_objective(self):
        """The objective."""
        from pgdpo_fast.objectives import from_name

        return from_name(**self.objective)

    @property
    def reference_mode(self) -> str:
        """`model.reference` with "auto" resolved to the cheapest: cached, else adapter-off, else copy."""
        if self.model.reference != "auto":
            return self.model.reference
        if self.data.reference_cache:
            return "cached"
        return "adapter-off" if self.model.train == "lora" else "copy"

    def check(self) -> list[str]:
        """Every contradiction between values; empty when there is none."""
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
        for key, value in (("data.store", self.data.store), ("output.dir", self.output.dir)):
            if not value:
                problems.append(f"{key}: required, e.g. --set {key}=FOLDER")
        if training.pairs_per_step % training.accumulation:
            problems.append(
                f"training.accumulation={training.accumulation}: expected a divisor of "
                f"training.pairs_per_step={training.pairs_per_step}, a pair is never split"
            )
        try:
            adapter_class(self.model.family)(self.model)
        except ConfigError as error:
            problems.append(str(error))
        for section, builder in (("process", self.build_process), ("objective", self.build_objective)):
            try:
                built = builder()
            except (ConfigError, TypeError) as error:
                problems.append(f"{section}: {error}")
                continue
            if section == "process":
                expected = adapter_class(self.model.family).process_class
                if type(built).__name__ != expected:
                    problems.append(
                        f"process.name={self.process['name']!r}: the {self.model.family} family was trained "
                        f"with {expected}, this is {type(built).__name__}"
                    )
        return problems


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Defaults, under a YAML file, under `key=value` overrides such as `objective.beta=500`.

    Raises:
        ConfigError: one message with every unknown key, wrong type and impossible value.
    """
    layers, problems = [], []
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
        layers.append((value, "command line"))
    return _resolve(layers, str(path) if path is not None else "command line", problems)


def describe_settings() -> str:
    """Every key with its type, default and meaning, as lines of text."""
    lines = []

    def section(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[item.name]):
                section(hints[item.name], f"{prefix}{item.name}.")
            elif "help" in item.metadata:
                default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
                shown = "" if default in ("", None) or default == {} or default == () else f" [{_show(default)}]"
                lines.append(f"  {prefix}{item.name} ({_type_name(hints[item.name])}){shown}: {item.metadata['help']}")

    section(TrainConfig, "")
    return "\n".join(lines)


# -- reading


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; expected a YAML file of settings") from error
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' at the top, got a {type(values).__name__}")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 1e-5 for a string and the last of two equal keys; both are read as people mean them."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ConfigError(f"{where}, line {key_node.start_mark.line + 1}: {key!r} is given twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_scalar_or_number(self, node):
            value = self.construct_scalar(node)
            try:
                return float(value) if node.style is None and value[:1] in "+-.0123456789" and value else value
            except ValueError:
                return value

    Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_scalar_or_number)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


# -- checking


def _resolve(layers: Sequence[tuple[Mapping, str]], where: str, problems: Sequence[str] = ()) -> TrainConfig:
    problems, origins, merged = list(problems), {}, {}
    for values, origin in layers:
        _merge(merged, values, "", origin, origins)
    config = _construct(TrainConfig, merged, "", problems)
    process = {"name": adapter_class(config.model.family).default_process, **config.process}
    config = dataclasses.replace(config, process=process, objective={"name": "pgdpo", **config.objective})
    problems += config.check()
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    if problems:
        raise ConfigError(f"{where}: {len(problems)} problems" + "".join(f"\n  {problem}" for problem in problems))
    config = dataclasses.replace(
        config,
        process=_with_defaults(config.process, config.build_process()),
        objective=_with_defaults(config.objective, config.build_objective()),
    )
    return dataclasses.replace(config, origins={key: origins.get(key, "default") for key in config.flat()})


def _merge(into: dict, values: Mapping, prefix: str, origin: str, origins: dict[str, str]) -> None:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if not isinstance(value, Mapping):
            into[key] = value
            origins[dotted] = origin
            continue
        below = into.get(key)
        # another name has other settings: those of the layer below do not apply
        if not isinstance(below, dict) or ("name" in value and value["name"] != below.get("name")):
            into[key] = {}
            for stale in [name for name in origins if name.startswith(f"{dotted}.")]:
                del origins[stale]
        _merge(into[key], value, f"{dotted}.", origin, origins)
        if not _is_section(dotted, value):
            origins[dotted] = origin


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
        problems.append(f"{prefix.rstrip('.')}={values!r}: expected a section of settings")
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
            value = _convert(value, kind)
        except TypeError:
            problems.append(f"{dotted}={value!r}: expected {_type_name(kind)}")
            continue
        minimum, above = item.metadata.get("minimum"), item.metadata.get("above")
        if value is not None and minimum is not None and value < minimum:
            problems.append(f"{dotted}={value!r}: expected at least {minimum}")
        elif value is not None and above is not None and value <= above:
            problems.append(f"{dotted}={value!r}: expected more than {above}")
        else:
            given[item.name] = value
    return cls(**given)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`; raises TypeError when it is something else. Nothing but int -> float is converted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)))
    if origin is Literal:
        if value in arguments and type(value) is type(arguments[0]):
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise TypeError
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError
        return dict(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise TypeError


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


def _all_keys(cls: type = TrainConfig, prefix: str = "") -> tuple[list[str], list[str]]:
    """(dotted keys of values, dotted keys of sections)."""
    keys, sections = [], []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        dotted = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            below_keys, below_sections = _all_keys(hints[item.name], f"{dotted}.")
            keys, sections = keys + below_keys, [*sections, dotted, *below_sections]
        elif dotted in ("process", "objective"):
            sections.append(dotted)
        elif item.metadata:
            keys.append(dotted)
    return keys, sections


_KEYS, _SECTIONS = _all_keys()


def _suggest(dotted: str) -> str:
    last = dotted.rsplit(".", 1)[-1]
    close = [key for key in _KEYS if key.rsplit(".", 1)[-1] == last]  # the right word in the wrong section
    close = close or get_close_matches(dotted, _KEYS + _SECTIONS, 1, cutoff=0.75)
    if not close:
        near = get_close_matches(last, [key.rsplit(".", 1)[-1] for key in _KEYS], 1)
        close = [key for key in _KEYS if key.rsplit(".", 1)[-1] in near]
    return f"; did you mean {close[0]}?" if close else ""


def _type_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if kind is type(None) else _type_name(kind) for kind in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_type_name(arguments[0])}" + (
            "" if arguments[-1] is ... else f" of length {len(arguments)}"
        )
    if origin is dict:
        return "a mapping"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
