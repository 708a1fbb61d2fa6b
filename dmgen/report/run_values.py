"""Values of runs as the pages need them: constraints in common, measurements, frames to plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.estimates.score import Score
from dmgen.evaluation.result import Evaluation
from dmgen.evaluation.verdicts import LEVEL
from dmgen.experiment.result import Run, StepEvaluation

Target = float | tuple[float, float]

_DISTANCES = {
    "kl_target_policy": "KL(p‖π), still missing, nats",
    "kl_policy_base": "KL(π‖a), paid, nats",
    "kl_target_base": "KL(p‖a), the least possible, nats",
    "excess": "KL(π‖a) − KL(p‖a), excess, nats",
    "gain": "KL(p‖a) − KL(p‖π), nearer to the target than the base, nats",
    "tv": "Total variation distance of p and π",
    "js": "Jensen-Shannon divergence of p and π, nats",
}


@dataclass(frozen=True)
class Measurement:
    """A quantity of an evaluation under base, target and policy; None where it is not measured.

    Attributes:
        name: short name, as in the columns of `evaluations_frame`.
        label: the name on a page.
        base: under the base.
        target: under p.
        policy: under the policy, or of no single model.
        interval: 99 % interval of `policy`.
        verdict: of a constraint, else "".
    """

    name: str
    label: str
    base: Score | None
    target: Score | None
    policy: Score
    interval: tuple[float, float]
    verdict: str = ""


def measurements(evaluation: Evaluation) -> list[Measurement]:
    """Return all quantities of an evaluation that the policy has."""
    rows = [
        Measurement(
            f"E[{m.name}]",
            f"Mean of {m.name}",
            m.base,
            m.reachable,
            m.policy,
            m.interval,
            m.verdict,
        )
        for m in evaluation.moments
    ]
    for name, label in _DISTANCES.items():
        score: Score = getattr(evaluation, name)
        rows.append(Measurement(name, label, None, None, score, score.interval(LEVEL)))
    for name, label, by_model in (
        ("length", "Length in tokens", evaluation.length),
        ("perplexity", "Perplexity a token, under the base", evaluation.perplexity),
    ):
        score = by_model["policy"]
        scores = (by_model.get("base"), by_model.get("target"), score)
        rows.append(Measurement(name, label, *scores, score.interval(LEVEL)))
    for name, label, by_order in (
        ("self_bleu", "Self-BLEU", evaluation.self_bleu),
        ("distinct", "Distinct", evaluation.distinct),
    ):
        for (model, order), score in by_order.items():
            if model == "policy":
                low, high = score.interval(LEVEL)
                high = min(high, 1.0) if name == "distinct" else high  # a fraction of n-grams
                base = by_order.get(("base", order))
                names = (f"{name}_{order}", f"{label}-{order}")
                rows.append(Measurement(*names, base, None, score, (low, high)))
    return rows


def as_run(run: Run | str | Path) -> Run:
    """Return the run itself, or the one in a folder.

    Raises:
        ValueError: there is no run in the folder, or a file of it cannot be read.
    """
    return run if isinstance(run, Run) else Run.load(run)


def method_of(run: Run) -> str:
    """Return the method as papers write it."""
    return "the policy" if run.config is None else run.config.method.replace("pp", "++")


def base_of(run: Run) -> str:
    """Return the short name of the base, or of the run where its base is not known."""
    return run.folder.name if run.config is None else Path(run.config.base).name


def constraints_of(run: Run) -> Sequence[Pointwise | Moment]:
    """Return the constraints of a run; none where neither target nor configuration was written."""
    if run.target is not None:
        return run.target.constraints
    return () if run.config is None else run.config.build_constraints()


def last_evaluation(run: Run) -> StepEvaluation | None:
    """Return the last evaluation with its step."""
    return run.evaluations[-1] if run.evaluations else None


def n_drawn(run: Run, step: int) -> float:
    """Return how many texts had been drawn for training at a step; NaN if that is not known."""
    if len(run.history):
        at_step = run.history.loc[run.history["step"] == step, "samples"]
        if len(at_step):
            return float(at_step.iloc[0])
    return math.nan if run.config is None else step * run.config.trainer.batch_size


def targets_in_common(runs: Sequence[Run]) -> dict[str, Target]:
    """Return the requested mean of each constraint, by name, where no two runs differ in it."""
    targets: dict[str, Target | None] = {}
    for run in runs:
        for constraint in constraints_of(run):
            name = constraint.name
            target = 1.0 if isinstance(constraint, Pointwise) else constraint.target
            targets[name] = target if targets.get(name, target) == target else None
    return {name: target for name, target in targets.items() if target is not None}


def base_moments_in_common(runs: Sequence[Run]) -> dict[str, Score]:
    """Return the means under the base by name, where all runs have the same base and prompt."""
    bases = {
        (r.config.base, r.config.prompt, r.config.max_new_tokens) if r.config else None
        for r in runs
    }
    target = runs[0].target
    return dict(target.base_moments) if target is not None and len(bases) == 1 else {}


def metrics_frame(runs: Sequence[Run], names: Sequence[tuple[str, Any]]) -> pd.DataFrame:
    """Return the training metrics of several runs under one another.

    Args:
        runs: the runs.
        names: (method, seed) of each, which become columns of that name.
    """
    frames = [
        run.history.assign(method=method, seed=seed)
        for run, (method, seed) in zip(runs, names, strict=True)
        if len(run.history)
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def evaluations_frame(runs: Sequence[Run], names: Sequence[tuple[str, Any]]) -> pd.DataFrame:
    """Return the evaluations of several runs, a row each; of two at the same step, the later one.

    Columns: method, seed, step, samples, final (the last of its run), and each measurement of the
    policy under its name, with the ends of its 99 % interval under `<name>_low`, `<name>_high`.

    Args:
        runs: the runs.
        names: (method, seed) of each.
    """
    rows = []
    for run, (method, seed) in zip(runs, names, strict=True):
        by_step = {at.step: at for at in run.evaluations}
        for step, at in by_step.items():
            row: dict[str, Any] = {"method": method, "seed": seed, "step": step}
            row |= {"samples": n_drawn(run, step), "final": at is last_evaluation(run)}
            for m in measurements(at.evaluation):
                low, high = m.interval
                row |= {m.name: m.policy.value, f"{m.name}_low": low, f"{m.name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)
