"""Run folders: what a run leaves on disk. The only file I/O beside `save_pretrained`.

config.yaml            what was asked, and the versions it ran under
target.json            constraints, λ and how it was fitted
metrics.jsonl          a row a step
evaluations.jsonl      evaluations on fresh samples
samples.jsonl          texts before and after
checkpoints/step-N/    all that going on needs: state.json, tensors.safetensors
policy/                the result, a Hugging Face folder with its model card and dmgen.json
report.html            all of it on one page
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmgen.estimates.score import finite

_KEPT_CHECKPOINTS = 2


def open_run(folder: Path, *, expected_step: int) -> None:
    """Makes `folder` ready for a run that stands at `expected_step`.

    A new run (step 0) needs a folder without a run; one that goes on needs the folder whose last
    row it follows. Rows after the checkpoint that was resumed are cut off, since they will be made
    again, and so is a last row that a crash left half written.

    Raises:
        ValueError: the folder holds another run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for the run")
    metrics = folder / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.exists() else []
    if expected_step == 0 and (rows or _checkpoints(folder)):
        raise ValueError(
            f"{folder} already holds a run of {len(rows)} steps: give another folder, or go on "
            "with it (sampler.resume(folder); on the command line --resume)"
        )
    if expected_step and len(_until(rows, expected_step)) != expected_step:
        raise ValueError(
            f"{folder} holds {len(rows)} steps, but this sampler stands at step {expected_step}: "
            "call sampler.resume(folder) first, or give the folder that its run began in"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in (metrics, folder / "evaluations.jsonl"):
        if path.exists():
            write_rows(path, _until(read_rows(path), expected_step))


def _until(rows: Iterable[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["step"] <= step]


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


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.yaml`, with the versions it ran under in a comment."""
    facts = "".join(f"# {name} {value}\n" for name, value in versions().items())
    write_text(folder / "config.yaml", facts + as_yaml(config))


def as_yaml(config: Mapping[str, Any]) -> str:
    """Plain values as YAML text."""
    # Escaped: YAML reads some characters, such as \x85, back as blanks.
    return str(yaml.safe_dump(dict(config), sort_keys=False))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file."""
    write_text(path, "".join(_line(row) for row in rows))


def versions() -> dict[str, str]:
    """What a run's figures depend on beside its settings."""
    names = ("dmgen", "torch", "transformers", "numpy", "scipy", "sacrebleu")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    return found | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes `checkpoints/step-N` so that it exists whole or not at all; keeps the last ones."""
    home = folder / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    for left_by_a_crash in home.glob(".step-*"):
        shutil.rmtree(left_by_a_crash)
    final, partial = home / f"step-{step}", home / f".step-{step}.partial"
    partial.mkdir()
    save_file(_apart(tensors), partial / "tensors.safetensors")
    write_json(partial / "state.json", facts)
    if final.exists():
        # A folder cannot replace another in one move; two moves leave next to no time between.
        os.replace(final, home / f".step-{step}.old")
    os.replace(partial, final)
    shutil.rmtree(home / f".step-{step}.old", ignore_errors=True)
    for old in _checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the last checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    found = _checkpoints(folder)
    if not found:
        raise ValueError(f"{folder} holds no checkpoint (looked in {folder / 'checkpoints'})")
    facts = read_json(found[-1] / "state.json")
    tensors: dict[str, torch.Tensor] = load_file(found[-1] / "tensors.safetensors")
    return tensors, facts


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can go on from a checkpoint."""
    return bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    found = {
        int(path.name.removeprefix("step-")): path
        for path in (folder / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdecimal()
    }
    return [found[step] for step in sorted(found)]
