"""`Health`: tells once, in words, when a run has lost its footing."""

from __future__ import annotations

import math
import warnings
from typing import Any

# A batch counts as collapsed under this share of effective texts, or so few of them (1 is one text
# that carries all), and a run after so many such batches.
_LEAST_SHARE, _LEAST, _PATIENCE = 0.01, 1.5, 10
# A two-sided 5 sigma event; heavy-tailed weights can make a false alarm of less.
_MOST_DRIFT = 5.0


class Health:
    """Watches the rows of a run and warns, once for each, of the ways in which it can be wrong.

    Args:
        batch_size: texts a step.
        weighted: whether the gradient is a mean under importance weights.
    """

    def __init__(self, batch_size: int, *, weighted: bool = True) -> None:
        self.batch_size = batch_size
        self.least_ess = max(_LEAST, _LEAST_SHARE * batch_size) if weighted else 0.0
        self.n_low = 0
        self.n_without_z = 0
        self.told: set[str] = set()

    def watch(self, row: dict[str, Any]) -> None:
        """Takes note of one row of metrics.

        Warns:
            RuntimeWarning: the weights have collapsed on a few texts, no text has satisfied the
                constraints, or estimates of Z from different proposals contradict one another.
        """
        no_z = not math.isfinite(row["log_z"])
        self.n_without_z = self.n_without_z + 1 if no_z else 0
        low = not no_z and row["ess"] < self.least_ess
        self.n_low = self.n_low + 1 if low else 0
        if self.n_without_z >= _PATIENCE:
            self._tell(
                "no hit",
                f"none of {row['samples']:,} texts satisfies the constraints, so Z is unknown and "
                "nothing is learnt: draw from a model that shows them (proposal=, or begin with a "
                "policy that was trained on an easier constraint), or ask for less",
            )
        if self.n_low >= _PATIENCE:
            self._tell(
                "collapse",
                f"the effective sample size has been under {self.least_ess:g} of "
                f"{self.batch_size} texts for {_PATIENCE} steps: one or a few carry the whole "
                "gradient. Lower the learning rate, enlarge batch_size, or bound the weights with "
                "base_share=0.1",
            )
        drift = row["log_z_drift"]
        if abs(drift) > _MOST_DRIFT:
            self._tell(
                "drift",
                f"at step {row['step']} log Z has moved by {drift:+.1f} standard errors since it "
                "was last estimated. Z does not depend on the proposal, so log-probabilities and "
                "texts may not belong together (such as texts drawn with top-p and scored "
                "without), or the weights are too heavy-tailed for their error to be trusted",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self.told:
            self.told.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=4)
