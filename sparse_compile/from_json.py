"""Reads JSON as what its writer had: dataclasses, lists, tuples, dicts and scalars, by their annotations.

Nothing is guessed: a wrong value is an error that names its path, as ``graphs[0].rows[2].tokens``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

# What JSON holds for each kind of annotation, and its name.  An int may stand for a float, as in Python.
_ACCEPTED: dict[Any, tuple[tuple[type, ...], str]] = {
    NoneType: ((NoneType,), "null"),
    bool: ((bool,), "bool"),
    int: ((int,), "int"),
    float: ((int, float), "float"),
    str: ((str,), "string"),
    dict: ((dict,), "object"),
    Mapping: ((dict,), "object"),
    list: ((list,), "list"),
    Sequence: ((list,), "list"),
    tuple: ((list,), "list"),
}


def from_json(kind: type[T], text: str | bytes) -> T:
    """What the text holds, as ``kind``.

    Raises:
        ValueError: the text is no JSON, or holds something else.
    """
    return build(kind, json.loads(text))


def build(kind: type[T], value: object) -> T:
    """What ``json.loads`` returned, as ``kind``; of a union, its first member that JSON may hold so.

    Raises:
        ValueError: it is something else.
        TypeError: ``kind`` has an annotation that is not supported.
    """
    return cast(T, _build(kind, value, ""))


def _build(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    member = next((member for member in members if _is_accepted(member, value)), None)
    if member is None:
        # typing gives back a union that it has made before of the same members, in whatever order: names are sorted.
        names = sorted((_ACCEPTED[_base(member)][1] for member in members), key=lambda name: (name == "null", name))
        raise _wrong(path, f"expected {' or '.join(names)}, got {shortened(value)}")
    base, arguments = _base(member), get_args(member)
    if is_dataclass(member):
        return _dataclass(member, value, path)
    if base in (dict, Mapping) and arguments:
        return {name: _build(arguments[1], item, f"{path}[{name!r}]") for name, item in value.items()}
    if base in (list, Sequence) and arguments:
        return _items([arguments[0]] * len(value), value, path)
    if base is tuple and arguments:
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) != len(value):
            raise _wrong(path, f"expected {len(kinds)} items, got {len(value)}")
        return tuple(_items(kinds, value, path))
    return value


def _items(kinds: Iterable[Any], values: Iterable[Any], path: str) -> list[Any]:
    return [
        _build(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, values, strict=True))
    ]


def _dataclass(kind: Any, read: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind) if field.init}
    if unknown := sorted(read.keys() - known.keys()):
        raise _wrong(path, f"{kind.__name__} has no field {unknown[0]!r}")
    for name, field in known.items():
        if name not in read and field.default is MISSING and field.default_factory is MISSING:
            raise _wrong(path, f"{name!r} is missing")
    values = {name: _build(hints[name], item, f"{path}.{name}".lstrip(".")) for name, item in read.items()}
    try:
        return kind(**values)
    except ValueError as error:  # what it checks itself
        raise _wrong(path, str(error)) from error


def _is_accepted(kind: Any, value: object) -> bool:
    types, _ = _ACCEPTED[_base(kind)]
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _base(kind: Any) -> Any:
    """The key of ``_ACCEPTED`` for an annotation."""
    base = dict if is_dataclass(kind) else get_origin(kind) or kind
    if base not in _ACCEPTED:
        raise TypeError(f"{kind} is not read from JSON")
    return base


def _wrong(path: str, what: str) -> ValueError:
    return ValueError(f"{path}: {what}" if path else what)
