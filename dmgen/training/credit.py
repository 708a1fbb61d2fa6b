"""Credit by token: the gradient of KL(p‖π) with a prefix value, of lower variance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmgen.models.guided import GuidedLM, base_columns, tilted
from dmgen.models.hf.precision import autocast
from dmgen.models.hf.soft_target import soft_cross_entropy
from dmgen.target.ebm import EBM
from dmgen.target.prefix_value import PrefixValue
from dmgen.training.batch import Batch
from dmgen.training.config import TrainerConfig
from dmgen.training.objective import Objective
from dmgen.training.objectives import Matching, importance_weight
from dmgen.training.state import TrainState


@dataclass(frozen=True)
class TokenCredit(Objective):
    """The gradient of `−KL(p‖π)` as a sum over tokens, unbiased at λ = 1 for any prefix value.

    With `r_t = (a/q)(x_<t) h̃(x_<t) / Z` before token t, P/(Zq) after the last one, and an anchor m,

        Σ_t r_t Σ_v (m − π)(v | x_<t) ∇log π(v | x_<t) + (Σ_{k≥t} λ^{k−t} e_k) ∇log π(x_t | x_<t)
        e_k = r_{k+1} − r_k (m/q)(x_k | x_<k).

    h̃ is the prefix value one token ahead, `Σ_v a(v | x_<t) ĥ(x_<t v)`. The first part is exact over
    the vocabulary, so the tokens that the constraints say nothing about are pulled to the base (or
    to p̂) without noise; the second is 0 wherever the value foresaw everything. The weight of a text
    itself, as in GDC++, is the case of ĥ = Z with m = π, up to the surprises of later tokens.

    Attributes:
        inner: the objective whose gradient it is, one that descends KL(p‖π).
        anchor: "policy" for m = π (the first part is 0: generalised advantage estimation), "base"
            for m = a, "value" for m = p̂, the guided base.
        gae_lambda: λ in [0, 1]; below 1 trades bias, if ĥ is wrong, for variance.

    Source: Schulman et al. 2016 (generalised advantage estimation); Jiang and Li 2016 (the doubly
    robust form); the prefix value is the twist of Naesseth et al. 2019.
    """

    inner: Matching
    anchor: str = "value"
    gae_lambda: float = 1.0
    per_token = True
    is_weighted = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the inner objective."""
        return self.inner.name

    @property
    def proposal_rule(self) -> str:  # type: ignore[override]
        """The rule of the inner objective."""
        return self.inner.proposal_rule

    @property
    def needs(self) -> frozenset[str]:
        """See `Objective`."""
        return frozenset({"base_hidden"})

    def identity(self) -> dict[str, Any]:
        """See `Objective`."""
        return super().identity() | {"anchor": self.anchor, "gae_lambda": self.gae_lambda}

    def init(self, policy: Any, target: EBM) -> dict[str, Tensor]:
        """Return the tensors of the target's prefix value, copied."""
        return {name: x.clone() for name, x in PrefixValue.of(target).tensors().items()}

    def draw_columns(self, state: TrainState, batch: Batch, target: EBM) -> dict[str, Tensor]:
        """Return log a of each token, of the prefixes under q, and log-values, each `(n, T)`."""
        value, samples = PrefixValue.from_tensors(state.objective), batch.texts
        hidden = batch.column("base_hidden")
        log_a, log_drawn, log_ahead = base_columns(target.base, value, samples, hidden)

        def prefixes(model: Any) -> Tensor:
            if model is target.base:
                tokens = log_a
            elif isinstance(model, GuidedLM) and model.base is target.base:
                tokens = log_a + log_drawn - log_ahead
            else:
                tokens = model.token_log_prob(samples)
            return tokens.double().cumsum(1)

        terms = [prefixes(model) + math.log(share) for model, share in batch.sources]
        columns = {
            "log_base": log_a.double(),
            "prefix_log_q": torch.logsumexp(torch.stack(terms), 0),
            "log_drawn": log_drawn.double(),
            "log_ahead": log_ahead.double(),
            "mask": samples.mask.double(),
        }
        if self.anchor == "policy":
            columns["log_policy"] = state.policy.token_log_prob(samples).double()
        return columns

    def prepare(self, state: TrainState, batch: Batch, target: EBM) -> Batch:
        """Add the prefix weights r and the credit of each token."""
        log_m = batch.tokens["log_base"]
        if self.anchor == "value":
            log_m = log_m + batch.tokens["log_drawn"] - batch.tokens["log_ahead"]
        elif self.anchor == "policy":
            log_m = batch.tokens["log_policy"]
        weights, credit = prefix_credit(batch, log_m, self.gae_lambda)
        return replace(batch, tokens={"weight": weights, "credit": credit})

    def advantage(self, batch: Batch) -> Tensor:
        """Return the credit of each token, float64 `(N, T)`."""
        return batch.tokens["credit"]

    def forward(self, state: TrainState, batch: Batch) -> Any:
        """Return the loss `(n,)` with its graph and log π of each text `(n,)`."""
        if self.anchor == "policy":
            log_pi = state.policy.token_log_prob(batch.texts, grad=True)
            loss = -(batch.tokens["credit"].to(log_pi) * log_pi).sum(-1)
        else:
            value = PrefixValue.from_tensors(state.objective) if self.anchor == "value" else None
            loss, log_pi = _anchored_loss(state.policy, batch, value)
        return loss, log_pi.detach().sum(-1, dtype=torch.float64)

    def log_prob_of(self, output: Any) -> Tensor:
        """See `Objective`."""
        log_prob: Tensor = output[1]
        return log_prob

    def loss(self, batch: Batch, log_pi: Any, advantage: Tensor) -> Tensor:
        """Return the loss of each text, `(n,)`, which `forward` has made."""
        loss: Tensor = log_pi[0]
        return loss


