"""Credit by token: its expected gradient is exact, and its variance is lower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dmgen
from dmgen.models.guided import GuidedLM
from dmgen.target.prefix_value import PrefixValue
from dmgen.training import objectives
from dmgen.training.batch import Batch
from dmgen.training.config import TrainerConfig
from dmgen.training.trainer import Trainer

ANCHORS = ("policy", "base", "value")
FEATURE = dmgen.feature(lambda text: text.count("a") >= 2, name="two a")


def make_target(hard: bool = False) -> dmgen.EBM:
    base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=3)
    wanted = dmgen.Pointwise(FEATURE) if hard else dmgen.Moment(FEATURE, 0.6)
    return dmgen.EBM.fit(base, [wanted], n_samples=2_000, seed=0)


def wrong(value: PrefixValue, seed: int = 0) -> PrefixValue:
    """Return a value that is off by a random function of the prefix and the token."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + 0.7 * torch.randn(x.shape, generator=generator)

    return replace(
        value,
        token_effects=noisy(value.token_effects),
        value_net=noisy(value.value_net),
        projection=noisy(value.projection),
    )


def expected_gradient(
    target: dmgen.EBM,
    policy: dmgen.TabularLM,
    proposal,
    value: PrefixValue,
    anchor: str,
    lam: float,
) -> torch.Tensor:
    """Return the exact mean of the loss's gradient over all texts of the proposal."""
    texts = target.exact().samples
    log_q = proposal.log_prob(texts).double()
    config = TrainerConfig(batch_size=len(texts), credit="token", anchor=anchor, gae_lambda=lam)
    trainer = Trainer(policy, target, config, objective=objectives.GDCPP)
    trainer.state.objective = value.tensors()
    objective = trainer.setup.objective
    batch = Batch(
        log_q,
        texts,
        log_score=target.log_score(texts),
        log_z=torch.full_like(log_q, target.exact().log_z),
        sources=((proposal, 1.0),),
        base=target.base,
        base_hidden=target.base.hidden_states(texts),
    )
    columns = objective.draw_columns(trainer.state, batch, target)
    batch = objective.prepare(trainer.state, replace(batch, tokens=columns), target)
    loss, _ = objective.forward(trainer.state, batch)
    weighted = (torch.exp(log_q) * loss).sum()
    return torch.autograd.grad(weighted, list(policy.parameters()))[0]


