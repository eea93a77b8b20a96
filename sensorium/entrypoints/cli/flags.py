"""Command-line flags from dataclasses: one flag per field, its help the field's docstring, its default the field's.

max_model_len: int | None = None          -->   --max-model-len INT
enable_prefix_caching: bool = True        -->   --enable-prefix-caching, --no-enable-prefix-caching
limit_mm_per_prompt: Mapping[str, int]    -->   --limit-mm-per-prompt '{"image": 4}'
lora_modules: Mapping[str, str]           -->   --lora-modules sql=FOLDER chat=FOLDER, or a JSON object
api_key: tuple[str, ...]                  -->   --api-key A --api-key B
scheduling_policy: Literal["fcfs", ...]   -->   --scheduling-policy {fcfs,priority}
plugins, with a metadata "flag"           -->   --plugin A --plugin B, where a flag takes one of several
text_words: Span                          -->   --text-words SPAN, for a class with a `parse`
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from sensorium.errors import ConfigError
from sensorium.settings import choice_of, field_type_of

_T = TypeVar("_T")


class Parsed(Protocol):
    """The protocol of a field's type that isn't a plain one."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The value as people write it. Raises `ConfigError`."""


_SETTINGS = "config_settings"
"""Where a parser stores which settings its config file may hold: the type of each field, and its flag."""


class Setting(NamedTuple):
    """The settings that a config file may hold."""

    flag: str
    hint: Any


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names a file of settings. The file may hold the settings of flags that `add_flags` added, and
    those that `accept_in_config` named, and nothing else: a setting that a command ignores is an error.
    """
    parser.add_argument("--config", metavar="FILE", help="a YAML file with values of the flags below; flags win")


def add_model(parser: argparse.ArgumentParser, text: str = 'a directory, a name on the model hub, or "demo"') -> None:
    """Add the argument that names the model, which the config file may name instead."""
    parser.add_argument("model", nargs="?", help=text)
    accept_in_config(parser, "model", str)


def accept_in_config(parser: argparse.ArgumentParser, name: str, hint: Any, flag: str | None = None) -> None:
    """Let the config file of a parser hold a value by this name."""
    known = parser.get_default(_SETTINGS) or {}
    parser.set_defaults(**{_SETTINGS: {**known, name: Setting(flag or name, hint)}})


def read_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """All values by field name: those of the config file, overridden by those of the flags.

    Raises:
        ConfigError: The config file can't be used.
    """
    values = read_config(parsed.config, getattr(parsed, _SETTINGS)) if parsed.config else {}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parsed).items()}
    return values | {name: value for name, value in given.items() if value is not None}


def add_flags(
    parser: argparse.ArgumentParser,
    kind: type,
    *,
    leave_out: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add a group of flags for the fields of a dataclass. Flags that aren't given are not in the parsed result.

    `defaults`, shown in the help, are the command's where they differ from the class's.
    """
    group = parser.add_argument_group(kind.__name__)
    hints, helps = typing.get_type_hints(kind, include_extras=True), field_docs(kind)
    for field in fields(kind):
        if field.name not in leave_out:
            text = helps.get(field.name, "").replace("%", "%%")
            value = (defaults or {}).get(field.name, _default(field))
            default = "" if value is None else f" [{value}]".replace("%", "%%")
            group.add_argument(
                "--" + _flag(field).replace("_", "-"),
                dest=field.name,
                default=argparse.SUPPRESS,
                help=text + default,
                **_argument(hints[field.name]),
            )
            accept_in_config(parser, field.name, hints[field.name], _flag(field))


