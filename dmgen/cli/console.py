"""The display of a run on a console, and the tracker that its metrics go to."""

from __future__ import annotations

import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from dmgen import experiment, report
from dmgen.constraints.constraint import Moment
from dmgen.experiment.config import RunConfig
from dmgen.experiment.folder import is_finished, resume_command
from dmgen.experiment.run import (
    Evaluated,
    Event,
    FitBegan,
    Fitted,
    RunBegan,
    StepTaken,
    TextPair,
    TextsCompared,
    TrainingBegan,
)
from dmgen.report import figures
from dmgen.target.ebm import EBM
from dmgen.training import run_folder

# Pairs of texts that are shown.
_N_SHOWN = 4
# After so many steps, the time of the whole run is estimated.
_N_TIMED = 5
# Errors of λ for which `plan` gives the number of texts.
_PLANNED_STDERR = (0.1, 0.05, 0.02)


def run(config: RunConfig, out: Path, *, resume: bool = False, track: str | None = None) -> None:
    """Run a configuration, show its progress, and write the model card and the page.

    Raises:
        ValueError: as `experiment.run`.
    """
    started = time.monotonic()
    progress = _Progress()
    try:
        with _tracker(track, out) as track_event:

            def on_event(event: Event) -> None:
                progress.show(event)
                track_event(event)

            if not (resume and _lacks_only_its_card(out, config)):
                experiment.run(config, out, resume=resume, on_event=on_event)
        report.write_model_card(out)
        if figures.available():
            report.write_report(out)
    except (KeyboardInterrupt, Exception):
        if progress.step is not None:
            kept = "the metrics and the last checkpoint; to go on from it"
            if is_finished(out):
                kept = "the policy; to write its card, or to go on from it with a larger n_steps"
            elif not run_folder.has_checkpoint(out):
                kept = "λ, but there was no checkpoint yet; to train again from the first step"
            typer.echo(
                f"\nStopped after step {progress.step} of {config.n_steps}. {out} keeps {kept}:\n"
                f"  {resume_command(out)}",
                err=True,
            )
        raise
    minutes = (time.monotonic() - started) / 60
    typer.echo(f"\nDone in {minutes:.1f} minutes.\n{_next_steps(out)}")


def _lacks_only_its_card(out: Path, config: RunConfig) -> bool:
    """Return whether a run was stopped between its last file and the model card."""
    if not is_finished(out) or (out / "policy" / "README.md").is_file():
        return False
    return experiment.Run.load(out).n_steps >= config.n_steps


