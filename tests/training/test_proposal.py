"""What texts are drawn from: mixtures with the base, and a proposal of the caller's."""

import dataclasses
import math

import pytest
import torch

import dmgen
from dmgen.training.distributed import Processes
from dmgen.training.proposal import is_closer
from dmgen.training.rollout import Rollout
from dmgen.training.state import copy_in_one_block


@pytest.mark.parametrize("rule", ["policy", "kl"])
@pytest.mark.parametrize("rows", [range(128), range(64), range(128, 256), range(96, 160)])
def test_a_share_of_the_batch_is_of_the_mixture(base, target, rule, rows):
    """Also where one of several processes draws texts of the base alone."""
    settings = dmgen.TrainerConfig(batch_size=256, base_share=0.5, proposal_rule=rule)
    policy = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5).copy()
    sampler = dmgen.GDCpp(policy, target, settings)
    if rule == "kl":
        sampler.state.proposal = dmgen.TabularLM.random("abc.", 4, eos=".", seed=6)

    class Rows(Processes):
        def rows(self, n):
            return rows

    setup = dataclasses.replace(sampler.setup, processes=Rows())
    batch = Rollout(setup).draw(sampler.state)
    samples, log_base, log_policy = batch.texts, batch.log_base, batch.log_policy
    q = sampler.proposal.log_prob(samples)
    mixture = torch.log(0.5 * base.log_prob(samples).exp() + 0.5 * q.exp())
    torch.testing.assert_close(samples.log_prob, mixture)
    torch.testing.assert_close(log_base, base.log_prob(samples))
    if rule == "policy":
        torch.testing.assert_close(log_policy, policy.log_prob(samples).detach())
    else:
        assert log_policy is None


@pytest.mark.parametrize(("share", "size"), [(0.75, 1), (0.1, 4), (0.999, 100)])
def test_a_share_of_no_texts_or_of_all_is_refused(share, size):
    with pytest.raises(ValueError, match="at least one text, and not all"):
        dmgen.TrainerConfig(batch_size=size, base_share=share)


def test_the_caller_s_proposal_is_never_changed(base, target):
    given = base.copy()
    before = given.logits.detach().clone()
    settings = dmgen.TrainerConfig(batch_size=256, learning_rate=0.05, proposal_every=4)
    sampler = dmgen.GDCpp(base.copy(), target, settings, proposal=given)
    assert sampler.train(40)["proposal_updated"].any()
    assert torch.equal(given.logits, before)
    assert sampler.proposal is not given
    # Once it is the sampler's own it is written into, not made anew each time.
    own = sampler.proposal
    assert sampler.train(40)["proposal_updated"][40:].any()
    assert sampler.proposal is own


@pytest.mark.parametrize("rule", ["kl", "tv"])
def test_an_equal_policy_is_called_closer_one_time_in_twenty(rule):
    """π is as far from p as q is: some texts are up to 10 % more probable, some less."""
    generator = torch.Generator().manual_seed(0)
    n_tests, n = 4000, 200
    # p/q is 2 or 1/2, whatever π is.
    often, moved = torch.rand(2, n_tests, n, generator=generator, dtype=torch.float64)
    log_w = torch.where(often < 1 / 3, math.log(2), -math.log(2))
    moved = 0.2 * (moved - 0.5)
    log_ratio = moved if rule == "kl" else torch.log1p(moved)
    called = [is_closer(rule, w, u, 0.0) for w, u in zip(log_w, log_ratio, strict=True)]
    share, stderr = sum(called) / n_tests, math.sqrt(0.05 * 0.95 / n_tests)
    # A little off 5 %, since 200 texts are not yet normal.
    assert abs(share - 0.05) < 4 * stderr


def test_few_effective_texts_decide_nothing():
    log_ratio = torch.full((100,), 0.5, dtype=torch.float64) + torch.arange(100) * 1e-3
    of_few = torch.full((100,), -math.inf, dtype=torch.float64)
    of_few[:19] = 0.0
    of_more = of_few.clone()
    of_more[:21] = 0.0
    assert not is_closer("kl", of_few, log_ratio, 0.0)
    assert is_closer("kl", of_more, log_ratio, 0.0)


def test_a_copy_in_one_block_is_a_copy(llama_lm):
    policy = llama_lm.copy()
    copied = copy_in_one_block(policy)
    blocks = {p.untyped_storage().data_ptr() for p in copied.parameters()}
    assert len(blocks) == 1 < len(list(copied.parameters()))
    assert len({p.untyped_storage().data_ptr() for p in policy.parameters()}) > 1
    samples = policy.sample(8, seed=0)
    assert torch.equal(copied.log_prob(samples), policy.log_prob(samples))
    with torch.no_grad():
        next(copied.parameters()).add_(1.0)  # weights of its own
    assert not torch.equal(copied.log_prob(samples), policy.log_prob(samples))
    copied.load_state_dict(policy.state_dict())
    assert torch.equal(copied.log_prob(samples), policy.log_prob(samples))
    assert {p.untyped_storage().data_ptr() for p in copied.parameters()} == blocks
