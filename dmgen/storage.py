"""Files: atomic writes, JSON, JSON lines, YAML and tensors; nothing here knows what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmgen.estimates.score import finite


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a JSON line; `read_rows` leaves out a line that a crash cut off.

    A number that is not finite becomes null: JSON has no other word for it.
    """
    with path.open("a", encoding="utf-8") as f:
        f.write(_line(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, without a last line that a crash cut off.

    Raises:
        ValueError: a line before the last is not JSON; the message names file and line.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # no JSON, or no UTF-8: a letter may be cut in two as well
            if i >= len(lines) - 1:
                break
            raise ValueError(f"{path}, line {i + 1} is not JSON: {error}") from error
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file, atomically."""
    write_text(path, "".join(_line(row) for row in rows))


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text atomically: a reader sees the old text or the new one, never half of it.

    Raises:
        ValueError: the path is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML text."""
    # Not allow_unicode: YAML reads some bare characters, such as \x85, back as blanks.
    return str(yaml.safe_dump(dict(values), sort_keys=False))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(apart(tensors), partial)
    os.replace(partial, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raise ValueError naming a damaged one."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, none sharing memory with another: safetensors refuses that.

    Only a tensor that shares memory is copied: a copy of all would take as much memory again.
    """
    separate: dict[str, Tensor] = {}
    addresses = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in addresses:
            plain = plain.clone()
        addresses.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _line(row: Mapping[str, Any]) -> str:
    plain = {k: finite(v) if isinstance(v, float) else v for k, v in row.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