def build(kind: Callable[..., _T], values: Mapping[str, Any]) -> _T:
    """The dataclass from the parsed flags that it has fields for."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def read_config(path: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Values from a YAML file, by field name or flag name.

    Raises:
        ConfigError: There is no such file, it isn't a mapping, or it names something unknown.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config: got {path!r}, expected a YAML file ({type(error).__name__}). Set --config."
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: got a {type(content).__name__} in {path!r}, expected names and values. Correct it.")
    named = {setting.flag: name for name, setting in settings.items()}
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    values = {named.get(name, name): value for name, value in values.items()}
    unknown = sorted(values.keys() - settings.keys())
    if unknown:
        raise ConfigError(
            f"config: got the unknown names {unknown} in {path!r}, expected names of flags that --help lists below "
            "--config. Remove them."
        )
    return {name: _as_given(name, value, settings[name].hint) for name, value in values.items()}


def field_docs(kind: type) -> dict[str, str]:
    """The documentation of each field: the string below it, or its entry under "Attributes:" of the class."""
    tree = ast.parse(inspect.getsource(kind))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    docs = _attribute_lines(inspect.getdoc(kind) or "")
    for here, below in zip(definition.body, definition.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name) and is_text:
            docs[here.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


def _attribute_lines(text: str) -> dict[str, str]:
    docs: dict[str, str] = {}
    name = None
    for line in text.partition("Attributes:")[2].partition("Raises:")[0].splitlines():
        head, colon, rest = line.strip().partition(": ")
        if colon and head.isidentifier():
            name = head
            docs[name] = rest
        elif name is not None and line.strip():
            docs[name] += " " + line.strip()
    return docs


def _flag(field: Field[Any]) -> str:
    """A field's name as a flag."""
    return str(field.metadata.get("flag", field.name))


def _default(field: Field[Any]) -> Any:
    """The default that the help shows; None for no default."""
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default)) or None
    return None if field.default is MISSING else field.default


def _argument(hint: Any) -> dict[str, Any]:
    """Arguments of `add_argument` for a field's type."""
    field_type = field_type_of(hint)
    hint, origin = field_type.kind, typing.get_origin(field_type.kind)
    if field_type.choices:
        # A value that matches no choice is returned unchanged, and argparse's error names the flag.
        return {"type": lambda text: choice_of(text, field_type.choices) or text, "choices": field_type.choices}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is not None and issubclass(origin, Mapping):
        if field_type_of(typing.get_args(hint)[1]).kind is str:
            return {"type": _named_texts, "action": _Merge, "nargs": "+", "metavar": "NAME=TEXT"}
        return {"type": _json_object, "metavar": "JSON"}
    if origin is not None and issubclass(origin, Sequence):
        return {"action": "append", **_argument(typing.get_args(hint)[0])}
    if hint in (int, float, str):
        return {"type": hint, "metavar": hint.__name__.upper()}
    if hasattr(hint, "parse"):
        return {"type": _as_argument(hint), "metavar": hint.__name__.upper()}
    raise TypeError(f"a field of type {hint} can't be given as a flag")


def _as_argument(kind: type[Parsed]) -> Callable[[str], Parsed]:
    def parse(text: str) -> Parsed:
        try:
            return kind.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


class _Merge(argparse.Action):
    """Puts several mappings together, of one flag or of a repeated one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        merged = dict(getattr(namespace, self.dest, {}))
        for each in values:
            for name, value in each.items():
                if name in merged:
                    parser.error(f"argument {option}: got {name!r} twice, expected each name once")
                merged[name] = value
        setattr(namespace, self.dest, merged)


def _named_texts(text: str) -> dict[str, Any]:
    """`name=text`, or a JSON object of several."""
    if text.lstrip().startswith("{"):
        return _json_object(text)
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=TEXT or a JSON object")
    return {name: value}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a JSON object")
    return value


def _as_given(name: str, value: Any, hint: Any) -> Any:
    """A value of a YAML file, checked as a flag would be."""
    field_type = field_type_of(hint)
    plain, origin = field_type.kind, typing.get_origin(field_type.kind)
    if field_type.choices or (value is None and field_type.is_optional):
        return value  # choices are checked where the settings are made
    if origin is not None and issubclass(origin, Sequence):
        (kind, *_) = typing.get_args(plain)
        return tuple(_one_of_several(each, kind) for each in (value if isinstance(value, list) else [value]))
    if hasattr(plain, "parse"):
        return plain.parse(str(value))
    expected = Mapping if origin is not None else (int, float) if plain is float else plain
    if not isinstance(value, expected) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{name}: got {value!r} in the config file, expected {plain}. Correct it.")
    return value


def _one_of_several(value: Any, kind: Any) -> Any:
    return kind.parse(str(value)) if hasattr(kind, "parse") else kind(value)
