"""`Rejection` against the proposal restricted to the hard constraints."""

import math

import pytest
import torch
from laws import uncalibrated
from sampling import HAS_A, INF, STARTS_B, N, counting, follows, law, log_weights

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.rejection import Rejection
from dmgen.target.ebm import EBM


def test_rejection_follows_the_proposal_where_the_hard_constraints_hold(target, proposal):
    samples = Rejection(target, proposal).sample(N, seed=1)
    texts = target.exact().samples.texts
    allowed = torch.tensor([0.0 if "a" in text else -INF for text in texts])
    log_q = proposal.log_prob(target.exact().samples)
    assert follows(samples, target, law(log_q, allowed))
    assert not follows(samples, target, target.exact().log_prob)
    assert not follows(samples, target, log_q)


def test_rejection_from_the_base_is_exact_without_soft_moments(world):
    base = counting(world)
    target = EBM(base, [Pointwise(HAS_A), Moment(STARTS_B, 0.0)], [-INF])
    sampler = Rejection(target, base)
    samples = sampler.sample(N, seed=1)
    assert (base.n_scored, base.n_drawn) == (0, sampler.n_drawn)
    assert follows(samples, target, target.exact().log_prob)
    assert all("a" in text and not text.startswith("b") for text in samples.texts)


def test_rejection_only_looks_at_features(target, proposal):
    target.base = None
    assert len(Rejection(target, proposal).sample(50, seed=0)) == 50


def test_rejection_says_how_far_it_is_from_the_target(target, proposal):
    log_q, log_w = log_weights(target, proposal)
    texts = target.exact().samples.texts
    log_r = torch.tensor([0.0 if "a" in text else -INF for text in texts])
    q = log_q.exp()
    exact = {
        "acceptance_rate": acceptance.acceptance_rate(log_r, q).value,
        "tv": acceptance.tv(log_w, log_r, q).value,
        "kl": acceptance.kl(log_w, log_r, q).value,
    }
    # Rejection brings the law closer to p by exactly the log of the rate.
    missing = target.exact().kl_target_policy(proposal)
    assert missing - exact["kl"] == pytest.approx(-math.log(exact["acceptance_rate"]))
    z = {name: [] for name in exact}
    for seed in range(60):
        found = Rejection(target, proposal, n_estimation=1000, seed=seed).diagnostics()
        assert found.keys() == exact.keys()
        for name, score in found.items():
            z[name].append((score.value - exact[name]) / score.stderr)
    assert uncalibrated(z) == set()


def test_rejection_without_a_hard_constraint_is_refused(world):
    target = EBM(world, [Moment(STARTS_B, 0.6)], [1.2])
    with pytest.raises(ValueError, match=r"no hard constraint.*use QuasiRejection"):
        Rejection(target, world)


def test_few_texts_are_drawn_beyond_those_asked_for(target, proposal):
    """The batches grow with the rate seen: at a rate near one they do not double."""
    sampler = Rejection(target, proposal)
    sampler.sample(500, seed=0)
    log_q, log_w = log_weights(target, proposal)
    rate = float(log_q.exp()[log_w > -INF].sum())
    assert sampler.n_drawn < 1.2 * 500 / rate
