"""`QuasiRejection` against the exact distribution p_β, and the choice of β."""

import math

import pytest
import torch
from laws import is_calibrated, is_rate, uncalibrated
from sampling import INF, STARTS_B, N, counting, follows, law, log_weights

from dmgen.constraints.constraint import Moment
from dmgen.constraints.feature import feature
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.quasi_rejection import QuasiRejection
from dmgen.target.ebm import EBM


@pytest.mark.parametrize("scale", [1e-9, 0.3, 1.0, 1.7])
def test_quasi_rejection_follows_p_beta(target, proposal, scale):
    """From q restricted to the texts with P > 0 up to p itself."""
    log_q, log_w = log_weights(target, proposal)
    top = float(log_w.max())
    sampler = QuasiRejection(target, proposal, scale * math.exp(top))
    samples = sampler.sample(N, seed=1)
    assert len(samples) == N
    p_beta = law(log_q, acceptance.log_acceptance(log_w, top + math.log(scale)))
    assert follows(samples, target, p_beta)
    restricted = law(log_q, torch.where(log_w > -INF, 0.0, -INF))
    p = target.exact().log_prob
    torch.testing.assert_close(samples.log_prob, proposal.log_prob(samples), rtol=0, atol=1e-12)
    # The power of this test: the laws at both ends are told apart, and from that in between.
    assert follows(samples, target, restricted) == (scale == 1e-9)
    assert follows(samples, target, p) == (scale >= 1)


def test_quasi_rejection_from_the_base_is_exact_where_the_factor_is_bounded(world):
    """P/a is at most e^λ: β = e^λ gives p, and the base is not scored for its own texts."""
    base = counting(world)
    target = EBM(base, [Moment(STARTS_B, 0.6)], [1.2])
    samples = QuasiRejection(target, base, math.exp(1.2)).sample(N, seed=2)
    assert base.n_scored == 0
    assert follows(samples, target, target.exact().log_prob)
    assert not follows(samples, target, target.exact().log_base)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_an_acceptance_rate_is_reached_and_judged_on_other_texts(target, proposal, rate):
    log_q, log_w = log_weights(target, proposal)
    z = []
    for seed in range(200):
        sampler = QuasiRejection(
            target, proposal, acceptance_rate=rate, n_estimation=400, seed=seed
        )
        log_r = acceptance.log_acceptance(log_w, sampler.log_beta)
        exact = acceptance.acceptance_rate(log_r, log_q.exp()).value
        found = sampler.diagnostics()["acceptance_rate"]
        # On the texts that β was chosen on it would be the rate asked for, whatever is true.
        assert found.value != pytest.approx(rate, abs=1e-9)
        z.append((found.value - exact) / found.stderr)
    assert is_calibrated(z)


def test_beta_is_chosen_on_texts_of_the_proposal(target, proposal):
    drawn = counting(proposal)
    sampler = QuasiRejection(target, drawn, acceptance_rate=0.2, n_estimation=3000, seed=4)
    assert (drawn.n_drawn, sampler.n_drawn) == (3000, 3000)
    log_q, log_w = log_weights(target, proposal)
    log_r = acceptance.log_acceptance(log_w, sampler.log_beta)
    exact = acceptance.acceptance_rate(log_r, log_q.exp()).value
    # The rate at a β with that rate on 3000 texts: the error is at most that of a Bernoulli.
    assert is_rate(exact, 3000, 0.2)
    assert sampler.beta == pytest.approx(math.exp(sampler.log_beta))


@pytest.mark.parametrize("beta", [0.4, 2.0])
def test_diagnostics_agree_with_the_sums_over_all_texts(target, proposal, beta):
    log_q, log_w = log_weights(target, proposal)
    log_beta, q = math.log(beta), log_q.exp()
    log_r = acceptance.log_acceptance(log_w, log_beta)
    exact = {
        "acceptance_rate": acceptance.acceptance_rate(log_r, q),
        "tv": acceptance.tv(log_w, log_r, q),
        "tv_bound": acceptance.tv_bound(log_w, log_beta, q),
        "kl": acceptance.kl(log_w, log_r, q),
        "beta_normalised": beta / math.exp(target.exact().log_z),
    }
    z = {name: [] for name in exact}
    for seed in range(60):
        sampler = QuasiRejection(target, proposal, beta, n_estimation=2000, seed=seed)
        found = sampler.diagnostics()
        assert found.keys() == exact.keys()
        for name, score in found.items():
            z[name].append((score.value - float(exact[name])) / score.stderr)
        assert all(score.n == 2000 for score in found.values())
    assert uncalibrated(z) == set()
    # The power of this check: the distance at a β larger by a quarter is refused.
    wrong = acceptance.tv(log_w, acceptance.log_acceptance(log_w, log_beta + 0.25), q).value
    shift = (exact["tv"].value - wrong) / found["tv"].stderr
    assert not is_calibrated([value + shift for value in z["tv"]])


