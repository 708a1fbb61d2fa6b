"""The gradient of a batch: micro-batches, chosen texts, clipping, and reused batches."""

import math

import pytest
import torch
from worlds import batch_of, config, exact_kl, tiny_gpt2

import dmgen
from dmgen.training.gradient import backward, update


def gradients(sampler, samples, log_z):
    backward(sampler.state, batch_of(sampler, samples, log_z), sampler.setup)
    return torch.cat([p.grad.flatten() for p in sampler.policy.parameters()])


METHODS = [
    dmgen.DPG,
    dmgen.GDC,
    dmgen.GDCpp,
    dmgen.FDPG,
    dmgen.VarGrad,
    dmgen.Reinforce,
    dmgen.ReinforceP,
]


@pytest.fixture(scope="module")
def pointwise(base):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    return dmgen.EBM(base, [dmgen.Pointwise(has_ab)])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method, base, target):
    samples = base.sample(8, seed=5)
    by_size = [
        gradients(
            method(base.copy(), target, config(batch_size=8, micro_batch_size=size)),
            samples,
            0.4,
        )
        for size in (1, 3, 8)
    ]
    for other in by_size[1:]:
        torch.testing.assert_close(other, by_size[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [dmgen.GDC, dmgen.DPG, dmgen.Reinforce])
def test_texts_that_add_nothing_to_the_gradient_are_not_differentiated(
    method, base, pointwise, monkeypatch
):
    """The gradient is that of all texts, from passes of those with P > 0 alone."""
    samples = base.sample(64, seed=5)
    log_score = pointwise.log_score(samples)
    n_possible = int((log_score > -math.inf).sum())
    assert 0 < n_possible < 50
    sampler = method(base.copy(), pointwise, config(batch_size=64, micro_batch_size=16))
    reward = batch_of(sampler, samples).reward
    log_policy = sampler.policy.log_prob(samples)
    whole = sampler.policy.log_prob(samples, grad=True)
    a = dmgen.training.objectives.advantage(
        sampler.setup.objective.name, log_score, samples.log_prob, log_policy, 0.4, reward=reward
    )
    expected = torch.autograd.grad(-(a @ whole) / 64, list(sampler.policy.parameters()))
    passes = []
    log_prob = sampler.policy.log_prob

    def watch(texts, *, grad=False):
        passes.append((len(texts), grad))
        return log_prob(texts, grad=grad)

    monkeypatch.setattr(sampler.policy, "log_prob", watch)
    for known in (None, log_policy):
        batch = batch_of(sampler, samples, 0.4, known)
        seen, found = backward(sampler.state, batch, sampler.setup)
        torch.testing.assert_close(found, a, rtol=1e-12, atol=0)
        torch.testing.assert_close(seen, log_policy, rtol=1e-12, atol=0)
        for parameter, grad in zip(sampler.policy.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-14)
        differentiated = sum(n for n, grad in passes if grad)
        # REINFORCE weighs by π, which only the pass itself tells, unless π was drawn from.
        blind = known is None and method is dmgen.Reinforce
        assert differentiated == (64 if blind else n_possible)
        passes.clear()


@pytest.mark.parametrize("transformer", [False, True])
def test_a_batch_without_a_possible_text_has_a_gradient_of_zero(transformer, base):
    lm = tiny_gpt2() if transformer else base
    starts_with_b = dmgen.feature(lambda text: text.startswith("b"), name="b")
    rare = dmgen.EBM(lm, [dmgen.Pointwise(starts_with_b)])
    samples = lm.sample(64, seed=5)
    samples = samples[rare.log_score(samples) == -math.inf]
    assert len(samples) > 5
    sampler = dmgen.GDC(lm.copy(), rare, config(batch_size=len(samples)))
    found = gradients(sampler, samples, 0.4)
    assert torch.equal(found, torch.zeros_like(found))


def test_selected_backward_is_unbiased(base, target):
    """Over many draws of the subset the mean gradient is that of all texts."""
    samples = base.sample(64, seed=5)
    full = gradients(dmgen.GDCpp(base.copy(), target, config(batch_size=64)), samples, 0.4)
    sampler = dmgen.GDCpp(base.copy(), target, config(batch_size=64, backward_size=16))
    draws = torch.stack([gradients(sampler, samples, 0.4) for _ in range(300)])
    stderr = draws.std(0) / math.sqrt(len(draws))
    moving = stderr > 1e-12
    z = ((draws.mean(0) - full)[moving] / stderr[moving]).abs()
    assert z.max() < 5
    torch.testing.assert_close(draws[:, ~moving].mean(0), full[~moving])
    # The check has the power to see a subset that is not weighed by its inverse probability.
    assert ((draws.mean(0) * 1.2 - full)[moving] / stderr[moving]).abs().max() > 5


def test_it_stops_at_a_gradient_that_is_not_finite(base, target):
    policy = base.copy()
    sampler = dmgen.GDCpp(policy, target, config())
    sampler.train(1)
    before = policy.logits.detach().clone()
    policy.logits.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="gradient of step 2"):
        sampler.train(1)
    assert torch.equal(policy.logits, before)


