"""The training loop against exact answers on an enumerable model."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pandas as pd
import pytest
import torch
from conftest import as_table

import dmgen
from dmgen.samplers.trainer import Trainer

METHODS = [dmgen.DPG, dmgen.GDC, dmgen.GDCpp]


@pytest.fixture(scope="module")
def base():
    return dmgen.TabularLM.random("abc.", 4, eos=".", seed=1)


@pytest.fixture(scope="module")
def target(base):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    return dmgen.EBM.fit(base, [dmgen.Moment(has_ab, 0.5)], n_samples=4000, seed=0)


def exact_kl(target, policy):
    """KL(p‖π) by listing every text."""
    texts = target.base.enumerate()
    log_score = target.log_score(texts)
    log_p = log_score - log_score.logsumexp(0)
    possible = log_p > -math.inf
    terms = log_p.exp() * (log_p - policy.log_prob(texts))
    return float(terms[possible].sum())


def config(**settings):
    defaults = {"batch_size": 256, "learning_rate": 0.05, "warmup_steps": 5, "seed": 3}
    return dmgen.TrainerConfig(**(defaults | settings))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"backward_size": 64}, {"proposal_rule": "policy"}])
def test_training_reaches_the_target(method, settings, base, target):
    policy = base.copy()
    before = exact_kl(target, policy)
    method(policy, target, config(schedule="linear", total_steps=60, **settings)).train(60)
    # The least that a method must do; GDC++ does far better, and its noise vanishes at the target.
    assert exact_kl(target, policy) < before / 10


def test_gdcpp_has_no_noise_left_at_the_target(base, target):
    """With π = p = q the advantage is 0 for every text: nothing moves, however large the step."""
    log_score = target.log_score(base.enumerate())
    policy = as_table(base, log_score - log_score.logsumexp(0)).copy()
    assert exact_kl(target, policy) == pytest.approx(0, abs=1e-12)
    sampler = dmgen.GDCpp(policy, target, config(proposal_rule="policy", warmup_steps=0))
    # Z must be exact for this, and the pool that the fit left behind is not.
    z = float(log_score.logsumexp(0))
    sampler.z = type(sampler.z).from_score(dmgen.Score(z, 0.0, 10**9))
    row = sampler.train(1).iloc[0]
    # What is left is rounding, in sums of four float64 logs.
    assert row["advantage_abs_mean"] < 1e-12
    assert row["ess"] == pytest.approx(256, rel=1e-12)


def gradients(sampler, samples, log_score, log_z):
    known = sampler._known_log_policy(samples, False)
    sampler._backward(samples, log_score, known, log_z)
    return torch.cat([p.grad.flatten() for p in sampler.policy.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method, base, target):
    samples = base.sample(8, seed=5)
    log_score = target.log_score(samples)
    by_size = [
        gradients(
            method(base.copy(), target, config(micro_batch_size=size)), samples, log_score, 0.4
        )
        for size in (1, 3, 8)
    ]
    for other in by_size[1:]:
        torch.testing.assert_close(other, by_size[0], rtol=1e-12, atol=1e-14)


def test_selected_backward_is_unbiased(base, target):
    """Over many draws of the subset the mean gradient is that of all texts."""
    samples = base.sample(64, seed=5)
    log_score = target.log_score(samples)
    full = gradients(dmgen.GDCpp(base.copy(), target, config()), samples, log_score, 0.4)
    sampler = dmgen.GDCpp(base.copy(), target, config(backward_size=16))
    draws = torch.stack([gradients(sampler, samples, log_score, 0.4) for _ in range(300)])
    stderr = draws.std(0) / math.sqrt(len(draws))
    moving = stderr > 1e-12
    z = ((draws.mean(0) - full)[moving] / stderr[moving]).abs()
    assert z.max() < 5
    torch.testing.assert_close(draws[:, ~moving].mean(0), full[~moving])
    # The check has the power to see a subset that is not weighed by its inverse probability.
    assert ((draws.mean(0) * 1.2 - full)[moving] / stderr[moving]).abs().max() > 5


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


def test_two_calls_are_one(base, target):
    one = dmgen.GDCpp(base.copy(), target, config(average_decay=0.9))
    two = dmgen.GDCpp(base.copy(), target, config(average_decay=0.9))
    whole = one.train(12)
    two.train(5)
    parts = two.train(7)
    pd.testing.assert_frame_equal(whole.drop(columns="seconds"), parts.drop(columns="seconds"))
    assert torch.equal(one.policy.logits, two.policy.logits)


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
    with pytest.raises(ValueError, match="another sampler"):
        dmgen.GDCpp(base.copy(), target, config()).resume(tmp_path)
    with pytest.raises(ValueError, match="already holds a run of 2 steps"):
        dmgen.GDC(base.copy(), target, config()).train(2, out=tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        dmgen.GDC(base.copy(), target, config()).resume(tmp_path / "nothing")


def test_fit_samples_serve_as_first_batches(base, target):
    calls = []

    class Counting(Trainer):
        method, default_proposal_rule = "gdc++", "policy"

    policy = base.copy()
    draw = policy.sample
    policy.sample = lambda *a, **k: calls.append(1) or draw(*a, **k)
    sampler = Counting(policy, target, config(batch_size=1500, first_batches_from_fit=True))
    sampler.train(4)
    # Two batches came from the fit, whose texts the pool of Z holds from the start.
    assert sampler.z.n == 4000 + 2 * 1500
    assert len(calls) == 2  # 4,000 texts were drawn for the fit: two whole batches
    assert exact_kl(target, policy) < exact_kl(target, base)


def test_a_step_without_hits_changes_nothing(base):
    never = dmgen.feature(lambda text: text == "zz", name="zz")
    target = dmgen.EBM(base, [dmgen.Pointwise(never)])
    policy = base.copy()
    history = dmgen.GDCpp(policy, target, config()).train(2)
    assert torch.equal(policy.logits, base.logits)
    assert (history["log_z"] == -math.inf).all()
    assert (history["advantage_abs_mean"] == 0).all()


def test_pointwise_target(base):
    begins = dmgen.feature(lambda text: text.startswith("ca"), name="ca")
    target = dmgen.EBM(base, [dmgen.Pointwise(begins)])
    policy = base.copy()
    dmgen.GDCpp(policy, target, config()).train(100)
    assert exact_kl(target, base) > 3  # -log Z: one text in twenty or fewer
    assert exact_kl(target, policy) < exact_kl(target, base) / 10


def test_bad_arguments(base, target):
    with pytest.raises(ValueError, match=r"base\.copy\(\)"):
        dmgen.GDCpp(base, target)
    with pytest.raises(ValueError, match="draws from the policy"):
        dmgen.DPG(base.copy(), target, proposal=base)
    with pytest.raises(TypeError, match="lerning_rate"):
        dmgen.TrainerConfig(lerning_rate=1)


def test_it_stops_at_a_gradient_that_is_not_finite(base, target):
    policy = base.copy()
    sampler = dmgen.GDCpp(policy, target, config())
    sampler.train(1)
    before = policy.logits.detach().clone()
    policy.logits.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        sampler.train(1)
    assert torch.equal(policy.logits, before)


def test_no_global_randomness(base, target):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dmgen.GDCpp(base.copy(), target, config(backward_size=32)).train(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """A process killed with SIGKILL leaves a run that resumes to the very same weights."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import sys, pathlib, torch, dmgen
        torch.set_num_threads(1)
        base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=1)
        has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
        target = dmgen.EBM.fit(base, [dmgen.Moment(has_ab, 0.5)], n_samples=2000, seed=0)
        config = dmgen.TrainerConfig(batch_size=64, learning_rate=0.05, checkpoint_every=3)
        out, n = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        sampler = dmgen.GDCpp(base.copy(), target, config)
        if (out / "checkpoints").exists() and any((out / "checkpoints").glob("step-*")):
            sampler.resume(out)
        elif (out / "metrics.jsonl").exists():
            (out / "metrics.jsonl").unlink()
        print("ready", flush=True)
        sampler.train(n - sampler.step, out=out)
        print(repr(sampler.policy.logits.sum().item()))
        """)
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out):
        return subprocess.Popen(
            [sys.executable, str(script), str(out), "100"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    expected = start(tmp_path / "whole").communicate()[0].split()[-1]
    delays = torch.rand(4, generator=torch.Generator().manual_seed(7)).tolist()
    for delay in delays:
        process = start(tmp_path / "killed")
        assert process.stdout.readline().strip() == "ready"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").communicate()[0].split()[-1] == expected
