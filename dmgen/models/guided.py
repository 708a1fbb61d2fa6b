"""`GuidedLM`: a base whose next token is tilted by a prefix value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dmgen.models.samples import Samples


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
        parts = [
            self._scored(part, None if hidden is None else hidden[first : first + len(part)])
            for first, part in _parts(samples)
        ]
        return torch.cat(parts)

    def _scored(self, samples: Samples, hidden: Tensor | None) -> Tensor:
        hidden = self.base.hidden_states(samples) if hidden is None else hidden
        log_a = self.base.vocabulary_log_prob(samples, hidden=hidden)
        log_values = self.value.log_values(samples.tokens, hidden)
        log_p = tilted(self.value, log_a, log_values).log_softmax(-1)
        chosen = log_p.gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
        return torch.where(samples.mask, chosen, 0.0)


def tilted(value: NextTokenValue, logits: Tensor, log_values: Tensor) -> Tensor:
    """Return logits `(..., V)` with the log-values `(..., C + 1)` of each next token added."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    others = log_values[..., -1:]
    index = value.candidates.expand(*logits.shape[:-1], -1)
    added = (logits + others).scatter_add(-1, index, (log_values[..., :-1] - others).to(logits))
    return added


def _parts(samples: Samples, size: int = 64) -> list[tuple[int, Samples]]:
    """Return parts of the samples, each with its first row: the logits of all take much memory."""
    return [(i, samples[i : i + size]) for i in range(0, len(samples), size)]
