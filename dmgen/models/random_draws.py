"""Reproducible uniforms, and the draw of a token from logits."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Tokens per block of the two-level draw: few enough that a float32 block sum keeps the tail.
_BLOCK = 256
# Logits that a CPU converts to float32 at a time: 4 MiB stay in its cache.
_CACHED = 2**20


def uniforms(n: int, length: int, *, seed: int | None, generator: torch.Generator | None) -> Tensor:
    """Return the float64 `(n, length)` block of uniforms in [0, 1) for a draw of `n` texts.

    Row i belongs to text i, so a text does not depend on how the draw is split into batches. With
    neither `seed` nor `generator` the draw is not reproducible.

    Raises:
        ValueError: `n` or `length` is not positive, or both `seed` and `generator` are given.
    """
    if n < 1 or length < 1:
        raise ValueError(f"need at least one text of at least one token, got n={n}, T={length}")
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    generator = _seeded(seed) if generator is None else generator
    u = torch.rand(n, length, generator=generator, dtype=torch.float64, device=generator.device)
    return u.cpu()


def stream(purpose: str, seed: int | None) -> torch.Generator:
    """Return a generator seeded by purpose and seed, or by the system's entropy without a seed."""
    if seed is not None:
        digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big", signed=True)
    return _seeded(seed)


def _seeded(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


def draw_tokens(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from `softmax(logits)` by inversion of the CDF.

    The formula is `token = searchsorted(cumsum(softmax(logits)), u)`. A float32 cumsum over a large
    vocabulary gives rare tokens bins of zero width, so the sum is taken in two levels: first a
    block of tokens is chosen, then a token inside it, both with float64 cumsums. A token of
    probability 0 is never drawn. The log-probability is exactly that of the two choices; it differs
    from the log-softmax by the float32 rounding of a block's sum.

    Args:
        logits: `(N, V)`; types narrower than float32 are converted to it first. `-inf` is legal,
            but not for a whole row.
        u: float64 `(N,)`, uniform in [0, 1).

    Returns:
        Tokens, long `(N,)`, and their log-probabilities, float64 `(N,)`, nats; NaN in rows with NaN
        logits.
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
    # The float64 sum of a block differs from its float32 sum in the last digits: rescale.
    token, _ = _invert(inner_edges, offset * (inner_total / block_sum))
    log_prob = torch.log(inner[rows, token] / inner_total * (block_sum / total))
    # NaN logits can put the token into the padding, and it must stay a legal id.
    return (block * width + token).clamp_(max=v - 1), log_prob


def _invert(edges: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of each `target` between cumulative `edges`, and its offset in the bin."""
    # Rounding can put target at or past the last edge; the last bin of positive width is the first
    # one that reaches this edge.
    below_last = torch.nextafter(edges[:, -1], torch.zeros_like(target))
    target = torch.minimum(target, below_last).unsqueeze(-1)
    index = torch.searchsorted(edges, target, right=True).clamp_(max=edges.shape[1] - 1)
    start = torch.where(index > 0, edges.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index.squeeze(-1), (target - start).squeeze(-1)
