"""Divergences against exact sums, and their errors over repeats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import is_calibrated, random_log_probs

from dmgen.estimates import weights as log_weights
from dmgen.estimates.divergences import js, kl, log_z_bounds, reverse_kl, tv
from dmgen.estimates.f_divergence import f_divergence

INF = math.inf
REPEATS = 400
ESTIMATORS = {"kl": kl, "tv": tv, "js": js}


def exact(log_p, log_pi):
    """Return KL(p‖π), TV and JS by their definitions."""
    p, pi = log_p.exp(), log_pi.exp()
    log_m = torch.logaddexp(log_p, log_pi) - math.log(2)
    return {
        "kl": float(torch.where(p > 0, p * (log_p - log_pi), 0.0).sum()),
        "tv": float((p - pi).abs().sum() / 2),
        "js": float(
            torch.where(p > 0, p * (log_p - log_m), 0.0).sum() / 2
            + torch.where(pi > 0, pi * (log_pi - log_m), 0.0).sum() / 2
        ),
    }


def every_state_once(n_states):
    """Return log q for which one sample of each state makes a mean over samples an exact sum."""
    return torch.full((n_states,), -math.log(n_states), dtype=torch.float64)


def poisson(rate, n_states=120):
    x = torch.arange(n_states, dtype=torch.float64)
    return x * math.log(rate) - rate - torch.lgamma(x + 1)


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize(("name", "value"), [("kl", 0.048412), ("tv", 0.123151), ("js", 0.01177)])
@pytest.mark.parametrize("log_z", [None, 7.5])
def test_poisson_11_against_10(name, value, log_z):
    log_p, log_pi = poisson(11.0), poisson(10.0)
    score = ESTIMATORS[name](log_p + 7.5, log_pi, every_state_once(120), log_z)
    # Half a unit of the last digit given; the tail beyond 120 is below 1e-60.
    assert score.value == pytest.approx(value, abs=5e-7)
    assert score.value == pytest.approx(exact(log_p, log_pi)[name], abs=1e-13)
    assert score.n == 120


def test_reverse_kl_of_poisson_laws():
    log_p, log_pi = poisson(11.0), poisson(10.0)
    # The mean over samples of π, here each state as often as 1e7 π says.
    counts = (log_pi.exp() * 1e7).round().long()
    score = reverse_kl(log_pi.repeat_interleave(counts), log_p.repeat_interleave(counts))
    # Rounding the counts of about 40 states to 1e-7 moves the mean by at most 40 * 5e-8 * 3.
    assert score.value == pytest.approx(0.046898, abs=7e-6)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_bounded_forms_equal_the_definitions(name, seed):
    log_p, log_pi = random_log_probs(seed, 30, 2.0), random_log_probs(100 + seed, 30, 2.0)
    log_p[:10] = -INF  # states only the policy has
    log_p = torch.log_softmax(log_p, 0)
    if name != "kl":
        log_pi[15:20] = -INF  # states only the target has, where KL is infinite
        log_pi[3:6] = -INF  # states that neither has
        log_pi = torch.log_softmax(log_pi, 0)
    value = ESTIMATORS[name](log_p - 3.0, log_pi, every_state_once(30)).value
    assert value == pytest.approx(exact(log_p, log_pi)[name], abs=1e-13)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_terms_stay_finite_where_the_ratios_do_not(name):
    # u = π/q = e^800 overflows; the terms grow with log u at most and must not feel it.
    log_p = torch.tensor([0.0, 0.0], dtype=torch.float64)
    log_pi = torch.tensor([800.0, -800.0], dtype=torch.float64)
    score = ESTIMATORS[name](log_p, log_pi, torch.zeros(2))
    # JS with g = 1: sample 0 gives ½ (2 log 2 - 800) - ½, sample 1 gives ½ · 2 log 2.
    js_terms = 0.5 * (2 * math.log(2) - 800) - 0.5 + math.log(2)
    expected = {"kl": 0.0, "tv": 0.5, "js": js_terms / 2}[name]
    assert score.value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_are_zero_at_the_target(name):
    log_p, log_q = random_log_probs(0, 20), random_log_probs(1, 20)
    score = ESTIMATORS[name](log_p, log_p, log_q, 0.0)
    assert score.value == pytest.approx(0.0, abs=1e-15)


def test_infinite_and_undefined_results():
    zeros = torch.zeros(3)
    hole = torch.tensor([0.0, -INF, 0.0])
    assert kl(zeros, hole, zeros).value == INF
    assert math.isnan(kl(zeros, hole, zeros).stderr)
    assert math.isfinite(kl(hole, hole, zeros).value)
    assert reverse_kl(zeros, hole).value == INF
    for name, estimator in ESTIMATORS.items():
        for log_z in (None, 0.0):
            score = estimator(torch.full((3,), -INF), zeros, zeros, log_z)
            assert math.isnan(score.value), name
            assert math.isnan(score.stderr), name


def test_arguments_are_checked():
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=r"log_proposal\[1\] is -inf"):
        kl(zeros, zeros, torch.tensor([0.0, -INF, 0.0]))
    with pytest.raises(ValueError, match=r"log_score\[2\] is nan"):
        tv(torch.tensor([0.0, 0.0, math.nan]), zeros, zeros)
    with pytest.raises(ValueError, match="log_policy has 2 samples"):
        js(zeros, torch.zeros(2), zeros)
    with pytest.raises(ValueError, match="log_z must be finite"):
        kl(zeros, zeros, zeros, -INF)
    with pytest.raises(ValueError, match=r"log_policy\[0\] is -inf"):
        reverse_kl(torch.tensor([-INF]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"target_weights\[1\]"):
        log_z_bounds(zeros, torch.tensor([0.0, -INF]))


# ---------------------------------------------------------------- the law of the estimators


def draw(log_q, n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_q.exp(), n, replacement=True, generator=g)


LOG_P = random_log_probs(3, 15)
LOG_PI = torch.log_softmax(LOG_P + random_log_probs(6, 15), 0)
LOG_Q = torch.log_softmax(LOG_P + 1.5 * random_log_probs(7, 15), 0)
N = 3000


@pytest.mark.parametrize("known_z", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_errors_are_calibrated(name, known_z):
    truth = exact(LOG_P, LOG_PI)[name]
    z, ignoring_z, ess = [], [], []
    for seed in range(REPEATS):
        x = draw(LOG_Q, N, seed)
        args = (LOG_P[x] + 2.0, LOG_PI[x], LOG_Q[x])
        score = ESTIMATORS[name](*args, 2.0 if known_z else None)
        z.append((score.value - truth) / score.stderr)
        # The wrong law: Z estimated, and its error left out.
        log_z = log_weights.log_z(args[0] - args[2])[0]
        ignoring_z.append((score.value - truth) / ESTIMATORS[name](*args, log_z).stderr)
        ess += [log_weights.ess(LOG_P[x] - LOG_Q[x]), log_weights.ess(LOG_PI[x] - LOG_Q[x])]
    assert min(ess) > 200  # where the docstrings say that errors can be believed
    assert is_calibrated(z)
    if not known_z:
        assert not is_calibrated(ignoring_z)


def test_reverse_kl_is_calibrated():
    truth = exact(LOG_PI, LOG_P)["kl"]
    z = []
    for seed in range(REPEATS):
        x = draw(LOG_PI, N, seed)
        score = reverse_kl(LOG_PI[x], LOG_P[x])
        z.append((score.value - truth) / score.stderr)
    assert is_calibrated(z)
    assert not is_calibrated(1.3 * np.array(z))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_pooled_samples_are_calibrated(name):
    counts = torch.tensor([1000, 2000])
    strata = torch.repeat_interleave(torch.arange(2), counts)
    truth = exact(LOG_P, LOG_PI)[name]
    z = []
    for seed in range(REPEATS):
        x = torch.cat([draw(LOG_Q, 1000, 2 * seed), draw(LOG_PI, 2000, 2 * seed + 1)])
        mixture = log_weights.log_mixture(torch.stack([LOG_Q, LOG_PI], 1)[x], counts)
        score = ESTIMATORS[name](LOG_P[x], LOG_PI[x], mixture, strata=strata)
        z.append((score.value - truth) / score.stderr)
    assert is_calibrated(z)


def test_log_z_bounds_hold_and_are_calibrated():
    log_w = LOG_P + 2.0 - LOG_Q
    truths = float(LOG_Q.exp() @ log_w), float(LOG_P.exp() @ log_w)
    assert truths[0] < 2.0 < truths[1]
    gap = exact(LOG_P, LOG_Q)["kl"] + exact(LOG_Q, LOG_P)["kl"]
    assert truths[1] - truths[0] == pytest.approx(gap, abs=1e-13)
    z = []
    for seed in range(REPEATS // 2):
        bounds = log_z_bounds(log_w[draw(LOG_Q, N, seed)], log_w[draw(LOG_P, N, 1000 + seed)])
        z += [(b.value - t) / b.stderr for b, t in zip(bounds, truths, strict=True)]
    assert is_calibrated(z)
    low, high = log_z_bounds(torch.tensor([0.0, -INF]), torch.zeros(2))
    assert low.value == -INF
    assert high.value == 0.0


@pytest.mark.parametrize("name", ["tv", "js", "kl"])
def test_family_equals_the_estimators(name):
    log_p, log_pi = random_log_probs(21, 25), random_log_probs(22, 25)
    log_p[:5] = -INF
    log_p = torch.log_softmax(log_p, 0)
    d = f_divergence(name)
    seen = log_p > -INF
    # Where P = 0 the perspective p f(π/p) tends to f'(∞) π.
    value = log_p[seen].exp() @ d.f((log_pi - log_p)[seen].exp())
    value += d.f_prime_at_infinity * log_pi[~seen].exp().sum()
    times = 2.0 if name == "js" else 1.0
    truth = times * exact(log_p, log_pi)[name]
    assert value.item() == pytest.approx(truth, abs=1e-13)
    score = ESTIMATORS[name](log_p, log_pi, every_state_once(25))
    assert times * score.value == pytest.approx(truth, abs=1e-13)


# ---------------------------------------------------------------- properties

laws = st.lists(st.floats(-30, 30), min_size=6, max_size=6).map(
    lambda xs: torch.log_softmax(torch.tensor(xs, dtype=torch.float64), 0)
)


@settings(max_examples=150, deadline=None)
@given(laws, laws, st.floats(-1e5, 1e5))
def test_bounds_and_shift_invariance(log_p, log_pi, shift):
    q = every_state_once(6)
    assert 0 <= tv(log_p, log_pi, q).value <= 1 + 1e-12
    assert -1e-12 <= js(log_p, log_pi, q).value <= math.log(2) + 1e-12
    assert kl(log_p, log_pi, q).value >= -1e-12
    for estimator in ESTIMATORS.values():
        # A log-score of 1e5 carries roundings of 1.5e-11, times a log ratio of at most 60.
        moved = estimator(log_p + shift, log_pi, q).value
        assert moved == pytest.approx(estimator(log_p, log_pi, q).value, abs=5e-9)


def test_a_part_of_the_target_that_the_policy_never_writes_costs_everything():
    """However small that part is: its weight may have underflowed."""
    log_score = torch.tensor([0.0, -800.0], dtype=torch.float64)
    log_policy = torch.tensor([0.0, -INF], dtype=torch.float64)
    found = kl(log_score, log_policy, torch.tensor([-0.7, -0.7], dtype=torch.float64))
    assert found.value == INF
