"""The gradient's variance against the covariance of all gradients held side by side."""

import math

import pytest
import torch
from worlds import config

import dmgen
from dmgen.models import TabularLM
from dmgen.training.diagnostics import gradient_variance


@pytest.fixture(params=["table", "gpt2", "llama"])
def policy(request, gpt2_lm, llama_lm):
    if request.param == "table":
        return TabularLM.random("abc.", 3, eos=".", seed=2).copy()
    return {"gpt2": gpt2_lm, "llama": llama_lm}[request.param].copy()


def test_it_is_the_covariance_of_the_texts_gradients(policy):
    samples = policy.sample(9, seed=3)
    a = torch.linspace(-1, 2, 9, dtype=torch.float64)
    a[4] = 0
    gradients = []
    for i in range(9):
        log_pi = policy.log_prob(samples[i : i + 1], grad=True)
        grads = torch.autograd.grad(log_pi.sum() * float(a[i]), list(policy.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]).double())
    each = torch.stack(gradients)
    found = gradient_variance(policy, samples, a)
    expected = float(each.var(0, correction=0).sum())
    assert expected > 1e-3
    # float32 models; sums over some thousands of parameters.
    assert found["grad_variance"] == pytest.approx(expected, rel=1e-4)
    assert found["grad_norm"] == pytest.approx(float(each.mean(0).norm()), rel=1e-4)


def test_no_text_counts_where_all_advantages_are_zero(policy):
    samples = policy.sample(3, seed=3)
    assert gradient_variance(policy, samples, torch.zeros(3)) == {
        "grad_variance": 0.0,
        "grad_norm": 0.0,
    }


def test_what_no_text_uses_counts_nothing(gpt2_lm):
    plain, more = gpt2_lm.copy(), gpt2_lm.copy()
    more.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    samples, a = plain.sample(5, seed=3), torch.linspace(-1, 2, 5, dtype=torch.float64)
    assert gradient_variance(more, samples, a) == gradient_variance(plain, samples, a)


def test_diagnostics_on_request(base, target):
    history = dmgen.GDCpp(base.copy(), target, config(diagnose_every=3)).train(7)
    assert history["grad_variance"].notna().tolist() == [False, False, True] * 2 + [False]
    quiet = dmgen.GDCpp(base.copy(), target, config()).train(7)
    assert history["kl_target_policy"].tolist() == quiet["kl_target_policy"].tolist()


def test_a_row_of_metrics_is_of_the_policy_by_texts_of_the_proposal(base, target):
    """π, q and the target are three laws here, so that no column can stand for another."""
    q = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5)
    policy = dmgen.TabularLM.random("abc.", 4, eos=".", seed=6).copy()
    sampler = dmgen.GDCpp(policy, target, config(), proposal=q)
    samples = q.sample(256, generator=dmgen.GDCpp(policy, target, config()).state.generator)
    log_q, log_pi = samples.log_prob, policy.log_prob(samples).detach()
    log_w = target.log_score(samples) - log_q
    row = sampler.train(1).iloc[0]
    weights = torch.softmax(log_w, 0)
    log_z = log_w.logsumexp(0) - math.log(256)
    u = (log_pi - log_q).exp()
    phi = torch.tensor(["ab" in text for text in samples.texts], dtype=torch.float64)
    log_p = log_w + log_q - log_z
    assert row["kl_target_policy"] == pytest.approx(float(weights @ (log_p - log_pi)), rel=1e-9)
    assert row["kl_target_proposal"] == pytest.approx(float(weights @ (log_p - log_q)), rel=1e-9)
    assert row["moment/ab"] == pytest.approx(float(u @ phi / u.sum()), rel=1e-9)
    assert row["ess"] == pytest.approx(1 / float(weights @ weights), rel=1e-9)
    assert row["largest_weight"] == pytest.approx(float(weights.max()), rel=1e-9)
