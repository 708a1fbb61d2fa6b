"""KL-controlled PPO: the objective with its value head, and the formulas per token."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmgen.constraints.constraint import Moment
from dmgen.constraints.feature import Feature
from dmgen.target import factor
from dmgen.target.ebm import EBM
from dmgen.training.batch import Batch
from dmgen.training.config import TrainerConfig
from dmgen.training.objective import Objective
from dmgen.training.objectives import constraint_reward
from dmgen.training.state import TrainState
from dmgen.validation import check_number

# The adaptive coefficient follows the KL's relative error up to this size, and whitening divides
# by a variance that is at least so large.
_MOST_ERROR, _LEAST_VARIANCE = 0.2, 1e-8


@dataclass(frozen=True)
class PPO(Objective):
    """Maximise `E_π[r] − β KL(π‖a)` by PPO; the fields are the options of `KLControl`.

    The objective's state holds the value head and β. Token columns are `log_old`, `log_base`,
    `values` (before each token) and `mask`; `prepare` adds `gae` (advantages before whitening) and
    `returns`.
    """

    kl_coefficient: float = 0.2
    kl_target: float | None = 6.0
    horizon: float = 10_000
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.1

    name = "kl-control"
    needs = frozenset({"batch"})

    def __post_init__(self) -> None:
        check_number("kl_coefficient", self.kl_coefficient, above=0)
        if self.kl_target is not None:
            check_number("kl_target", self.kl_target, above=0)
        check_number("horizon", self.horizon, above=0)
        check_number("gamma", self.gamma, least=0, most=1)
        check_number("gae_lambda", self.gae_lambda, least=0, most=1)
        check_number("clip", self.clip, above=0, most=1)
        check_number("value_coefficient", self.value_coefficient, least=0)

    def check(self, config: TrainerConfig) -> None:
        """Refuse settings of methods that weigh the texts of another distribution."""
        allowed: dict[str, tuple[tuple[Any, ...], str]] = {
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
                    f"KLControl has no {name}, got {getattr(config, name)!r}: {reason}; leave it "
                    "out"
                )
        if self.kl_target is not None:
            # With a shorter one, a few steps could change an adaptive β without bound.
            check_number("horizon", self.horizon, least=config.batch_size)

    def identity(self) -> dict[str, Any]:
        """Return the facts of `Objective`, and β if it is fixed."""
        beta = "adaptive" if self.kl_target is not None else self.kl_coefficient
        return super().identity() | {"kl_coefficient": beta}

    def init(self, policy: Any, target: EBM) -> dict[str, Tensor]:
        """Return β and the value head, a weight for each hidden unit and a bias, all 0."""
        if not hasattr(policy, "hidden_states"):
            raise TypeError(
                "KLControl predicts rewards from the policy's hidden_states(samples, grad=), and a "
                f"{type(policy).__name__} has none: use a CausalLM or TabularLM"
            )
        one = policy.sample(1, prompt=target.prompt, max_new_tokens=1, seed=0)
        width = policy.hidden_states(one).shape[-1]
        like = next(p for p in policy.parameters() if p.requires_grad)
        head = torch.zeros(width + 1, dtype=like.dtype, device=like.device)
        beta = torch.tensor(float(self.kl_coefficient), dtype=torch.float64)
        return {"value_head": torch.nn.Parameter(head), "kl_coefficient": beta}

    def draw_columns(self, state: TrainState, batch: Batch, target: EBM) -> dict[str, Tensor]:
        """Return the token columns of freshly drawn texts, from one pass of the base."""
        samples = batch.texts
        log_base = target.base.token_log_prob(samples).double()
        outside = (log_base == -math.inf).any(-1)
        if bool(outside.any()):
            i = int(outside.nonzero()[0])
            raise FloatingPointError(
                f"the policy drew text {i} ({samples.texts[i]!r}), to which the base assigns "
                "probability 0, so KL(π‖a) is infinite: begin with policy = base.copy()"
            )
        parts = [_look(state, part) for part in samples.split(state.micro_batch(samples))]
        log_old, values = (
            torch.cat([x.cpu().double() for x in columns]) for columns in zip(*parts, strict=True)
        )
        mask = samples.mask.double()
        return {"log_old": log_old, "log_base": log_base, "values": values, "mask": mask}

    def prepare(self, state: TrainState, batch: Batch, target: EBM) -> Batch:
        """Add the reward, the advantage of each token before whitening, and the return."""
        reward, columns = constraint_reward(target, batch), batch.tokens
        log_old, log_base, mask = (columns[k] for k in ("log_old", "log_base", "mask"))
        beta = float(state.objective["kl_coefficient"])
        rewards = token_rewards(reward, log_old, log_base, mask.bool(), beta)
        advantage = gae(rewards, columns["values"], self.gamma, self.gae_lambda)  # (N, T)
        returns = advantage + columns["values"]
        return replace(
            batch, reward=reward, tokens={**columns, "gae": advantage, "returns": returns}
        )

    def advantage(self, batch: Batch) -> Tensor:
        """Return the advantage of each token, whitened over all tokens of the batch, `(N, T)`."""
        return whiten(batch.tokens["gae"], batch.tokens["mask"].bool())

    def forward(self, state: TrainState, batch: Batch) -> Any:
        """Return log π and the value of each token with their graph, both `(n, T)`."""
        return _look(state, batch.texts, grad=True)

    def log_prob_of(self, output: Any) -> Tensor:
        """See `Objective`."""
        return output[0].sum(-1)  # type: ignore[no-any-return]

    def loss(self, batch: Batch, log_pi: Any, advantage: Tensor) -> Tensor:
        """Return the PPO loss of each text, the sum over its tokens, `(n,)`."""
        log_prob, values = log_pi
        columns = {k: v.to(log_prob) for k, v in batch.tokens.items()}
        terms = ppo_loss(
            log_prob,
            values,
            advantage.to(log_prob),
            columns["log_old"],
            columns["returns"],
            columns["values"],
            clip=self.clip,
            value_coefficient=self.value_coefficient,
        )
        return terms.sum(-1)

    def text_weights(self, batch: Batch) -> Tensor:
        """Return 1 / tokens of the batch: the loss is a mean over tokens, not over texts."""
        n_tokens = float(batch.tokens["mask"].sum())
        return torch.full((len(batch),), 1.0 / n_tokens, dtype=torch.float64)

    def text_advantage(self, batch: Batch, advantage: Tensor) -> Tensor:
        """Return the first token's advantage before whitening, that of the whole text, `(N,)`."""
        return batch.tokens["gae"][:, 0]

    def follow(self, state: TrainState, batch: Batch) -> dict[str, float]:
        """Return β and the batch's KL(π‖a), nats, and adapt β."""
        kl = float((batch.tokens["log_old"] - batch.tokens["log_base"]).sum(-1).mean())
        beta = float(state.objective["kl_coefficient"])
        if self.kl_target is not None:
            state.objective["kl_coefficient"].fill_(
                adapted(beta, kl, self.kl_target, self.horizon, len(batch))
            )
        return {"kl_coefficient": beta, "kl_policy_base": kl}

    def own_target(self, target: EBM) -> EBM:
        """Return the target `P_z(x) ∝ a(x) exp(r(x)/β)`, which matches a fixed β.

        For every π, `E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p_z)`, so that the maximum is at p_z.
        Moments keep their targets and have λ/β; the hard constraints together are one more binary
        feature, with λ = 1/β.

        Raises:
            ValueError: β is adaptive, or rewards are discounted.

        Source: Korbak et al. 2022, section 3 and Theorem 1.
        """
        if self.kl_target is not None:
            raise ValueError(
                f"with kl_target={self.kl_target:g} the KL coefficient changes during training (it "
                f"begins at {self.kl_coefficient:.4g}), so there is no fixed target: pass "
                "kl_target=None and a kl_coefficient"
            )
        if self.gamma != 1:
            raise ValueError(
                f"with gamma={self.gamma:g} later rewards count less, so E[r] − β KL(π‖a) is not "
                "maximised and a(x) exp(r(x)/β) is not reached: pass gamma=1"
            )
        beta = self.kl_coefficient
        soft = factor.soft_moments(target.constraints, target.lambdas)
        lambdas = target.lambdas[target.lambdas.isfinite()]
        if len(soft) < len(target.constraints):
            soft = [*soft, Moment(all_hard(target), 1.0)]
            lambdas = torch.cat([lambdas, torch.ones(1, dtype=torch.float64)])
        return EBM(
            target.base,
            soft,
            lambdas / beta,
            prompt=target.prompt,
            max_new_tokens=target.max_new_tokens,
        )


