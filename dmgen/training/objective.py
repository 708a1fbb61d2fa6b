"""`Objective`: a training method as a value; those of dmgen are in `objectives` and `ppo`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmgen.target.ebm import EBM
from dmgen.training.baselines import Baseline
from dmgen.training.batch import Batch
from dmgen.training.config import TrainerConfig
from dmgen.training.state import TrainState


class Objective:
    """A training method with the gradient `E_q[A ∇log π]`, unless it overrides `loss`.

    A subclass sets `name` and overrides `advantage`; all else has defaults.

    Attributes:
        name: its name in tables and checkpoints.
        proposal_rule: the default of `TrainerConfig.proposal_rule`.
        per_token: whether the advantage has a column for each token, `(N, T)`.
        is_weighted: whether the gradient is a mean under importance weights P/q, which can
            collapse on a few texts.
        needs_support: whether it is infinite for texts with P = 0, so that it cannot learn hard
            constraints.
    """

    name: str
    proposal_rule: str = "policy"
    per_token: bool = False
    is_weighted: bool = False
    needs_support: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Inputs of A beside log P, log q, Z: "log_policy" and "batch", the other texts."""
        return frozenset({"log_policy"})

    def identity(self) -> dict[str, Any]:
        """Return the facts that must be equal in a checkpoint and the run that resumes it."""
        return {"objective": self.name}

    def check(self, config: TrainerConfig) -> None:
        """Raise ValueError for settings that do not go with this objective."""
        if config.baseline is not None:
            raise ValueError(f"objective {self.name!r} has no baselines: leave baseline out")

    def with_baseline(self, baseline: str | Baseline | None) -> Objective:
        """Return the objective with this baseline; None keeps its own."""
        return self

    def init(self, policy: Any, target: EBM) -> dict[str, Tensor]:
        """Return the objective's own state by name; parameters in it are trained too."""
        return {}

    def draw_columns(self, state: TrainState, batch: Batch, target: EBM) -> dict[str, Tensor]:
        """Return token columns `(n, T)` of freshly drawn texts, "log_base" among them if known."""
        return {}

    def prepare(self, state: TrainState, batch: Batch, target: EBM) -> Batch:
        """Return the batch with the columns that `advantage` and `loss` read beside log π."""
        return batch

    def advantage(self, batch: Batch) -> Tensor:
        """Return the advantage of each text `(N,)` or token `(N, T)`, float64, detached."""
        raise NotImplementedError(f"objective {self.name!r} must define advantage(batch)")

    def forward(self, state: TrainState, batch: Batch) -> Any:
        """Return the input of `loss`: log π with its graph, `(n,)`, or of each token `(n, T)`."""
        if self.per_token:
            return state.policy.token_log_prob(batch.texts, grad=True)
        return state.policy.log_prob(batch.texts, grad=True)

    def log_prob_of(self, output: Any) -> Tensor:
        """Return log π of each text `(n,)` from the output of `forward`."""
        return output.sum(-1) if self.per_token else output  # type: ignore[no-any-return]

    def loss(self, batch: Batch, log_pi: Any, advantage: Tensor) -> Tensor:
        """Return the loss of each text `(n,)`; only log π is differentiated."""
        terms: Tensor = -advantage.to(log_pi) * log_pi
        return terms.sum(-1) if self.per_token else terms

    def text_weights(self, batch: Batch) -> Tensor:
        """Return the weight of each text's loss in the loss of the batch, float64 `(N,)`."""
        return torch.full((len(batch),), 1.0 / len(batch), dtype=torch.float64)

    def text_advantage(self, batch: Batch, advantage: Tensor) -> Tensor:
        """Return one advantage a text `(N,)` for metrics."""
        return advantage.sum(-1) if self.per_token else advantage

    def follow(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Update the objective's own state after a step; return further columns of metrics."""
        return {}
