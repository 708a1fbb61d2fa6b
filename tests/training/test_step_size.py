"""The step size that follows the KL divergence of each step."""

import dataclasses

import pytest
import torch
from worlds import config, exact_kl

import dmgen


@pytest.mark.parametrize("wanted", [1e-3, 1e-2])
def test_an_automatic_rate_makes_steps_of_the_kl_that_is_asked(wanted, base, target):
    settings = config(learning_rate="auto", step_kl=wanted, warmup_steps=0, batch_size=512)
    history = dmgen.GDCpp(base.copy(), target, settings).train(60)
    measured = history["step_kl"][30:]
    # A controller by the square root: within a factor of 2 in the mean of thirty steps.
    assert wanted / 2 < measured.mean() < wanted * 2
    assert exact_kl(target, base) > 0.1


def test_an_automatic_rate_does_not_take_rounding_for_a_step(base, target):
    """Drawing and scoring in bfloat16 differ by some tenths of a nat: by more than a step does."""

    class Rounding(dmgen.TabularLM):
        def sample(self, n, **settings):
            samples = super().sample(n, **settings)
            noise = 0.25 * torch.randn(n, generator=torch.Generator().manual_seed(0))
            return dataclasses.replace(samples, log_prob=samples.log_prob + noise)

    policy = Rounding(base.vocab, base.logits.clone(), base.max_new_tokens, eos=base.eos)
    policy.logits.requires_grad_(True)
    sampler = dmgen.DPG(policy, target, config(learning_rate="auto"))
    first = sampler.state.rate
    history = sampler.train(30)
    assert sampler.state.rate > first
    assert history["step_kl"][20:].mean() < 0.02