def _look(state: TrainState, samples: Any, grad: bool = False) -> tuple[Tensor, Tensor]:
    """Return log π of each token and the value before it, `(n, T)`, 0 where masked."""
    policy, head = state.policy, state.objective["value_head"]
    hidden = policy.hidden_states(samples, grad=grad)  # (n, T, D)
    log_pi = policy.token_log_prob(samples, grad=grad, hidden=hidden)
    with torch.set_grad_enabled(grad):
        values = hidden.to(head) @ head[:-1] + head[-1]
        return log_pi, torch.where(samples.mask.to(values.device), values, 0.0)


def all_hard(target: EBM) -> Feature:
    """Return the feature b(x): a text satisfies all hard constraints of `target`."""
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


def token_rewards(
    reward: Tensor, log_old: Tensor, log_base: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """Return `−β (log π_old(x_t) − log a(x_t))`, plus the reward r `(N,)` on the last token.

    Columns and result are `(N, T)`; a row sums to `r − β (log π_old(x) − log a(x))`.

    Source: Ziegler et al. 2019, section 2.
    """
    rewards = torch.where(mask, kl_coefficient * (log_base - log_old), 0.0)
    rewards[torch.arange(len(mask)), mask.sum(-1) - 1] += reward
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Return `Â_t = Σ_l (γλ)^l δ_{t+l}`, `δ_t = r_t + γ V_{t+1} − V_t`, `(N, T)`; V = 0 at the end.

    Rewards r_t and values V_t are `(N, T)`, 0 after the end of a text.

    Source: Schulman et al. 2016, eq. 16.
    """
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    advantage = torch.zeros_like(deltas)
    later = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        later = deltas[:, t] + gamma * gae_lambda * later
        advantage[:, t] = later
    return advantage


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return `(x − mean) / sqrt(var + 1e-8)` over the entries with mask, 0 elsewhere, `(N, T)`."""
    entries = x[mask]
    white = (x - entries.mean()) / torch.sqrt(entries.var(correction=0) + _LEAST_VARIANCE)
    return torch.where(mask, white, 0.0)


def ppo_loss(
    log_pi: Tensor,
    values: Tensor,
    advantage: Tensor,
    log_old: Tensor,
    returns: Tensor,
    old_values: Tensor,
    *,
    clip: float,
    value_coefficient: float,
) -> Tensor:
    """Return the loss of each token; only `log_pi` and `values` are differentiated.

    `max(−Âρ, −Â clip(ρ, 1 ± c)) + ½ v max((V − G)², (clip(V, V_old ± c) − G)²)`, ρ = π/π_old, with
    the returns G, `clip` c and `value_coefficient` v; all columns are `(N, T)`.

    Source: Schulman et al. 2017, eq. 7, negated; value loss of Ziegler et al. 2019.
    """
    ratio = torch.exp(log_pi - log_old)
    of_policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    near = old_values + (values - old_values).clamp(-clip, clip)
    of_value = torch.maximum((values - returns).square(), (near - returns).square())
    return of_policy + 0.5 * value_coefficient * of_value


def adapted(coefficient: float, kl: float, kl_target: float, horizon: float, n_texts: int) -> float:
    """Return the next KL coefficient, `β (1 + clip(KL/kl_target − 1, ±0.2) · n_texts/horizon)`.

    Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / kl_target - 1, -_MOST_ERROR), _MOST_ERROR)
    return coefficient * (1 + error * n_texts / horizon)
