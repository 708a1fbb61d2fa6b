"""`LanguageModel`: the protocol that every model of texts follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmgen.models.samples import Samples


@runtime_checkable
class LanguageModel(Protocol):
    """A distribution over texts that can be sampled from and scored exactly.

    A text is the tokens after the prompt, up to and with the first EOS, or `max_new_tokens` tokens
    without one; both kinds are outcomes, so the probabilities of all texts sum to 1. Sampling is
    ancestral at temperature 1.
    """

    max_new_tokens: int

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
        """`n` texts, with the log-probability of the very law that each was drawn from."""
        ...

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Log-probability of each text in nats, float64 `(N,)`."""
        ...

    def token_log_prob(
        self,
        samples: Samples,
        *,
        batch_size: int | None = None,
        grad: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each token given those before it, `(N, T)`, 0 where masked.

        `hidden` is what `hidden_states` gave for the same samples, which may save a pass.
        """
        ...

    def hidden_states(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """What the model knows before each token: state t, of those before t, `(N, T, D)`.

        0 where masked.
        """
        ...

    def copy(self) -> Any:
        """An independent trainable copy."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of the model."""
        ...
