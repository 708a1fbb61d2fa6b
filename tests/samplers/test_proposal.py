"""What texts are drawn from: mixtures with the base, and a proposal of the caller's."""

import pytest
import torch

import dmgen


@pytest.mark.parametrize("rule", ["policy", "kl"])
@pytest.mark.parametrize("rows", [range(128), range(64), range(128, 256), range(96, 160)])
def test_a_share_of_the_batch_is_of_the_mixture(base, target, rule, rows):
    """Also where one of several processes draws texts of the base alone."""
    settings = dmgen.TrainerConfig(batch_size=256, base_share=0.5, proposal_rule=rule)
    policy = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5).copy()
    sampler = dmgen.GDCpp(policy, target, settings)
    if rule == "kl":
        sampler.proposal = dmgen.TabularLM.random("abc.", 4, eos=".", seed=6)
    sampler.rows = rows
    samples, log_base, log_policy = sampler._draw()
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
    with pytest.raises(ValueError, match="some of them, and not all"):
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
