"""An unbiased choice, by |advantage|, of the texts of a batch that get a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(advantage: Tensor, n: int) -> Tensor:
    """Return each text's probability to be kept, `(N,)`, proportional to |advantage|, at most 1.

    They sum to `n`; if no more than `n` texts have an advantage `(N,)` other than 0, exactly those
    are kept. A sum over all texts is estimated without bias by the kept ones, each divided by its
    probability.

    Source: Horvitz and Thompson 1952.
    """
    size = advantage.abs().double()
    if int((size > 0).sum()) <= n:
        return (size > 0).double()
    certain = torch.zeros_like(size, dtype=torch.bool)
    # A cap at 1 raises the probabilities of the others, which can need a cap too: at most N rounds.
    while True:
        rest = torch.where(certain, 0.0, size)
        keep = rest * ((n - int(certain.sum())) / rest.sum())
        capped = ~certain & (keep >= 1)
        if not bool(capped.any()):
            return torch.where(certain, 1.0, keep)
        certain |= capped


def systematic_sample(probabilities: Tensor, u: float) -> Tensor:
    """Return positions, long, ascending, each of the N kept with its probability, `(N,)`.

    One uniform `u` in [0, 1) places a grid of step 1 on the cumulative sum, so the number kept is
    the sum of the probabilities, rounded up or down.
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), probabilities.double().cumsum(0)])
    hits = torch.ceil(edges - u)
    return (hits[1:] > hits[:-1]).nonzero().squeeze(-1)
