"""The tail index of Pareto weights, of few values, and of weights far apart."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dmgen.estimates.weights import pareto_k

INF = math.inf


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_k_recovers_the_index_of_pareto_weights(k):
    n = 20_000
    estimates = []
    for seed in range(50):
        u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        estimates.append(pareto_k(-k * torch.log(u)))  # w = u^-k has tail index k
    # The prior moves the mean of m = 3 sqrt(n) excesses by 10/(m+10) of the way to 0.5; the fit
    # itself has a bias of order (1+k)/m, and its asymptotic sd is (1+k)/sqrt(m).
    m = math.ceil(3 * math.sqrt(n))
    expected = (m * k + 5) / (m + 10)
    tolerance = 5 * (1 + k) / math.sqrt(m * 50) + 3 * (1 + k) / m
    assert abs(np.mean(estimates) - expected) < tolerance
    assert np.std(estimates) == pytest.approx((1 + k) / math.sqrt(m), rel=0.5)


def test_k_of_a_short_tail_is_pulled_to_one_half():
    k, m, repeats = 3.0, 20, 400  # N = 100 has a tail of 20
    estimates = []
    for seed in range(repeats):
        u = torch.rand(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        estimates.append(pareto_k(-k * torch.log(u)))
    pulled = (m * k + 10 * 0.5) / (m + 10)
    tolerance = 5 * (1 + k) / math.sqrt(m * repeats) + (1 + k) / m
    assert abs(np.mean(estimates) - pulled) < tolerance
    assert abs(np.mean(estimates) - k) > tolerance


def test_k_agrees_with_maximum_likelihood():
    lw = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = math.ceil(3 * math.sqrt(5000))
    w = np.sort(lw.exp().numpy())
    k_ml = stats.genpareto.fit(w[-m:] - w[-m - 1], floc=0)[0]
    ours = (pareto_k(lw) * (m + 10) - 5) / m  # without the prior
    # Two estimators of one k from the same data differ by less than the sd of either.
    assert abs(ours - k_ml) < (1 + k_ml) / math.sqrt(m)


@pytest.mark.parametrize("spread", [5.0, 50.0, 700.0, 1e5])
def test_k_of_weights_however_far_apart(spread):
    """The largest has it all."""
    assert pareto_k(torch.arange(100, dtype=torch.float64) * -spread) > 2


def test_k_on_weights_with_few_values():
    assert pareto_k(torch.zeros(1000)) == -INF
    assert pareto_k(torch.tensor([0.0] * 5000 + [9.0] * 5000)) == -INF
    # A bounded step seen a hundred times; a spike seen twice; hits of a hard constraint.
    assert pareto_k(torch.tensor([0.0] * 9900 + [9.0] * 100)) < 0
    assert pareto_k(torch.tensor([0.0] * 9998 + [9.0] * 2)) == INF
    assert pareto_k(torch.tensor([-INF] * 9900 + [9.0] * 100)) < 0


@pytest.mark.parametrize("n", [1, 2, 5, 26, 90, 178])
def test_k_is_never_nan_on_two_values(n):
    for hits in range(n + 1):
        for low in (0.0, -INF):
            lw = torch.full((n,), low)
            lw[:hits] = 3.0
            assert not math.isnan(pareto_k(lw))
