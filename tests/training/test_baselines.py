"""Baselines in training; their values are tested with the objectives."""

import math

import pytest

import dmgen


def config(**settings):
    defaults = {"batch_size": 256, "learning_rate": 0.05, "warmup_steps": 5, "seed": 3}
    return dmgen.TrainerConfig(**(defaults | settings))


def exact_kl(target, policy):
    """KL(p‖π) by listing every text."""
    texts = target.base.enumerate()
    log_score = target.log_score(texts)
    log_p = log_score - log_score.logsumexp(0)
    possible = log_p > -math.inf
    terms = log_p.exp() * (log_p - policy.log_prob(texts))
    return float(terms[possible].sum())


@pytest.mark.parametrize("baseline", ["none", "z", "leave_one_out", "optimal"])
def test_training_reaches_the_target_with_any_baseline(baseline, base, target):
    policy = base.copy()
    before = exact_kl(target, policy)
    settings = config(schedule="linear", total_steps=60, baseline=baseline)
    dmgen.GDC(policy, target, settings).train(60)
    assert exact_kl(target, policy) < before / 10
