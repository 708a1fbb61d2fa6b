"""Files: atomic writes, JSON, JSON lines and YAML; nothing here knows what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dmgen.estimates.score import finite


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one JSON line; a reader never sees half of it after a crash, see `read_rows`.

    A number that is not finite becomes null: JSON has no other word for it.
    """
    with path.open("a", encoding="utf-8") as f:
        f.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    plain = {k: finite(v) if isinstance(v, float) else v for k, v in row.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that was cut off by a crash is left out."""
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


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is not JSON; names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one move: a reader sees the old text or the new, never half."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def as_yaml(config: Mapping[str, Any]) -> str:
    """Plain values as YAML text."""
    # Escaped: YAML reads some characters, such as \x85, back as blanks.
    return str(yaml.safe_dump(dict(config), sort_keys=False))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file."""
    write_text(path, "".join(_line(row) for row in rows))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none sharing memory with another: safetensors refuses that.

    Only what shares is copied: a copy of all would take as much memory again.
    """
    plain: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain
