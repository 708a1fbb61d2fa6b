"""`Setup`: the part of a training run that does not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmgen.target.ebm import EBM
from dmgen.training.config import TrainerConfig
from dmgen.training.credit import with_credit
from dmgen.training.distributed import Processes
from dmgen.training.objective import Objective
from dmgen.training.state import TrainState


@dataclass(frozen=True, eq=False)
class Setup:
    """The fixed part of a run.

    Attributes:
        target: the distribution to match.
        objective: the method, with the baseline that the configuration chooses.
        config: the settings.
        first_proposal: the model that texts are drawn from at first.
        proposal_rule: when the proposal follows the policy, see `TrainerConfig`.
        processes: this process among those that train together.
    """

    target: EBM
    objective: Objective
    config: TrainerConfig
    first_proposal: Any
    proposal_rule: str
    processes: Processes

    @classmethod
    def of(
        cls, policy: Any, target: EBM, config: TrainerConfig, objective: Objective, proposal: Any
    ) -> Setup:
        """Return the setup of a run, or raise, see `Trainer`."""
        objective.check(config)
        rule = config.proposal_rule or objective.proposal_rule
        first = policy if rule == "policy" else target.base
        if proposal is not None:
            _check_proposal(proposal, rule, config)
            first = proposal
        processes = Processes.here(next(iter(policy.parameters())).device)
        processes.rows(config.batch_size)  # refuses a batch that cannot be divided
        chosen = with_credit(objective, config).with_baseline(config.baseline)
        return cls(target, chosen, config, first, rule, processes)

    @property
    def rows(self) -> range:
        """The rows of a batch that this process draws."""
        return self.processes.rows(self.config.batch_size)

    def proposal(self, state: TrainState) -> Any:
        """Return the model that texts are drawn from now."""
        return self.first_proposal if state.proposal is None else state.proposal

    def is_due(self, state: TrainState, every: int | None) -> bool:
        """Return whether the number of steps taken is a multiple of `every`."""
        return every is not None and state.step % every == 0


def _check_proposal(proposal: Any, rule: str, config: TrainerConfig) -> None:
    """Refuse a proposal that the settings leave unused, or that lacks a method they need."""
    if rule == "policy":
        raise ValueError('proposal_rule "policy" draws from the policy: give no proposal')
    if not hasattr(proposal, "sample"):
        raise TypeError(f"proposal must have sample(), got {type(proposal).__name__}")
    if config.base_share and not hasattr(proposal, "log_prob"):
        raise ValueError(
            f"base_share mixes the base with the proposal, which must then score the base's texts; "
            f"{type(proposal).__name__} has no log_prob: leave base_share out"
        )