def test_reuse_takes_more_steps_on_the_same_texts(base, target):
    once = dmgen.GDCpp(base.copy(), target, config(warmup_steps=0))
    twice = dmgen.GDCpp(base.copy(), target, config(warmup_steps=0, reuse=2))
    first, both = once.train(1), twice.train(1)
    assert first["samples"].tolist() == both["samples"].tolist() == [256]
    assert exact_kl(target, twice.policy) < exact_kl(target, once.policy)
    # By hand: the same texts, weighed again with the policy that has moved.
    samples = base.sample(256, generator=dmgen.GDCpp(base.copy(), target, config()).state.generator)
    by_hand = dmgen.GDCpp(base.copy(), target, config(warmup_steps=0))
    for _ in range(2):
        backward(by_hand.state, batch_of(by_hand, samples, by_hand.state.z.log_z), by_hand.setup)
        update(by_hand.state, by_hand.setup)
    assert torch.equal(by_hand.policy.logits, twice.policy.logits)


def test_the_norm_of_a_gradient_is_clipped(base, target):
    """By SGD a first step is the rate times the gradient: of the norm that is allowed."""
    norms = []
    for allowed in (None, 1e-3):
        settings = config(optimizer="sgd", learning_rate=1.0, warmup_steps=0, max_grad_norm=allowed)
        policy = base.copy()
        dmgen.GDCpp(policy, target, settings).train(1)
        norms.append(float((policy.logits.detach() - base.logits).norm()))
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)  # torch adds 1e-6 to the norm it divides by


def test_adamw_decays_the_weights(base, target):
    after = {}
    for optimizer in ("adam", "adamw"):
        policy = base.copy()
        dmgen.GDCpp(policy, target, config(optimizer=optimizer, warmup_steps=0)).train(1)
        after[optimizer] = policy.logits.detach()
    # The decay that torch takes is 0.01, times the rate.
    expected = after["adam"] - 0.05 * 0.01 * base.logits.detach()
    torch.testing.assert_close(after["adamw"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"reuse": 2, "learning_rate": "auto"}])
def test_gradients_are_not_kept_while_texts_are_drawn_and_judged(
    settings, base, target, monkeypatch
):
    policy, kept = base.copy(), []
    sample = policy.sample

    def watch(*arguments, **options):
        kept.append([p.grad for p in policy.parameters()])
        return sample(*arguments, **options)

    monkeypatch.setattr(policy, "sample", watch)
    dmgen.DPG(policy, target, config(batch_size=64, **settings)).train(3)
    assert kept == [[None]] * 3
    assert [p.grad for p in policy.parameters()] == [None]
