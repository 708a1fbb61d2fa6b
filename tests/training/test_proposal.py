"""What texts are drawn from: mixtures with the base, and a proposal of the caller's."""

import dataclasses
import math

import pytest
import torch
from worlds import as_table, config, exact_kl

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


def test_the_proposal_follows_the_policy_only_when_it_is_closer(base, target):
    sampler = dmgen.GDCpp(base.copy(), target, config())
    history = sampler.train(60)
    assert history["proposal_updated"].any()
    assert sampler.proposal is not base
    # A policy that runs away from the target is never taken as the proposal.
    worse = dmgen.GDCpp(base.copy(), target, config(learning_rate=1e-9))
    with torch.no_grad():
        worse.policy.logits.mul_(3.0)
    assert not worse.train(40)["proposal_updated"].any()
    frozen = dmgen.GDCpp(base.copy(), target, config(proposal_rule="never"))
    frozen.train(20)
    assert frozen.proposal is base


@pytest.mark.parametrize("rule", ["kl", "tv"])
def test_rules_agree_with_the_exact_divergences(rule, base, target):
    sampler = dmgen.GDC(base.copy(), target, config(proposal_rule=rule))
    history = sampler.train(60)
    assert history["proposal_updated"].any()
    assert exact_kl(target, sampler.proposal) < exact_kl(target, base)


@pytest.mark.parametrize(("asked", "size", "share"), [(0.25, 256, 0.25), (0.1, 32, 3 / 32)])
def test_the_proposal_is_tested_as_the_mixture_that_texts_come_from(
    asked, size, share, base, target
):
    """A policy that equals the proposal makes the same mixture, so no text speaks for it."""
    q = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5)
    settings = config(base_share=asked, batch_size=size, learning_rate=1e-12, proposal_every=5)
    sampler = dmgen.GDC(q.copy(), target, settings, proposal=q)
    assert not sampler.train(4)["proposal_updated"].any()
    log_w, log_ratio = sampler.state.compared
    assert len(log_w) == 4 * size
    torch.testing.assert_close(log_ratio, torch.zeros_like(log_ratio), rtol=0, atol=1e-9)
    # While texts come from the base alone, it is the mixture that would follow.
    first = dmgen.GDC(q.copy(), target, settings)
    first.train(1)
    samples = base.sample(size, generator=dmgen.GDC(q.copy(), target, settings).state.generator)
    u = q.log_prob(samples).exp() / samples.log_prob.exp()
    expected = torch.log((1 - share) * u + share)
    torch.testing.assert_close(first.state.compared[1], expected, atol=1e-6, rtol=0)


def test_texts_of_the_fit_say_nothing_of_another_proposal(base, target):
    """They are the base's: log π − log a is not log π − log q."""
    log_score = target.log_score(base.enumerate())
    best = as_table(base, log_score - log_score.logsumexp(0))
    settings = config(first_batches_from_fit=True, proposal_every=5, learning_rate=1e-3)
    sampler = dmgen.GDC(base.copy(), target, settings, proposal=best)
    assert not sampler.train(10)["proposal_updated"].any()
    assert sampler.state.compared.shape == (2, 0)
    sampler.train(10)  # 15 batches of the 4,000 texts, and five drawn
    assert sampler.state.compared.shape == (2, 5 * 256)


def test_what_the_proposal_is_tested_on_is_bounded_and_resumed(base, target, tmp_path):
    settings = config(proposal_every=1, learning_rate=1e-12)
    far = base.copy()
    with torch.no_grad():
        far.logits.mul_(3.0)  # it will not be closer
    sampler = dmgen.GDC(far.copy(), target, settings)
    sampler.train(12, out=tmp_path)
    assert sampler.state.compared.shape == (2, 12 * 256)
    resumed = dmgen.GDC(far.copy(), target, settings)
    resumed.resume(tmp_path)
    assert torch.equal(resumed.state.compared, sampler.state.compared)
    sampler.train(13)
    resumed.train(13)
    assert sampler.state.compared.shape == (2, 20 * 256)
    assert torch.equal(resumed.state.compared, sampler.state.compared)
