"""What a resumed run takes over, and what it refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import dmgen
from dmgen.training import checkpoint, memory


def config(**settings):
    defaults = {"batch_size": 256, "learning_rate": 0.05, "seed": 3, "proposal_every": 4}
    return dmgen.TrainerConfig(**(defaults | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal_rule": "policy"}, "another proposal_rule: kl, not policy"),
        ({"proposal_rule": "never"}, "another proposal_rule: kl, not never"),
        ({"optimizer": "sgd"}, "another optimizer: adam, not sgd"),
        ({"seed": 4}, "another seed: 3, not 4"),
    ],
)
def test_settings_that_make_another_run_are_refused(base, target, tmp_path, settings, message):
    dmgen.GDC(base.copy(), target, config()).train(2, out=tmp_path)
    sampler = dmgen.GDC(base.copy(), target, config(**settings))
    with pytest.raises(ValueError, match=message):
        sampler.resume(tmp_path)
    assert torch.equal(sampler.policy.logits, base.logits)
    assert sampler.step == 0


def test_how_it_goes_on_may_change(base, target, tmp_path):
    dmgen.GDC(base.copy(), target, config()).train(2, out=tmp_path)
    sampler = dmgen.GDC(
        base.copy(), target, config(proposal_rule="kl", learning_rate=0.01, batch_size=128)
    )
    sampler.resume(tmp_path)
    history = sampler.train(1)
    assert history["samples"].tolist() == [256, 512, 640]
    # The third of 100 steps of warmup.
    assert history["learning_rate"].iloc[-1] == pytest.approx(0.01 * 3 / 101)


def test_another_policy_is_refused_by_name(base, target, tmp_path):
    dmgen.GDC(base.copy(), target, config()).train(2, out=tmp_path)
    larger = dmgen.TabularLM.random("abc.", 5, eos=".", seed=1).copy()
    sampler = dmgen.GDC(larger, target, config())
    before = larger.logits.detach().clone()
    with pytest.raises(ValueError, match="another policy: it has logits as"):
        sampler.resume(tmp_path)
    assert torch.equal(larger.logits, before)


def test_a_resumed_policy_is_what_train_left(base, target, tmp_path):
    first = dmgen.GDC(base.copy(), target, config(average_decay=0.9))
    first.train(5, out=tmp_path)
    second = dmgen.GDC(base.copy(), target, config(average_decay=0.9))
    second.resume(tmp_path)
    assert torch.equal(first.policy.logits, second.policy.logits)
    # It is the average, not the last weights.
    assert not torch.equal(second.policy.logits, second.state.average["logits"])


def test_the_size_of_a_micro_batch_is_that_of_the_run(base, target, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**12)
    first = dmgen.GDCpp(base.copy(), target, config())
    first.train(1, out=tmp_path)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    second = dmgen.GDCpp(base.copy(), target, config())
    second.resume(tmp_path)
    second.train(1)
    assert first.state.micro_batch_size == second.state.micro_batch_size < 32
    told = dmgen.GDCpp(base.copy(), target, config(micro_batch_size=7))
    told.resume(tmp_path)
    assert told.state.micro_batch_size == 7


def test_a_proposal_of_the_caller_is_found_again(base, target, tmp_path):
    given = dmgen.TabularLM.random("abc.", 4, eos=".", seed=2)
    first = dmgen.GDC(base.copy(), target, config(proposal_rule="never"), proposal=given)
    first.train(2, out=tmp_path)
    second = dmgen.GDC(base.copy(), target, config(proposal_rule="never"), proposal=given)
    second.resume(tmp_path)
    assert second.proposal is given
    without = dmgen.GDC(base.copy(), target, config(proposal_rule="never"))
    with pytest.raises(ValueError, match="had proposal= and this trainer has not"):
        without.resume(tmp_path)
    first.train(2)
    second.train(2)
    assert torch.equal(first.policy.logits, second.policy.logits)


def test_no_steps_leave_no_run(base, target, tmp_path):
    sampler = dmgen.GDC(base.copy(), target, config())
    sampler.train(0, out=tmp_path)
    assert len(sampler.train(2, out=tmp_path)) == 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_resumed_run_does_not_hold_its_checkpoint_in_memory(base, target, tmp_path):
    settings = config(average_decay=0.9, proposal_rule="kl")
    first = dmgen.GDC(base.copy(), target, settings)
    first.train(8, out=tmp_path)
    assert first.proposal is not first.setup.first_proposal  # the file has all that there can be
    sampler = dmgen.GDC(base.copy(), target, settings)
    sampler.resume(tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


METHODS = [
    dmgen.DPG,
    dmgen.GDC,
    dmgen.GDCpp,
    dmgen.FDPG,
    dmgen.VarGrad,
    dmgen.Reinforce,
    dmgen.ReinforceP,
]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method, base, target, tmp_path):
    settings = config(average_decay=0.9, backward_size=100, proposal_every=4)
    whole = method(base.copy(), target, settings)
    expected = whole.train(25, out=tmp_path / "whole")
    first = method(base.copy(), target, settings)
    first.train(13, out=tmp_path / "parts")
    second = method(base.copy(), target, settings)
    second.resume(tmp_path / "parts")
    found = second.train(12, out=tmp_path / "parts")
    assert torch.equal(whole.policy.logits, second.policy.logits)
    pd.testing.assert_frame_equal(expected.drop(columns="seconds"), found.drop(columns="seconds"))
    rows = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 26))


def test_resume_refuses_another_run(base, target, tmp_path):
    dmgen.GDC(base.copy(), target, config()).train(2, out=tmp_path)
    with pytest.raises(ValueError, match="another objective: gdc, not gdc"):
        dmgen.GDCpp(base.copy(), target, config()).resume(tmp_path)
    dmgen.FDPG(base.copy(), target, config()).train(2, out=tmp_path / "js")
    with pytest.raises(ValueError, match="another divergence: js, not tv"):
        dmgen.FDPG(base.copy(), target, config(), divergence="tv").resume(tmp_path / "js")
    other = dmgen.EBM(base, target.constraints, [v + 0.1 for v in target.lambdas])
    with pytest.raises(ValueError, match="another target"):
        dmgen.GDC(base.copy(), other, config()).resume(tmp_path)
    with pytest.raises(ValueError, match="already holds a run of 2 steps"):
        dmgen.GDC(base.copy(), target, config()).train(2, out=tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        dmgen.GDC(base.copy(), target, config()).resume(tmp_path / "nothing")


def test_the_last_checkpoint_is_written_once(base, target, tmp_path, monkeypatch):
    steps, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda s, setup, out: steps.append(s.step) or save(s, setup, out)
    )
    sampler = dmgen.GDC(base.copy(), target, config(checkpoint_every=3))
    sampler.train(6, tmp_path)
    sampler.train(1, tmp_path)
    assert steps == [3, 6, 7]
