"""`KLControl`: PPO on a reward less a price on KL(π‖a), the reward-maximising baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from dmgen.constraints.constraint import Moment
from dmgen.constraints.feature import Feature
from dmgen.models.samples import Samples
from dmgen.target import factor
from dmgen.target.ebm import EBM
from dmgen.training.config import TrainerConfig
from dmgen.training.methods import Reinforce
from dmgen.training.ppo import adapted, gae, ppo_loss, token_rewards, whiten

# The least positive number.
_TINY = math.ulp(0.0)


@dataclass(frozen=True, eq=False)
class Rollout:
    """This process's texts as they stood when drawn: float64 `(n, T)`, 0 where `mask` is false.

    Attributes:
        mask: bool, true for the tokens of the text.
        log_old: log π of each token under the policy that drew it, nats.
        log_base: log a of each token, nats.
        values: what the value head expected before each token, in the reward's unit.
    """

    mask: Tensor
    log_old: Tensor
    log_base: Tensor
    values: Tensor


class KLControl(Reinforce):
    """Maximises `E_π[r] − β KL(π‖a)` by PPO, r = b(x) + λ·φ(x) as in `Reinforce`, on-policy.

    Each token pays `β (log π(x_t) − log a(x_t))`, the last one earns r. A value head, linear on the
    hidden states before each token, says what was to be expected, and generalised advantage
    estimation what each token was better for; its loss trains the shared trunk too.
    `config.reuse` is the number of PPO passes over a batch, `config.batch_size` its texts.

    At a fixed β it matches a distribution of its own, `own_target()`, which is not `target`: what
    is hard there is only paid for here. With `kl_target` β moves by itself,
    `β ← β (1 + clip(KL/kl_target − 1, ±0.2) · batch_size/horizon)` after each step.

    Rows of metrics have two columns more: `kl_coefficient`, the β of the step, and
    `kl_policy_base`, the batch's mean of log π − log a, nats.

    Args:
        policy: the model to train; it must have `hidden_states(samples, *, grad)`.
        target: its constraints are what is rewarded.
        config: settings of the run; those of importance weights do not apply and are refused.
        proposal: must be None, since texts are drawn from the policy.
        kl_coefficient: β, > 0, in units of reward a nat; where it begins if it is adaptive.
        kl_target: the KL(π‖a) that β is steered to, nats, > 0; None keeps β fixed.
        horizon: in so many texts β moves by a fifth at most; at least a batch.
        gamma: discount of rewards a token, in [0, 1].
        gae_lambda: λ of generalised advantage estimation, in [0, 1]; 1 does not trust the values.
        clip: the ratio π/π_old counts within 1 ± clip, and the values move by `clip` a batch at
            most; in (0, 1].
        value_coefficient: weight of the value loss, >= 0.

    Raises:
        TypeError: the policy has no hidden states, or an option is not a number.
        ValueError: an option is out of its range, a setting asks for something else than on-policy
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
        config = config or TrainerConfig()
        _check_on_policy(config, proposal)
        for name, value, least, most in (
            ("kl_coefficient", kl_coefficient, _TINY, math.inf),
            ("kl_target", _TINY if kl_target is None else kl_target, _TINY, math.inf),
            # With a shorter one, a few steps would carry an adaptive β anywhere.
            ("horizon", horizon, _TINY if kl_target is None else config.batch_size, math.inf),
            ("gamma", gamma, 0.0, 1.0),
            ("gae_lambda", gae_lambda, 0.0, 1.0),
            ("clip", clip, _TINY, 1.0),
            ("value_coefficient", value_coefficient, 0.0, math.inf),
        ):
            _check_range(name, value, least, most)
        if not hasattr(policy, "hidden_states"):
            raise TypeError(
                "KLControl predicts rewards from the policy's hidden_states(samples, grad=), and a "
                f"{type(policy).__name__} has none: use a CausalLM or TabularLM"
            )
        super().__init__(policy, target, config)
        self.kl_target, self.horizon = kl_target, horizon
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip, self.value_coefficient = clip, value_coefficient
        one = policy.sample(1, prompt=target.prompt, max_new_tokens=1, seed=0)
        width = policy.hidden_states(one).shape[-1]
        like = self.parameters[0]
        # A weight for each hidden unit, and a bias.
        self.value_head = torch.nn.Parameter(
            torch.zeros(width + 1, dtype=like.dtype, device=like.device)
        )
        self.parameters.append(self.value_head)
        self.optimizer.add_param_group({"params": [self.value_head]})
        self._coefficient = torch.tensor(float(kl_coefficient), dtype=torch.float64)
        self.own_state["value_head"] = self.value_head
        if kl_target is not None:
            self.own_state["kl_coefficient"] = self._coefficient
        self._rollout: Rollout | None = None

    @property
    def kl_coefficient(self) -> float:
        """β by now, in units of reward a nat."""
        return float(self._coefficient)

    def own_target(self) -> EBM:
        """The distribution `P_z(x) ∝ a(x) exp(r(x)/β)` that a fixed β leads to.

        For every π, `E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p_z)`: to maximise the one is to
        minimise the reverse KL divergence to the other. Moments keep their targets and have λ/β;
        the hard constraints together are one more binary feature, with λ = 1/β.

        Returns:
            A target over the same base and prompt.

        Raises:
            ValueError: β is adaptive, or rewards are discounted.

        Source: Korbak et al. 2022, section 3 and Theorem 1.
        """
        if self.kl_target is not None:
            raise ValueError(
                f"with kl_target={self.kl_target:g} the KL coefficient moves with the policy (it "
                f"is {self.kl_coefficient:.4g} now), so what is maximised changes all the time and "
                "there is no fixed target: pass kl_target=None and a kl_coefficient"
            )
        if self.gamma != 1:
            raise ValueError(
                f"with gamma={self.gamma:g} what comes later counts less, so it is not "
                "E[r] − β KL(π‖a) that is maximised, nor a(x) exp(r(x)/β) reached: pass gamma=1"
            )
        target, beta = self.target, self.kl_coefficient
        soft = factor.soft_moments(target.constraints, target.lambdas)
        lambdas = target.lambdas[target.lambdas.isfinite()]
        if len(soft) < len(target.constraints):
            soft = [*soft, Moment(_all_hard(target), 1.0)]
            lambdas = torch.cat([lambdas, torch.ones(1, dtype=torch.float64)])
        return EBM(
            target.base,
            soft,
            lambdas / beta,
            prompt=target.prompt,
            max_new_tokens=target.max_new_tokens,
        )

    def _step(self) -> dict[str, Any]:
        row = super()._step()
        own = self._drawn()
        kl = float(self.processes.gather((own.log_old - own.log_base).sum(-1)).mean())
        row |= {"kl_coefficient": self.kl_coefficient, "kl_policy_base": kl}
        if self.kl_target is not None:
            self._coefficient.fill_(
                adapted(
                    self.kl_coefficient, kl, self.kl_target, self.horizon, self.config.batch_size
                )
            )
        return row

    def _draw(self) -> tuple[Samples, Tensor | None, Tensor | None]:
        """As `Trainer._draw`; the one scoring pass of the base gives log a of each token."""
        samples, _, log_policy = super()._draw()
        self._rollout = self._roll_out(samples)
        return samples, self._rollout.log_base.sum(-1), log_policy

    def _roll_out(self, samples: Samples) -> Rollout:
        log_base = self.target.base.token_log_prob(samples).double()
        parts = samples.split(self._micro_batch(samples))
        log_old, values = (
            torch.cat([x.cpu().double() for x in columns])
            for columns in zip(*(self._look(part) for part in parts), strict=True)
        )
        infinite = (log_base == -math.inf).any(-1)
        if bool(infinite.any()):
            i = int(infinite.nonzero()[0])
            raise FloatingPointError(
                f"the policy drew text {i} ({samples.texts[i]!r}), which the base cannot say, so "
                "KL(π‖a) is infinite: begin with policy = base.copy()"
            )
        return Rollout(samples.mask, log_old, log_base, values)

    def _drawn(self) -> Rollout:
        return cast(Rollout, self._rollout)  # `_draw` comes first in every step

    def _look(self, samples: Samples, grad: bool = False) -> tuple[Tensor, Tensor]:
        """log π of each token and the value before it, `(n, T)`, 0 where masked."""
        hidden = self.policy.hidden_states(samples, grad=grad)  # (n, T, D)
        log_pi = self.policy.token_log_prob(samples, grad=grad, hidden=hidden)
        with torch.set_grad_enabled(grad):
            read = hidden.to(self.value_head)
            values = read @ self.value_head[:-1] + self.value_head[-1]
            return log_pi, torch.where(samples.mask.to(values.device), values, 0.0)

    def _backward(
        self,
        samples: Samples,
        log_q: Tensor,
        log_score: Tensor,
        log_policy: Tensor | None,
        reward: Tensor | None,
        log_z: float,
    ) -> tuple[Tensor, Tensor]:
        """Sets the gradient of the PPO loss, the mean over all tokens of the batch.

        Returns log π_old and, of each text, the advantage of its first token before whitening, both
        `(N,)`: what the whole text earned beyond what was expected.
        """
        own, mine = self._drawn(), slice(self.rows.start, self.rows.stop)
        rewards = token_rewards(
            cast(Tensor, reward)[mine], own.log_old, own.log_base, own.mask, self.kl_coefficient
        )
        advantage = gae(rewards, own.values, self.gamma, self.gae_lambda)  # (n, T)
        returns = advantage + own.values
        of_all, seen = (self.processes.gather(x) for x in (advantage, own.mask.double()))  # (N, T)
        white, n_tokens = whiten(of_all, seen.bool())[mine], float(seen.sum())
        self.optimizer.zero_grad(set_to_none=True)
        for part in torch.split(torch.arange(len(samples)), self._micro_batch(samples)):
            texts = samples[part]
            log_pi, values = self._look(texts, grad=True)
            fixed = (white, own.log_old, returns, own.values)
            loss = ppo_loss(
                log_pi,
                values,
                *(x[part].to(log_pi) for x in fixed),
                clip=self.clip,
                value_coefficient=self.value_coefficient,
            )
            # Not the mean of each part: parts hold unequal numbers of tokens. Padding adds 0.
            torch.autograd.backward(loss.sum() / n_tokens)
        self.processes.sum_gradients(self.parameters)
        return log_q, of_all[:, 0]


