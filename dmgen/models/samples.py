"""`Samples`: a batch of texts drawn from a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch of drawn texts, on the CPU.

    Attributes:
        tokens: long `(N, T)`, the tokens after the prompt; masked entries are arbitrary.
        mask: bool `(N, T)`, true up to and with the first EOS, or up to the last token if there is
            no EOS.
        log_prob: float64 `(N,)`, nats, under the model that drew the text.
        texts: N decoded texts, without prompt and special tokens.
        prompts: N prompts.

    Raises:
        ValueError: the lengths or shapes disagree, a row of the mask is empty or has gaps, or a
            `log_prob` is NaN or `+inf`.
    """

    tokens: Tensor
    mask: Tensor
    log_prob: Tensor
    texts: list[str]
    prompts: list[str]

    def __post_init__(self) -> None:
        n = len(self.texts)
        shapes = (tuple(self.tokens.shape), tuple(self.mask.shape), tuple(self.log_prob.shape))
        if self.tokens.ndim != 2 or shapes[0] != shapes[1] or shapes[2] != (n,):
            raise ValueError(
                "Samples needs tokens and mask of one shape (N, T) and log_prob of shape (N,) with "
                f"N = {n} texts; got tokens {shapes[0]}, mask {shapes[1]}, log_prob {shapes[2]}"
            )
        if len(self.prompts) != n or shapes[0][0] != n:
            raise ValueError(
                f"Samples has {n} texts, {len(self.prompts)} prompts and {shapes[0][0]} rows of "
                "tokens: the three must be equal"
            )
        if (self.mask[:, 1:] & ~self.mask[:, :-1]).any() or (self.n_tokens < 1).any():
            raise ValueError(
                "each row of mask must be true up to the end of its text, for one token at least, "
                "and false after it"
            )
        check_log_prob(self.log_prob, self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Samples:
        """Return the texts at a slice, a list of positions, or an index or boolean tensor."""
        if isinstance(index, int):
            raise TypeError(f"Samples[{index}]: give a slice, e.g. samples[{index}:{index + 1}]")
        rows = torch.arange(len(self))[index]
        return Samples(
            self.tokens[rows],
            self.mask[rows],
            self.log_prob[rows],
            [self.texts[i] for i in rows.tolist()],
            [self.prompts[i] for i in rows.tolist()],
        )

    def split(self, size: int) -> Iterator[Samples]:
        """Yield consecutive parts of at most `size` texts."""
        if size < 1:
            raise ValueError(f"parts must hold at least one text, got size={size}")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def n_tokens(self) -> Tensor:
        """Return the length of each text in tokens, including an EOS, long `(N,)`."""
        return self.mask.sum(-1)

    @property
    def longest(self) -> int:
        """Return the length of the longest text in tokens; later columns are masked in all rows."""
        return int(self.mask.any(0).sum())

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """Return the texts of at least one part as one batch, padded to the widest part."""
        if not parts:
            raise ValueError("Samples.cat needs at least one part, got an empty sequence")
        width = max(p.tokens.shape[1] for p in parts)

        def padded(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]))

        return Samples(
            torch.cat([padded(p.tokens) for p in parts]),
            torch.cat([padded(p.mask) for p in parts]),
            torch.cat([p.log_prob for p in parts]),
            [t for p in parts for t in p.texts],
            [t for p in parts for t in p.prompts],
        )


def mask_until_eos(tokens: Tensor, eos: int) -> Tensor:
    """Return true up to and with the first `eos` of each row, bool `(N, T)`."""
    is_eos = tokens == eos
    return (is_eos.cumsum(-1) - is_eos.long()) == 0


def check_log_prob(log_prob: Tensor, texts: Sequence[str]) -> None:
    """Raise ValueError for the first text with a `log_prob`, `(N,)` or `(N, T)`, NaN or `+inf`."""
    bad = torch.isnan(log_prob) | (log_prob == torch.inf)
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"the log-probability of text {i} ({texts[i]!r}) is NaN or infinite, so the model gave "
            "NaN or infinite logits: its weights have diverged, or dtype is too narrow for them"
        )
