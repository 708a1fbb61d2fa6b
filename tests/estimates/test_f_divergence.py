"""The f-divergences against autograd, their limits, and the range of t."""

import math

import pytest
import torch
from laws import random_log_probs

from dmgen.estimates.f_divergence import f_divergence

INF = math.inf
NAMES = ["kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2"]
NAMES += [("alpha", a) for a in (-1.0, 0.0, 1e-6, 0.3, 0.5, 1 - 1e-6, 1.0, 2.0)]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_one_of_the_divergence(name):
    d = f_divergence(name)
    p = random_log_probs(11, 20).exp()
    logits = random_log_probs(12, 20).clone().requires_grad_()
    log_pi = torch.log_softmax(logits, 0)
    (p @ d.f(log_pi.exp() / p)).backward()
    expected = logits.grad.clone()

    logits.grad = None
    pi, log_t = log_pi.detach().exp(), log_pi.detach() - p.log()
    # ∇ D = E_π[(f'(t) - c) ∇ log π]: with the baseline f'(1), and so with any other constant.
    for c in (0.0, d.f_prime_at_one):
        logits.grad = None
        reward = d.pseudo_reward(log_t) + c
        (-(pi * reward) @ torch.log_softmax(logits, 0)).backward()
        assert torch.allclose(logits.grad, expected, rtol=0, atol=1e-9)
    # The check sees a reward that is off by one part in a thousand where it varies.
    logits.grad = None
    (-(pi * (1.001 * reward)) @ torch.log_softmax(logits, 0)).backward()
    assert not torch.allclose(logits.grad, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_f_is_convex_zero_at_one_and_fits_its_derivative(name):
    d = f_divergence(name)
    t = torch.logspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    values = d.f(t)
    (slope,) = torch.autograd.grad(values.sum(), t)
    away = (t.detach() - 1).abs() > 1e-9  # the kink of TV
    # Rounding: f' reaches 1e6 (chi2), and alpha near 0 or 1 divides by 1e-6.
    assert torch.allclose(slope[away], d.f_prime(t.detach())[away], rtol=1e-9, atol=1e-9)
    assert (slope[1:] >= slope[:-1] - 1e-12).all()
    one = torch.ones(1)
    assert d.f(one).item() == pytest.approx(0.0, abs=1e-15)
    assert d.f_prime(one).item() == pytest.approx(d.f_prime_at_one, abs=1e-15)
    assert torch.equal(d.pseudo_reward(t.detach().log()), -d.f_prime(t.detach()))


@pytest.mark.parametrize(
    ("name", "reward", "f_at_zero"),
    [
        ("kl", 0.0, INF),
        ("reverse_kl", -INF, 0.0),
        ("tv", -0.5, 0.5),
        ("js", -math.log(2), math.log(2)),
        ("chi2", -1.0, INF),
        ("reverse_chi2", -INF, 1.0),
        (("alpha", -1.0), -INF, 0.5),
        (("alpha", 0.0), -INF, 1.0),
        (("alpha", 0.3), -1 / 0.3, 1 / 0.7),
        (("alpha", 0.5), -2.0, 2.0),
        (("alpha", 1.0), -1.0, INF),
        (("alpha", 2.0), -0.5, INF),
    ],
)
def test_behaviour_at_zero_probability(name, reward, f_at_zero):
    d = f_divergence(name)
    assert d.pseudo_reward(torch.tensor(INF)).item() == pytest.approx(reward, rel=1e-15)
    assert d.f_prime_at_infinity == pytest.approx(-reward, rel=1e-15)
    assert d.f(torch.zeros(1)).item() == pytest.approx(f_at_zero, rel=1e-14)


@pytest.mark.parametrize(
    ("alpha", "name", "factor"),
    [(0.0, "reverse_kl", 1.0), (1.0, "kl", 1.0), (2.0, "chi2", 0.5), (-1.0, "reverse_chi2", 0.5)],
)
def test_alpha_meets_its_named_members(alpha, name, factor):
    p, pi = random_log_probs(31, 20).exp(), random_log_probs(32, 20).exp()
    named = factor * (p @ f_divergence(name).f(pi / p))
    at = p @ f_divergence(("alpha", alpha)).f(pi / p)
    assert at.item() == pytest.approx(named.item(), rel=1e-13)
    # The formula next to the limit has no cancellation: it is off by the step, not by rounding.
    near = p @ f_divergence(("alpha", alpha + 1e-9)).f(pi / p)
    assert near.item() == pytest.approx(named.item(), rel=1e-7)


def test_alpha_one_half_is_hellinger():
    p, pi = random_log_probs(31, 20).exp(), random_log_probs(32, 20).exp()
    hellinger = 0.5 * ((p.sqrt() - pi.sqrt()) ** 2).sum()
    value = p @ f_divergence(("alpha", 0.5)).f(pi / p)
    assert value.item() == pytest.approx(4 * hellinger.item(), rel=1e-13)


def test_pseudo_rewards_far_out_do_not_pass_through_t():
    far = torch.tensor([1000.0, -1000.0], dtype=torch.float64)
    assert f_divergence("js").pseudo_reward(far).tolist() == pytest.approx(
        [-math.log(2), 1000 - math.log(2)], rel=1e-15
    )
    assert f_divergence("reverse_kl").pseudo_reward(far).tolist() == [-1001.0, 999.0]
    assert f_divergence("tv").pseudo_reward(far).tolist() == [-0.5, 0.5]
    assert f_divergence("kl").pseudo_reward(far)[0].item() == 0.0


@pytest.mark.parametrize(
    "bad", ["KL", "forward_kl", ("beta", 1.0), ("alpha", math.nan), ("alpha",)]
)
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match="alpha"):
        f_divergence(bad)


def test_values_outside_the_range_are_refused():
    d = f_divergence("js")
    with pytest.raises(ValueError, match=r"log_t is NaN at position \[1\]"):
        d.pseudo_reward(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="finite and >= 0"):
        d.f(torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="finite and >= 0"):
        d.f(torch.tensor([INF]))
    with pytest.raises(ValueError, match=">= 0"):
        d.f_prime(torch.tensor([-1.0]))
