"""`Trainer`: the one training loop, from a source of batches to a history of metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from dmgen.estimates.running_z import RunningZ
from dmgen.evaluation.evaluate import evaluate
from dmgen.models.guided import GuidedLM
from dmgen.models.random_draws import stream
from dmgen.target.ebm import EBM
from dmgen.target.prefix_value import PrefixValue
from dmgen.training import checkpoint, run_folder
from dmgen.training.averaging import hide_average, show_average, shown_average
from dmgen.training.config import TrainerConfig
from dmgen.training.objective import Objective
from dmgen.training.rollout import Rollout, Source
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState
from dmgen.training.step import Info, step
from dmgen.training.step_size import FIRST_RATE


class Trainer:
    """Fit `policy` to `target` by `∇ = E_q[A ∇log π]`, with the objective's A and q.

    Under `accelerate launch` every process makes the same trainer, see `distributed`.

    Args:
        policy: the model to train, usually `base.copy()`; it is changed in place.
        target: the distribution to match.
        config: settings of the run.
        objective: the method, such as `objectives.GDCPP`, or one of the user's own.
        proposal: the model to draw from at first; None takes the target's base (off-policy) or
            the policy itself.
        source: the source of batches; None draws them, see `rollout.Rollout`.

    Attributes:
        setup: the fixed part of the run.
        state: the changing part; checkpoints hold all of it.

    Raises:
        TypeError: the proposal cannot be sampled from.
        ValueError: the policy has nothing to train, or is the target's own base; a setting does
            not go with the objective, the proposal or the number of processes.
    """

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        objective: Objective,
        proposal: Any = None,
        source: Source | None = None,
    ) -> None:
        config = config or TrainerConfig()
        trainable = [p for p in policy.parameters() if p.requires_grad]
        if not trainable or policy is target.base:
            raise ValueError("the policy has no trainable weights: use policy = base.copy()")
        self.setup = Setup.of(policy, target, config, objective, proposal)
        own_state = self.setup.objective.init(policy, target)
        if self.setup.proposal_rule == "guided":
            guided = GuidedLM(target.base, PrefixValue.from_tensors(own_state))
            self.setup = replace(self.setup, first_proposal=guided)
        trained = [x for x in own_state.values() if isinstance(x, torch.nn.Parameter)]
        is_auto = config.learning_rate == "auto"
        z = RunningZ.from_score(target.log_z)
        self.state = TrainState(
            policy=policy,
            optimizer=_optimizer(config, trainable, trained),
            generator=stream("train", config.seed),
            rate=FIRST_RATE if is_auto else float(config.learning_rate),
            z=z,
            z_before=z,
            objective=own_state,
            micro_batch_size=config.micro_batch_size,
        )
        self.source: Source = source or Rollout(self.setup)

    @property
    def policy(self) -> Any:
        """The model that is trained."""
        return self.state.policy

    @property
    def target(self) -> EBM:
        """The distribution to match."""
        return self.setup.target

    @property
    def config(self) -> TrainerConfig:
        """Settings of the run."""
        return self.setup.config

    @property
    def proposal(self) -> Any:
        """The model that texts are currently drawn from."""
        return self.setup.proposal(self.state)

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.state.step

    @property
    def n_drawn(self) -> int:
        """Number of texts used."""
        return self.state.n_drawn

    @property
    def seconds(self) -> float:
        """Seconds spent in steps."""
        return self.state.seconds

    @property
    def history(self) -> list[Info]:
        """One row of metrics per step."""
        return self.state.history

    def train(
        self,
        n_steps: int,
        out: str | Path | None = None,
        *,
        log: Callable[[Info], None] | None = None,
    ) -> pd.DataFrame:
        """Take `n_steps` more steps and return the history of all steps, a row a step.

        Args:
            n_steps: number of steps.
            out: a run folder for metrics, evaluations and checkpoints, one of them after the last
                step, from which `resume(out)` continues.
            log: called with each row of metrics.

        Raises:
            ValueError: `out` holds another run, or the processes have different targets.
            FloatingPointError: an advantage or a gradient is not finite; the step is not taken.
        """
        self._check_before_training()
        state, setup = self.state, self.setup
        folder = None if out is None or not setup.processes.is_main else Path(out)
        if folder is not None:
            run_folder.open_run(folder, expected_step=state.step)
        hide_average(state)
        is_main = setup.processes.is_main
        bar = tqdm(total=n_steps, desc=self._name, unit="step", disable=None if is_main else True)
        batches = self.source.batches(state)
        try:
            for _ in range(n_steps):
                started = time.monotonic()
                row = step(state, next(batches), setup)
                state.seconds += time.monotonic() - started
                row["seconds"] = round(state.seconds, 3)
                state.history.append(row)
                if folder is not None:
                    self._record(folder, row)
                if log is not None and is_main:
                    log(row)
                bar.set_postfix_str(_postfix(row), refresh=False)
                bar.update()
            if folder and state.step and not setup.is_due(state, self.config.checkpoint_every):
                checkpoint.save(state, setup, folder)
            setup.processes.wait()
        finally:
            bar.close()
            show_average(state)
        return pd.DataFrame(state.history)

    def resume(self, run: str | Path) -> None:
        """Fill this trainer and its policy, in place, from the last checkpoint of a run folder.

        With `average_decay` the policy has the averaged weights, as after `train`.

        Raises:
            ValueError: there is no checkpoint, or it belongs to another run, see `checkpoint.load`.
        """
        checkpoint.load(self.state, self.setup, Path(run))
        show_average(self.state)

    @property
    def _name(self) -> str:
        return type(self).__name__ if type(self) is not Trainer else self.setup.objective.name

    def _check_before_training(self) -> None:
        """Refuse different targets of the processes, and too few texts of the fit."""
        config, target = self.config, self.target
        log_z = target.log_z.value if target.log_z else 0.0
        fitted = torch.cat([target.lambdas, torch.tensor([log_z], dtype=torch.float64)])
        if not self.setup.processes.agree(fitted):
            raise ValueError("the processes have targets of different λ or Z: give EBM.fit a seed")
        n_texts = len(target.fit_samples or ())
        if config.first_batches_from_fit and not self.step and n_texts < config.batch_size:
            raise ValueError(
                "first_batches_from_fit needs the texts that λ was fitted on, a batch of "
                f"{config.batch_size} at least, and the target has {n_texts}: fit it by "
                "EBM.fit(base, ...) on more, without a proposal, or leave the setting out"
            )

    def _record(self, folder: Path, row: Info) -> None:
        """Write what is due after a step: metrics, an evaluation, a checkpoint."""
        state, setup = self.state, self.setup
        run_folder.append_metrics(folder, row)
        if setup.is_due(state, self.config.evaluate_every):
            with shown_average(state):
                evaluation = evaluate(state.policy, self.target, seed=state.step)
            run_folder.append_evaluation(folder, state.step, evaluation)
        if setup.is_due(state, self.config.checkpoint_every):
            checkpoint.save(state, setup, folder)


def _optimizer(
    config: TrainerConfig,
    weights: list[torch.nn.Parameter],
    of_objective: list[torch.nn.Parameter],
) -> torch.optim.Optimizer:
    """Return the configured optimiser; its learning rate is set at every step."""
    groups = [{"params": group} for group in (weights, of_objective) if group]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # Fused: one pass over weights and moments, and no temporaries of their size.
    return make(groups, lr=1.0, fused=True)


def _postfix(row: Info) -> str:
    """Return the numbers that the progress bar shows."""
    moments = [f"{k[7:]} {v:.2f}" for k, v in row.items() if k.startswith("moment/")]
    speed = row["samples"] / max(row["seconds"], 1e-9)
    parts = [*moments, f"KL(p‖π) {row['kl_target_policy']:.2f}", f"ESS {row['ess']:.0f}"]
    return ", ".join([*parts, f"{speed:.0f} texts/s"])
