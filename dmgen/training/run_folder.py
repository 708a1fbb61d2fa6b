"""Run folders of the trainer: metrics, evaluations and checkpoints.

metrics.jsonl          a row a step
evaluations.jsonl      evaluations on fresh samples
checkpoints/step-N/    state.json, tensors.safetensors

`experiment` adds config.yaml, target.json, samples.jsonl, policy/ and report.html.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dmgen.evaluation.result import Evaluation
from dmgen.storage import apart, append_row, read_json, read_rows, write_json, write_rows

_METRICS, _EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
_KEPT_CHECKPOINTS = 2


def open_run(folder: Path, *, expected_step: int) -> None:
    """Prepare `folder` for the steps of a run after `expected_step`.

    A new run (step 0) needs a folder without a run, a resumed one its own folder. Rows after the
    checkpoint are removed, since they will be made again, and so is an incomplete last row.

    Raises:
        ValueError: the folder holds another run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for the run")
    rows = read_metrics(folder)
    if expected_step == 0 and (rows or _checkpoints(folder)):
        raise ValueError(
            f"{folder} already holds a run of {len(rows)} steps: give another folder, or resume "
            "it (sampler.resume(folder); on the command line --resume)"
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
    """Return the rows of metrics, one a step; none if there is no file."""
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
    """Return (step, final, evaluation) of each evaluation; none if there is no file."""
    return [
        (row["step"], bool(row.get("final")), Evaluation.from_dict(row))
        for row in _rows(folder / _EVALUATIONS)
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write `checkpoints/step-N` completely or not at all, and keep the last two checkpoints."""
    home = folder / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    for incomplete in home.glob(".step-*"):
        shutil.rmtree(incomplete)
    final, partial = home / f"step-{step}", home / f".step-{step}.partial"
    partial.mkdir()
    save_file(apart(tensors), partial / "tensors.safetensors")
    write_json(partial / "state.json", facts)
    if final.exists():
        # A folder cannot replace another in one move.
        os.replace(final, home / f".step-{step}.old")
    os.replace(partial, final)
    shutil.rmtree(home / f".step-{step}.old", ignore_errors=True)
    for old in _checkpoints(folder)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and facts of the last checkpoint; raise ValueError if there is none."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise ValueError(f"{folder} holds no checkpoint (looked in {folder / 'checkpoints'})")
    tensors: dict[str, Tensor] = load_file(checkpoints[-1] / "tensors.safetensors")
    return tensors, read_json(checkpoints[-1] / "state.json")


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run can be resumed."""
    return bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    n = len("step-")
    paths = (folder / "checkpoints").glob("step-*")
    return sorted((p for p in paths if p.name[n:].isdecimal()), key=lambda p: int(p.name[n:]))
