"""`Run`: a run as its folder holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dmgen import storage
from dmgen.evaluation.result import Evaluation
from dmgen.experiment.build import build_constraints
from dmgen.experiment.config import RunConfig
from dmgen.experiment.versions import read_versions
from dmgen.target.fit import TargetFit
from dmgen.training import run_folder


@dataclass(frozen=True)
class StepEvaluation:
    """An evaluation of a run.

    Attributes:
        step: gradient steps that the policy had taken.
        final: whether it is the one at the end of a run, with the settings in `config.evaluate`.
        evaluation: the result.
    """

    step: int
    final: bool
    evaluation: Evaluation


@dataclass(frozen=True)
class TextPair:
    """A text of the base and one of the policy, drawn with the same random numbers.

    Attributes:
        prompt: their prompt.
        base: text of the base.
        policy: text of the policy.
        features: values of the features of both, `{"base": {name: value}, "policy": {...}}`.
    """

    prompt: str
    base: str
    policy: str
    features: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Run:
    """A run as its folder holds it, finished or not; equal runs have equal contents.

    Attributes:
        folder: the run folder.
        config: its settings; None if the trainer was called without a configuration.
        target: constraints, λ and the fit of λ; None where no `target.json` was written.
        history: metrics of the training, a row a step; NaN where a number is not finite.
        evaluations: all evaluations, the oldest first.
        samples: pairs of texts of base and policy.
        versions: versions of dmgen and its libraries that the run was made with, by name.
    """

    folder: Path
    config: RunConfig | None
    target: TargetFit | None
    history: pd.DataFrame
    evaluations: tuple[StepEvaluation, ...]
    samples: tuple[TextPair, ...]
    versions: Mapping[str, str]

    @property
    def evaluation(self) -> Evaluation | None:
        """Return the last evaluation; None if there is none yet."""
        return self.evaluations[-1].evaluation if self.evaluations else None

    @property
    def n_steps(self) -> int:
        """Return the number of gradient steps taken so far."""
        return int(self.history["step"].iloc[-1]) if len(self.history) else 0

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Return the run in a folder; neither its base nor a classifier's head is needed.

        Raises:
            ValueError: there is neither a configuration nor a step, or a file cannot be read.
        """
        folder = Path(folder)
        config_path = folder / "config.yaml"
        rows = run_folder.read_metrics(folder)
        if not config_path.is_file() and not rows:
            raise ValueError(
                f"there is no run in {folder}: it has neither config.yaml nor metrics.jsonl"
            )
        config = RunConfig.load(config_path) if config_path.is_file() else None
        constraints = None if config is None else build_constraints(config)
        has_target = (folder / "target.json").is_file()
        evaluations = run_folder.read_evaluations(folder)
        return cls(
            folder=folder,
            config=config,
            target=TargetFit.load(folder, constraints) if has_target else None,
            history=pd.DataFrame(
                [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
            ),
            evaluations=tuple(StepEvaluation(*evaluation) for evaluation in evaluations),
            samples=_read_pairs(folder),
            versions=read_versions(config_path) if config else {},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Run):
            return NotImplemented
        names = ("config", "target", "evaluations", "samples", "versions")
        equal = all(getattr(self, name) == getattr(other, name) for name in names)
        return equal and self.history.equals(other.history)

    def __str__(self) -> str:
        """Show the method, the steps, the target and the last evaluation."""
        steps = f"{self.n_steps:,} steps"
        if self.config is not None:
            steps = (
                f"{self.config.method} on {self.config.base}, {steps} of {self.config.n_steps:,}"
            )
        parts = [f"{steps}, in {self.folder}", self.target, self.evaluation]
        return "\n\n".join(str(part) for part in parts if part is not None)


def _read_pairs(folder: Path) -> tuple[TextPair, ...]:
    path = folder / "samples.jsonl"
    return tuple(TextPair(**row) for row in storage.read_rows(path)) if path.is_file() else ()
