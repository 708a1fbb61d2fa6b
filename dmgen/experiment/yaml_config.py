"""YAML files and overrides read into dataclasses, with every key and type checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from dmgen.validation import check_known

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def load(cls: Any, path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Return the dataclass `cls` that a YAML file with `overrides` on top describes.

    Args:
        cls: a dataclass; fields that are dataclasses are sections of the file.
        path: the file.
        overrides: `key=value` or `section.key=value`, the value as in YAML; entries of a list by
            position. Nothing after the `=` is the empty text.

    Raises:
        ValueError: as `from_mapping`, or there is no such file or it is not YAML; the message
            begins with the path and the overrides.
        TypeError: as `from_mapping`.
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
    """Return the dataclass `cls` that plain values describe; keys left out take their defaults.

    Raises:
        ValueError: a key is unknown (the nearest known one is named) or missing, or `cls` refuses a
            value.
        TypeError: a value has the wrong type.
    """
    return _section(cls, mapping, "", all_keys(cls))


def need_mapping(value: Any, where: str) -> None:
    """Raise unless the value is a mapping; `where` is the dotted key that it stands under."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where or 'a configuration'} must be keys with values, got {value!r}")


def to_number(value: Any) -> Any:
    """Return an integer, or a number that PyYAML reads as text, as a float; others as they are."""
    # YAML 1.1 wants a point and a sign, 1.0e-4, and reads 1e-4 as text.
    is_text = isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if type(value) is int or is_text else value


def all_keys(cls: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys, those of the sections too."""
    names: list[str] = []
    for name, hint in ((f.name, get_type_hints(cls)[f.name]) for f in fields(cls)):
        names += all_keys(hint, f"{name}.") if is_dataclass(hint) else [prefix + name]
    return names


def _section(cls: Any, mapping: Any, where: str, every: Sequence[str], default: Any = None) -> Any:
    """Return `cls` from a mapping; keys left out are those of `default`, or the class's own."""
    need_mapping(mapping, where)
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    for key in mapping:
        check_known(key, tuple(known), "key", place=where or "the configuration", elsewhere=every)
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
    """Return the value, if it is of the type that the field is declared with."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # The dataclass itself checks fields of other types, such as `constraints`.
    if not any(kind in _TYPE_NAMES for kind in allowed):
        return value
    if float in allowed:
        value = to_number(value)
    if type(value) in allowed:
        return value
    wanted = " or ".join(_TYPE_NAMES.get(kind, str(kind)) for kind in allowed)
    raise TypeError(f"{where} must be {wanted}, got {value!r}")


def _override(mapping: dict[str, Any], override: str) -> None:
    """Put the value of one `key.sub=value` into the mapping."""
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
    """Return the key or index of `part` in a mapping or a list."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise ValueError(f"there is no {path!r}: {node!r} has no part {part!r}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, where PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raise if a key is given twice, and build the mapping otherwise."""
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
