"""Which texts of a batch are worth a backward pass: an unbiased choice by |advantage|."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(advantage: Tensor, n: int) -> Tensor:
    """Probabilities to be kept, `(N,)`, proportional to |advantage|, capped at 1, that sum to `n`.

    A sum over all texts is estimated without bias by the kept ones, each divided by its
    probability (Horvitz and Thompson 1952); texts of advantage 0 are never kept and never missed.
    If no more than `n` texts have an advantage other than 0, all of those are kept, with
    probability 1.

    Args:
        advantage: `(N,)`, finite.
        n: texts to keep, at least 1.
    """
    size = advantage.abs().double()
    if int((size > 0).sum()) <= n:
        return (size > 0).double()
    certain = torch.zeros_like(size, dtype=torch.bool)
    # Capping one text at 1 leaves more for the others, which can cap another: at most N rounds.
    while True:
        rest = torch.where(certain, 0.0, size)
        keep = rest * ((n - int(certain.sum())) / rest.sum())
        capped = ~certain & (keep >= 1)
        if not bool(capped.any()):
            return torch.where(certain, 1.0, keep)
        certain |= capped


def systematic_sample(probabilities: Tensor, u: float) -> Tensor:
    """Positions kept when each is kept with its probability, long, ascending.

    Systematic sampling: one uniform `u` in [0, 1) places a grid of step 1 on the cumulative sum, so
    the number kept is the sum of the probabilities, rounded up or down.

    Args:
        probabilities: `(N,)`, between 0 and 1.
        u: uniform in [0, 1).
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), probabilities.double().cumsum(0)])
    hits = torch.ceil(edges - u)
    return (hits[1:] > hits[:-1]).nonzero().squeeze(-1)
