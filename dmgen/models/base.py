"""What language models share: `Samples`, the `LanguageModel` protocol, the draw of a token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

# Tokens a block in the two-level draw: small enough that a float32 block sum keeps the tail.
_BLOCK = 256
# Logits that a CPU lifts to float32 at a time: 4 MiB stay in its cache.
_CACHED = 2**20


@dataclass(frozen=True, eq=False)
class Samples:
    """A batch of drawn texts, on the CPU.

    Attributes:
        tokens: long `(N, T)`, the tokens after the prompt; what lies after the end is arbitrary.
        mask: bool `(N, T)`, true up to and with the first EOS or, without one, the last token.
        log_prob: float64 `(N,)`, nats, under the model that drew the text.
        texts: N decoded texts, without prompt and special tokens.
        prompts: N prompts.

    Raises:
        ValueError: the lengths or shapes disagree, a row of the mask is empty or has holes, or a
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
        refuse_nan(self.log_prob, self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Samples:
        """The chosen texts: by slice, a list of positions, or an index or boolean tensor."""
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
        """Consecutive parts of at most `size` texts."""
        if size < 1:
            raise ValueError(f"parts must hold at least one text, got size={size}")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def n_tokens(self) -> Tensor:
        """Length of each text in tokens, an EOS included, long `(N,)`."""
        return self.mask.sum(-1)

    @property
    def longest(self) -> int:
        """Length of the longest text in tokens; columns from there on hold nothing but padding."""
        return int(self.mask.any(0).sum())

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """All texts of `parts` in one batch, in order; shorter ones are padded to the longest."""
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


def refuse_nan(log_prob: Tensor, texts: Sequence[str]) -> None:
    """Raises if log-probabilities, `(N,)` or `(N, T)`, are NaN or `+inf`, naming the first text."""
    bad = torch.isnan(log_prob) | (log_prob == torch.inf)
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"the log-probability of text {i} ({texts[i]!r}) is NaN or infinite, so the model gave "
            "NaN or infinite logits: its weights have diverged, or dtype is too narrow for them"
        )


def uniforms(n: int, length: int, *, seed: int | None, generator: torch.Generator | None) -> Tensor:
    """The float64 `(n, length)` block of uniforms in [0, 1) that a draw of `n` texts uses up.

    Row i belongs to text i, so a text does not depend on how the draw is split into batches.
    With neither `seed` nor `generator` the draw is not reproducible; no global state is touched.

    Raises:
        ValueError: `n` is not positive, or both `seed` and `generator` are given.
    """
    if n < 1 or length < 1:
        raise ValueError(f"need at least one text of at least one token, got n={n}, T={length}")
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if generator is None:
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
    drawn = torch.rand(n, length, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.cpu()


def stream(purpose: str, seed: int | None) -> torch.Generator:
    """A generator for one purpose: the same `seed` gives other texts to fit, to train and to judge.

    With `seed=None` it starts from the system's entropy.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return generator.manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def draw_tokens(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from `softmax(logits)` by inversion of the CDF, and its log-probability.

    Plainly: `token = searchsorted(cumsum(softmax(logits)), u)`. A float32 cumsum over a large
    vocabulary gives rare tokens bins of zero width, so the sum is taken in two levels: first a
    block of tokens is chosen, then a token inside it, both with float64 cumsums. A token of
    probability 0 is never drawn. The log-probability is that of the two choices as they were made,
    so it is exact for the law of the draw; it differs from the softmax by the float32 rounding of a
    block's sum.

    Args:
        logits: `(N, V)`; what is narrower than float32 is lifted to it first. `-inf` is legal, a
            row of nothing else is not.
        u: float64 `(N,)`, uniform in [0, 1).

    Returns:
        Tokens, long `(N,)`, and log-probabilities, float64 `(N,)`, nats; NaN where the logits were.
    """
    rows = len(logits) if logits.device.type != "cpu" else max(1, _CACHED // logits.shape[1])
    parts = zip(torch.split(logits, rows), torch.split(u, rows), strict=True)
    tokens, log_probs = zip(*(_draw_rows(*part) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _draw_rows(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    n, v = logits.shape
    width = min(_BLOCK, v)
    lifted = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = (lifted - lifted.amax(-1, keepdim=True)).exp_()  # (N, V)
    padding = -v % width
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(n, -1, width)
    block_sums = blocks.sum(-1).double()  # (N, B)
    edges = block_sums.cumsum(-1)
    total = edges[:, -1]
    rows = torch.arange(n, device=logits.device)
    block, offset = _invert(edges, u.to(total) * total)  # (N,)
    inner = blocks[rows, block].double()  # (N, width)
    inner_edges = inner.cumsum(-1)
    inner_total, block_sum = inner_edges[:, -1], block_sums[rows, block]
    # The block's own sum in float64 differs from its float32 sum in the last digits: rescale.
    token, _ = _invert(inner_edges, offset * (inner_total / block_sum))
    log_prob = torch.log(inner[rows, token] / inner_total * (block_sum / total))
    # NaN logits put the token anywhere, in the padding too: it must stay a legal input.
    return (block * width + token).clamp_(max=v - 1), log_prob


def _invert(edges: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each `target` between cumulative `edges`, and how far into the bin it lies."""
    # Rounding can put target at or past the last edge; the first bin to reach that edge is the last
    # one of positive width.
    below_last = torch.nextafter(edges[:, -1], torch.zeros_like(target))
    target = torch.minimum(target, below_last).unsqueeze(-1)
    index = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    start = torch.where(index > 0, edges.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index.squeeze(-1), (target - start).squeeze(-1)
