"""What a batch is drawn from: rows of one draw, mixtures with the base, and when q moves to π."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates import weights as log_weights
from dmgen.models.protocols import LanguageModel
from dmgen.models.samples import Samples
from dmgen.training.config import TrainerConfig

# A one-sided 95 % test: the policy must be closer to the target than the proposal is by this many
# standard errors, on at least this effective number of texts.
_CLOSER = 1.645
_MIN_ESS = 20.0
# They are compared on the texts of so many rounds of `proposal_every` steps: older ones tell of a
# policy that is gone.
_MOST_ROUNDS = 20


def draw_rows(
    parts: Sequence[tuple[LanguageModel, int]],
    rows: range,
    *,
    prompt: str,
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[tuple[LanguageModel, Samples]]:
    """The texts of `rows` of one draw that takes so many texts from each model, in their order.

    Text i depends on row i of the uniforms alone, so the texts of several processes together are
    those that one process would draw; the generator ends where it would have ended there.
    """
    drawn = []
    first = 0
    for model, n in parts:
        start, stop = (min(max(edge - first, 0), n) for edge in (rows.start, rows.stop))
        _skip(start, max_new_tokens, generator)
        if start < stop:
            texts = model.sample(
                stop - start, prompt=prompt, max_new_tokens=max_new_tokens, generator=generator
            )
            drawn.append((model, texts))
        _skip(n - stop, max_new_tokens, generator)
        first += n
    return drawn


def _skip(n: int, length: int, generator: torch.Generator) -> None:
    """Passes over the uniforms of `n` texts."""
    if n > 0:
        torch.rand(n, length, generator=generator, dtype=torch.float64, device=generator.device)


def draw_mixture(
    drawn: Sequence[tuple[LanguageModel, Samples]],
    base: LanguageModel,
    q: LanguageModel,
    share: float,
) -> tuple[Samples, Tensor, Tensor]:
    """The texts drawn from q and from the base as one batch from `(1 − share)·q + share·a`.

    Of several processes one can have texts of the base alone; they are of the mixture all the same.

    Returns:
        The samples, whose `log_prob` is that of the mixture; log a and log q, `(N,)`.
    """
    log_base = torch.cat([s.log_prob if m is base else base.log_prob(s) for m, s in drawn])
    log_q = torch.cat([s.log_prob if m is q else q.log_prob(s) for m, s in drawn])
    log_mixture = _mixture(log_q, log_base, share)
    return replace(Samples.cat([s for _, s in drawn]), log_prob=log_mixture), log_base, log_q


def _mixture(log_q: Tensor, log_base: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_q + math.log1p(-share), log_base + math.log(share))


def copy_in_one_block(policy: Any) -> Any:
    """A copy of the policy whose weights lie in one block of memory.

    One by one they would take the gaps that a step's activations have left in the heap, and those
    of the next step would need more room.
    """
    copied = policy.copy()
    weights = list(copied.parameters())
    if len({(p.dtype, p.device) for p in weights}) == 1:
        block = torch.cat([p.detach().flatten() for p in weights])
        parts = torch.split(block, [p.numel() for p in weights])
        for p, part in zip(weights, parts, strict=True):
            p.data = part.view_as(p)
    return copied


class Comparison:
    """What the texts of the last steps, since q was replaced, say of policy and proposal.

    Args:
        rule: "kl" or "tv", see `is_closer`; others compare nothing.
        config: settings of the run.
    """

    def __init__(self, rule: str, config: TrainerConfig) -> None:
        # Of whole texts: not always base_share itself.
        self.rule, self.share = rule, config.n_base / config.batch_size
        self.most = _MOST_ROUNDS * config.proposal_every * config.batch_size
        self.clear()

    def clear(self) -> None:
        """Forgets what was seen: the proposal is another one."""
        self.seen = torch.empty(2, 0, dtype=torch.float64)

    def add(
        self, log_w: Tensor, log_q: Tensor, log_policy: Tensor, log_base: Tensor | None
    ) -> None:
        """Takes note of a batch, all `(N,)`, nats.

        With a share of the base, q is the mixture that texts are drawn from, and π makes another
        one: the two mixtures are compared. So there log a must be known.
        """
        if self.rule not in ("kl", "tv"):
            return
        if log_base is not None:
            log_policy = _mixture(log_policy, log_base, self.share)
        batch = torch.stack([log_w, log_policy - log_q])
        self.seen = torch.cat([self.seen, batch], dim=1)[:, -self.most :]

    def is_won(self, log_z: float) -> bool:
        """Whether the policy is measurably closer to the target."""
        log_w, log_ratio = self.seen
        return bool(log_w.numel()) and is_closer(self.rule, log_w, log_ratio, log_z)


def is_closer(rule: str, log_w: Tensor, log_ratio: Tensor, log_z: float) -> bool:
    """Whether the policy is measurably closer to the target than the proposal is.

    A paired test on texts of the proposal, one-sided at 95 %, not a bare comparison.

    Args:
        rule: the divergence, "kl" (KL(p‖·)) or "tv".
        log_w: log P − log q, `(N,)`, nats.
        log_ratio: log π − log q, `(N,)`, nats.
        log_z: log Z, nats.
    """
    if log_weights.ess(log_w) < _MIN_ESS:
        return False
    gain, stderr = _gain(rule, log_w, log_ratio, log_z)
    return gain > _CLOSER * stderr


def _gain(rule: str, log_w: Tensor, log_ratio: Tensor, log_z: float) -> tuple[float, float]:
    """D(p, q) − D(p, π) with its standard error, from the same texts; positive if π is closer."""
    if rule == "kl":
        value, stderr = log_weights.mean(log_w, log_ratio)
        return float(value), float(stderr)
    # The bounded form of TV: the plain one is heavy-tailed where π/q is large.
    g, u = torch.exp(log_w - log_z), torch.exp(log_ratio)
    terms = (g - 1).clamp(min=0) - (g - u).clamp(min=0)
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))
