"""What a run folder says, as DataFrames and scores; whatever is missing is empty, not an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dmgen import storage
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.estimates.score import Score
from dmgen.evaluation.verdicts import LEVEL
from dmgen.experiment.config import RunConfig

__all__ = [
    "RunRecord",
    "bases_of",
    "evaluations_frame",
    "goals_of",
    "metrics_frame",
    "policy_rows",
    "score",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run folder as it is now, finished or not.

    Attributes:
        folder: where it is.
        config: what was asked; None for a run that was not made on the command line.
        versions: of what it ran under, by name.
        target: `target.json`: constraints, λ and how it was found; empty if there is none.
        metrics: a row a step.
        evaluations: `evaluations.jsonl`, the last one last.
        pairs: `samples.jsonl`: texts before and after.
    """

    folder: Path
    config: RunConfig | None
    versions: Mapping[str, str]
    target: Mapping[str, Any]
    metrics: pd.DataFrame
    evaluations: Sequence[Row]
    pairs: Sequence[Row]

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Everything in the folder of a run.

        Raises:
            ValueError: there is neither a configuration nor a step, or a file cannot be understood.
        """
        folder = Path(folder)
        config, target = folder / "config.yaml", folder / "target.json"
        metrics = _rows(folder / "metrics.jsonl")
        if not config.is_file() and not metrics:
            raise ValueError(
                f"there is no run in {folder}: it has neither config.yaml nor metrics.jsonl"
            )
        return cls(
            folder=folder,
            config=RunConfig.load(config) if config.is_file() else None,
            versions=_versions(config) if config.is_file() else {},
            target=storage.read_json(target) if target.is_file() else {},
            metrics=pd.DataFrame(
                [{k: math.nan if v is None else v for k, v in row.items()} for row in metrics]
            ),
            evaluations=_rows(folder / "evaluations.jsonl"),
            pairs=_rows(folder / "samples.jsonl"),
        )

    @property
    def method(self) -> str:
        """The method as papers write it."""
        return self.config.method.replace("pp", "++") if self.config else "the policy"

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""
        return int(self.metrics["step"].iloc[-1]) if len(self.metrics) else 0

    @property
    def constraints(self) -> list[Pointwise | Moment]:
        """The constraints as objects; none where there is no configuration."""
        return self.config.build_constraints() if self.config else []

    @property
    def final(self) -> Row | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    def samples_at(self, step: int) -> float:
        """How many texts had been drawn for training at a step; NaN if that is not known."""
        if len(self.metrics):
            at = self.metrics.loc[self.metrics["step"] == step, "samples"]
            if len(at):
                return float(at.iloc[0])
        return step * self.config.trainer.batch_size if self.config else math.nan


def score(evaluation: Row, metric: str, model: str = "") -> Score | None:
    """A number of an evaluation; None where it was not measured, NaN where it is not finite."""
    for row in evaluation["rows"]:
        if row["metric"] == metric and row["model"] == model:
            return as_score(row)
    return None


def as_score(row: Mapping[str, Any]) -> Score:
    """The score in a row of a result file, where None stands for a number that is not finite."""
    value, stderr = (math.nan if row[k] is None else float(row[k]) for k in ("value", "stderr"))
    return Score(value, stderr, row["n"], row.get("signature", ""))


def policy_rows(evaluation: Row) -> list[Row]:
    """The rows of the constraints under the policy, in the order of the constraints."""
    return [row for row in evaluation["rows"] if row["model"] == "policy" and "verdict" in row]


def goals_of(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What was asked, by the name of the constraint, where all runs asked the same."""
    found: dict[str, Any] = {}
    for record in records:
        for c in record.constraints:
            target = 1.0 if isinstance(c, Pointwise) else c.target
            found[c.name] = target if found.get(c.name, target) == target else None
    return {name: target for name, target in found.items() if target is not None}


def bases_of(records: Sequence[RunRecord]) -> dict[str, Score]:
    """The moments of the base by name, where all runs have the same base and prompt."""
    kinds = {
        (r.config.base, r.config.prompt, r.config.max_new_tokens) if r.config else None
        for r in records
    }
    found = records[0].target.get("base_moments", {}) if len(kinds) == 1 else {}
    return {name: as_score(row) for name, row in found.items()}


def metrics_frame(records: Sequence[RunRecord], names: Sequence[tuple[str, Any]]) -> pd.DataFrame:
    """The training metrics of several runs under one another.

    Args:
        records: the runs.
        names: (method, seed) of each, which become columns of that name.
    """
    frames = [
        record.metrics.assign(method=method, seed=seed)
        for record, (method, seed) in zip(records, names, strict=True)
        if len(record.metrics)
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def evaluations_frame(
    records: Sequence[RunRecord], names: Sequence[tuple[str, Any]]
) -> pd.DataFrame:
    """The evaluations of several runs, a row each; of two at the same step, the later one.

    Columns: method, seed, step, samples, final (the last of its run), and for each number of the
    policy or of no model its value under the name of the metric, with the ends of its 99 % interval
    under `<metric>_low` and `<metric>_high`.

    Args:
        (as in `metrics_frame`)
    """
    rows = []
    for record, (method, seed) in zip(records, names, strict=True):
        by_step = {evaluation["step"]: evaluation for evaluation in record.evaluations}
        for step, evaluation in by_step.items():
            row: Row = {
                "method": method,
                "seed": seed,
                "step": step,
                "samples": record.samples_at(step),
                "final": evaluation is record.final,
            }
            for found in evaluation["rows"]:
                if found["model"] in ("policy", ""):
                    name, (low, high) = found["metric"], interval(found)
                    row |= {name: as_score(found).value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """The 99 % interval of a row of an evaluation: its own if it has one, else the normal one."""
    if row.get("low") is not None and row.get("high") is not None:
        return float(row["low"]), float(row["high"])
    low, high = as_score(row).interval(LEVEL)
    # A share of n-grams.
    return low, min(high, 1.0) if row["metric"].startswith("distinct") else high


def _rows(path: Path) -> list[Row]:
    return storage.read_rows(path) if path.is_file() else []


def _versions(config: Path) -> dict[str, str]:
    """The names and versions in the comment above a `config.yaml`."""
    lines = config.read_text(encoding="utf-8").splitlines()
    facts = [line[1:].strip().partition(" ") for line in lines if line.startswith("#")]
    return {name: version for name, _, version in facts if version}
