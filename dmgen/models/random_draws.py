"""Reproducible uniforms, and the draw of a token from logits."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Tokens a block in the two-level draw: small enough that a float32 block sum keeps the tail.
_BLOCK = 256


# Logits that a CPU lifts to float32 at a time: 4 MiB stay in its cache.
_CACHED = 2**20


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
