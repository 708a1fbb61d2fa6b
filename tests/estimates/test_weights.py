"""Importance weights against exact sums over a small world, and their errors over repeats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import is_calibrated
from scipy import stats

from dmgen.estimates.weights import (
    balance_heuristic,
    ess,
    log_mixture,
    log_z,
    mean,
    pareto_k,
    stderr_of_mean,
)

REPEATS = 400
INF = math.inf


def world(seed=0, n_states=12):
    """Return log P (one state impossible), log q, and a value per state."""
    g = torch.Generator().manual_seed(seed)
    log_p = torch.randn(n_states, generator=g, dtype=torch.float64) + 0.7
    log_p[3] = -INF
    log_q = torch.log_softmax(torch.randn(n_states, generator=g, dtype=torch.float64), 0)
    return log_p, log_q, torch.randn(n_states, generator=g, dtype=torch.float64)


def draw(log_q, n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_q.exp(), n, replacement=True, generator=g)


# ---------------------------------------------------------------- exact answers


def test_small_case_by_hand():
    lw = torch.tensor([1.0, 3.0, 0.0]).log()  # weights 1, 3, 0
    assert ess(lw) == pytest.approx(16 / 10, abs=1e-6)  # float32 logarithms
    value, stderr = log_z(lw.double())
    assert value == pytest.approx(math.log(4 / 3), abs=1e-6)
    # sd of (1, 3, 0) with ddof 1 is sqrt(7/3); over sqrt(3) * 4/3.
    assert stderr == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3) / (4 / 3), abs=1e-6)
    value, stderr = mean(lw.double(), torch.tensor([2.0, 4.0, 99.0]))
    assert value == pytest.approx(3.5, abs=1e-6)
    # N/(N-1) * sum of omega^2 (v - 3.5)^2 = 1.5 * ((1.5/4)^2 + (3 * 0.5/4)^2)
    assert stderr == pytest.approx(math.sqrt(1.5 * 2 * 0.375**2), abs=1e-6)


@pytest.mark.parametrize("shift", [-1e5, 0.0, 1e5])
def test_no_precision_is_lost_far_from_zero(shift):
    log_p, log_q, value = world()
    x = draw(log_q, 500, 0)
    lw = log_p[x] - log_q[x]
    # Adding 1e5 rounds each input by at most 2^-37 = 7.3e-12, which bounds every change.
    near = {"abs": 3e-11, "rel": 3e-11}
    assert ess(lw + shift) == pytest.approx(ess(lw), **near)
    assert log_z(lw + shift)[0] - shift == pytest.approx(log_z(lw)[0], abs=3e-11)
    assert log_z(lw + shift)[1] == pytest.approx(log_z(lw)[1], **near)
    assert mean(lw + shift, value[x]) == pytest.approx(mean(lw, value[x]), **near)
    # k sees differences of weights, so it amplifies the rounding; 1e-6 is far below its own error.
    assert pareto_k(lw + shift) == pytest.approx(pareto_k(lw), abs=1e-6)


def test_values_far_from_zero_keep_their_digits():
    lw = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    v = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    base, shifted = mean(lw, v), mean(lw, v + 1e9)
    assert shifted[0] - 1e9 == pytest.approx(base[0], abs=2e-7)  # one ulp of 1e9
    assert shifted[1] == pytest.approx(base[1], rel=1e-7)


def test_several_columns_equal_one_by_one():
    log_p, log_q, value = world()
    x = draw(log_q, 300, 1)
    lw = log_p[x] - log_q[x]
    columns = torch.stack([value[x], value[x] ** 2], 1)
    both, errors = mean(lw, columns)
    assert both.shape == errors.shape == (2,)
    for j in range(2):
        # Sums over another memory layout may round differently: a few ulp.
        one = mean(lw, columns[:, j])
        assert (float(both[j]), float(errors[j])) == pytest.approx(one, rel=1e-13)


def test_no_weight_at_all():
    lw = torch.full((5,), -INF)
    assert ess(lw) == 0.0
    assert log_z(lw) == (-INF, INF)
    assert all(map(math.isnan, mean(lw, torch.arange(5.0))))
    value, stderr = mean(lw, torch.ones(5, 2))
    assert value.isnan().all()
    assert stderr.isnan().all()
    assert pareto_k(lw) == INF


def test_one_sample_has_no_error():
    value, stderr = log_z(torch.tensor([2.0]))
    assert value == 2.0
    assert math.isnan(stderr)


def test_values_without_weight_are_ignored():
    lw = torch.tensor([0.0, -INF, 0.0])
    assert mean(lw, torch.tensor([1.0, math.nan, 3.0]))[0] == 2.0
    with pytest.raises(ValueError, match=r"values\[1, 0\] is nan"):
        mean(torch.zeros(3), torch.tensor([1.0, math.nan, 3.0]))


@pytest.mark.parametrize("function", [ess, log_z, pareto_k])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_inf_are_refused_at_their_position(function, bad):
    with pytest.raises(ValueError, match=r"\[2\]"):
        function(torch.tensor([0.0, -INF, bad, bad]))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="shape"):
        ess(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="shape"):
        ess(torch.zeros(0))
    with pytest.raises(ValueError, match="values must be"):
        mean(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="strata"):
        stderr_of_mean(torch.zeros(3, dtype=torch.float64), torch.zeros(2))


# ---------------------------------------------------------------- pooled proposals


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
    _, log_q, value = world(5)
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


def test_a_stratum_of_one_sample_is_conservative():
    residuals = torch.tensor([3.0, 1.0, -1.0, -3.0], dtype=torch.float64)
    strata = torch.tensor([0, 1, 1, 1])
    # Alone: 3^2. The others around their mean -1: (4 + 0 + 4) * 3/2.
    assert stderr_of_mean(residuals, strata) == pytest.approx(math.sqrt(9 + 12) / 4, abs=1e-15)


# ---------------------------------------------------------------- the law of the estimators


def test_errors_are_calibrated():
    log_p, log_q, value = world()
    exact = float(torch.logsumexp(log_p, 0))
    exact_mean = float((log_p - exact).exp() @ value)
    z, z_mean = [], []
    for seed in range(REPEATS):
        x = draw(log_q, 1500, seed)
        lw = log_p[x] - log_q[x]
        estimate, stderr = log_z(lw)
        z.append((estimate - exact) / stderr)
        estimate, stderr = mean(lw, value[x])
        z_mean.append((estimate - exact_mean) / stderr)
    assert is_calibrated(z)
    assert is_calibrated(z_mean)
    # Power: errors wrong by a quarter, or a bias of a third of one, do not pass.
    assert not is_calibrated(1.25 * np.array(z))
    assert not is_calibrated(np.array(z_mean) + 1 / 3)


# ---------------------------------------------------------------- Pareto k


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


# ---------------------------------------------------------------- properties

weights = st.lists(st.one_of(st.floats(-300, 300), st.just(-INF)), min_size=1, max_size=40).map(
    lambda xs: torch.tensor(xs, dtype=torch.float64)
)


@settings(max_examples=200, deadline=None)
@given(weights)
def test_ess_lies_between_one_and_the_number_of_positive_weights(lw):
    positive = int((~torch.isneginf(lw)).sum())
    # (Σw)² / Σw² is off by a few roundings of sums of 40 terms.
    assert min(1, positive) * (1 - 1e-13) <= ess(lw) <= positive * (1 + 1e-13)


@settings(max_examples=200, deadline=None)
@given(weights)
def test_mean_stays_inside_the_values_with_weight(lw):
    values = torch.arange(float(len(lw)), dtype=torch.float64)
    seen = values[~torch.isneginf(lw)]
    value, stderr = mean(lw, values)
    if len(seen) == 0:
        assert math.isnan(value)
    else:
        assert seen.min() - 1e-12 <= value <= seen.max() + 1e-12
        assert stderr >= 0 or len(lw) == 1
