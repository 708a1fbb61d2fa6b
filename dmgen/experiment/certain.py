"""Texts of a run's target itself, by quasi-rejection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmgen.estimates.score import Score
from dmgen.experiment.build import load_finished_base, load_finished_policy, load_target
from dmgen.experiment.config import RunConfig
from dmgen.models.guided import GuidedLM
from dmgen.models.samples import Samples
from dmgen.monte_carlo.quasi_rejection import QuasiRejection
from dmgen.target.prefix_value import PrefixValue

# TV(p, p_β) to keep, and the texts that choose β and check it.
_MAX_TV, _N_ESTIMATION = 0.01, 1024


@dataclass(frozen=True, eq=False)
class CertainDraw:
    """Texts that were accepted, and what they cost.

    Attributes:
        samples: the texts; their `log_prob` is the proposal's.
        proposal: "policy" or "guided base".
        diagnostics: those of `QuasiRejection`, on texts that did not choose β.
        n_drawn: texts drawn in all.
    """

    samples: Samples
    proposal: str
    diagnostics: Mapping[str, Score]
    n_drawn: int

    def __str__(self) -> str:
        """Return the proposal, the acceptance rate and the distance to the target in a line."""
        return (
            f"Texts of the target, by quasi-rejection from the {self.proposal}: "
            f"{self.diagnostics['acceptance_rate']} accepted, TV {self.diagnostics['tv']}, "
            f"{self.n_drawn:,} texts drawn"
        )


def draw_certain(folder: Path, config: RunConfig, n: int, seed: int | None) -> CertainDraw:
    """Return `n` texts of the target of a finished run.

    The proposal is the policy, or the guided base where the run has a prefix value and more of its
    texts are accepted.

    Raises:
        RuntimeError: too few texts are accepted, see `QuasiRejection.sample`.
    """
    base = load_finished_base(config)
    target = load_target(folder, config, base)
    proposals: dict[str, Any] = {"policy": load_finished_policy(folder, config)}
    if config.trainer.credit == "token":
        proposals["guided base"] = GuidedLM(base, PrefixValue.load(folder))
    samplers = {
        name: QuasiRejection(target, model, max_tv=_MAX_TV, n_estimation=_N_ESTIMATION, seed=seed)
        for name, model in proposals.items()
    }
    rates = {name: s.diagnostics()["acceptance_rate"].value for name, s in samplers.items()}
    best = max(rates, key=rates.__getitem__)
    sampler = samplers[best]
    samples = sampler.sample(n, seed=seed)
    n_drawn = sum(s.n_drawn for s in samplers.values())
    return CertainDraw(samples, best, sampler.diagnostics(), n_drawn)