def kl_gradient(target: dmgen.EBM, policy: dmgen.TabularLM) -> torch.Tensor:
    """Return the gradient of KL(p‖π), by its definition."""
    exact = target.exact()
    kl = -(exact.log_prob.exp() * policy.log_prob(exact.samples, grad=True)).sum()
    return torch.autograd.grad(kl, list(policy.parameters()))[0]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("drawn_from", ["base", "policy", "other", "guided"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_it_is_unbiased_for_a_wrong_value(anchor: str, drawn_from: str, hard: bool) -> None:
    target = make_target(hard)
    policy = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5).copy()
    value = wrong(PrefixValue.fit(target, n_texts=500))
    proposal = {
        "base": target.base,
        "policy": policy,
        "other": dmgen.TabularLM.random("abc.", 4, eos=".", seed=9),
        "guided": GuidedLM(target.base, value),
    }[drawn_from]
    found = expected_gradient(target, policy, proposal, value, anchor, 1.0)
    # The value is computed in float32.
    assert torch.allclose(found, kl_gradient(target, policy), atol=1e-6)
    biased = expected_gradient(target, policy, proposal, value, anchor, 0.0)
    assert not torch.allclose(biased, kl_gradient(target, policy), atol=1e-3)


def gradient_noise(credit: str, anchor: str) -> float:
    """Return the exact variance of a text's gradient, summed over the weights, texts of the base.

    The sum of `E‖g‖²` over all texts, less the squared norm of the mean.
    """
    # Only the first of six tokens matters; the others need no credit.
    base = dmgen.TabularLM.random("abc", 6, seed=3)
    first = dmgen.feature(lambda text: text.startswith("a"), name="first")
    target = dmgen.EBM.fit(base, [dmgen.Moment(first, 0.9)], n_samples=2_000, seed=0)
    policy = base.copy()
    texts = target.exact().samples
    config = TrainerConfig(batch_size=len(texts), credit=credit, anchor=anchor)
    trainer = Trainer(policy, target, config, objective=objectives.GDCPP)
    objective = trainer.setup.objective
    log_q = target.base.log_prob(texts).double()
    batch = Batch(
        log_q,
        texts,
        log_score=target.log_score(texts),
        log_policy=policy.log_prob(texts),
        log_z=torch.full_like(log_q, target.exact().log_z),
        sources=((target.base, 1.0),),
        base=target.base,
        base_hidden=target.base.hidden_states(texts),
    )
    columns = objective.draw_columns(trainer.state, batch, target)
    batch = objective.prepare(trainer.state, replace(batch, tokens=columns), target)
    mean, square = torch.zeros_like(policy.logits), 0.0
    for i, q in enumerate(torch.exp(log_q).tolist()):
        some = batch[[i]]
        loss = objective.loss(
            some, objective.forward(trainer.state, some), objective.advantage(some)
        )
        gradient = torch.autograd.grad(loss.sum(), list(policy.parameters()))[0]
        mean, square = mean + q * gradient, square + q * float(gradient.square().sum())
    return square - float(mean.square().sum())


def test_tokens_that_tell_nothing_get_no_noise() -> None:
    plain = gradient_noise("text", "value")
    noise = {anchor: gradient_noise("token", anchor) / plain for anchor in ANCHORS}
    # The gradient of the first token is the same for every text, and the rest is 0.
    assert noise["value"] < 0.1
    assert noise["base"] < 0.3
    assert noise["policy"] < 0.3


@pytest.mark.parametrize("rule", ["guided", "kl", "never", "policy"])
def test_a_resumed_run_is_bit_equal(rule: str, tmp_path) -> None:
    def trainer() -> dmgen.GDCpp:
        config = TrainerConfig(
            batch_size=32, learning_rate=0.05, credit="token", gae_lambda=0.9,
            proposal_rule=rule, proposal_every=2, checkpoint_every=2,
        )  # fmt: skip
        target = make_target()
        return dmgen.GDCpp(target.base.copy(), target, config)

    whole, half = trainer(), trainer()
    expected = whole.train(6)
    half.train(3, tmp_path)
    again = trainer()
    again.resume(tmp_path)
    found = again.train(3)
    same = [column for column in expected if column != "seconds"]
    assert found[same].equals(expected[same])
    assert torch.equal(again.policy.logits, whole.policy.logits)


def test_training_with_credit_reaches_the_target() -> None:
    target = make_target()
    policy = target.base.copy()
    config = TrainerConfig(
        batch_size=256, learning_rate=0.05, warmup_steps=0, credit="token",
        proposal_rule="guided", schedule="linear", total_steps=150,
    )  # fmt: skip
    dmgen.GDCpp(policy, target, config).train(150)
    exact = target.exact()
    log_pi = policy.log_prob(exact.samples)
    assert float((exact.log_prob.exp() * (exact.log_prob - log_pi)).sum()) < 0.01


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (dmgen.VarGrad, {}, "DPG, GDC and GDC"),
        (dmgen.GDCpp, {"baseline": "optimal"}, "baseline goes with one advantage"),
        (dmgen.GDCpp, {"backward_size": 8}, "backward_size goes with one advantage"),
        (dmgen.GDCpp, {"anchor": "policy", "reuse": 2}, "set reuse to 1"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(method, settings, message) -> None:
    target = make_target()
    config = TrainerConfig(batch_size=32, credit="token", **settings)
    with pytest.raises(ValueError, match=message):
        method(target.base.copy(), target, config)
    with pytest.raises(ValueError, match="set credit"):
        TrainerConfig(proposal_rule="guided")
