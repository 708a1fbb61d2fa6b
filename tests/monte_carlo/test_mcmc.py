"""`MetropolisHastings` against powers of its transition matrix."""

import math

import pytest
import torch
from laws import is_calibrated, is_rate
from sampling import INF, N, follows, law, log_weights, transition

from dmgen.monte_carlo.mcmc import MetropolisHastings, _walk


def start_law(log_q, log_w):
    return law(log_q, torch.where(log_w > -INF, 0.0, -INF)).exp()


@pytest.mark.parametrize(("burn_in", "thin"), [(0, 1), (2, 1), (1, 2), (40, 1)])
def test_a_chain_has_the_law_of_its_steps(target, proposal, burn_in, thin):
    """One text a chain, so that all are independent: start · K^(burn_in + thin)."""
    log_q, log_w = log_weights(target, proposal)
    k, start = transition(log_q, log_w), start_law(log_q, log_w)
    sampler = MetropolisHastings(target, proposal, n_chains=N, burn_in=burn_in, thin=thin)
    samples = sampler.sample(N, seed=1)
    steps = burn_in + thin
    expected = (start @ torch.linalg.matrix_power(k, steps)).log()
    assert follows(samples, target, expected)
    # The power of this test: p is told apart early on, and the start and one step at the end.
    assert follows(samples, target, target.exact().log_prob) == (steps > 10)
    assert not follows(samples, target, start.log())
    if steps != 1:
        assert not follows(samples, target, (start @ k).log())
    torch.testing.assert_close(samples.log_prob, proposal.log_prob(samples), rtol=0, atol=1e-12)


def test_the_law_of_the_chain_closes_in_as_promised(target, proposal):
    log_q, log_w = log_weights(target, proposal)
    k, now = transition(log_q, log_w), start_law(log_q, log_w)
    p = target.exact().log_prob.exp()
    torch.testing.assert_close(p @ k, p, rtol=0, atol=1e-12)
    worst = float(torch.exp(log_w.max() - target.exact().log_z))
    for step in range(40):
        assert float((now - p).abs().sum() / 2) <= (1 - 1 / worst) ** step + 1e-12
        now = now @ k


@pytest.mark.parametrize("thin", [1, 3])
def test_kept_states_of_a_chain_are_as_far_apart_as_thinning_says(target, proposal, thin):
    log_q, log_w = log_weights(target, proposal)
    k = torch.linalg.matrix_power(transition(log_q, log_w), thin)
    p = target.exact().log_prob.exp()
    chains = 4000
    sampler = MetropolisHastings(target, proposal, n_chains=chains, burn_in=60, thin=thin)
    texts = sampler.sample(2 * chains, seed=7).texts
    same = sum(x == y for x, y in zip(texts[:chains], texts[chains:], strict=True))
    exact = float((p * k.diagonal()).sum())
    assert is_rate(same / chains, chains, exact)
    other = float((p * torch.linalg.matrix_power(k, 2).diagonal()).sum())
    assert not is_rate(same / chains, chains, other)  # the power of this test
    # Neighbouring chains are strangers.
    alike = sum(x == y for x, y in zip(texts[:chains:2], texts[1:chains:2], strict=True))
    alone = float((p * p).sum())
    assert is_rate(2 * alike / chains, chains // 2, alone)


def test_the_acceptance_rate_is_that_of_the_stationary_chain(target, proposal):
    log_q, log_w = log_weights(target, proposal)
    p, q = target.exact().log_prob.exp(), log_q.exp()
    seen = log_w > -INF
    ratio = torch.exp((log_w - log_w[seen][:, None]).clamp(max=0))
    exact = float((p[seen][:, None] * q * ratio).sum())
    sampler = MetropolisHastings(target, proposal, n_chains=50, burn_in=40, thin=2)
    with pytest.raises(RuntimeError, match="nothing was sampled yet"):
        sampler.diagnostics()
    z = []
    for seed in range(100):
        sampler.sample(500, seed=seed)
        found = sampler.diagnostics()["acceptance_rate"]
        assert found.n == 50 * 2 * 10
        z.append((found.value - exact) / found.stderr)
    # Errors from the spread of 50 chains: a t law with 49 degrees of freedom, sd √(49/47).
    assert is_calibrated([value / math.sqrt(49 / 47) for value in z])


def test_a_single_chain_has_no_known_error(target, proposal):
    sampler = MetropolisHastings(target, proposal, n_chains=1, burn_in=2, thin=1)
    assert len(sampler.sample(5, seed=0)) == 5
    assert math.isnan(sampler.diagnostics()["acceptance_rate"].stderr)
    # No more chains are started than texts are asked for.
    many = MetropolisHastings(target, proposal, n_chains=1000, burn_in=2, thin=1)
    assert len(many.sample(3, seed=0)) == 3
    assert many.n_drawn < 100


def test_a_walk_by_hand():
    log_w = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [-INF, 0.5], [2.0, -5.0]], dtype=torch.float64)
    # e^-1 = 0.37, e^-0.5 = 0.61
    u = torch.tensor([[0.36, 0.99], [0.0, 0.62], [0.99, 0.9]], dtype=torch.float64)
    assert _walk(log_w, u).tolist() == [[1, 1], [1, 1], [3, 1]]
    u = torch.tensor([[0.38, 0.99], [0.0, 0.60], [0.99, 0.0]], dtype=torch.float64)
    assert _walk(log_w, u).tolist() == [[0, 1], [0, 2], [3, 3]]
