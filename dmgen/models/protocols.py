"""`Sampler` and `LanguageModel`: the protocols of models of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmgen.models.samples import Samples

# From the tokens of texts so far `(n, t)`, the states before the next token `(n, D)` and its logits
# `(n, V)` to other logits `(n, V)`.
Guide = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@runtime_checkable
class Sampler(Protocol):
    """A distribution over texts that can be sampled from; it can be a proposal, not a policy.

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
        """Draw `n` texts, each with its log-probability under the distribution it was drawn from.

        Args:
            n: number of texts.
            prompt: the text before.
            max_new_tokens: longest text in tokens; None takes the model's default.
            seed: seed of the draw; text i is the same for every `batch_size`.
            generator: source of randomness, instead of `seed`.
            batch_size: texts decoded side by side; None chooses by memory.
        """
        ...


@runtime_checkable
class LanguageModel(Sampler, Protocol):
    """A distribution over texts that can be sampled from, scored exactly and trained."""

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of each text in nats, float64 `(N,)`."""
        ...

    def token_log_prob(
        self,
        samples: Samples,
        *,
        batch_size: int | None = None,
        grad: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of each token given those before it, nats.

        Args:
            samples: texts to score, by their stored ids.
            batch_size: texts per forward pass; None chooses by memory.
            grad: keep the graph.
            hidden: the `hidden_states` of the same samples, which may save a forward pass.

        Returns:
            `(N, T)`, 0 where masked.
        """
        ...

    def hidden_states(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the state before each token, `(N, T, D)`, 0 where masked.

        State t depends on the prompt and on the tokens before t only.
        """
        ...

    def copy(self) -> Any:
        """Return an independent trainable copy."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the trainable parameters."""
        ...


class TokenModel(LanguageModel, Protocol):
    """A language model whose distribution over each next token can be read and changed.

    Attributes:
        vocab_size: the number of ids.
        eos_id: the id that ends a text, or None.
        output_layer: the linear map from hidden states to logits, or None if there is none.
    """

    vocab_size: int
    eos_id: int | None
    output_layer: Any | None

    def decode(self, tokens: Tensor, shown: Tensor) -> list[str]:
        """Return the text of the shown tokens of each row, both `(N, T)`."""
        ...

    def vocabulary_log_prob(
        self, samples: Samples, *, hidden: Tensor | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of every token at each position, `(N, T, V)`, nats."""
        ...
