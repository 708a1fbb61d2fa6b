"""The average of the weights, and when the policy holds it."""

import json

import pytest
import torch
from worlds import config

import dmgen
from dmgen import storage


def test_averaged_weights_are_the_average_of_those_of_the_steps(base, target):
    plain, weights = base.copy(), []
    dmgen.GDCpp(plain, target, config()).train(
        12, log=lambda row: weights.append(plain.logits.detach().clone())
    )
    averaged = base.copy()
    dmgen.GDCpp(averaged, target, config(average_decay=0.8)).train(12)
    # The plain mean of the first five, as far as the decay of 0.8 reaches back.
    expected = torch.stack(weights[:5]).mean(0)
    for own in weights[5:]:
        expected = 0.8 * expected + 0.2 * own
    torch.testing.assert_close(averaged.logits.detach(), expected)
    assert not torch.allclose(averaged.logits, plain.logits, atol=1e-3)


def test_resume_overrules_an_average_that_is_shown(base, target, tmp_path):
    settings = config(average_decay=0.9)
    sampler = dmgen.GDCpp(base.copy(), target, settings)
    sampler.train(5, out=tmp_path)
    twin = dmgen.GDCpp(base.copy(), target, settings)
    twin.resume(tmp_path)
    sampler.train(3)
    sampler.resume(tmp_path)
    sampler.train(2)
    twin.train(2)
    assert torch.equal(sampler.policy.logits, twin.policy.logits)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_an_evaluation_is_of_what_training_would_leave(base, target, tmp_path, decay):
    settings = config(average_decay=decay, evaluate_every=3, warmup_steps=0)
    policy, twin = base.copy(), base.copy()
    sampler = dmgen.GDCpp(policy, target, settings)
    sampler.train(4, tmp_path)
    (row,) = storage.read_rows(tmp_path / "evaluations.jsonl")
    dmgen.GDCpp(twin, target, settings).train(3)
    expected = dmgen.evaluate(twin, target, seed=3).to_dict()
    assert row["rows"] == json.loads(json.dumps(expected["rows"]))
    # It changes nothing: the fourth step is that of a run without evaluations.
    other = base.copy()
    dmgen.GDCpp(other, target, config(average_decay=decay, warmup_steps=0)).train(4)
    for a, b in zip(policy.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_interrupted_run_leaves_the_average_too(base, target):
    policy, weights = base.copy(), []

    def stop(row):
        weights.append(policy.logits.detach().clone())
        if len(weights) == 4:
            raise KeyboardInterrupt

    sampler = dmgen.GDCpp(policy, target, config(average_decay=0.9))
    with pytest.raises(KeyboardInterrupt):
        sampler.train(10, log=stop)
    torch.testing.assert_close(policy.logits.detach(), torch.stack(weights).mean(0))
    sampler.train(1, log=stop)
    assert torch.equal(sampler.policy.logits, policy.logits)
