"""`Trainer`: the one training loop, from a source of batches to a history of metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmgen.estimates.running_z import RunningZ
from dmgen.evaluation.evaluate import evaluate
from dmgen.models.random_draws import stream
from dmgen.target.ebm import EBM
from dmgen.training import checkpoint, run_folder
from dmgen.training.averaging import hide_average, show_average, shown_average
from dmgen.training.config import TrainerConfig
from dmgen.training.distributed import Processes
from dmgen.training.objective import Objective
from dmgen.training.rollout import Rollout, Source
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState
from dmgen.training.step import Info, step
from dmgen.training.step_size import FIRST_RATE

__all__ = ["Trainer"]


class Trainer:
    """Fit `policy` to `target` by `∇ = E_q[A ∇log π]`, with the objective's A and q.

    Under `accelerate launch` every process makes the same trainer; each draws and differentiates
    its part of a batch, and all take the same step.

    Args:
        policy: the model to train, usually `base.copy()`; it is changed in place.
        target: the distribution to match.
        config: settings of the run.
        objective: the method, such as `objectives.GDCPP`, or one of the user's own.
        proposal: the model to draw from at first; None takes the target's base (off-policy) or
            the policy itself.
        source: where batches come from; None draws them, see `rollout.Rollout`.

    Attributes:
        setup: the fixed part of the run.
        state: the changing part; checkpoints hold all of it.

    Raises:
        ValueError: the policy has nothing to train, or is the target's own base; a setting does
            not go with the objective or the number of processes.
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
        objective.check(config)
        trainable = [p for p in policy.parameters() if p.requires_grad]
        if not trainable or policy is target.base:
            raise ValueError("the policy has no trainable weights: use policy = base.copy()")
        rule = config.proposal_rule or objective.proposal_rule
        first: Any = policy if rule == "policy" else target.base
        if proposal is not None:
            _check_proposal(proposal, rule, config)
            first = proposal
        self.setup = Setup(
            target,
            objective.with_baseline(config.baseline),
            config,
            first,
            rule,
            Processes.here(trainable[0].device),
        )
        self.setup.processes.rows(config.batch_size)
        own = objective.init(policy, target)
        trained = [x for x in own.values() if isinstance(x, torch.nn.Parameter)]
        auto = config.learning_rate == "auto"
        z = RunningZ.from_score(target.log_z)
        self.state = TrainState(
            policy=policy,
            optimizer=_optimizer(config, trainable, trained),
            generator=stream("train", config.seed),
            rate=FIRST_RATE if auto else float(config.learning_rate),
            z=z,
            z_before=z,
            objective=own,
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
        """The model that texts are drawn from now."""
        return self.setup.proposal(self.state)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step

    @property
    def n_drawn(self) -> int:
        """Texts used."""
        return self.state.n_drawn

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return self.state.seconds

    @property
    def history(self) -> list[Info]:
        """A row of metrics a step."""
        return self.state.history

    def train(
        self,
        n_steps: int,
        out: str | Path | None = None,
        *,
        log: Callable[[Info], None] | None = None,
    ) -> pd.DataFrame:
        """Take `n_steps` more steps and return the history of all so far, a row a step.

        Args:
            n_steps: how many.
            out: a run folder for metrics, evaluations and checkpoints, the last one where it ends;
                `resume(out)` goes on from it. An interrupted run goes on from the last checkpoint
                that `checkpoint_every` wrote.
            log: called with each row of metrics.

        Raises:
            ValueError: `out` holds another run, or the processes have different targets.
            FloatingPointError: an advantage or a gradient is not finite; names its terms, or the
                step. No update is made of it, and the last checkpoint is untouched.
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

        The policy is then what `train` left: with averaged weights, if they are kept.

        Raises:
            ValueError: there is no checkpoint, or it belongs to another run: objective, target,
                optimizer, proposal, seed or policy.
        """
        checkpoint.load(self.state, self.setup, Path(run))
        show_average(self.state)

    @property
    def _name(self) -> str:
        return type(self).__name__ if type(self) is not Trainer else self.setup.objective.name

    def _check_before_training(self) -> None:
        """Refuse processes of different targets, and first batches that the fit cannot give."""
        config, target = self.config, self.target
        if not self.setup.processes.agree(_fitted(target)):
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


def _check_proposal(proposal: Any, rule: str, config: TrainerConfig) -> None:
    """Refuse a proposal that is not drawn from, or cannot do what the settings need."""
    if rule == "policy":
        raise ValueError('proposal_rule "policy" draws from the policy: give no proposal')
    if not hasattr(proposal, "sample"):
        raise TypeError(f"proposal must have sample(), got {type(proposal).__name__}")
    if config.base_share and not hasattr(proposal, "log_prob"):
        raise ValueError(
            f"base_share mixes the base with the proposal, which must then score the base's texts; "
            f"{type(proposal).__name__} has no log_prob: leave base_share out"
        )


def _fitted(target: EBM) -> Tensor:
    """Return λ and log Z of a target, 0 where it was not fitted."""
    log_z = target.log_z.value if target.log_z else 0.0
    return torch.cat([target.lambdas, torch.tensor([log_z], dtype=torch.float64)])


def _optimizer(
    config: TrainerConfig,
    weights: list[torch.nn.Parameter],
    of_objective: list[torch.nn.Parameter],
) -> torch.optim.Optimizer:
    """Return the optimiser that is configured; its learning rate is set at every step."""
    groups = [{"params": group} for group in (weights, of_objective) if group]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # Fused: one pass over weights and moments, and no temporaries of their size.
    return make(groups, lr=1.0, fused=True)


def _postfix(row: Info) -> str:
    """Return the figures that the progress bar shows."""
    moments = [f"{k[7:]} {v:.2f}" for k, v in row.items() if k.startswith("moment/")]
    speed = row["samples"] / max(row["seconds"], 1e-9)
    parts = [*moments, f"KL(p‖π) {row['kl_target_policy']:.2f}", f"ESS {row['ess']:.0f}"]
    return ", ".join([*parts, f"{speed:.0f} texts/s"])
