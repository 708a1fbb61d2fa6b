"""The trained samplers by name: `Trainer` with one objective each."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar, cast

from dmgen.estimates.f_divergence import FDivergence
from dmgen.target.ebm import EBM
from dmgen.training import objectives
from dmgen.training.config import TrainerConfig
from dmgen.training.kl_control import PPO
from dmgen.training.objective import Objective
from dmgen.training.trainer import Trainer
from dmgen.validation import check_known

__all__ = [
    "DPG",
    "FDPG",
    "GDC",
    "METHODS",
    "GDCpp",
    "KLControl",
    "Reinforce",
    "ReinforceP",
    "VarGrad",
    "make_objective",
]


class _Fixed(Trainer):
    """A trainer whose objective has no options."""

    objective: ClassVar[Objective]

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        proposal: Any = None,
    ) -> None:
        super().__init__(policy, target, config, objective=self.objective_of(), proposal=proposal)

    @classmethod
    def objective_of(cls) -> Objective:
        """Return the objective."""
        return cls.objective


class DPG(_Fixed):
    """Distributional policy gradient, on-policy: A = P/(Zπ). Parshakova et al. 2019.

    With `proposal_rule="never"` it draws from the base throughout.
    """

    objective = objectives.DPG


class GDC(_Fixed):
    """KL-adaptive DPG: A = P/(Zq), q a frozen copy that follows the policy. Khalifa et al. 2021."""

    objective = objectives.GDC


class GDCpp(_Fixed):
    """GDC++: A = P/(Zq) − π/q, which is 0 for every text when π = p. Korbak et al. 2022."""

    objective = objectives.GDCPP


class VarGrad(_Fixed):
    """Descend the variance of log P − log π over a batch, without Z. Richter et al. 2020.

    On-policy, that is the gradient of KL(π‖p), as with trajectory balance at the best log Z. It is
    infinite where P = 0, so it cannot learn hard constraints.
    """

    objective = objectives.VARGRAD


class Reinforce(_Fixed):
    """Maximise the reward b(x) + λ·φ(x), on-policy, whatever the language loses. Williams 1992.

    b(x) is 1 where all hard constraints hold, else 0, and is left out where there are none; for
    moments alone the reward is λ·φ. It does not match the target, and is here to compare with.
    """

    objective = objectives.REINFORCE


class ReinforceP(_Fixed):
    """Maximise the reward P(x), on-policy: it ends on the likeliest texts. Korbak et al. 2022.

    The reward is measured in units of the largest P(x) met so far, where the papers multiply it by
    a constant. Texts differ by hundreds of nats, a short one from a long one already, so that any
    constant leaves the range of floating-point numbers sooner or later; a larger unit is a smaller
    step, which Adam evens out.
    """

    objective = objectives.REINFORCE_P


class FDPG(Trainer):
    """Descend any f-divergence of π and p, on-policy: A = −(f'(π/p) − f'(1)). Go et al. 2023.

    Args:
        policy: as in `Trainer`.
        target: as in `Trainer`.
        config: as in `Trainer`.
        proposal: as in `Trainer`.
        divergence: a name or ("alpha", a) as in `f_divergence.f_divergence`, or an `FDivergence`.
            Those that are infinite where P = 0 cannot learn hard constraints.

    Raises:
        ValueError: an unknown divergence; otherwise as `Trainer`.
    """

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        proposal: Any = None,
        divergence: str | tuple[str, float] | list[Any] | FDivergence = "js",
    ) -> None:
        objective = self.objective_of(divergence)
        super().__init__(policy, target, config, objective=objective, proposal=proposal)

    @classmethod
    def objective_of(
        cls, divergence: str | tuple[str, float] | list[Any] | FDivergence = "js"
    ) -> Objective:
        """Return the objective for a divergence."""
        return objectives.fdpg(divergence)


class KLControl(Trainer):
    """Maximise `E_π[r] − β KL(π‖a)` by PPO, r = b(x) + λ·φ(x) as in `Reinforce`, on-policy.

    Each token pays `β (log π(x_t) − log a(x_t))`, the last one earns r. A value head, linear on the
    hidden states before each token, predicts the return, and generalised advantage estimation
    says how much better each token was; its loss trains the shared trunk too.
    `config.reuse` is the number of PPO passes over a batch, `config.batch_size` its texts.

    At a fixed β it matches a distribution of its own, `own_target()`, which is not `target`: a hard
    constraint there is only a reward here. With `kl_target` β moves by itself,
    `β ← β (1 + clip(KL/kl_target − 1, ±0.2) · batch_size/horizon)` after each step.

    Rows of metrics have two columns more: `kl_coefficient`, the β of the step, and
    `kl_policy_base`, the batch's mean of log π − log a, nats.

    Args:
        policy: the model to train; it must have `hidden_states(samples, *, grad)`.
        target: its constraints are rewarded.
        config: settings of the run; those of importance weights do not apply and are refused.
        proposal: must be None, since texts are drawn from the policy.
        kl_coefficient: β, > 0, in units of reward a nat; where it begins if it is adaptive.
        kl_target: the KL(π‖a) that β is steered to, nats, > 0; None keeps β fixed.
        horizon: in so many texts β moves by a fifth at most; at least a batch.
        gamma: discount of rewards a token, in [0, 1].
        gae_lambda: λ of generalised advantage estimation, in [0, 1]; at 1 the values are only a
            baseline.
        clip: the ratio π/π_old counts within 1 ± clip, and the values move by `clip` a batch at
            most; in (0, 1].
        value_coefficient: weight of the value loss, >= 0.

    Raises:
        TypeError: the policy has no hidden states, or an option is not a number.
        ValueError: an option is out of its range, a setting requests something else than on-policy
            batches; otherwise as `Trainer`.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), as the baseline of Korbak et al. 2022, whose
    constants are the defaults; Schulman et al. 2016, 2017 (GAE, PPO).
    Differs from the paper: one optimiser step a batch and pass, not one for each 32 texts; the
    advantages are whitened over all tokens of the batch, on all processes. A text ends with its
    EOS: nothing after it is rewarded or predicted. The value head begins at 0, without dropout.
    Until some text has satisfied the hard constraints there is nothing to learn, and only β moves.
    """

    def __init__(
        self,
        policy: Any,
        target: EBM,
        config: TrainerConfig | None = None,
        *,
        proposal: Any = None,
        kl_coefficient: float = 0.2,
        kl_target: float | None = 6.0,
        horizon: float = 10_000,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        value_coefficient: float = 0.1,
    ) -> None:
        if proposal is not None:
            raise ValueError("KLControl draws from the policy itself: give no proposal")
        objective = PPO(
            kl_coefficient, kl_target, horizon, gamma, gae_lambda, clip, value_coefficient
        )
        super().__init__(policy, target, config, objective=objective)

    objective_of = PPO

    @property
    def kl_coefficient(self) -> float:
        """β by now, in units of reward a nat."""
        return float(self.state.objective["kl_coefficient"])

    def own_target(self) -> EBM:
        """Return the distribution that a fixed β leads to; see `kl_control.PPO.own_target`."""
        return cast(PPO, self.setup.objective).own_target(self.target)


METHODS: dict[str, Any] = {
    method.__name__: method
    for method in (DPG, GDC, GDCpp, FDPG, VarGrad, Reinforce, ReinforceP, KLControl)
}


def make_objective(method: str, options: Mapping[str, Any]) -> Objective:
    """Return the objective of a method by name; nothing else is built.

    Args:
        method: a name in `METHODS`.
        options: its options, such as `{"divergence": "js"}`.

    Raises:
        ValueError: an unknown method or option, or a value out of its range.
        TypeError: an option of the wrong type.
    """
    check_known(method, tuple(METHODS), "method")
    make = METHODS[method].objective_of
    for name in options:
        check_known(name, tuple(signature(make).parameters), f"option of {method}")
    objective: Objective = make(**options)
    return objective