def with_credit(objective: Objective, config: TrainerConfig) -> Objective:
    """Return the objective with the credit that the configuration chooses.

    Raises:
        ValueError: credit by token is chosen for an objective that does not descend KL(p‖π), or
            with settings that need one advantage a text.
    """
    if config.credit == "text":
        return objective
    if not isinstance(objective, Matching) or objective.gain is not importance_weight:
        raise ValueError(
            f'credit "token" is for DPG, GDC and GDC++, which descend KL(p‖π), not for '
            f"{objective.name!r}: leave credit out"
        )
    for setting in ("baseline", "backward_size", "diagnose_every"):
        if getattr(config, setting) is not None:
            raise ValueError(
                f'{setting} goes with one advantage a text, not with credit "token": leave one out'
            )
    if config.anchor == "policy" and config.reuse > 1:
        raise ValueError('anchor "policy" weighs by the policy of the draw: set reuse to 1')
    return TokenCredit(objective, config.anchor, config.gae_lambda)


def prefix_credit(batch: Batch, log_m: Tensor, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return r before each token and its credit `Σ_{k≥t} λ^{k−t} e_k`, float64 `(N, T)`, 0 masked.

    Args:
        batch: with log-weights, log Z, and the token columns of `TokenCredit.draw_columns`.
        log_m: log m of each token under the anchor, `(N, T)`, nats.
        gae_lambda: λ.
    """
    log_q, mask = batch.tokens["prefix_log_q"], batch.tokens["mask"] > 0
    before = torch.nn.functional.pad((batch.tokens["log_base"].cumsum(1) - log_q)[:, :-1], (1, 0))
    log_z = batch.column("log_z").unsqueeze(-1)
    weights = torch.exp(before + batch.tokens["log_ahead"] - log_z)
    of_token = log_q - torch.nn.functional.pad(log_q[:, :-1], (1, 0))
    expected = weights * torch.exp(log_m - of_token)
    goes_on = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    final = torch.exp(batch.log_w - batch.column("log_z")).unsqueeze(-1)
    reached = torch.where(goes_on, torch.nn.functional.pad(weights[:, 1:], (0, 1)), final)
    surprise = torch.where(mask, reached - expected, 0.0)
    credit, later = torch.zeros_like(surprise), surprise.new_zeros(len(surprise))
    for t in range(surprise.shape[1] - 1, -1, -1):
        later = surprise[:, t] + gae_lambda * later
        credit[:, t] = later
    finite = torch.where(mask, weights, 0.0), torch.where(mask, credit, 0.0)
    if not all(bool(x.isfinite().all()) for x in finite):
        raise FloatingPointError(
            "the weight of a prefix is not finite: the proposal assigns it too little probability"
        )
    return finite


def _anchored_loss(policy: Any, batch: Batch, value: PrefixValue | None) -> tuple[Tensor, Tensor]:
    """Return the loss of each text `(n,)` and log π of each token `(n, T)` for an anchor m."""
    samples, states = batch.texts, batch.column("base_hidden")
    soft, hard = batch.tokens["weight"], batch.tokens["credit"]
    if policy.output_layer is None or batch.base.output_layer is None:
        return _plain_loss(policy, batch, value)
    device, mask = policy.device, samples.mask
    hidden = policy.hidden_states(samples, grad=True)[mask.to(device)]
    tilt = None
    if value is not None:
        log_values = value.log_values(samples.tokens, states)[mask]
        tilt = value.candidates.to(device), (log_values[:, :-1] - log_values[:, -1:]).to(device)
    rows = (x[mask].to(device) for x in (soft.float(), hard.float(), samples.tokens))
    with autocast(device, policy.dtype):
        losses, log_pi = soft_cross_entropy(
            hidden, policy.output_layer, states[mask].to(device), batch.base.output_layer, tilt,
            *rows,
        )  # fmt: skip
    empty = torch.zeros(mask.shape, device=device)
    spread = (empty.masked_scatter(mask.to(device), x) for x in (losses, log_pi))
    loss, log_prob = spread
    return loss.sum(-1), log_prob.cpu()


def _plain_loss(policy: Any, batch: Batch, value: PrefixValue | None) -> tuple[Tensor, Tensor]:
    """Return `_anchored_loss` by its definition, from the whole vocabulary at once."""
    samples, states = batch.texts, batch.column("base_hidden")
    log_pi = policy.vocabulary_log_prob(samples, grad=True)
    log_m = batch.base.vocabulary_log_prob(samples, hidden=states).to(log_pi)
    if value is not None:
        log_values = value.log_values(samples.tokens, states).to(log_pi)
        log_m = tilted(value, log_m, log_values).log_softmax(-1)
    chosen = log_pi.gather(-1, samples.tokens.to(log_pi.device).unsqueeze(-1)).squeeze(-1)
    soft, hard = (batch.tokens[name].to(log_pi) for name in ("weight", "credit"))
    # A token of probability 0 under both has log π = -inf and no part in the sum.
    cross = torch.where(log_m == -math.inf, 0.0, log_m.exp() * log_pi).sum(-1)
    mask = samples.mask.to(log_pi.device)
    loss = torch.where(mask, -soft * cross - hard * chosen, 0.0).sum(-1)
    return loss, torch.where(mask, chosen, 0.0).detach().cpu()
