"""An exponential average of a policy's weights, which takes their place where a policy is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class WeightAverage:
    """The average of the policy's weights over steps, as long as the policy holds its own.

    Args:
        policy: the model that is trained.
        decay: share of the average that a step keeps, between 0 and 1; None keeps no average, and
            all else does nothing.
    """

    def __init__(self, policy: Any, decay: float | None) -> None:
        self.policy, self.decay = policy, decay
        # The average, or the policy's own weights while the policy holds the average.
        self.weights: dict[str, Tensor] = {}
        self.is_swapped = False

    def update(self, step: int) -> None:
        """Counts the weights after step `step`, from 0."""
        if self.decay is None:
            return
        weights = self.policy.state_dict()
        if not self.weights:
            self.weights = {k: v.clone() for k, v in weights.items()}
        # Early on, an average over all steps so far: the decay's own horizon is not reached yet.
        decay = min(self.decay, step / (step + 1))
        for name, value in weights.items():
            self.weights[name].lerp_(value, 1 - decay)

    def show(self) -> None:
        """Puts the average into the policy, if there is one."""
        if self.weights and not self.is_swapped:
            self._swap()

    def hide(self) -> None:
        """Puts the policy's own weights back."""
        if self.is_swapped:
            self._swap()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The policy as `show` would leave it, for a while."""
        self.show()
        try:
            yield
        finally:
            self.hide()

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes over an average from a checkpoint; the policy holds its own weights by now."""
        self.weights = {} if self.decay is None else weights
        self.is_swapped = False

    def _swap(self) -> None:
        own = {k: v.clone() for k, v in self.policy.state_dict().items()}
        self.policy.load_state_dict(self.weights)
        self.weights, self.is_swapped = own, not self.is_swapped
