"""Accepting, from log-weights alone: the Poisson table, sums by hand, errors, the choice of β."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import is_calibrated, uncalibrated
from scipy import stats

from dmgen.estimates.score import Score
from dmgen.monte_carlo import acceptance

INF = math.inf


def by_hand(log_w, probs, log_beta):
    """AR, TV, bound and KL of p_β, straight from their definitions, for weights in range of exp."""
    w, beta = log_w.exp(), math.exp(log_beta)
    p, p_beta = (probs * x / (probs * x).sum() for x in (w, w.clamp(max=beta)))
    seen = p > 0
    return (
        float((probs * (w / beta).clamp(max=1)).sum()),
        float((p - p_beta).abs().sum() / 2),
        float(p[log_w > log_beta].sum()),
        float((p[seen] * (p[seen] / p_beta[seen]).log()).sum()),
    )


def by_functions(log_w, log_beta, probs=None):
    """The same four as Scores, from the functions under test."""
    log_r = acceptance.log_acceptance(log_w, log_beta)
    return (
        acceptance.acceptance_rate(log_r, probs),
        acceptance.tv(log_w, log_r, probs),
        acceptance.tv_bound(log_w, log_beta, probs),
        acceptance.kl(log_w, log_r, probs),
    )


def poisson(mean_p, mean_q):
    """log-weights and probabilities of the counts up to 120; those beyond have less than 1e-70."""
    k = np.arange(121)
    log_q = stats.poisson.logpmf(k, mean_q)
    log_w = stats.poisson.logpmf(k, mean_p) - log_q
    return torch.tensor(log_w), torch.tensor(np.exp(log_q))


# ---------------------------------------------------------------- exact values


@pytest.mark.parametrize(
    ("mean_p", "mean_q", "beta", "expected"),
    [
        (11, 10, 0.5, (0.99950, 0.12294, 0.99508, 0.04815)),
        (11, 10, 1.0, (0.87685, 0.07492, 0.54011, 0.01988)),
        (11, 10, 2.0, (0.49818, 0.00353, 0.03219, 0.00049)),
        (11, 10, 4.0, (0.25000, 0.00001, 0.00008, 0.00000)),
        (10, 9, 0.5, (0.99931, 0.12919, 0.99723, 0.05324)),
        (10, 9, 1.0, (0.87052, 0.07922, 0.54207, 0.02221)),
        (10, 9, 2.0, (0.49759, 0.00472, 0.02704, 0.00073)),
    ],
)
def test_the_poisson_table(mean_p, mean_q, beta, expected):
    log_w, probs = poisson(mean_p, mean_q)
    found = by_functions(log_w, math.log(beta), probs)
    for score, value in zip(found, expected, strict=True):
        assert score.value == pytest.approx(value, abs=5.01e-6)  # the table has five decimals
        assert (score.stderr, score.n) == (0, 0)
    assert acceptance.beta_normalised(log_w, math.log(beta), probs).value == pytest.approx(beta)


def test_a_small_beta_leaves_the_proposal():
    """Poisson 11 and 10: TV 0.123151 and KL(11‖10) 0.048412."""
    log_w, probs = poisson(11, 10)
    rate, tv, bound, kl = by_functions(log_w, float(log_w.min()), probs)
    assert rate.value == pytest.approx(1, abs=1e-12)
    assert bound.value == pytest.approx(1, abs=1e-4)  # all but the count 0 and its p-mass e^-11
    assert tv.value == pytest.approx(0.123151, abs=5e-7)
    assert kl.value == pytest.approx(0.048412, abs=5e-7)


def test_a_beta_above_every_weight_gives_p_itself():
    log_w, probs = poisson(11, 10)
    log_beta = float(log_w.max())
    rate, tv, bound, kl = by_functions(log_w, log_beta, probs)
    assert rate.value == pytest.approx(math.exp(-log_beta))
    assert bound.value == 0
    assert (tv.value, kl.value) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))


# Multiples of 1/64: no two that differ are equal up to rounding, and adding 1000 is exact.
log_weight = st.one_of(st.integers(-1280, 1280).map(lambda k: k / 64), st.just(-INF))
some_log_beta = st.integers(-1600, 1600).map(lambda k: k / 64)
weights = st.lists(log_weight, min_size=1, max_size=12).filter(lambda lw: max(lw) > -INF)


@given(weights, some_log_beta, st.data())
def test_exact_values_are_the_definitions(lw, log_beta, data):
    masses = data.draw(st.lists(st.floats(0.01, 1), min_size=len(lw), max_size=len(lw)))
    log_w, probs = torch.tensor(lw), torch.tensor(masses)
    log_w, probs = log_w.double(), probs.double() / probs.double().sum()
    found = by_functions(log_w, log_beta, probs)
    expected = by_hand(log_w, probs, log_beta)
    assert [s.value for s in found] == pytest.approx(list(expected), rel=1e-9, abs=1e-9)


@given(weights, some_log_beta, st.sampled_from([-1e3, 1e3]))
def test_estimates_are_the_exact_values_of_the_sample_in_any_unit(lw, log_beta, shift):
    """The plain mean is the sum with probabilities 1/N, and the scale of P changes nothing."""
    log_w = torch.tensor(lw, dtype=torch.float64)
    even = torch.full_like(log_w, 1 / len(log_w))
    plain = by_functions(log_w, log_beta)
    exact = by_functions(log_w, log_beta, even)
    moved = by_functions(log_w + shift, log_beta + shift)
    for a, b, c in zip(plain, exact, moved, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-9, abs=1e-12)
        assert a.value == pytest.approx(c.value, rel=1e-9, abs=1e-9)
        assert a.stderr == pytest.approx(c.stderr, rel=1e-6, abs=1e-9, nan_ok=True)
    ratio = acceptance.beta_normalised(log_w, log_beta)
    assert ratio.value == pytest.approx(math.exp(log_beta) / float(log_w.exp().mean()))


@given(weights, some_log_beta, st.integers(0, 320).map(lambda k: k / 64))
def test_a_larger_beta_is_slower_and_closer(lw, log_beta, more):
    log_w = torch.tensor(lw, dtype=torch.float64)
    before, after = by_functions(log_w, log_beta), by_functions(log_w, log_beta + more)
    for a, b in zip(before, after, strict=True):
        assert b.value <= a.value + 1e-12
    for rate, tv, bound, kl in (before, after):
        assert 0 < rate.value <= 1 + 1e-12
        assert -1e-12 <= tv.value <= bound.value + 1e-12
        assert kl.value >= -1e-12
        assert tv.value <= math.sqrt(max(kl.value, 0) / 2) + 1e-9  # Pinsker


def test_accepting_half_of_the_space_brings_p_closer_by_the_log_of_the_rate():
    """r need not come from a β: here it is an indicator that holds wherever p lives."""
    log_w = torch.tensor([0.3, -1.0, -INF, -INF, -INF], dtype=torch.float64)
    probs = torch.tensor([0.2, 0.3, 0.1, 0.25, 0.15], dtype=torch.float64)
    log_r = torch.tensor([0.0, 0.0, 0.0, -INF, -INF], dtype=torch.float64)
    before = acceptance.kl(log_w, torch.zeros(5), probs).value
    after = acceptance.kl(log_w, log_r, probs).value
    assert acceptance.acceptance_rate(log_r, probs).value == pytest.approx(0.6)
    assert before - after == pytest.approx(-math.log(0.6))


# ---------------------------------------------------------------- errors of the estimates

N_REPEATS, N_SAMPLES = 400, 2000
LAWS = {
    "moderate": (torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([-1.5, 0.1, 0.7, 1.4])),
    "hard": (torch.tensor([0.55, 0.15, 0.2, 0.1]), torch.tensor([-INF, -1.0, 0.4, 1.1])),
}


def repeats(probs, log_w):
    """Samples of q as positions drawn from its exact law."""
    rng = np.random.default_rng(5)
    p = probs.double().numpy()
    for _ in range(N_REPEATS):
        yield log_w.double()[rng.choice(len(p), N_SAMPLES, p=p / p.sum())]


def all_five(log_w, log_beta, probs=None):
    names = ("rate", "tv", "bound", "kl")
    found = dict(zip(names, by_functions(log_w, log_beta, probs), strict=True))
    return found | {"beta": acceptance.beta_normalised(log_w, log_beta, probs)}


@pytest.mark.parametrize("log_beta", [-0.6, 0.55])
@pytest.mark.parametrize("law", LAWS)
def test_errors_are_calibrated(law, log_beta):
    probs, log_w = LAWS[law]
    exact = all_five(log_w, log_beta, probs)
    z = {name: [] for name in exact}
    for drawn in repeats(probs, log_w):
        for name, score in all_five(drawn, log_beta).items():
            assert score.n == N_SAMPLES
            z[name].append((score.value - exact[name].value) / score.stderr)
    assert uncalibrated(z) == set()


def test_errors_that_forget_z_are_seen_by_that_very_check():
    """The power of the test above: with Z taken as exact the errors of TV and KL are too large."""
    probs, log_w = LAWS["hard"]
    log_beta = 0.55
    exact = all_five(log_w, log_beta, probs)
    z_tv, z_kl = [], []
    for drawn in repeats(probs, log_w):
        log_r = acceptance.log_acceptance(drawn, log_beta)
        g, h = (torch.exp(x - torch.logsumexp(x, 0)) * N_SAMPLES for x in (drawn, log_r))
        excess = torch.where(drawn > -INF, drawn - log_r, 0.0)
        for name, terms, z in (("tv", (g - h).clamp(min=0), z_tv), ("kl", g * excess, z_kl)):
            found = all_five(drawn, log_beta)[name].value
            z.append((found - exact[name].value) / float(terms.std() / math.sqrt(N_SAMPLES)))
    assert not is_calibrated(z_tv)
    assert not is_calibrated(z_kl)


def test_one_sample_has_no_known_error():
    for score in by_functions(torch.tensor([0.3]), -1.0):
        assert math.isnan(score.stderr)


# ---------------------------------------------------------------- the choice of β


@settings(max_examples=300)
@given(st.lists(log_weight, min_size=1, max_size=30), st.integers(1, 100).map(lambda k: k / 100))
def test_beta_accepts_the_share_asked_for_and_is_the_largest_to_do_so(lw, rate):
    log_w = torch.tensor(lw, dtype=torch.float64)
    share = float((log_w > -INF).double().mean())
    if share < rate:
        with pytest.raises(ValueError, match=r"take at most"):
            acceptance.log_beta_for(log_w, rate)
        return
    log_beta = acceptance.log_beta_for(log_w, rate)
    # Up to 30 times the share that is taken for the rounding of rate * n.
    assert by_functions(log_w, log_beta)[0].value == pytest.approx(rate, abs=1e-10)
    assert by_functions(log_w, log_beta + 0.01)[0].value < rate


@pytest.mark.parametrize(
    ("weights", "rate", "beta"),
    [
        ([1, 2, 4], 1.0, 1.0),  # the smallest weight
        ([1, 2, 4], 7 / 12, 4.0),  # AR = 7/(3β) from the largest on
        ([1, 2, 4], 7 / 24, 8.0),
        ([1, 2, 4], 5 / 6, 2.0),
        ([1, 2, 4], 2 / 3, 3.0),  # between two: (1 + 3/3)/3
        ([0, 0, 3, 3], 0.5, 3.0),  # ties
        ([0, 0, 3, 3], 0.25, 6.0),
        ([0, 5], 0.5, 5.0),
        ([0, 5], 1e-13, 2.5e13),
    ],
)
def test_beta_by_hand(weights, rate, beta):
    log_w = torch.tensor(weights, dtype=torch.float64).log()
    assert acceptance.log_beta_for(log_w, rate) == pytest.approx(math.log(beta))


def test_beta_of_weights_far_beyond_the_range_of_floats():
    log_w = torch.tensor([-2000.0, -5.0, 3000.0], dtype=torch.float64)
    assert acceptance.log_beta_for(log_w, 1.0) == pytest.approx(-2000)
    assert acceptance.log_beta_for(log_w, 1 / 3) == pytest.approx(3000)
    assert acceptance.log_beta_for(log_w, 1 / 30) == pytest.approx(3000 + math.log(10))


@pytest.mark.parametrize("n", range(2, 60))
def test_a_rate_next_to_a_share_does_not_break_on_rounding(n):
    """Weights so far apart that the rate is a staircase: β is found on the step or at its edge."""
    log_w = torch.linspace(0, 100.0 * n, n, dtype=torch.float64)
    for k in range(1, n + 1):
        for rate in (k / n, math.nextafter(k / n, 0), min(math.nextafter(k / n, 1), 1.0)):
            log_beta = acceptance.log_beta_for(log_w, rate)
            assert by_functions(log_w, log_beta)[0].value == pytest.approx(rate, abs=1e-11)
            # As large as it can be: k texts are accepted with certainty up to the k-th largest.
            assert log_beta == pytest.approx(float(log_w[n - k]), abs=1e-9)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_infinity_are_refused(bad):
    log_w, fine = torch.tensor([0.1, bad]), torch.tensor([0.0, -0.5])
    for call in (
        lambda: acceptance.log_acceptance(log_w, 0.0),
        lambda: acceptance.acceptance_rate(log_w),
        lambda: acceptance.tv(log_w, fine),
        lambda: acceptance.kl(log_w, fine),
        lambda: acceptance.tv(fine, log_w),
        lambda: acceptance.tv_bound(log_w, 0.0),
        lambda: acceptance.beta_normalised(log_w, 0.0),
        lambda: acceptance.log_beta_for(log_w, 0.5),
    ):
        with pytest.raises(ValueError, match=r"log_\w+\[1\] is (nan|inf)"):
            call()
    with pytest.raises(ValueError, match="log_beta must be finite"):
        acceptance.log_acceptance(fine, bad)


def test_chances_above_one_are_refused():
    with pytest.raises(ValueError, match=r"log_accept must be at most 0, got 0\.2"):
        acceptance.acceptance_rate(torch.tensor([-1.0, 0.2]))


def test_lengths_and_probabilities_must_fit():
    lw = torch.zeros(3)
    with pytest.raises(ValueError, match="log_accept has 2 samples, the others 3"):
        acceptance.tv(lw, torch.zeros(2))
    for probs in (torch.ones(3), torch.tensor([0.5, 0.5]), torch.tensor([1.5, -0.5, 0.0])):
        with pytest.raises(ValueError, match="probs must be 3 numbers >= 0 with sum 1"):
            acceptance.acceptance_rate(lw, probs)


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        acceptance.log_beta_for(torch.zeros(3), rate)


def test_without_a_weight_nothing_is_known_of_p():
    nothing, log_r = torch.full((4,), -INF), torch.tensor([0.0, -1.0, 0.0, -INF])
    for score in (
        acceptance.tv(nothing, log_r),
        acceptance.kl(nothing, log_r),
        acceptance.tv_bound(nothing, 0.0),
        acceptance.beta_normalised(nothing, 0.0),
        acceptance.kl(log_r, nothing),
    ):
        assert math.isnan(score.value)
    assert acceptance.acceptance_rate(nothing) == Score(0.0, 0.0, 4)


def test_what_is_never_accepted_costs_infinity():
    log_w, log_r = torch.tensor([0.0, 1.0, -INF]), torch.tensor([0.0, -INF, 0.0])
    score = acceptance.kl(log_w, log_r)
    assert (score.value, score.n) == (INF, 3)
    assert math.isnan(score.stderr)


def test_beta_at_the_largest_weight_leaves_nothing_outside_whatever_the_rounding():
    """log w comes as (log a + λφ) − log a, and β as exp of the same λ."""
    log_a = -torch.linspace(1, 500, 2000, dtype=torch.float64)
    for weight in (0.1, 0.3, 0.7, 1.9, 4.4):
        log_w = (log_a + weight) - log_a
        log_beta = math.log(math.exp(weight))
        assert (log_w > log_beta).any()
        assert acceptance.tv_bound(log_w, log_beta).value == 0


@pytest.mark.parametrize("max_tv", [0.01, 0.1, 0.3])
def test_the_smallest_beta_that_keeps_a_distance(max_tv):
    log_w = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_beta = acceptance.log_beta_for_tv(log_w, max_tv)

    def distance(log_beta):
        return acceptance.tv(log_w, acceptance.log_acceptance(log_w, log_beta)).value

    assert distance(log_beta) <= max_tv < distance(log_beta - 1e-6)
    with pytest.raises(ValueError, match="has P > 0"):
        acceptance.log_beta_for_tv(torch.full((5,), -INF), max_tv)
