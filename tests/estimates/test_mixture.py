"""Samples pooled from several proposals: exact densities, and errors over repeats."""

import math

import numpy as np
import pytest
import torch
from laws import draw, is_calibrated

from dmgen.estimates.weights import balance_heuristic, log_mixture, log_z, mean

REPEATS = 400
INF = math.inf


def test_mixture_is_the_weighted_density():
    log_probs = torch.log(torch.tensor([[0.5, 0.1], [0.2, 0.0], [0.3, 0.9], [0.3, 0.9]]).double())
    expected = torch.log((3 * log_probs.exp()[:, 0] + log_probs.exp()[:, 1]) / 4)
    assert torch.allclose(log_mixture(log_probs, torch.tensor([3, 1])), expected, atol=1e-15)
    target = torch.tensor([0.0, -INF, 1.0, 1.0])
    weights = balance_heuristic(target, log_probs, torch.tensor([3, 1]))
    assert torch.equal(weights, target - log_mixture(log_probs, torch.tensor([3, 1])))


def test_mixture_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="sum to the 2 rows"):
        log_mixture(torch.zeros(2, 2), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"\(N, M\)"):
        log_mixture(torch.zeros(2, 2), torch.tensor([2]))
    # The third proposal has a density but no samples, so row 1 came from nowhere.
    rows = torch.tensor([[0.0, 0.0, 0.0], [-INF, -INF, 0.0]])
    with pytest.raises(ValueError, match=r"log_probs\[1\]"):
        log_mixture(rows, torch.tensor([1, 1, 0]))
    with pytest.raises(ValueError, match=r"log_probs\[:, 1\]\[0\] is nan"):
        log_mixture(torch.tensor([[0.0, math.nan]]), torch.tensor([1, 0]))


def pooled(seed, counts=(300, 900)):
    """Return (log-weights, values, strata, exact log Z, exact mean); P is close to proposal 0."""
    g = torch.Generator().manual_seed(5)
    _, logits, value = (torch.randn(12, generator=g, dtype=torch.float64) for _ in range(3))
    log_q = torch.log_softmax(logits, 0)
    log_a = torch.log_softmax(2 * log_q, 0)
    log_b = log_a.flip(0)
    log_p = log_a + 0.3 * value
    states = torch.cat([draw(log_a, counts[0], 2 * seed), draw(log_b, counts[1], 2 * seed + 1)])
    strata = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    log_probs = torch.stack([log_a, log_b], 1)[states]
    lw = balance_heuristic(log_p[states], log_probs, torch.tensor(counts))
    exact = float(torch.logsumexp(log_p, 0))
    return lw, value[states], strata, exact, float((log_p - exact).exp() @ value)


def test_pooled_errors_need_the_strata_to_be_exact():
    z, z_mean, loose = [], [], []
    for seed in range(REPEATS):
        lw, values, strata, exact, exact_mean = pooled(seed)
        value, stderr = log_z(lw, strata)
        z.append((value - exact) / stderr)
        loose.append((value - exact) / log_z(lw)[1])
        value, stderr = mean(lw, values, strata)
        z_mean.append((value - exact_mean) / stderr)
    assert is_calibrated(z)
    assert is_calibrated(z_mean)
    # Without strata the error is too large: conservative, and seen to be by the same check.
    assert np.std(loose) < 1
    assert not is_calibrated(loose)
