"""Configs as strict JSON and as typed ``--set a.b=value`` overrides: nothing unknown, nothing silently converted."""

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

from raydream.config.checks import near
from raydream.config.former import what_became_of
from raydream.schedule import Constant, Linear, Polyline, Schedule, Steps

T = TypeVar("T")
_Change = tuple[list[str], str, str]  # the keys that are left to go, the value's words, the whole path
_SCHEDULES: dict[str, type] = {"constant": Constant, "linear": Linear, "steps": Steps, "polyline": Polyline}
_SCHEDULE_SET = frozenset(_SCHEDULES.values())


def to_json(config: Any) -> Any:
    """Plain JSON values of a config; schedules carry their ``kind``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = next((name for name, cls in _SCHEDULES.items() if type(config) is cls), None)
        return {"kind": kind, **fields} if kind else fields
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def dumps(config: Any) -> str:
    """A config as indented JSON text that ``loads`` reads back to an equal config."""
    return json.dumps(to_json(config), indent=2, ensure_ascii=False)


def loads(cls: type[T], text: str) -> T:
    """Reads JSON text strictly; ``ValueError`` naming the field for an unknown key, a wrong type or a bad value."""
    return typing.cast(T, from_json(cls, parse(text)))


def parse(text: str) -> Any:
    """The JSON of a config, unchecked; ``ValueError`` where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config: not valid JSON ({error})") from error


def parse_value(cls: type, name: str, text: str) -> Any:
    """The JSON that the words of ``name=text`` stand for in a field of a config class, unchecked."""
    return _literal(_annotations(cls).get(name), text)


def from_json(expected: Any, value: Any, path: str = "") -> Any:
    """Builds a value of the annotated type from JSON, naming the path of whatever does not fit."""
    if expected == Schedule:
        return _schedule(value, path)
    if kinds := _kinds(expected):
        expected = _of_kind(kinds, value.get("kind") if isinstance(value, dict) else None, path)
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _dataclass(expected, value, path)
    origin = typing.get_origin(expected)
    if origin is typing.Literal:
        choices = typing.get_args(expected)
        if value not in choices:
            hint = near(str(value), map(str, choices))
            raise ValueError(
                f"{path}: must be one of {', '.join(map(repr, choices))}, got {value!r}{hint and f'; {hint}'}"
            )
        return value
    if origin is tuple:
        return _tuple(typing.get_args(expected), value, path)
    return _scalar(expected, value, path)


def apply_overrides(config: T, overrides: list[str]) -> T:
    """A copy of a config with all of ``a.b.0.c=value``; the value is JSON, or text where the field is text. The last
    one of a field counts, and settings are checked together: two that only fit each other may come in any order.
    """
    changes: list[_Change] = []
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ValueError(f"set: need FIELD=VALUE, got {override!r}")
        changes.append((path.split("."), text, path))
    return typing.cast(T, _replace(config, changes, ""))


def field_names(cls: Any, prefix: str = "") -> list[str]:
    """The dotted names of all settings below a config class, for help and for suggestions; those of the usual kind
    where there are several.
    """
    names: list[str] = []
    for name, expected in _annotations(cls).items():
        inner = typing.get_args(expected)
        expected = next(iter(_kinds(expected).values()), expected)
        if dataclasses.is_dataclass(expected) and expected not in _SCHEDULE_SET:
            names += field_names(expected, f"{prefix}{name}.")
        elif typing.get_origin(expected) is tuple and inner and dataclasses.is_dataclass(inner[0]):
            names += field_names(inner[0], f"{prefix}{name}.0.")
        else:
            names.append(prefix + name)
    return names


@functools.cache
def _kinds(expected: Any) -> dict[str, Any]:
    """A choice of config classes by the name that each has in its field ``kind``, the usual one first; else empty."""
    choices = typing.get_args(expected) if isinstance(expected, types.UnionType) and expected != Schedule else ()
    return {typing.get_args(_annotations(cls)["kind"])[0]: cls for cls in choices}


