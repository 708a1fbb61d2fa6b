"""The training loop: its arguments, and what it leaves."""

import math

import pandas as pd
import pytest
import torch
from worlds import config

import dmgen


def test_two_calls_are_one(base, target):
    one = dmgen.GDCpp(base.copy(), target, config(average_decay=0.9))
    two = dmgen.GDCpp(base.copy(), target, config(average_decay=0.9))
    whole = one.train(12)
    two.train(5)
    parts = two.train(7)
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), parts.drop(columns="seconds"))
    assert torch.equal(one.policy.logits, two.policy.logits)


def test_a_step_without_hits_changes_nothing(base):
    never = dmgen.feature(lambda text: text == "zz", name="zz")
    target = dmgen.EBM(base, [dmgen.Pointwise(never)])
    policy = base.copy()
    history = dmgen.GDCpp(policy, target, config()).train(2)
    assert torch.equal(policy.logits, base.logits)
    assert (history["log_z"] == -math.inf).all()
    assert (history["advantage_abs_mean"] == 0).all()


def test_bad_arguments(base, target):
    with pytest.raises(ValueError, match=r"base\.copy\(\)"):
        dmgen.GDCpp(base, target)
    with pytest.raises(ValueError, match="draws from the policy"):
        dmgen.DPG(base.copy(), target, proposal=base)
    with pytest.raises(TypeError, match="lerning_rate"):
        dmgen.TrainerConfig(lerning_rate=1)


def test_no_global_randomness(base, target):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dmgen.GDCpp(base.copy(), target, config(backward_size=32)).train(3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_broken_sampler_shows_in_the_drift_of_z(base, target):
    """Log-probabilities that are not those of the draw: here every text is recorded too likely."""

    class Broken(type(base)):
        def sample(self, *args, **kwargs):
            samples = super().sample(*args, **kwargs)
            return dmgen.Samples(
                samples.tokens, samples.mask, samples.log_prob + 0.3, samples.texts, samples.prompts
            )

    def run(kind):
        policy = kind(base.vocab, base.logits, base.max_new_tokens, eos=base.eos)
        policy.logits.requires_grad_(True)
        sampler = dmgen.GDCpp(policy, target, config(proposal_rule="policy", learning_rate=1e-6))
        return sampler.train(10)["log_z_drift"].iloc[-1]

    with pytest.warns(RuntimeWarning, match="log Z has moved"):
        assert run(Broken) < -5
    assert abs(run(type(base))) < 4
