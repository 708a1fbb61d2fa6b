"""Configuration files: YAML and overrides into dataclasses, with every key and type checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def load(cls: Any, path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """The dataclass `cls` from a YAML file with `overrides` put on top.

    Args:
        cls: a dataclass; fields that are dataclasses are sections of the file.
        path: the file.
        overrides: `key=value` or `section.key=value`, the value as in YAML; entries of a list by
            position. Nothing after the `=` is the empty text.

    Raises:
        ValueError, TypeError: as `from_mapping`, or there is no such file or it is not YAML; the
            message begins with the path and the overrides.
    """
    path = Path(path)
    if not path.is_file():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise ValueError(f"there is no configuration file {str(path)!r}{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as such ({error})") from error
    mapping = _parse(text, str(path))
    overrides = list(overrides)
    try:
        need_mapping(mapping, "")
        for override in overrides:
            _override(mapping, override)
        return from_mapping(cls, mapping)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{' '.join([str(path), *overrides])}: {error}") from error


def from_mapping(cls: Any, mapping: Any) -> Any:
    """The dataclass `cls` from plain values; what is left out is its default.

    Raises:
        ValueError: a key is unknown (the nearest known one is named) or missing, or `cls` refuses a
            value.
        TypeError: a value has the wrong type.
    """
    return _section(cls, mapping, "", all_keys(cls))


def need_mapping(value: Any, where: str) -> None:
    """Refuses what is no mapping; `where` is the dotted key that it stands under."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where or 'a configuration'} must be keys with values, got {value!r}")


def refuse_unknown(key: Any, known: Sequence[str], where: str, every: Sequence[str] = ()) -> None:
    """Refuses a key that is not `known`, naming the nearest one, or one of `every` with its name.

    Args:
        key: as given.
        known: the keys that there are at this place.
        where: the dotted key that it stands under; "" at the top.
        every: dotted names of the keys elsewhere, for one that is only in the wrong place.
    """
    if key in known:
        return
    elsewhere = [name for name in every if name.split(".")[-1] == key]
    close = elsewhere or get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    place = where or "the configuration"
    raise ValueError(f"unknown key {key!r} in {place}{hint} There are {', '.join(known)}")


def number(value: Any) -> Any:
    """The value as a float, if it is an integer or a number that PyYAML takes for text."""
    # YAML 1.1 wants a point and a sign, 1.0e-4, and reads 1e-4 as text.
    is_text = isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if type(value) is int or is_text else value


def _section(cls: Any, mapping: Any, where: str, every: Sequence[str], default: Any = None) -> Any:
    """The dataclass `cls` from a mapping; what is left out is that of `default`, or `cls`'s own."""
    need_mapping(mapping, where)
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    for key in mapping:
        refuse_unknown(key, tuple(known), where, every)
    for name, f in known.items():
        if name not in mapping and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{name!r} is missing")
    values = {}
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else key
        if is_dataclass(hints[key]):
            factory: Any = known[key].default_factory
            # A section whose lines are all commented out is null in YAML.
            values[key] = _section(
                hints[key], {} if value is None else value, path, every, factory()
            )
        else:
            values[key] = _typed(value, hints[key], path)
    try:
        return cls(**values) if default is None else replace(default, **values)
    except ValueError as error:
        if not where:
            raise
        raise ValueError(f"{where}: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value, if it is of the type that the field is declared with."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # `constraints` is checked where it is built, and a type that is not here by its own class.
    if not any(kind in _KINDS for kind in allowed):
        return value
    if float in allowed:
        value = number(value)
    if type(value) in allowed:
        return value
    wanted = " or ".join(_KINDS.get(kind, str(kind)) for kind in allowed)
    raise TypeError(f"{where} must be {wanted}, got {value!r}")


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def all_keys(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all keys, those of the sections too."""
    names: list[str] = []
    for name, hint in ((f.name, get_type_hints(cls)[f.name]) for f in fields(cls)):
        names += all_keys(hint, f"{name}.") if is_dataclass(hint) else [prefix + name]
    return names


def _override(mapping: dict[str, Any], override: str) -> None:
    """Puts the value of one `key.sub=value` into the mapping."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"an override is key=value, like trainer.batch_size=256; got {override!r}")
    *parents, last = path.split(".")
    node: Any = mapping
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_place(node, part, path)]
    node[_place(node, last, path)] = _parse(text, override) if text else ""


def _place(node: Any, part: str, path: str) -> Any:
    """Where `part` of a path is in a mapping or a list."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise ValueError(f"there is no {path!r}: {node!r} has no part {part!r}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, where PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in named]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                problem=f"the key {twice!r} is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" (line {mark.line + 1})"
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{where} is not YAML{line}: {problem}") from error
