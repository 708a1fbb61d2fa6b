"""`run`: from a configuration to a folder with a trained and measured policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmgen import storage
from dmgen.evaluation.evaluate import evaluate
from dmgen.evaluation.result import Evaluation
from dmgen.experiment.build import (
    build_policy,
    build_trainer,
    fit_draw,
    fit_target,
    load_model,
    load_target,
)
from dmgen.experiment.config import RunConfig, with_absolute_paths
from dmgen.experiment.folder import refuse_other_run, refuse_used
from dmgen.experiment.publish import publish
from dmgen.experiment.result import Run, StepEvaluation, TextPair
from dmgen.experiment.versions import write_config
from dmgen.models.protocols import LanguageModel
from dmgen.target.ebm import EBM
from dmgen.target.prefix_value import PrefixValue
from dmgen.training import run_folder
from dmgen.training.trainer import Trainer

__all__ = [
    "Evaluated",
    "Event",
    "FitBegan",
    "Fitted",
    "Run",
    "RunBegan",
    "StepEvaluation",
    "StepTaken",
    "TextPair",
    "TextsCompared",
    "TrainingBegan",
    "run",
]

# Pairs of texts of base and policy that a run keeps.
_N_PAIRS = 32


@dataclass(frozen=True)
class RunBegan:
    """The settings and the folder are checked; the base is loaded next."""

    config: RunConfig
    folder: Path


@dataclass(frozen=True)
class FitBegan:
    """λ is fitted next, on `n_samples` texts of the base."""

    n_samples: int


@dataclass(frozen=True)
class Fitted:
    """λ is fitted."""

    target: EBM


@dataclass(frozen=True)
class TrainingBegan:
    """The trainer stands at `step`, with λ and the settings on disk; `resumed` if it goes on."""

    step: int
    resumed: bool


@dataclass(frozen=True)
class StepTaken:
    """A gradient step was taken: its row of metrics."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """The policy was evaluated at the end."""

    evaluation: Evaluation


@dataclass(frozen=True)
class TextsCompared:
    """Texts of base and policy were drawn."""

    pairs: tuple[TextPair, ...]


Event = RunBegan | FitBegan | Fitted | TrainingBegan | StepTaken | Evaluated | TextsCompared


def run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Run:
    """Fit the target, train the policy, evaluate it, and return the run as its folder holds it.

    Args:
        config: the settings.
        out: the run folder, which a new run makes.
        resume: go on with the run in `out` from its last checkpoint; the result equals that of a
            run that was never stopped.
        on_event: called with each `Event` when it happens.

    Raises:
        ValueError: `out` holds a run (or, with `resume`, none, a finished one, or one of other
            settings), or may not be written to; the base cannot be loaded.
        MomentsUnreachable: no λ gives the requested moments.
        ArithmeticError: a number is not finite, or the evaluation contradicts itself.
    """
    out, config = Path(out), with_absolute_paths(config)
    tell: Callable[[Event], None] = on_event or (lambda event: None)
    if resume:
        refuse_other_run(out, config)
    else:
        refuse_used(out)
    tell(RunBegan(config, out))
    # Before the long work: the folder may be one that cannot be written.
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} may not be written to: give another folder, or change its rights")
    base = load_model(config.base, config)
    if resume:
        target = load_target(out, config, base)
    else:
        tell(FitBegan(config.fit.n_samples))
        target = fit_target(config, base)
        tell(Fitted(target))
    if config.trainer.credit == "token":
        _find_prefix_value(target, out, resume)
    policy = build_policy(config, target)
    trainer = build_trainer(config, policy, target)
    if resume:
        _resume(trainer, config, out)
    else:
        target.save(out)
    write_config(out, config.to_mapping())
    tell(TrainingBegan(trainer.step, resume))
    trainer.train(config.n_steps - trainer.step, out, log=lambda row: tell(StepTaken(row)))
    for of_fewer_steps in ("dmgen.json", "README.md"):
        (out / "policy" / of_fewer_steps).unlink(missing_ok=True)
    policy.save_pretrained(out / "policy")
    _measure(policy, target, config, out, trainer.step, tell)
    publish(out / "policy", config, target.fitted)  # the last file: the run is finished
    return Run.load(out)


def _find_prefix_value(target: EBM, out: Path, resume: bool) -> None:
    """Give the target its prefix value, from the run folder if the run goes on."""
    if resume:
        target.prefix_value = PrefixValue.load(out)
    else:
        PrefixValue.of(target).save(out)


def _measure(
    policy: LanguageModel,
    target: EBM,
    config: RunConfig,
    out: Path,
    step: int,
    tell: Callable[[Event], None],
) -> None:
    """Evaluate the policy and draw pairs of texts; write both."""
    evaluation = evaluate(policy, target, **asdict(config.evaluate))
    tell(Evaluated(evaluation))
    pairs = _draw_pairs(target, policy, config)
    storage.write_rows(out / "samples.jsonl", [asdict(pair) for pair in pairs])
    tell(TextsCompared(pairs))
    run_folder.append_evaluation(out, step, evaluation, final=True, seed=config.evaluate.seed)


def _resume(trainer: Trainer, config: RunConfig, out: Path) -> None:
    """Bring a new trainer to the last step of the run, with the texts that it still has to use."""
    if run_folder.has_checkpoint(out):
        trainer.resume(out)
    else:
        # Stopped before its first checkpoint: the same steps again, with the same λ.
        storage.write_rows(out / "metrics.jsonl", [])
    if trainer.step > config.n_steps:
        raise ValueError(
            f"the run in {out} is past step {config.n_steps} already: raise n_steps, as in "
            f"n_steps={2 * trainer.step}"
        )
    n_used = trainer.step * config.trainer.batch_size
    if config.trainer.first_batches_from_fit and n_used < config.fit.n_samples:
        draw = fit_draw(config)
        trainer.target.fit_samples = trainer.target.base.sample(draw.pop("n_samples"), **draw)


def _draw_pairs(target: EBM, policy: LanguageModel, config: RunConfig) -> tuple[TextPair, ...]:
    """Return pairs of texts from the same random numbers, with the values of all features."""
    drawn = {
        name: model.sample(_N_PAIRS, prompt=config.prompt, seed=config.evaluate.seed)
        for name, model in (("base", target.base), ("policy", policy))
    }
    values = {name: target.values(samples) for name, samples in drawn.items()}
    return tuple(
        TextPair(
            config.prompt,
            drawn["base"].texts[i],
            drawn["policy"].texts[i],
            {
                name: {feature: float(column[i]) for feature, column in columns.items()}
                for name, columns in values.items()
            },
        )
        for i in range(_N_PAIRS)
    )