def test_diagnostics_are_drawn_once(target, proposal):
    sampler = QuasiRejection(target, proposal, 0.5, n_estimation=100)
    assert sampler.diagnostics() == sampler.diagnostics()
    assert sampler.n_drawn == 100


def test_beta_normalised_does_not_depend_on_the_unit_of_p(world, proposal):
    """A λ on a feature that is always 1 changes P by a factor and p not at all."""
    always = feature(lambda text: True, name="always")
    found = []
    for unit in (0.0, 3.0, -800.0, 800.0):
        target = EBM(world, [Moment(STARTS_B, 0.6), Moment(always, (0.5, 2.0))], [1.2, unit])
        sampler = QuasiRejection(target, proposal, acceptance_rate=0.3, n_estimation=500, seed=5)
        found.append((sampler.log_beta - unit, sampler.diagnostics(), sampler.sample(20, seed=1)))
    assert sampler.beta == INF
    for log_beta, scores, samples in found[1:]:
        assert log_beta == pytest.approx(found[0][0], abs=1e-9)
        assert samples.texts == found[0][2].texts
        for name, score in scores.items():
            assert score.value == pytest.approx(found[0][1][name].value, abs=1e-9)


def test_pools_do_not_depend_on_the_batch_size(target, proposal):
    found = [
        QuasiRejection(
            target, proposal, acceptance_rate=0.2, n_estimation=100, seed=1, batch_size=size
        )
        for size in (1, 9, 1000)
    ]
    assert len({sampler.log_beta for sampler in found}) == 1
    values = [{k: s.value for k, s in sampler.diagnostics().items()} for sampler in found]
    assert values[1] == pytest.approx(values[0])
    assert values[2] == pytest.approx(values[0])


def test_a_rate_above_the_share_of_possible_texts_is_refused(target, proposal):
    with pytest.raises(ValueError, match=r"of 500 texts .* have P > 0, so no beta .* take at most"):
        QuasiRejection(target, proposal, acceptance_rate=0.99, n_estimation=500, seed=0)


def test_a_search_without_hope_is_given_up_early(target, proposal):
    """At one text in 10^9, a thousandth of max_draws shows that 100,000 are out of reach."""
    log_q, log_w = log_weights(target, proposal)
    sampler = QuasiRejection(target, proposal, 1e9 * math.exp(float(log_w.max())))
    with pytest.raises(RuntimeError, match=r"0 of [\d,]+ texts .* accepted .* far more draws"):
        sampler.sample(100_000, seed=0)
    assert sampler.n_drawn < 10_000
    # At one in 40 the same is seen from the texts that were accepted.
    rate = float((log_q.exp() * log_w.exp()).sum()) / (40 * math.exp(float(log_w.max())))
    sampler = QuasiRejection(target, proposal, 40 * math.exp(float(log_w.max())), max_draws=10_000)
    with pytest.raises(RuntimeError, match=r"max_draws=10,000.*a smaller beta.*raise max_draws"):
        sampler.sample(5_000, seed=0)
    assert sampler.n_drawn < 10_000
    assert rate * 10_000 < 5_000


def test_a_search_within_reach_is_not_given_up(target, proposal):
    """The cap is the number of draws, not a guess: with some slack every seed succeeds."""
    log_q, log_w = log_weights(target, proposal)
    beta = math.exp(float(log_w.max()))
    log_r = acceptance.log_acceptance(log_w, math.log(beta))
    rate = acceptance.acceptance_rate(log_r, log_q.exp()).value
    n = 50
    enough = math.ceil((n + 6 * math.sqrt(n)) / rate)  # six standard deviations of the count
    for seed in range(100):
        sampler = QuasiRejection(target, proposal, beta, max_draws=enough)
        assert len(sampler.sample(n, seed=seed)) == n
        assert sampler.n_drawn <= enough
    too_few = QuasiRejection(target, proposal, beta, max_draws=n)
    with pytest.raises(RuntimeError, match="max_draws=50"):
        too_few.sample(n, seed=0)
    assert too_few.n_drawn == n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either beta or acceptance_rate"),
        ({"beta": 1.0, "acceptance_rate": 0.1}, "either beta or acceptance_rate"),
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"beta": -1.0}, "beta must be a finite number above 0"),
        ({"beta": INF}, "beta must be a finite number above 0"),
        ({"beta": math.nan}, "beta must be a finite number above 0"),
        ({"acceptance_rate": 0.0}, r"acceptance_rate must lie in \(0, 1\]"),
        ({"acceptance_rate": 1.1}, r"acceptance_rate must lie in \(0, 1\]"),
        ({"acceptance_rate": math.nan}, r"acceptance_rate must lie in \(0, 1\]"),
        ({"beta": 1.0, "n_estimation": 1}, "n_estimation must be"),
    ],
)
def test_beta_and_rate_are_refused_before_anything_is_drawn(target, proposal, arguments, message):
    drawn = counting(proposal)
    with pytest.raises(ValueError, match=message):
        QuasiRejection(target, drawn, **arguments)
    assert drawn.n_drawn == 0
