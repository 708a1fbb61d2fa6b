"""Baselines in training; their values are tested with the objectives."""

import pytest
from worlds import config, exact_kl

import dmgen


@pytest.mark.parametrize("baseline", ["none", "z", "leave_one_out", "optimal"])
def test_training_reaches_the_target_with_any_baseline(baseline, base, target):
    policy = base.copy()
    before = exact_kl(target, policy)
    settings = config(schedule="linear", total_steps=60, baseline=baseline)
    dmgen.GDC(policy, target, settings).train(60)
    assert exact_kl(target, policy) < before / 10
