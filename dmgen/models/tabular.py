"""`TabularLM`: a small language model whose texts can all be listed, for exact results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmgen.models.protocols import Guide
from dmgen.models.random_draws import draw_tokens, uniforms
from dmgen.models.samples import Samples, check_log_prob, mask_until_eos


class TabularLM:
    """A language model with one trainable row of logits per prefix.

    Args:
        vocab: V distinct strings; a text is its tokens joined without blanks, except the EOS.
        logits: float64 `(P, V)`, one row per prefix: first the empty prefix, then all prefixes of
            one token, of two, ..., of `max_new_tokens - 1`, each length in the order of base V.
        max_new_tokens: T, the length of a text without EOS.
        eos: the member of `vocab` that ends a text, or None.

    Raises:
        ValueError: `vocab` holds duplicates or lacks `eos`, or `logits` has another shape.
    """

    def __init__(
        self, vocab: Sequence[str], logits: Tensor, max_new_tokens: int, *, eos: str | None = None
    ) -> None:
        self.vocab = list(vocab)
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        v = len(self.vocab)
        if len(set(self.vocab)) != v or v < 1:
            raise ValueError(f"vocab must hold distinct tokens, got {self.vocab}")
        if eos is not None and eos not in self.vocab:
            raise ValueError(f"eos {eos!r} is not in vocab {self.vocab}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._eos_id = -1 if eos is None else self.vocab.index(eos)
        # First row of the prefixes of each length.
        self._offsets = torch.tensor([sum(v**k for k in range(t)) for t in range(max_new_tokens)])
        n_prefixes = sum(v**t for t in range(max_new_tokens))
        if tuple(logits.shape) != (n_prefixes, v):
            raise ValueError(
                f"logits must have shape ({n_prefixes}, {v}) for {v} tokens and texts of "
                f"{max_new_tokens}, got {tuple(logits.shape)}"
            )
        self.logits = torch.nn.Parameter(logits.detach().double().clone(), requires_grad=False)

    @classmethod
    def random(
        cls,
        vocab: Sequence[str],
        max_new_tokens: int,
        *,
        eos: str | None = None,
        scale: float = 1.0,
        seed: int = 0,
    ) -> TabularLM:
        """Return a model with independent normal logits of standard deviation `scale`."""
        v = len(vocab)
        generator = torch.Generator().manual_seed(seed)
        n_prefixes = sum(v**t for t in range(max_new_tokens))
        logits = torch.randn(n_prefixes, v, generator=generator, dtype=torch.float64)
        return cls(vocab, scale * logits, max_new_tokens, eos=eos)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self.vocab)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, or None."""
        return None if self.eos is None else self._eos_id

    # Its logits are a row of the table, not a linear map of a state.
    output_layer = None

    def decode(self, tokens: Tensor, shown: Tensor) -> list[str]:
        """Return the text of the shown tokens of each row, both `(N, T)`, without the EOS."""
        shown = shown & (tokens != self._eos_id)
        return [
            "".join(self.vocab[token] for token, keep in zip(row, kept, strict=True) if keep)
            for row, kept in zip(tokens.tolist(), shown.tolist(), strict=True)
        ]

    def vocabulary_log_prob(
        self, samples: Samples, *, hidden: Tensor | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of every token at each position, `(N, T, V)`, nats."""
        tokens = samples.tokens[:, : self.max_new_tokens].masked_fill(
            ~samples.mask[:, : self.max_new_tokens], 0
        )
        with torch.set_grad_enabled(grad):
            return self.logits.log_softmax(-1)[self._prefix_rows(tokens)]

    def sample(
        self,
        n: int,
        *,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        guide: Guide | None = None,
    ) -> Samples:
        """Draw `n` texts, see `Sampler.sample`; a prompt is refused, `batch_size` has no effect.

        `guide` changes the logits of each next token, see `protocols.Guide`.
        """
        self._refuse_prompt(prompt)
        length = self._length(max_new_tokens)
        u = uniforms(n, length, seed=seed, generator=generator)
        tokens = torch.zeros(n, length, dtype=torch.long)
        log_prob, unfinished = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
        with torch.no_grad():
            for t in range(length):
                rows = self._prefix_rows(tokens)[:, t]
                logits = self.logits[rows]
                if guide is not None:
                    states = torch.nn.functional.one_hot(rows, len(self.logits)).double()
                    logits = guide(tokens[:, :t], states, logits)
                tokens[:, t], drawn = draw_tokens(logits, u[:, t])
                log_prob += torch.where(unfinished, drawn, 0.0)
                unfinished &= tokens[:, t] != self._eos_id
        samples = self._finish(tokens)
        return samples if guide is None else replace(samples, log_prob=log_prob)

    def enumerate(self, max_new_tokens: int | None = None) -> Samples:
        """Return every text once, with its exact log-probability."""
        length = self._length(max_new_tokens)
        tokens = torch.tensor(
            list(itertools.product(range(len(self.vocab)), repeat=length)), dtype=torch.long
        )
        if self.eos is not None:
            # Sequences that differ after the EOS only are one text: keep the one with 0s there.
            tokens = tokens[((tokens == 0) | mask_until_eos(tokens, self._eos_id)).all(-1)]
        return self._finish(tokens)

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the log-probability of each text in nats, float64 `(N,)`."""
        return self.token_log_prob(samples, grad=grad).sum(-1)

    def token_log_prob(
        self,
        samples: Samples,
        *,
        batch_size: int | None = None,
        grad: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probability of each token in nats, float64 `(N, T)`, 0 where masked.

        `batch_size` and `hidden` have no effect. Raise ValueError for texts outside of the table.
        """
        used = self._longest(samples)
        with torch.set_grad_enabled(grad):
            scored = self._token_log_prob(samples.tokens[:, :used], samples.mask[:, :used])
        check_log_prob(scored.detach(), samples.texts)
        return torch.nn.functional.pad(scored, (0, samples.tokens.shape[1] - used))

    def hidden_states(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Return the table row of each prefix, one-hot, float64 `(N, T, P)`, 0 where masked.

        It depends on no parameter, so that `grad` and `batch_size` have no effect. Raise ValueError
        for texts outside of the table.
        """
        used = self._longest(samples)
        tokens, mask = samples.tokens[:, :used], samples.mask[:, :used]
        rows = self._prefix_rows(tokens.masked_fill(~mask, 0))
        states = torch.nn.functional.one_hot(rows, len(self.logits)) * mask.unsqueeze(-1)
        padding = (0, 0, 0, samples.tokens.shape[1] - used)
        return torch.nn.functional.pad(states.double(), padding)

    def copy(self) -> TabularLM:
        """Return an independent trainable copy."""
        other = TabularLM(self.vocab, self.logits, self.max_new_tokens, eos=self.eos)
        other.logits.requires_grad_(True)
        return other

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the only parameter, the table of logits."""
        yield self.logits

    def state_dict(self) -> dict[str, Tensor]:
        """Return the table by name."""
        return {"logits": self.logits.detach()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a table of the same shape into this model."""
        with torch.no_grad():
            self.logits.copy_(state["logits"])

    def _length(self, max_new_tokens: int | None) -> int:
        length = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= length <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens must lie in 1..{self.max_new_tokens}, the length of the table; "
                f"got {length}"
            )
        return length

    @staticmethod
    def _refuse_prompt(prompt: str | Sequence[str]) -> None:
        if prompt != "":
            raise ValueError(f"TabularLM has no prompts, got {prompt!r}: leave prompt empty")

    def _longest(self, samples: Samples) -> int:
        """Return the tokens of the longest text; raise for texts outside of the table."""
        for prompt in set(samples.prompts):
            self._refuse_prompt(prompt)
        used = samples.longest
        if used > self.max_new_tokens:
            raise ValueError(
                f"a text of {used} tokens is longer than the table's {self.max_new_tokens}"
            )
        return used

    def _prefix_rows(self, tokens: Tensor) -> Tensor:
        """Return the table row of the prefix before each token, `(N, T)`."""
        rows = torch.zeros_like(tokens)
        for t in range(1, tokens.shape[1]):
            rows[:, t] = rows[:, t - 1] * len(self.vocab) + tokens[:, t - 1]
        return rows + self._offsets[: tokens.shape[1]]

    def _token_log_prob(self, tokens: Tensor, mask: Tensor) -> Tensor:
        table = self.logits.log_softmax(-1)
        tokens = tokens.masked_fill(~mask, 0)
        per_token = table[self._prefix_rows(tokens), tokens]  # (N, T)
        # Not a product with the mask: a masked token may have log-probability -inf.
        return torch.where(mask, per_token, 0.0)

    def _finish(self, tokens: Tensor) -> Samples:
        mask = mask_until_eos(tokens, self._eos_id)
        with torch.no_grad():
            log_prob = self._token_log_prob(tokens, mask).sum(-1)
        texts = self.decode(tokens, mask)
        return Samples(tokens, mask, log_prob, texts, [""] * len(texts))