def _of_kind(kinds: dict[str, Any], kind: Any, path: str) -> Any:
    if kind is not None and kind not in kinds:
        raise ValueError(f"{path}.kind: must be one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind] if kind is not None else next(iter(kinds.values()))


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path or 'config'}: must be an object with fields, got {value!r}")
    known = _annotations(cls)
    for key in value:
        if key not in known:
            _unknown(f"{path}.{key}" if path else key, key, list(known))
    arguments = {key: from_json(known[key], item, f"{path}.{key}" if path else key) for key, item in value.items()}
    return _construct(cls, arguments, path)


def _construct(cls: type, arguments: dict[str, Any], path: str) -> Any:
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in arguments
    ]
    if required:
        raise ValueError(f"{path}.{required[0]}".lstrip(".") + ": is missing")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}.{error}" if path else str(error)) from error


def _schedule(value: Any, path: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | dict):
        raise ValueError(
            f'{path}: must be a number such as 0.5 or JSON such as {{"kind": "linear", ...}}, got {value!r}'
        )
    if not isinstance(value, dict):
        return Constant(_scalar(float, value, path))
    kind = value.get("kind")
    if kind not in _SCHEDULES:
        raise ValueError(f"{path}.kind: must be one of {', '.join(_SCHEDULES)}, got {kind!r}")
    return _dataclass(_SCHEDULES[kind], {key: item for key, item in value.items() if key != "kind"}, path)


def _tuple(items: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: must be a list, got {value!r}")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(from_json(items[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if len(value) != len(items):
        raise ValueError(f"{path}: must have {len(items)} entries, got {len(value)}")
    return tuple(from_json(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(zip(items, value)))


def _scalar(expected: Any, value: Any, path: str) -> Any:
    if isinstance(expected, types.UnionType):
        raise TypeError(f"{path}: union types other than Schedule are not used in configs")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"{path}: must be of type {expected.__name__}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise ValueError(f"{path}: must be a finite number, got {value}")
    return value


def _unknown(path: str, key: str, known: list[str]) -> typing.NoReturn:
    became = what_became_of(path)
    if became is not None:
        raise ValueError(f"{path}: no setting of this release; {became}")
    hint = near(key, known) or f"known fields are {', '.join(known)}"
    raise ValueError(f"{path}: unknown field; {hint}")


def _replace(node: Any, changes: list[_Change], path: str) -> Any:
    """The node at ``path`` with all changes below it, each of its fields' in their order."""
    fields: dict[str, list[_Change]] = {}
    for keys, text, whole in changes:
        fields.setdefault(keys[0], []).append((keys[1:], text, whole))
    if isinstance(node, tuple):
        items = list(node)
        for key, below in fields.items():
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(f"{below[0][2]}: {key!r} must be an index below {len(node)}")
            items[int(key)] = _changed(items[int(key)], type(items[int(key)]), below, f"{path}.{key}")
        return tuple(items)
    cls: Any = type(node)
    if not dataclasses.is_dataclass(node):
        raise ValueError(f"{changes[0][2]}: {changes[0][0][0]!r} does not lead to a setting")
    known = _annotations(cls)
    arguments = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    for key, below in fields.items():
        if key not in known:
            _unknown(below[0][2], key, list(known))
        arguments[key] = _changed(arguments[key], known[key], below, f"{path}.{key}".lstrip("."))
    return _construct(cls, arguments, path)


def _changed(value: Any, expected: Any, changes: list[_Change], path: str) -> Any:
    """One field's value: a change of the whole field drops those before it, of its parts those after it are kept. One
    of its kind begins with the usual settings of that kind.
    """
    parts: list[_Change] = []
    kinds = _kinds(expected)
    for change in [c for c in changes if kinds and c[0] == ["kind"] and c[1] != value.kind]:
        value = _of_kind(kinds, change[1], path)()
    for change in changes:
        keys, text, whole = change
        if keys:
            parts.append(change)
        else:
            value, parts = from_json(expected, _literal(expected, text), whole), []
    return _replace(value, parts, path) if parts else value


def _literal(expected: Any, text: str) -> Any:
    is_text = expected is str or (
        typing.get_origin(expected) is typing.Literal and isinstance(typing.get_args(expected)[0], str)
    )
    if is_text:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # of the wrong type: from_json names the field and says what is needed
