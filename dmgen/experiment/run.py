"""`run`: from a configuration to a folder with a trained, measured policy; `Run`: that folder."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dmgen import storage
from dmgen.evaluation.evaluate import evaluate
from dmgen.evaluation.result import Evaluation
from dmgen.experiment.build import (
    build_constraints,
    build_trainer,
    fit_draw,
    fit_target,
    load_model,
    load_target,
)
from dmgen.experiment.config import RunConfig, with_absolute_paths
from dmgen.experiment.publish import publish
from dmgen.experiment.versions import read_versions, write_config
from dmgen.models.protocols import LanguageModel
from dmgen.target.ebm import EBM
from dmgen.target.fit import TargetFit
from dmgen.training import run_folder
from dmgen.training.trainer import Trainer

__all__ = [
    "WRITTEN",
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
    "finished_config",
    "is_finished",
    "load_config",
    "resume_command",
    "run",
]

WRITTEN = (
    "config.yaml", "target.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl",
    "checkpoints", "policy", "report.html",
)  # fmt: skip
_N_PAIRS = 32
# Settings that may change when a run goes on; all others say which run it is.
_MAY_CHANGE = {"n_steps", "trainer", "evaluate", "device", "dtype"}


# ---------------------------------------------------------------- the value


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


# ---------------------------------------------------------------- the events


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


# ---------------------------------------------------------------- the work


def run(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    on_event: Callable[[Event], object] | None = None,
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
    tell: Callable[[Event], object] = on_event or (lambda event: None)
    if resume:
        _refuse_other_run(out, config)
    else:
        _refuse_used(out)
    tell(RunBegan(config, out))
    # Before the long work: the folder may be one that cannot be written.
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} may not be written to: give another folder, or change its rights")
    base = load_model(config.base, config)
    policy = base.copy(**asdict(config.policy))
    if resume:
        target = load_target(out, config, base)
    else:
        tell(FitBegan(config.fit.n_samples))
        target = fit_target(config, base)
        tell(Fitted(target))
    trainer = build_trainer(config, policy, target)
    if resume:
        _resume(trainer, config, out)
    else:
        target.save(out)
    write_config(out, config.to_mapping())
    tell(TrainingBegan(trainer.step, resume))
    trainer.train(config.n_steps - trainer.step, out, log=lambda row: tell(StepTaken(row)))
    (out / "policy" / "README.md").unlink(missing_ok=True)  # the card of fewer steps
    policy.save_pretrained(out / "policy")
    _measure(policy, target, config, out, trainer.step, tell)
    publish(out / "policy", config, target.fitted)
    return Run.load(out)


def _measure(
    policy: LanguageModel,
    target: EBM,
    config: RunConfig,
    out: Path,
    step: int,
    tell: Callable[[Event], object],
) -> None:
    """Evaluate the policy and draw pairs of texts; write both."""
    evaluation = evaluate(policy, target, **asdict(config.evaluate))
    tell(Evaluated(evaluation))
    pairs = _draw_pairs(target.base, policy, config)
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


def _draw_pairs(
    base: LanguageModel, policy: LanguageModel, config: RunConfig
) -> tuple[TextPair, ...]:
    """Return pairs of texts from the same random numbers, with the values of all features."""
    drawn = {
        name: model.sample(_N_PAIRS, prompt=config.prompt, seed=config.evaluate.seed)
        for name, model in (("base", base), ("policy", policy))
    }
    features = {f.name: f for c in build_constraints(config, base) for f in c.features}
    values = {
        model: {name: f(texts.texts, texts.prompts).tolist() for name, f in features.items()}
        for model, texts in drawn.items()
    }
    return tuple(
        TextPair(
            config.prompt,
            drawn["base"].texts[i],
            drawn["policy"].texts[i],
            {
                model: {name: column[i] for name, column in columns.items()}
                for model, columns in values.items()
            },
        )
        for i in range(_N_PAIRS)
    )


def _read_pairs(folder: Path) -> tuple[TextPair, ...]:
    path = folder / "samples.jsonl"
    return tuple(TextPair(**row) for row in storage.read_rows(path)) if path.is_file() else ()


# ---------------------------------------------------------------- whose folder it is


def is_finished(folder: Path) -> bool:
    """Return whether a run is finished: the card of its policy is the last file that it writes."""
    return (folder / "policy" / "README.md").is_file()


def load_config(folder: Path) -> RunConfig:
    """Return the configuration of a run.

    Raises:
        ValueError: there is no run with a target in the folder.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "target.json").is_file():
        raise ValueError(f"there is no run in {folder}: it has no config.yaml with a target.json")
    return RunConfig.load(folder / "config.yaml")


def finished_config(folder: Path, device: str | None = None) -> RunConfig:
    """Return the configuration of a finished run, on `device` where one is given.

    Raises:
        ValueError: there is no run in the folder, or it is not finished.
    """
    config = load_config(folder)
    if not is_finished(folder):
        raise ValueError(
            f"the run in {folder} is not finished; go on with it:\n  {resume_command(folder)}"
        )
    return config if device is None else replace(config, device=device)


def resume_command(folder: Path) -> str:
    """Return the shell command that goes on with a run."""
    name = shlex.quote(str(folder))
    return f"dmgen train {name}/config.yaml --out {name} --resume"


def _refuse_used(out: Path) -> None:
    """Raise if a new run in `out` would touch anything that is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run, --out runs/NAME")
    if re.match(r"\w\w+:/", str(out)):
        raise ValueError(f"--out must be a folder of this machine, got {out}")
    present = [name for name in WRITTEN if (out / name).exists()]
    if present:
        unfinished = "config.yaml" in present and not is_finished(out)
        hint = f", or go on with it:\n  {resume_command(out)}" if unfinished else ""
        raise ValueError(
            f"{out} already holds a run ({', '.join(present)}). Give another folder, such as "
            f"--out {shlex.quote(f'{out}-2')}{hint}"
        )


def _refuse_other_run(out: Path, config: RunConfig) -> None:
    """Raise unless `out` holds a run of this configuration that is not finished."""
    begun = with_absolute_paths(load_config(out)).to_mapping()
    requested = config.to_mapping()
    changed = [k for k in requested if k not in _MAY_CHANGE and requested[k] != begun[k]]
    if changed:
        raise ValueError(
            f"the run in {out} was begun with another {', '.join(changed)} (see "
            f"{out}/config.yaml): a run that goes on keeps them. Give another folder, --out, for a "
            "new run"
        )
    for step, final, _ in run_folder.read_evaluations(out) if is_finished(out) else []:
        if final and step >= config.n_steps:
            raise ValueError(
                f"the run in {out} is finished: it took {step} steps. For more, raise n_steps:\n"
                f"  {resume_command(out)} n_steps={2 * step}"
            )
