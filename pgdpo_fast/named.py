"""Objects a configuration names: a class from a list, or any importable one, and its settings.

`{"name": "dpo", "beta": 500}` and `{"name": "my_package.losses:SquaredHinge", "beta": 500}` become objects here.
The settings are the fields of the class, a dataclass; all unknown ones, wrong types and impossible values are found in
one go.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pgdpo_fast.errors import ConfigError
from pgdpo_fast.options import convert, did_you_mean, wrong
from pgdpo_fast.storage import sha256_file

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one kind that have a name, and the door to all others.

    Args:
        kind: what they are, in error messages.
        base: the class all of them derive from.
        classes: by name; each a dataclass whose fields are its settings.
    """

    def __init__(self, kind: str, base: type[T], classes: Mapping[str, type[T]]):
        self.kind, self.base, self.classes = kind, base, dict(classes)

    def find(self, name: Any, where: str) -> type[T]:
        """The class called `name`, or lying at the import path `name`, "module:Class".

        Importing runs the module's code.

        Raises:
            ConfigError: no such name, module or class, or the class is not of this kind.
        """
        if isinstance(name, str) and ":" in name:
            return self._imported(name, where)
        if not isinstance(name, str) or name not in self.classes:
            raise ConfigError(
                f"{where}.name={name!r}: expected one of {', '.join(self.classes)}, or the import path of another "
                f"{self.kind}, my_package.module:Class{did_you_mean(name, self.classes)}"
            )
        return self.classes[name]

    def build(self, settings: Mapping[str, Any], where: str) -> T:
        """The object of a mapping with a `name` and that class's own settings.

        Raises:
            ConfigError: one message with all problems, each with the key that `where` begins.
        """
        problems: list[str] = []
        made = self._build(settings, where, problems)
        if made is None or problems:
            raise ConfigError("\n  ".join(dict.fromkeys(problems)))
        return made

    def problems(self, settings: Mapping[str, Any], where: str) -> list[str]:
        """What keeps `build` from making the object; empty when nothing does."""
        problems: list[str] = []
        self._build(settings, where, problems)
        return list(dict.fromkeys(problems))

    def describe(self, made: T) -> dict[str, Any]:
        """The mapping `build` makes an equal object of: the name and every setting that a file can hold."""
        cls = type(made)
        names = [name for name, known in self.classes.items() if known is cls]
        settings: dict[str, Any] = {"name": names[0] if names else f"{cls.__module__}:{cls.__qualname__}"}
        for item in dataclasses.fields(made):  # type: ignore[arg-type]
            value = getattr(made, item.name)
            if item.init and isinstance(value, self.base):
                settings[item.name] = self.describe(value)
            elif item.init and self._are_made(value):
                settings[item.name] = [self.describe(one) for one in value]
            elif item.init and _is_plain(value):
                settings[item.name] = _plain(value)
        return settings

    def sources(self, made: T) -> dict[str, str]:
        """sha256 of the file of every class that was named by an import path, nested ones included."""
        found = {}
        if type(made) not in self.classes.values():
            path = inspect.getsourcefile(type(made))
            found[self.describe(made)["name"]] = sha256_file(Path(path)) if path else "unknown"
        for item in dataclasses.fields(made):  # type: ignore[arg-type]
            value = getattr(made, item.name)
            for one in value if self._are_made(value) else [value]:
                if isinstance(one, self.base):
                    found |= self.sources(one)
        return found

    def _are_made(self, value: Any) -> bool:
        """Whether `value` is a list of objects of this kind."""
        return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, self.base) for one in value)

    def _imported(self, path: str, where: str) -> type[T]:
        given = f"{where}.name={path!r}"
        module_name, _, qualified = path.partition(":")
        if not all(part.isidentifier() for part in (*module_name.split("."), *qualified.split("."))):
            raise ConfigError(f"{given}: expected an import path such as my_package.module:Class")
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise ConfigError(f"{given}: importing {module_name} fails, {error}") from error
            raise ConfigError(
                f"{given}: there is no module {error.name!r}; install it, or, for a file in the current folder, put "
                "PYTHONPATH=. before the command"
            ) from error
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{given}: importing {module_name} fails, {type(error).__name__}: {error}") from error
        for part in qualified.split("."):
            if not hasattr(found, part):
                near = did_you_mean(part, [name for name, value in vars(found).items() if isinstance(value, type)])
                raise ConfigError(f"{given}: {getattr(found, '__name__', found)} has no {part!r}{near}")
            found = getattr(found, part)
        if not isinstance(found, type) or not issubclass(found, self.base) or found is self.base:
            raise ConfigError(f"{given}: expected a subclass of {self.base.__module__}.{self.base.__qualname__}")
        if "__annotations__" in vars(found) and "__dataclass_params__" not in vars(found):
            decorator = "dataclass(frozen=True)" if self.base.__dataclass_params__.frozen else "dataclass"  # type: ignore[attr-defined]
            raise ConfigError(f"{given}: its settings are the fields of a dataclass; put @{decorator} on it")
        return found

    def _build(self, settings: Any, where: str, problems: list[str]) -> T | None:
        if isinstance(settings, str):
            settings = {"name": settings}
        if not isinstance(settings, Mapping) or "name" not in settings:
            problems.append(str(wrong(where, settings, "a mapping with the key 'name'")))
            return None
        try:
            cls = self.find(settings["name"], where)
            hints = typing.get_type_hints(cls)
        except ConfigError as error:
            problems.append(str(error))
            return None
        except (NameError, TypeError) as error:
            problems.append(f"{where}.name={settings['name']!r}: an annotation of the class cannot be read, {error}")
            return None
        known = {item.name: item for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
        given: dict[str, Any] = {}
        for key, value in settings.items():
            dotted = f"{where}.{key}"
            if key == "name":
                continue
            if key not in known:
                takes = f"{settings['name']} takes {', '.join(known) or 'no settings'}"
                problems.append(f"{dotted}: {takes}{did_you_mean(key, known)}")
            elif isinstance(hints[key], type) and issubclass(hints[key], self.base):
                if (below := self._build(value, dotted, problems)) is not None:
                    given[key] = below
            elif any(isinstance(kind, type) and issubclass(kind, self.base) for kind in typing.get_args(hints[key])):
                if not isinstance(value, (list, tuple)):
                    problems.append(str(wrong(dotted, value, "a list of mappings with the key 'name'")))
                    continue
                made = [self._build(one, f"{dotted}[{place}]", problems) for place, one in enumerate(value)]
                if all(one is not None for one in made):
                    given[key] = made
            else:
                try:
                    given[key] = convert(dotted, value, hints[key], known[key].metadata)
                except ConfigError as error:
                    problems.append(str(error))
        required = [name for name, item in known.items() if _is_required(item)]
        problems += [f"{where}.{name}: required by {settings['name']}" for name in required if name not in settings]
        return self._construct(cls, given, required, where, problems) if given.keys() >= set(required) else None

    def _construct(self, cls: type[T], given: dict, required: list[str], where: str, problems: list[str]) -> T | None:
        """The object; a class refuses its first bad value, so then each value is tried beside the defaults."""
        try:
            return cls(**given)
        except Exception as error:
            found = [_said(error, cls, where)]
        needed, alone = {name: given[name] for name in required}, []
        for key, value in given.items():
            try:
                cls(**{**needed, key: value})
            except Exception as error:
                alone.append(_said(error, cls, where))
        problems += alone or found
        return None


def _said(error: Exception, cls: type, where: str) -> str:
    """What a class says of its settings, by the key of the configuration."""
    if not isinstance(error, ConfigError):
        return f"{where}: {cls.__name__} refuses, {error!r}"
    said, own = str(error), f"{cls.__name__}."
    return f"{where}.{said.removeprefix(own)}" if said.startswith(own) else f"{where}: {said}"


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
