"""Run folders of the trainer: metrics, evaluations and checkpoints.

config.yaml            the configuration, and the versions it ran under
target.json            the constraints, λ and its fit
metrics.jsonl          a row a step
evaluations.jsonl      evaluations on fresh samples
samples.jsonl          texts before and after
checkpoints/step-N/    state.json, tensors.safetensors
policy/                the result, a Hugging Face folder with its model card and dmgen.json
report.html            one page
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmgen.evaluation.result import Evaluation
from dmgen.storage import apart, append_row, read_json, read_rows, write_json, write_rows

_METRICS, _EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_KEPT_CHECKPOINTS = 2


def open_run(folder: Path, *, expected_step: int) -> None:
    """Prepare `folder` for a run that stands at `expected_step`.

    A new run (step 0) needs a folder without a run; one that goes on needs the folder whose last
    row it follows. Rows after the checkpoint that was resumed are cut off, since they will be made
    again, and so is a last row that a crash left half written.

    Raises:
        ValueError: the folder holds another run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for the run")
    rows = read_metrics(folder)
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
    for path in (folder / _METRICS, folder / _EVALUATIONS):
        if path.exists():
            write_rows(path, _until(read_rows(path), expected_step))


def _until(rows: Iterable[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["step"] <= step]


def append_metrics(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the metrics of a run."""
    append_row(folder / _METRICS, row)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics, one a step; none where there is no file."""
    return _rows(folder / _METRICS)


def append_evaluation(
    folder: Path, step: int, evaluation: Evaluation, *, final: bool = False, seed: int | None = None
) -> None:
    """Add an evaluation on fresh samples, made after `step` steps.

    Args:
        folder: the run folder.
        step: steps taken.
        evaluation: its result.
        final: whether it is the one at the end of a run; it replaces an earlier one of that step.
        seed: seed of its draws, for a final one.
    """
    path = folder / _EVALUATIONS
    if not final:
        append_row(path, {"step": step} | evaluation.to_dict())
        return
    others = [row for row in _rows(path) if not (row.get("final") and row["step"] == step)]
    write_rows(path, [*others, {"step": step, "final": True, "seed": seed} | evaluation.to_dict()])


def read_evaluations(folder: Path) -> list[tuple[int, bool, Evaluation]]:
    """Return (step, final, evaluation) of each evaluation; none where there is no file."""
    return [
        (row["step"], bool(row.get("final")), Evaluation.from_dict(row))
        for row in _rows(folder / _EVALUATIONS)
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write `checkpoints/step-N` so that it exists whole or not at all; keeps the last ones."""
    home = folder / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    for left_by_a_crash in home.glob(".step-*"):
        shutil.rmtree(left_by_a_crash)
    final, partial = home / f"step-{step}", home / f".step-{step}.partial"
    partial.mkdir()
    save_file(apart(tensors), partial / "tensors.safetensors")
    write_json(partial / "state.json", facts)
    if final.exists():
        # A folder cannot replace another in one move; two moves leave next to no time between.
        os.replace(final, home / f".step-{step}.old")
    os.replace(partial, final)
    shutil.rmtree(home / f".step-{step}.old", ignore_errors=True)
    for old in _checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and facts of the last checkpoint.

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
    """Return whether a run can go on from a checkpoint."""
    return bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, the oldest first."""
    found = {
        int(path.name.removeprefix("step-")): path
        for path in (folder / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdecimal()
    }
    return [found[step] for step in sorted(found)]