class _Progress:
    """The events of one run as text.

    Attributes:
        step: steps taken so far; None before the training.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._config: RunConfig | None = None
        self._timed_step = 0
        self._seconds: deque[float] = deque(maxlen=_N_TIMED + 1)

    def show(self, event: Event) -> None:
        """Print an event."""
        match event:
            case RunBegan(config, folder):
                self._config = config
                _show_request(config, folder)
            case FitBegan(n_samples):
                show_fit_began(n_samples)
            case Fitted(target):
                typer.echo(f"\n{target}\n")
            case TrainingBegan(step, resumed):
                self._begin_training(step, resumed)
            case StepTaken(row):
                self._take_step(row)
            case Evaluated(evaluation):
                typer.echo(f"\n{evaluation}\n")
            case TextsCompared(pairs):
                _show_pairs(pairs[:_N_SHOWN])

    def _begin_training(self, step: int, resumed: bool) -> None:
        if self._config is None:
            raise RuntimeError("a training cannot begin before its run")
        trainer, fit = self._config.trainer, self._config.fit
        # Steps on texts of the fit draw nothing, so they tell too little of the time of the others.
        n_from_fit = fit.n_samples // trainer.batch_size if trainer.first_batches_from_fit else 0
        self.step, self._timed_step = step, max(step, n_from_fit) + _N_TIMED
        if resumed:
            typer.echo(
                f"Going on from step {step} of {self._config.n_steps}, with λ as it was fitted."
            )

    def _take_step(self, row: Mapping[str, Any]) -> None:
        """Count a step; after the first few, estimate the time of those to come."""
        self.step = int(row["step"])
        self._seconds.append(row["seconds"])
        n_steps = self._config.n_steps if self._config else 0
        if self.step == self._timed_step < n_steps:
            seconds = (self._seconds[-1] - self._seconds[0]) / max(1, len(self._seconds) - 1)
            minutes = seconds * (n_steps - self.step) / 60
            # Not by typer: tqdm moves its bar out of the way.
            tqdm.write(
                f"Step {self.step} of {n_steps}: about {minutes:.1f} minutes more "
                f"({seconds:.1f} s a step).",
                file=sys.stdout,
            )


def show_fit_began(n_samples: int) -> None:
    """Print that λ is fitted next."""
    typer.echo(f"Fitting λ on {n_samples:,} texts of the base ...")


def plan(target: EBM) -> list[dict[str, Any]]:
    """Return a row for each soft moment: hits, λ with its error, texts that smaller errors take."""
    fit = target.moment_fit
    if fit is None:
        return []
    return [
        {
            "feature": name,
            "n_samples": fit.n_samples,
            "hits": int(fit.hits[i]),
            "lambda": float(fit.lambdas[i]),
            "lambda_stderr": float(fit.lambdas_stderr[i]),
            "samples_for_stderr": {
                str(stderr): int(fit.n_samples_for(stderr)[i]) for stderr in _PLANNED_STDERR
            },
        }
        for i, name in enumerate(fit.names)
    ]


def check_tracker_package(name: str) -> None:
    """Raise if the package of a tracker is missing, which accelerate would only warn of.

    Raises:
        ValueError: the package is not installed.
    """
    from accelerate.tracking import get_available_trackers

    if name not in [tracker.value for tracker in get_available_trackers()]:
        raise ValueError(f"--track {name} needs its package: pip install {name}")


@contextmanager
def _tracker(name: str | None, out: Path) -> Iterator[Callable[[Event], None]]:
    """Yield a function that sends the metrics of events to a tracker; None: to nowhere."""
    if name is None:
        yield lambda event: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=name, project_dir=out, cpu=not torch.cuda.is_available())

    def send(event: Event) -> None:
        if isinstance(event, RunBegan):
            settings = {"config": event.config.to_yaml()}
            accelerator.init_trackers("dmgen", config=settings)
        if isinstance(event, StepTaken):
            accelerator.log(dict(event.row), step=event.row["step"])

    try:
        yield send
    finally:
        accelerator.end_training()


def _show_request(config: RunConfig, out: Path) -> None:
    typer.echo(f"Base        {config.base}")
    for constraint in config.build_constraints():
        wish = "every text"
        if isinstance(constraint, Moment):
            wish = f"mean {constraint.target}"
        typer.echo(f"Requested   {constraint.name}: {wish}")
    typer.echo(
        f"Method      {config.method}, {config.n_steps:,} steps of {config.trainer.batch_size:,} "
        f"texts of at most {config.max_new_tokens} tokens\nRun folder  {out}\n"
    )


def _show_pairs(pairs: tuple[TextPair, ...]) -> None:
    table = Table("base", "policy", title="The same random numbers, before and after")
    for pair in pairs:
        # As Text: a bracket in a text is no markup.
        cells = (Text(" ".join(text.split())) for text in (pair.base, pair.policy))
        table.add_row(*cells, end_section=True)
    Console(highlight=False).print(table)


def _next_steps(out: Path) -> str:
    run = shlex.quote(str(out))
    page = f"{out}/report.html shows all of it. " if figures.available() else ""
    return (
        f"{page}{out}/policy is a Hugging Face folder, which\n"
        "AutoModelForCausalLM.from_pretrained loads. Next:\n"
        f"  dmgen sample {run} -n 20                 more texts of the policy\n"
        f"  dmgen evaluate {run} --seed 7            the table again, on other texts\n"
        f"  dmgen train {run}/config.yaml --out {run}-2 trainer.seed=8\n"
        "                                           the same with a setting changed"
    )
