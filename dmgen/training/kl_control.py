"""KL-controlled PPO: the objective, with a value head and a KL coefficient of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from dmgen.training.ppo import adapted, gae, ppo_loss, token_rewards, whiten
from dmgen.training.state import TrainState
from dmgen.validation import check_number

__all__ = ["PPO"]


@dataclass(frozen=True)
class PPO(Objective):
    """Maximise `E_π[r] − β KL(π‖a)` by PPO; see `KLControl`, whose options these are.

    Its own state holds the weights of the value head and β. Its token columns are `log_old` and
    `log_base` (nats), `values` (the value head before each token) and `mask`; `prepare` adds
    `gae` (the advantage of each token before whitening) and `returns`.
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
        """Refuse what belongs to methods that weigh the texts of another distribution."""
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
            # With a shorter one, a few steps would carry an adaptive β anywhere.
            check_number("horizon", self.horizon, least=config.batch_size)

    def identity(self) -> dict[str, Any]:
        """See `Objective`: β too where it is fixed."""
        beta = "adaptive" if self.kl_target is not None else self.kl_coefficient
        return super().identity() | {"kl_coefficient": beta}

    def init(self, policy: Any, target: EBM) -> dict[str, Tensor]:
        """Return the value head, at 0: a weight for each hidden unit, and a bias; and β.

        Raises:
            TypeError: the policy has no hidden states.
        """
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
        """Return the token columns of freshly drawn texts; one pass of the base gives log a."""
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
        """Add the reward, the advantage of each token before whitening, and the returns."""
        reward, columns = constraint_reward(target, batch), batch.tokens
        log_old, log_base, mask = (columns[k] for k in ("log_old", "log_base", "mask"))
        beta = float(state.objective["kl_coefficient"])
        rewards = token_rewards(reward, log_old, log_base, mask.bool(), beta)
        advantage = gae(rewards, columns["values"], self.gamma, self.gae_lambda)  # (N, T)
        returns = advantage + columns["values"]
        return batch.with_(reward=reward, tokens={**columns, "gae": advantage, "returns": returns})

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
        """Return the advantage of the first token before whitening, `(N,)`.

        That is the return of the whole text beyond the expected one.
        """
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
        """Return the distribution `P_z(x) ∝ a(x) exp(r(x)/β)` that a fixed β leads to.

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
                f"begins at {self.kl_coefficient:.4g}), so what is maximised changes all the time "
                "and there is no fixed target: pass kl_target=None and a kl_coefficient"
            )
        if self.gamma != 1:
            raise ValueError(
                f"with gamma={self.gamma:g} what comes later counts less, so it is not "
                "E[r] − β KL(π‖a) that is maximised, nor a(x) exp(r(x)/β) reached: pass gamma=1"
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
    """Return the feature b(x), that a text satisfies all hard constraints of `target`."""
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
