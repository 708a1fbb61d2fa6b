"""The trained samplers by name: each is an advantage and a rule for the proposal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates.f_divergence import f_divergence
from dmgen.target import factor
from dmgen.target.ebm import EBM
from dmgen.training.config import TrainerConfig
from dmgen.training.trainer import Trainer


class DPG(Trainer):
    """Distributional policy gradient, on-policy: A = P/(Zπ). Parshakova et al. 2019.

    With `proposal_rule="never"` it draws from the base throughout.
    """

    method = "dpg"
    default_proposal_rule = "policy"


class GDC(Trainer):
    """KL-adaptive DPG: A = P/(Zq), q a frozen copy that follows the policy. Khalifa et al. 2021."""

    method = "gdc"
    default_proposal_rule = "kl"


class GDCpp(Trainer):
    """GDC++: A = P/(Zq) − π/q, which is 0 for every text when π = p. Korbak et al. 2022."""

    method = "gdc++"
    default_proposal_rule = "kl"


class FDPG(Trainer):
    """Descends any f-divergence of π and p, on-policy: A = −(f'(π/p) − f'(1)). Go et al. 2023.

    Args:
        policy, target, config, proposal: as in `Trainer`.
        divergence: a name or ("alpha", a) as in `divergences.f_divergence`. Those that are infinite
            where P = 0 cannot learn hard constraints.

    Raises:
        ValueError: an unknown divergence; otherwise as `Trainer`.
    """

    method = "fdpg"
    default_proposal_rule = "policy"

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        proposal: Any = None,
        divergence: str | tuple[str, float] | list[Any] = "js",
    ) -> None:
        if isinstance(divergence, list):  # YAML has no tuples
            divergence = tuple(divergence)
        f_divergence(divergence)
        self.divergence = divergence
        super().__init__(policy, target, config, proposal=proposal)


class VarGrad(Trainer):
    """Descends the variance of log P − log π over a batch, which needs no Z. Richter et al. 2020.

    On-policy, that is the gradient of KL(π‖p), as with trajectory balance at the best log Z. It is
    infinite where P = 0, so it cannot learn hard constraints.
    """

    method = "vargrad"
    default_proposal_rule = "policy"


class Reinforce(Trainer):
    """Maximises the reward b(x) + λ·φ(x), on-policy, whatever the language loses. Williams 1992.

    b(x) is 1 where all hard constraints hold, else 0, and is left out where there are none; for
    moments alone the reward is λ·φ. It does not match the target, and is here to compare with.
    """

    method = "reinforce"
    default_proposal_rule = "policy"

    def reward(self, values: dict[str, Tensor], log_score: Tensor) -> Tensor:
        """b(x) + λ·φ(x) of each text, `(N,)`."""
        constraints, lambdas = self.target.constraints, self.target.lambdas
        soft = factor.soft_moments(constraints, lambdas)
        finite = lambdas[lambdas.isfinite()]
        total = factor.statistics(soft, values) @ finite
        if len(soft) == len(constraints):
            return total
        return total + (self.target.log_factor(values) > -math.inf).double()


class ReinforceP(Trainer):
    """Maximises the reward P(x), on-policy: it ends on the likeliest texts. Korbak et al. 2022.

    The reward is measured in units of the largest P(x) met so far, where the papers multiply it by
    a constant. Texts differ by hundreds of nats, a short one from a long one already, so that any
    constant leaves the range of floating-point numbers sooner or later; a larger unit is a smaller
    step, which Adam evens out.
    """

    method = "reinforce"
    default_proposal_rule = "policy"

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        proposal: Any = None,
    ) -> None:
        super().__init__(policy, target, config, proposal=proposal)
        # log of the unit, nats.
        self.own_state["log_unit"] = torch.tensor(-math.inf, dtype=torch.float64)

    def reward(self, values: dict[str, Tensor], log_score: Tensor) -> Tensor:
        """P(x) of each text in the unit so far, in 0..1, `(N,)`; 0 while no text was possible."""
        log_unit = self.own_state["log_unit"]
        log_unit.copy_(torch.maximum(log_unit, log_score.max()))
        if log_unit == -math.inf:
            return torch.zeros_like(log_score)
        return torch.exp(log_score - log_unit)
