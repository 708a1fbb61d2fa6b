"""The trained samplers by name: `Trainer` with one objective each."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar, cast

from dmgen.estimates.f_divergence import FDivergence
from dmgen.target.ebm import EBM
from dmgen.training import objectives
from dmgen.training.config import TrainerConfig
from dmgen.training.objective import Objective
from dmgen.training.ppo import PPO
from dmgen.training.trainer import Trainer
from dmgen.validation import check_known


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

    On-policy, that is the gradient of KL(π‖p), which is infinite where P = 0, so it cannot learn
    hard constraints.
    """

    objective = objectives.VARGRAD


class Reinforce(_Fixed):
    """Maximise the reward b(x) + λ·φ(x), on-policy, without regard to the base. Williams 1992.

    b(x) is 1 where all hard constraints hold and 0 elsewhere; for moments alone the reward is λ·φ.
    It does not match the target, and serves as a comparison.
    """

    objective = objectives.REINFORCE


class ReinforceP(_Fixed):
    """Maximise the reward P(x), on-policy: it ends on the likeliest texts. Korbak et al. 2022.

    Differs from the paper: the reward is in units of the largest P(x) so far, not multiplied by a
    constant: P of a short and a long text differ by hundreds of nats, so that a constant overflows.
    Adam evens out the change of scale.
    """

    objective = objectives.REINFORCE_P


class FDPG(Trainer):
    """Descend any f-divergence of π and p, on-policy: A = −(f'(π/p) − f'(1)). Go et al. 2023.

    `divergence` is a name or ("alpha", a) as in `f_divergence.f_divergence`, or an `FDivergence`;
    those that are infinite where P = 0 cannot learn hard constraints. All else is as in `Trainer`.
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

    The reward of each token is `−β (log π(x_t) − log a(x_t))`, plus r for the last one. A value
    head, linear on the hidden states before each token, predicts the return, and its loss trains
    the policy's weights too. `config.reuse` is the number of PPO passes over a batch. With a fixed
    β the optimum is `own_target()`, which differs from `target`: a hard constraint is only a
    reward. Rows of metrics have two more columns: `kl_coefficient`, β, and `kl_policy_base`, the
    batch's mean of log π − log a, nats.

    Args:
        policy: the model to train; it must have `hidden_states(samples, *, grad)`.
        target: its constraints are rewarded.
        config: settings of the run; those of importance weights do not apply and are refused.
        proposal: must be None, since texts are drawn from the policy.
        kl_coefficient: β, or the first β if it is adaptive, > 0, reward per nat.
        kl_target: the KL(π‖a) to reach, nats, > 0, by an adaptive
            `β ← β (1 + clip(KL/kl_target − 1, ±0.2) · batch_size/horizon)`; None keeps β fixed.
        horizon: see `kl_target`; at least a batch.
        gamma: discount of rewards per token, in [0, 1].
        gae_lambda: λ of generalised advantage estimation, in [0, 1].
        clip: bound of the change of π/π_old from 1 and of the values in a batch, in (0, 1].
        value_coefficient: weight of the value loss, >= 0.

    Raises:
        TypeError: the policy has no hidden states, or an option is not a number.
        ValueError: an option is out of its range or a setting does not go with on-policy batches;
            otherwise as `Trainer`.

    Source: Ziegler et al. 2019 (arXiv:1909.08593); the defaults are the constants of Korbak et al.
    2022; Schulman et al. 2016, 2017 (GAE, PPO).
    Differs from the paper: one optimiser step per batch and pass, not one for each 32 texts;
    advantages are whitened over all tokens of the batch, on all processes; tokens after EOS have no
    reward and no value; the value head begins at 0, without dropout. Before the first text that
    satisfies the hard constraints only β changes.
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
        """The current β, reward per nat."""
        return float(self.state.objective["kl_coefficient"])

    def own_target(self) -> EBM:
        """Return the target that a fixed β leads to, see `PPO.own_target`."""
        return cast(PPO, self.setup.objective).own_target(self.target)


METHODS: dict[str, Any] = {
    method.__name__: method
    for method in (DPG, GDC, GDCpp, FDPG, VarGrad, Reinforce, ReinforceP, KLControl)
}


def make_objective(method: str, options: Mapping[str, Any]) -> Objective:
    """Return the objective of a method in `METHODS` with options such as `{"divergence": "js"}`.

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
