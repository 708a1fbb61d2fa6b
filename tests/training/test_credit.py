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
