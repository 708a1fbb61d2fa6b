"""`Estimate`: the delta method against formulas derived by hand, and errors over repeats."""

import math

import pytest
import torch
from laws import is_calibrated

from dmgen.estimates import divergences
from dmgen.estimates.estimate import Estimate, stderr_of_mean
from dmgen.estimates.score import Score
from dmgen.estimates.weights import Weights, ess
from dmgen.estimates.weights import log_z as estimate_log_z
from dmgen.estimates.weights import mean as weighted_mean
from dmgen.monte_carlo import acceptance

INF = math.inf
N = 400


def columns(seed):
    """log P with some `-inf`, log π, log q and strata of N samples, and log π without `-inf`."""
    g = torch.Generator().manual_seed(seed)
    log_p, log_pi, log_q = torch.randn(3, N, generator=g, dtype=torch.float64)
    log_p[torch.rand(N, generator=g) < 0.3] = -INF
    holes = log_pi.masked_fill((torch.rand(N, generator=g) < 0.1) & (log_p == -INF), -INF)
    return log_p, holes, log_q, torch.randint(0, 3, (N,), generator=g)


# ---------------------------------------------------------------- arithmetic


def influences(seed=0, n=3):
    """Means of n columns of the same samples, far from 0."""
    x = torch.randn(50, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + 3, [Estimate.mean(column) for column in (x + 3).unbind(1)]


EXPRESSIONS = {
    "sum": lambda a, b, c: a + b + c + 2,
    "difference": lambda a, b, c: a - b - 1,
    "product": lambda a, b, c: a * b * c * 2,
    "ratio": lambda a, b, c: a / b / 4,
    "from a number": lambda a, b, c: (5 - a) * (2 / b) + (1 + c) * 3,
    "logs": lambda a, b, c: a.log() - (b * c).log(),
    "exponentials": lambda a, b, c: (-a).exp() + (b - c).exp(),
}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_arithmetic_is_the_delta_method(expression):
    """The influence is the gradient times the influences of the arguments."""
    x, estimates = influences()
    found = expression(*estimates)
    means = x.mean(0).requires_grad_()
    value = expression(*means)
    (gradient,) = torch.autograd.grad(value, means)
    assert found.value == pytest.approx(value.item(), rel=1e-14)
    expected = (x - x.mean(0)) @ gradient
    assert torch.allclose(found.influence, expected, rtol=1e-12, atol=1e-13)
    assert float(found.influence.mean()) == pytest.approx(0, abs=1e-12)


def test_an_estimate_minus_itself_is_exactly_zero():
    _, (a, _, _) = influences()
    assert (a - a).score() == Score(0.0, 0.0, 50)


def test_a_total_is_n_times_the_mean():
    x, (a, _, _) = influences()
    total = Estimate.total(x[:, 0])
    assert total.score().value == pytest.approx(50 * a.value, rel=1e-14)
    assert total.score().stderr == pytest.approx(50 * a.score().stderr, rel=1e-14)


def test_the_error_of_a_number_put_in_for_the_truth():
    _, (a, b, _) = influences()
    both = b + 2.0 * a.error()
    assert both.value == b.value
    assert both.score().stderr == pytest.approx((b + 2 * a).score().stderr, rel=1e-12)


def test_a_score_may_have_another_number_of_samples_and_a_signature():
    _, (a, _, _) = influences()
    assert a.score(7, "sig") == Score(a.value, a.score().stderr, 7, "sig")


def test_only_estimates_of_the_same_samples_combine():
    _, (a, _, _) = influences()
    x = torch.arange(50.0, dtype=torch.float64)
    for other in (
        Estimate.mean(x[:49]),
        Estimate.mean(x, strata=torch.zeros(50)),
    ):
        with pytest.raises(ValueError, match="same samples"):
            a + other
    strata = torch.arange(50) % 2
    one, two = Estimate.mean(x, strata), Estimate.mean(x, strata.clone())
    assert (one - two).score().stderr == 0


def test_logarithms_and_exponentials_out_of_range():
    zeros = Estimate.mean(torch.zeros(4, dtype=torch.float64))
    assert zeros.log().value == -INF
    assert math.isnan(zeros.log().score().stderr)
    assert math.isnan((zeros - 1).log().value)
    assert (zeros + 1000).exp().value == INF


def test_an_infinite_value_has_no_error():
    score = Estimate.mean(torch.tensor([0.0, INF, 1.0], dtype=torch.float64)).score()
    assert score.value == INF
    assert math.isnan(score.stderr)


def test_the_error_of_a_ratio_knows_that_both_come_from_the_same_samples():
    z, of_strangers = [], []
    g = torch.Generator().manual_seed(3)
    for _ in range(400):
        x = torch.randn(300, generator=g, dtype=torch.float64)
        a, b = Estimate.mean(x + 2), Estimate.mean(2 * x + 5)
        found = a / b
        relative = math.hypot(*(e.score().stderr / e.value for e in (a, b)))
        z.append((found.value - 2 / 5) / found.score().stderr)
        of_strangers.append((found.value - 2 / 5) / (found.value * relative))
    assert is_calibrated(z)
    assert not is_calibrated(of_strangers)  # the power of this test


# ---------------------------------------------------------------- weights


def test_added_weights_are_those_of_all_samples_in_strata_of_their_own():
    log_p, _, log_q, strata = columns(0)
    log_w = log_p - log_q
    both = Weights(log_w[:100]).add(Weights(log_w[100:], strata[100:]))
    assert torch.equal(both.log_w, log_w)
    assert both.strata.unique(return_counts=True)[1][0] == 100
    assert len(both.strata.unique()) == 4
    assert both.log_z.value == pytest.approx(estimate_log_z(log_w)[0], rel=1e-14)


def test_a_mixture_is_the_balance_heuristic():
    log_p, _, log_q, _ = columns(1)
    log_probs, counts = torch.stack([log_q, log_q.flip(0)], 1), torch.tensor([100, 300])
    found = Weights.mixture(log_p, log_probs, counts)
    assert torch.equal(found.log_w, log_p - (log_probs + (counts.double() / N).log()).logsumexp(1))


def test_weights_equal_the_pure_functions():
    log_p, _, log_q, strata = columns(2)
    w = Weights(log_p - log_q, strata)
    assert w.ess.value == ess(w.log_w)
    assert (w.log_z.value, w.log_z.score().stderr) == estimate_log_z(w.log_w, strata)
    score = w.mean(log_q).score()
    assert (score.value, score.stderr) == weighted_mean(w.log_w, log_q, strata)
    assert w.log_density.exp().mean() == pytest.approx(1, abs=1e-14)


def test_a_known_log_z_has_no_error():
    w = Weights(torch.tensor([0.0, -1.0]), known_log_z=0.25)
    assert w.log_z.score() == Score(0.25, 0.0, 2)
    assert w.log_density.tolist() == [-0.25, -1.25]


def test_without_weights_nothing_is_known():
    w = Weights(torch.full((3,), -INF))
    assert (w.ess.value, w.log_z.value) == (0.0, -INF)
    assert math.isnan(w.ess.score().stderr)
    assert math.isnan(w.mean(torch.ones(3)).value)


# ---------------------------------------------------------------- formulas derived by hand


def equal(score, value, influence, strata=None):
    """Whether a score equals a value and the error of an influence derived by hand."""
    assert score.value == pytest.approx(float(value), rel=1e-12)
    assert score.stderr == pytest.approx(stderr_of_mean(influence, strata), rel=1e-12)


def densities(log_p, log_pi, log_q, log_z):
    """log g and log u, with the estimate of log Z where it is not known."""
    log_w = log_p - log_q
    estimated = float(log_w.logsumexp(0)) - math.log(len(log_w))
    return log_w - (estimated if log_z is None else log_z), log_pi - log_q


def kl_by_hand(log_g, log_u):
    g = log_g.exp()
    terms = torch.where(log_g > -INF, g * (log_g - log_u), 0.0)
    return terms, terms + g


def tv_by_hand(log_g, log_u):
    g = log_g.exp()
    terms = (g - log_u.exp()).clamp(min=0)
    return terms, torch.where(terms > 0, g, 0.0)


def js_by_hand(log_g, log_u):
    g, u = log_g.exp(), log_u.exp()
    m = (g + u) / 2
    terms = (torch.xlogy(g, g) - torch.xlogy(g, m) + torch.xlogy(u, u) - torch.xlogy(u, m)) / 2
    terms = terms - math.log(2) / 2 * (u - g)
    return terms, torch.where(g > 0, (torch.xlogy(g, g / m) + math.log(2) * g) / 2, 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("in_strata", [False, True])
@pytest.mark.parametrize("log_z", [None, 0.4])
@pytest.mark.parametrize("by_hand", [kl_by_hand, tv_by_hand, js_by_hand])
def test_divergences_equal_those_derived_by_hand(by_hand, log_z, in_strata, seed):
    log_p, log_pi, log_q, strata = columns(seed)
    strata = strata if in_strata else None
    measure = {kl_by_hand: divergences.kl, tv_by_hand: divergences.tv, js_by_hand: divergences.js}
    log_g, log_u = densities(log_p, log_pi, log_q, log_z)
    terms, slope = by_hand(log_g, log_u)
    influence = terms if log_z is not None else terms - slope.mean() * (log_g.exp() - 1)
    found = measure[by_hand](log_p, log_pi, log_q, log_z, strata=strata)
    equal(found, terms.mean(), influence, strata)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("in_strata", [False, True])
def test_weights_equal_those_derived_by_hand(in_strata, seed):
    log_p, _, log_q, strata = columns(seed)
    strata = strata if in_strata else None
    weights, w = Weights(log_p - log_q, strata), (log_p - log_q).exp()
    g = w / w.mean()
    equal(weights.log_z.score(), w.mean().log(), g - 1, strata)
    mean = (g * log_q).mean()
    equal(weights.mean(log_q).score(), mean, g * (log_q - mean), strata)
    value = w.sum() ** 2 / (w * w).sum()
    influence = value * (2 * g - g * g / (g * g).mean())
    equal(weights.ess.score(), value, influence, strata)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("log_beta", [-0.7, 0.5])
def test_acceptance_equals_what_was_derived_by_hand(log_beta, exact, seed):
    log_p, _, log_q, _ = columns(seed)
    log_w = log_p - log_q
    probs = log_q.softmax(0) if exact else None
    mass = probs if exact else torch.full_like(log_w, 1 / N)
    log_r = acceptance.log_acceptance(log_w, log_beta)
    w, r = log_w.exp(), log_r.exp()
    g, h = w / (mass @ w), r / (mass @ r)

    def agree(score, value, influence):
        if exact:
            assert (score.stderr, score.n) == (0, 0)
            assert score.value == pytest.approx(float(value), rel=1e-12)
        else:
            equal(score, value, influence)

    agree(acceptance.acceptance_rate(log_r, probs), mass @ r, r)
    terms = (g - h).clamp(min=0)
    above = (terms > 0).double()
    influence = terms - (mass @ (above * g)) * (g - 1) + (mass @ (above * h)) * (h - 1)
    agree(acceptance.tv(log_w, log_r, probs), mass @ terms, influence)
    excess = torch.where(w > 0, log_w - log_r, 0.0)
    mean = mass @ (g * excess)
    value = mean - (mass @ w).log() + (mass @ r).log()
    agree(acceptance.kl(log_w, log_r, probs), value, g * (excess - mean) - (g - 1) + (h - 1))
    outside = (log_w > log_beta).double()
    value = mass @ (g * outside)
    agree(acceptance.tv_bound(log_w, log_beta, probs), value, g * (outside - value))
    beta = math.exp(log_beta) / (mass @ w)
    agree(acceptance.beta_normalised(log_w, log_beta, probs), beta, -beta * (g - 1))


@pytest.mark.parametrize("seed", range(5))
def test_differences_from_pooled_texts_equal_those_derived_by_hand(seed):
    """KL(π‖a) - KL(p‖a) and KL(p‖a) - KL(p‖π), from texts of a and π in equal numbers."""
    log_p, _, log_a, _ = columns(seed)
    log_pi = log_a.flip(0) + 0.3
    log_q = torch.logaddexp(log_a, log_pi) - math.log(2)
    strata = torch.arange(2).repeat_interleave(N // 2)
    own = strata == 1
    log_w = log_p - log_q
    log_z = float(log_w.logsumexp(0)) - math.log(N)
    g = (log_w - log_z).exp()

    def target_kl(log_other):
        t = torch.where(g > 0, log_p - log_other, 0.0)
        mean = (g * t).mean()
        return mean - log_z, g * (t - mean) - (g - 1)

    paid = (log_pi - log_a)[own].mean()
    paid_influence = torch.where(own, 2 * (log_pi - log_a - paid), 0.0)
    (to_a, a_influence), (to_pi, pi_influence) = target_kl(log_a), target_kl(log_pi)

    p = Weights(log_w, strata)
    kl_a, kl_pi = (
        divergences.estimate_kl(p, Weights(x - log_q, strata, known_log_z=0.0))
        for x in (log_a, log_pi)
    )
    of_policy = Weights(torch.where(own, 0.0, -INF), strata)
    excess = of_policy.mean(log_pi - log_a) - kl_a
    equal(excess.score(), paid - to_a, paid_influence - a_influence, strata)
    equal((kl_a - kl_pi).score(), to_a - to_pi, a_influence - pi_influence, strata)
