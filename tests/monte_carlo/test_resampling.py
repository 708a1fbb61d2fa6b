"""`ImportanceResampling` against the exact distribution of small and large pools."""

import math
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from laws import is_calibrated, is_rate
from sampling import INF, STARTS_B, counting, follows, log_weights

from dmgen.constraints.constraint import Moment
from dmgen.models import Samples
from dmgen.monte_carlo.resampling import ImportanceResampling, _resample
from dmgen.target.ebm import EBM


def law_of_a_pool_of_two(log_q, log_w):
    """Exactly: both texts are one of all, and the second is chosen as often as the first.

    A pool without a text with P > 0 is refused, so the law is that given one.
    """
    q, w = log_q.exp(), log_w.exp()
    pair = q[:, None] * q
    total = w[:, None] + w
    share = torch.where(total > 0, w[:, None] / total, 0.0)
    return (2 * pair * share).sum(1).log().log_softmax(0)


def one_each(sampler, n):
    """One text of each of n pools; a pool without any hit gives none."""
    drawn = []
    for seed in range(n):
        with suppress(RuntimeError):
            drawn.append(sampler.sample(1, seed=seed))
    return Samples.cat(drawn)


def test_a_pool_of_two_has_the_exact_law_of_a_pool_of_two(target, proposal):
    log_q, log_w = log_weights(target, proposal)
    found = one_each(ImportanceResampling(target, proposal, n_pool=2), 1000)
    assert follows(found, target, law_of_a_pool_of_two(log_q, log_w))
    assert not follows(found, target, target.exact().log_prob)


def test_a_large_pool_gives_p(target, proposal):
    """The bias of order 1/200 is far below what 1000 texts can show."""
    found = one_each(ImportanceResampling(target, proposal, n_pool=200), 1000)
    assert follows(found, target, target.exact().log_prob)
    log_q, log_w = log_weights(target, proposal)
    assert not follows(found, target, law_of_a_pool_of_two(log_q, log_w))


def test_texts_of_a_pool_come_in_proportion_to_their_weight(target, proposal):
    sampler = ImportanceResampling(target, proposal, n_pool=300)
    samples = sampler.sample(1000, seed=3)
    assert len(samples) == 1000
    assert sampler.n_drawn == 300
    assert all("a" in text for text in samples.texts)
    torch.testing.assert_close(samples.log_prob, proposal.log_prob(samples), rtol=0, atol=1e-12)
    # In random order: copies are not neighbours more often than chance has it.
    counts = torch.tensor([samples.texts.count(text) for text in set(samples.texts)]).double()
    chance = float((counts * (counts - 1)).sum()) / (1000 * 999)
    alike = sum(x == y for x, y in pairwise(samples.texts)) / 999
    assert is_rate(alike, 999, chance)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_systematic_counts_are_the_expected_ones_rounded(n):
    log_w = torch.tensor([-1.0, -INF, 2.0, 0.5, -INF, 700.0 - 699.5, -300.0, -INF]).double()
    expected = n * log_w.softmax(0)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    mean = torch.zeros_like(log_w)
    for u in grid.tolist():
        rows = _resample(log_w, n, u)
        assert len(rows) == n
        counts = torch.bincount(rows, minlength=len(log_w))
        assert ((counts >= expected.floor()) & (counts <= expected.ceil())).all()
        mean += counts / len(grid)
    # On average over u the counts are exact; each can be off by one cell of the grid.
    torch.testing.assert_close(mean, expected, rtol=0, atol=2 / 2000)


@pytest.mark.parametrize("u", [0.0, math.nextafter(1.0, 0.0)])
def test_a_weight_of_zero_is_never_chosen_not_even_at_the_edges(u):
    log_w = torch.tensor([-INF, 0.0, -INF, 0.1, -INF], dtype=torch.float64)
    for n in (1, 3, 10, 1000):
        assert set(_resample(log_w, n, u).tolist()) <= {1, 3}


def test_ess_of_the_pool_is_reported(target, proposal):
    sampler = ImportanceResampling(target, proposal, n_pool=500)
    with pytest.raises(RuntimeError, match="nothing was sampled yet"):
        sampler.diagnostics()
    log_q, log_w = log_weights(target, proposal)
    g = torch.exp(log_w - target.exact().log_z)
    exact = 500 / float((log_q.exp() * g**2).sum())
    z = []
    for seed in range(200):
        sampler.sample(1, seed=seed)
        found = sampler.diagnostics()["ess"]
        assert found.n == 500
        z.append((found.value - exact) / found.stderr)
    assert is_calibrated(z)


def test_weights_of_the_base_need_no_second_pass(world):
    """The base's own log-probabilities are recorded: P/q is the factor alone."""
    base = counting(world)
    target = EBM(base, [Moment(STARTS_B, 0.6)], [1.2])
    found = ImportanceResampling(target, base, n_pool=100)
    found.sample(10, seed=0)
    assert base.n_scored == 0
    assert 0 < found.diagnostics()["ess"].value <= 100
    samples = base.sample(50, seed=0)
    factor = 1.2 * torch.tensor([t.startswith("b") for t in samples.texts]).double()
    torch.testing.assert_close(found._log_weights(samples), factor, rtol=0, atol=1e-12)
