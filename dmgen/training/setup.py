"""`Setup`: everything about a training run that does not change while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dmgen.target.ebm import EBM
from dmgen.training.config import TrainerConfig
from dmgen.training.distributed import Processes
from dmgen.training.objective import Objective
from dmgen.training.state import TrainState

__all__ = ["Setup"]


@dataclass(frozen=True, eq=False)
class Setup:
    """The fixed part of a run.

    Attributes:
        target: the distribution to match.
        objective: the method, with the baseline that the configuration chooses.
        config: the settings.
        first_proposal: the model that texts are drawn from at first; it may be the caller's own,
            and is never changed.
        proposal_rule: when the proposal follows the policy, see `TrainerConfig`.
        processes: this process among those that train together.
    """

    target: EBM
    objective: Objective
    config: TrainerConfig
    first_proposal: Any
    proposal_rule: str
    processes: Processes

    @property
    def rows(self) -> range:
        """The rows of a batch that this process draws."""
        return self.processes.rows(self.config.batch_size)

    def proposal(self, state: TrainState) -> Any:
        """Return the model that texts are drawn from now."""
        return self.first_proposal if state.proposal is None else state.proposal

    def is_due(self, state: TrainState, every: int | None) -> bool:
        """Return whether something that is done at every so many steps is due now."""
        return every is not None and state.step % every == 0
