"""`GuidedLM`: a base whose next token is tilted by a prefix value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dmgen.models.samples import Samples

# Log-probabilities of a whole vocabulary in memory at a time.
_VOCABULARY_NUMBERS = 2**24


class NextTokenValue(Protocol):
    """Log-values of the texts that each next token would make, see `target.PrefixValue`."""

    @property
    def candidates(self) -> Tensor:
        """Ids of the C tokens with a value of their own."""
        ...

    def log_values(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return `(N, T, C + 1)` for tokens `(N, T)` and the states before them `(N, T, D)`."""
        ...

    def next_log_values(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return `(N, C + 1)` for the token after `tokens`, `(N, t)`."""
        ...

    def column(self, tokens: Tensor) -> Tensor:
        """Return the entry of `log_values` that belongs to each token."""
        ...


class GuidedLM:
    """The base guided by a prefix value: `p̂(v | x_<t) = a(v | x_<t) ĥ(x_<t v) / h̃(x_<t)`.

    `h̃(x_<t) = Σ_v a(v | x_<t) ĥ(x_<t v)` normalises each token, so texts are drawn one by one and
    scored exactly. If ĥ were exact, p̂ would be the target. It has nothing to train.

    Args:
        base: the language model a, with `hidden_states`, `vocabulary_log_prob` and a guide.
        value: ĥ of every next token.
    """

    def __init__(self, base: Any, value: NextTokenValue) -> None:
        self.base = base
        self.value = value
        self.max_new_tokens: int = base.max_new_tokens

    def sample(
        self,
        n: int,
        *,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Samples:
        """Draw `n` texts, see `Sampler.sample`."""

        def guide(tokens: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
            return tilted(self.value, logits, self.value.next_log_values(tokens, hidden))

        drawn: Samples = self.base.sample(
            n,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            guide=guide,
        )
        return drawn

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of each text in nats, float64 `(N,)`; it has no gradient."""
        return self.token_log_prob(samples, batch_size=batch_size).sum(-1, dtype=torch.float64)

    def token_log_prob(
        self,
        samples: Samples,
        *,
        batch_size: int | None = None,
        grad: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of each token, `(N, T)`, 0 where masked, without a graph."""
        hidden = self.base.hidden_states(samples) if hidden is None else hidden
        log_a, log_drawn, log_ahead = base_columns(self.base, self.value, samples, hidden)
        return log_a + log_drawn - log_ahead


def tilted(value: NextTokenValue, logits: Tensor, log_values: Tensor) -> Tensor:
    """Return logits `(..., V)` with the log-values `(..., C + 1)` of each next token added."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    others = log_values[..., -1:]
    index = value.candidates.expand(*logits.shape[:-1], -1)
    return (logits + others).scatter_add(-1, index, (log_values[..., :-1] - others).to(logits))


def base_columns(
    base: Any, value: NextTokenValue, samples: Samples, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log a, log ĥ after each token and log h̃ before it, each `(N, T)`, nats, 0 if masked.

    `hidden` are the base's states `(N, T, D)`.
    """
    size = max(1, _VOCABULARY_NUMBERS // (samples.tokens.shape[1] * base.vocab_size))
    columns = []
    for first in range(0, len(samples), size):
        part, states = samples[first : first + size], hidden[first : first + size]
        log_p = base.vocabulary_log_prob(part, hidden=states)
        log_values = value.log_values(part.tokens, states).to(log_p)
        drawn = log_values.gather(-1, value.column(part.tokens).unsqueeze(-1))
        # Σ_v a(v) ĥ(x v), with one ĥ for all tokens but the candidates.
        of_candidates = log_p[..., value.candidates].exp()
        fractions = torch.cat([of_candidates, 1 - of_candidates.sum(-1, keepdim=True)], -1)
        ahead = (fractions.clamp(min=0) * log_values.exp()).sum(-1).log()
        log_a = log_p.gather(-1, part.tokens.unsqueeze(-1)).squeeze(-1)
        columns.append([log_a, drawn.squeeze(-1), ahead])
    log_a, log_drawn, log_ahead = (
        torch.where(samples.mask, torch.cat(column), 0.0) for column in zip(*columns, strict=True)
    )
    return log_a, log_drawn, log_ahead
