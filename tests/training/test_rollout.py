"""Batches from the texts of the fit and from mixtures with the base."""

import dataclasses
import math

import pytest
import torch
from worlds import config, exact_kl

import dmgen
from dmgen.training import objectives
from dmgen.training.trainer import Trainer


def test_fit_samples_serve_as_first_batches(base, target):
    calls = []

    policy = base.copy()
    draw = policy.sample
    policy.sample = lambda *a, **k: calls.append(1) or draw(*a, **k)
    objective = dataclasses.replace(objectives.GDCPP, proposal_rule="policy")
    settings = config(batch_size=1500, first_batches_from_fit=True)
    sampler = Trainer(policy, target, settings, objective=objective)
    sampler.train(4)
    # Two batches came from the fit, whose texts the pool of Z holds from the start.
    assert sampler.state.z.n == 4000 + 2 * 1500
    assert len(calls) == 2  # 4,000 texts were drawn for the fit: two whole batches
    assert exact_kl(target, policy) < exact_kl(target, base)


def test_first_batches_need_texts_of_a_fit(base, target):
    declared = dmgen.EBM(base, target.constraints, target.lambdas.tolist())
    for given, size in ((declared, 256), (target, 4001)):
        sampler = dmgen.GDC(
            base.copy(), given, config(first_batches_from_fit=True, batch_size=size)
        )
        with pytest.raises(ValueError, match=r"a batch of \d+ at least, and the target has"):
            sampler.train(1)


def test_a_mixture_with_the_base_has_the_mixture_s_weights(base, target):
    sampler = dmgen.GDCpp(base.copy(), target, config(base_share=0.25, proposal_rule="policy"))
    sampler.train(20)
    batch = sampler.source.draw(sampler.state)
    samples = batch.texts
    torch.testing.assert_close(batch.log_base, base.log_prob(samples))
    torch.testing.assert_close(batch.log_policy, sampler.policy.log_prob(samples))
    mixture = torch.log(0.25 * batch.log_base.exp() + 0.75 * batch.log_policy.exp())
    torch.testing.assert_close(samples.log_prob, mixture)
    assert torch.equal(batch.log_q, samples.log_prob)
    # 64 texts of 256 are the base's, in law: the mean of the mixture's weights is 1.
    every = base.enumerate()
    law = 0.25 * base.log_prob(every).exp() + 0.75 * sampler.policy.log_prob(every).exp()
    counts = torch.zeros(len(every))
    where = {text: i for i, text in enumerate(every.texts)}
    for _ in range(40):
        for text in sampler.source.draw(sampler.state).texts.texts:
            counts[where[text]] += 1
    expected = law * counts.sum()
    large = expected > 5
    chi2 = float(((counts - expected)[large] ** 2 / expected[large]).sum())
    freedom = int(large.sum())
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    wrong = base.log_prob(every).exp()[large] * counts.sum()
    assert float(((counts[large] - wrong) ** 2 / wrong).sum()) > freedom + 5 * math.sqrt(
        2 * freedom
    )