def _all_hard(target: EBM) -> Feature:
    """b(x): whether a text satisfies all hard constraints of `target`."""
    pairs = list(factor.with_lambdas(target.constraints, target.lambdas))
    hard = [constraint for constraint, weight in pairs if math.isinf(weight)]
    lambdas = target.lambdas[target.lambdas.isinf()]
    features = {f.name: f for constraint in hard for f in constraint.features}

    def holds(texts: list[str], prompts: list[str]) -> Tensor:
        values = {name: feature(texts, prompts) for name, feature in features.items()}
        return factor.log_factor(hard, lambdas, values) > -math.inf

    names = ", ".join(
        f"{c.name} = 0" if isinstance(c, Moment) and weight < 0 else c.name
        for c, weight in pairs
        if math.isinf(weight)
    )
    return Feature(holds, f"all of: {names}", batched=True, with_prompt=True, binary=True)


def _check_on_policy(config: TrainerConfig, proposal: Any) -> None:
    """Refuses what belongs to methods that weigh the texts of another law."""
    if proposal is not None:
        raise ValueError("KLControl draws from the policy itself: give no proposal")
    allowed: dict[str, tuple[Any, str]] = {
        "proposal_rule": ((None, "policy"), "it draws from the policy itself"),
        "baseline": ((None,), "its baseline is the value head"),
        "backward_size": ((None,), "its advantages belong to tokens, not to texts"),
        "diagnose_every": ((None,), "its advantages belong to tokens, not to texts"),
        "base_share": ((0,), "it draws from the policy itself"),
        "first_batches_from_fit": ((False,), "it draws from the policy itself"),
    }
    for name, (values, reason) in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"KLControl has no {name}, got {getattr(config, name)!r}: {reason}; leave it out"
            )


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (least <= value <= most and math.isfinite(value)):
        low = "positive" if least == _TINY else f"at least {least:g}"
        high = f" and at most {most:g}" if math.isfinite(most) else " and finite"
        raise ValueError(f"{name} must be {low}{high}, got {value!r}")
