"""The gradient's variance against the covariance of all gradients held side by side."""

import pytest
import torch

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
