"""The training loop against exact answers on an enumerable model."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from worlds import as_table, batch_of, tiny_gpt2

import dmgen
from dmgen import storage
from dmgen.estimates.running_z import RunningZ
from dmgen.training import checkpoint, objectives
from dmgen.training.batch import Batch
from dmgen.training.gradient import backward, update
from dmgen.training.objectives import advantage
from dmgen.training.trainer import Trainer

MATCHING = [dmgen.DPG, dmgen.GDC, dmgen.GDCpp, dmgen.FDPG, dmgen.VarGrad]
METHODS = [*MATCHING, dmgen.Reinforce, dmgen.ReinforceP]


@pytest.fixture(scope="module")
def pointwise(base):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    return dmgen.EBM(base, [dmgen.Pointwise(has_ab)])


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


@pytest.mark.parametrize("method", MATCHING)
@pytest.mark.parametrize(
    "settings", [{}, {"backward_size": 64}, {"base_share": 0.25, "reuse": 2}], ids=str
)
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
    sampler.state.z = RunningZ.from_score(dmgen.Score(z, 0.0, 10**9))
    row = sampler.train(1).iloc[0]
    # What is left is rounding, in sums of four float64 logs.
    assert row["advantage_abs_mean"] < 1e-12
    assert row["ess"] == pytest.approx(256, rel=1e-12)


def gradients(sampler, samples, log_z):
    backward(sampler.state, batch_of(sampler, samples, log_z), sampler.setup)
    return torch.cat([p.grad.flatten() for p in sampler.policy.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method, base, target):
    samples = base.sample(8, seed=5)
    by_size = [
        gradients(
            method(base.copy(), target, config(batch_size=8, micro_batch_size=size)),
            samples,
            0.4,
        )
        for size in (1, 3, 8)
    ]
    for other in by_size[1:]:
        torch.testing.assert_close(other, by_size[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [dmgen.GDC, dmgen.DPG, dmgen.Reinforce])
def test_texts_that_add_nothing_to_the_gradient_are_not_differentiated(
    method, base, pointwise, monkeypatch
):
    """The gradient is that of all texts, from passes of those with P > 0 alone."""
    samples = base.sample(64, seed=5)
    log_score = pointwise.log_score(samples)
    n_possible = int((log_score > -math.inf).sum())
    assert 0 < n_possible < 50
    sampler = method(base.copy(), pointwise, config(batch_size=64, micro_batch_size=16))
    reward = batch_of(sampler, samples).reward
    log_policy = sampler.policy.log_prob(samples)
    whole = sampler.policy.log_prob(samples, grad=True)
    a = dmgen.training.objectives.advantage(
        sampler.setup.objective.name, log_score, samples.log_prob, log_policy, 0.4, reward=reward
    )
    expected = torch.autograd.grad(-(a @ whole) / 64, list(sampler.policy.parameters()))
    passes = []
    log_prob = sampler.policy.log_prob

    def watch(texts, *, grad=False):
        passes.append((len(texts), grad))
        return log_prob(texts, grad=grad)

    monkeypatch.setattr(sampler.policy, "log_prob", watch)
    for known in (None, log_policy):
        batch = batch_of(sampler, samples, 0.4, known)
        seen, found = backward(sampler.state, batch, sampler.setup)
        torch.testing.assert_close(found, a, rtol=1e-12, atol=0)
        torch.testing.assert_close(seen, log_policy, rtol=1e-12, atol=0)
        for parameter, grad in zip(sampler.policy.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-14)
        differentiated = sum(n for n, grad in passes if grad)
        # REINFORCE weighs by π, which only the pass itself tells, unless π was drawn from.
        blind = known is None and method is dmgen.Reinforce
        assert differentiated == (64 if blind else n_possible)
        passes.clear()


@pytest.mark.parametrize("transformer", [False, True])
def test_a_batch_without_a_possible_text_has_a_gradient_of_zero(transformer, base):
    lm = tiny_gpt2() if transformer else base
    starts_with_b = dmgen.feature(lambda text: text.startswith("b"), name="b")
    rare = dmgen.EBM(lm, [dmgen.Pointwise(starts_with_b)])
    samples = lm.sample(64, seed=5)
    samples = samples[rare.log_score(samples) == -math.inf]
    assert len(samples) > 5
    sampler = dmgen.GDC(lm.copy(), rare, config(batch_size=len(samples)))
    found = gradients(sampler, samples, 0.4)
    assert torch.equal(found, torch.zeros_like(found))


def test_selected_backward_is_unbiased(base, target):
    """Over many draws of the subset the mean gradient is that of all texts."""
    samples = base.sample(64, seed=5)
    full = gradients(dmgen.GDCpp(base.copy(), target, config(batch_size=64)), samples, 0.4)
    sampler = dmgen.GDCpp(base.copy(), target, config(batch_size=64, backward_size=16))
    draws = torch.stack([gradients(sampler, samples, 0.4) for _ in range(300)])
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


def test_fit_samples_serve_as_first_batches(base, target):
    calls = []

    policy = base.copy()
    draw = policy.sample
    policy.sample = lambda *a, **k: calls.append(1) or draw(*a, **k)
    objective = dataclasses.replace(objectives.GDCPP, proposal_rule="policy")
    settings = config(batch_size=1500, first_batches_from_fit=True)
    sampler = Trainer(policy, target, settings, objective=objective)
    sampler.train(4)
    # Two batches came from the fit, whose texts the pool of Z holds from the start.
    assert sampler.state.z.n == 4000 + 2 * 1500
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
    with pytest.raises(FloatingPointError, match="gradient of step 2"):
        sampler.train(1)
    assert torch.equal(policy.logits, before)


def test_no_global_randomness(base, target):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dmgen.GDCpp(base.copy(), target, config(backward_size=32)).train(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "tv", "js", ("alpha", 0.5)], ids=str)
def test_fdpg_reaches_the_target_by_any_divergence(name, base, target):
    policy = base.copy()
    before = exact_kl(target, policy)
    settings = config(schedule="linear", total_steps=80)
    dmgen.FDPG(policy, target, settings, divergence=name).train(80)
    assert exact_kl(target, policy) < before / 10


def test_fdpg_refuses_a_divergence_that_there_is_not(base, target):
    with pytest.raises(ValueError, match="jensen"):
        dmgen.FDPG(base.copy(), target, divergence="jensen")


@pytest.mark.parametrize("baseline", ["none", "z", "leave_one_out", "optimal"])
def test_training_reaches_the_target_with_any_baseline(baseline, base, target):
    policy = base.copy()
    before = exact_kl(target, policy)
    settings = config(schedule="linear", total_steps=60, baseline=baseline)
    dmgen.GDC(policy, target, settings).train(60)
    assert exact_kl(target, policy) < before / 10


def test_reinforce_forgets_the_base(base):
    """The reward is maximised, and the language is lost: KL(π‖a) far above what p needs."""
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM(base, [dmgen.Pointwise(has_ab)])
    exact = target.exact()
    spent = {}
    for method in (dmgen.Reinforce, dmgen.GDCpp):
        policy = base.copy()
        method(policy, target, config()).train(150)
        log_pi = policy.log_prob(exact.samples)
        hits = (log_pi.exp() * target.values(exact.samples)["ab"]).sum()
        assert hits > 0.9
        spent[method] = exact.kl_policy_base(policy)
    assert spent[dmgen.Reinforce] > spent[dmgen.GDCpp] + 0.1


def test_the_reward_is_b_and_lambda_phi(base):
    has_a = dmgen.feature(lambda text: "a" in text, name="a")
    has_b = dmgen.feature(lambda text: "b" in text, name="b")
    samples = base.enumerate()
    a, b = (torch.tensor([float(x in t) for t in samples.texts]).double() for x in "ab")

    def reward(constraints, lambdas):
        target = dmgen.EBM(base, constraints, lambdas)
        sampler = dmgen.Reinforce(base.copy(), target, config())
        return batch_of(sampler, samples).reward

    hard, soft = dmgen.Pointwise(has_a), dmgen.Moment(has_b, 0.5)
    torch.testing.assert_close(reward([hard], []), a)
    torch.testing.assert_close(reward([soft], [1.5]), 1.5 * b)
    torch.testing.assert_close(reward([hard, soft], [1.5]), a + 1.5 * b)


def test_reinforce_p_ends_on_the_likeliest_text(base, target):
    policy = base.copy()
    dmgen.ReinforceP(policy, target, config()).train(200)
    every = base.enumerate()
    best = int(target.log_score(every).argmax())
    assert policy.log_prob(every)[best].exp() > 0.9


def test_the_reward_p_stays_in_range_however_far_apart_texts_are(base, target):
    sampler = dmgen.ReinforceP(base.copy(), target, config())

    def reward(*log_scores):
        column = torch.tensor(log_scores, dtype=torch.float64)
        batch = Batch(column, log_score=column)
        return sampler.setup.objective.prepare(sampler.state, batch, target).reward.tolist()

    assert reward(-math.inf, -math.inf) == [0, 0]
    # A text of one token beside long ones.
    assert reward(-900.0, -4.0, -math.inf) == pytest.approx([math.exp(-896), 1, 0])
    # The unit of later batches is the largest P so far, of whichever batch.
    assert reward(-5.0, -7.0) == pytest.approx([math.exp(-1), math.exp(-3)])
    assert reward(-2.0, -4.0) == pytest.approx([1, math.exp(-2)])


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


def test_a_mixture_with_the_base_has_the_mixture_s_weights(base, target):
    sampler = dmgen.GDCpp(base.copy(), target, config(base_share=0.25, proposal_rule="policy"))
    sampler.train(20)
    batch = sampler.source.draw(sampler.state)
    samples = batch.texts
    torch.testing.assert_close(batch.log_base, base.log_prob(samples))
    torch.testing.assert_close(batch.log_policy, sampler.policy.log_prob(samples))
    mixture = torch.log(0.25 * batch.log_base.exp() + 0.75 * batch.log_policy.exp())
    torch.testing.assert_close(samples.log_prob, mixture)
    assert torch.equal(batch.log_q, samples.log_prob)
    # 64 texts of 256 are the base's, in law: the mean of the mixture's weights is 1.
    every = base.enumerate()
    law = 0.25 * base.log_prob(every).exp() + 0.75 * sampler.policy.log_prob(every).exp()
    counts = torch.zeros(len(every))
    where = {text: i for i, text in enumerate(every.texts)}
    for _ in range(40):
        for text in sampler.source.draw(sampler.state).texts.texts:
            counts[where[text]] += 1
    expected = law * counts.sum()
    large = expected > 5
    chi2 = float(((counts - expected)[large] ** 2 / expected[large]).sum())
    freedom = int(large.sum())
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    wrong = base.log_prob(every).exp()[large] * counts.sum()
    assert float(((counts[large] - wrong) ** 2 / wrong).sum()) > freedom + 5 * math.sqrt(
        2 * freedom
    )


def test_reuse_takes_more_steps_on_the_same_texts(base, target):
    once = dmgen.GDCpp(base.copy(), target, config(warmup_steps=0))
    twice = dmgen.GDCpp(base.copy(), target, config(warmup_steps=0, reuse=2))
    first, both = once.train(1), twice.train(1)
    assert first["samples"].tolist() == both["samples"].tolist() == [256]
    assert exact_kl(target, twice.policy) < exact_kl(target, once.policy)
    # By hand: the same texts, weighed again with the policy that has moved.
    samples = base.sample(256, generator=dmgen.GDCpp(base.copy(), target, config()).state.generator)
    by_hand = dmgen.GDCpp(base.copy(), target, config(warmup_steps=0))
    for _ in range(2):
        backward(by_hand.state, batch_of(by_hand, samples, by_hand.state.z.log_z), by_hand.setup)
        update(by_hand.state, by_hand.setup)
    assert torch.equal(by_hand.policy.logits, twice.policy.logits)


def test_diagnostics_on_request(base, target):
    history = dmgen.GDCpp(base.copy(), target, config(diagnose_every=3)).train(7)
    assert history["grad_variance"].notna().tolist() == [False, False, True] * 2 + [False]
    quiet = dmgen.GDCpp(base.copy(), target, config()).train(7)
    assert history["kl_target_policy"].tolist() == quiet["kl_target_policy"].tolist()


def test_the_advantage_that_is_not_finite_is_named(base, target):
    sampler = dmgen.DPG(base.copy(), target, config())
    with torch.no_grad():
        sampler.policy.logits[0, 0] = math.nan
    with pytest.raises((FloatingPointError, ValueError), match="text"):
        sampler.train(1)


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


def test_first_batches_need_texts_of_a_fit(base, target):
    declared = dmgen.EBM(base, target.constraints, target.lambdas.tolist())
    for given, size in ((declared, 256), (target, 4001)):
        sampler = dmgen.GDC(
            base.copy(), given, config(first_batches_from_fit=True, batch_size=size)
        )
        with pytest.raises(ValueError, match=r"a batch of \d+ at least, and the target has"):
            sampler.train(1)


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


def test_the_last_checkpoint_is_written_once(base, target, tmp_path, monkeypatch):
    steps, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda s, setup, out: steps.append(s.step) or save(s, setup, out)
    )
    sampler = dmgen.GDC(base.copy(), target, config(checkpoint_every=3))
    sampler.train(6, tmp_path)
    sampler.train(1, tmp_path)
    assert steps == [3, 6, 7]


def test_gdc_does_not_need_log_policy_however_improbable_a_text_is():
    """Beyond e^709, 1/q overflows: a text of some 200 tokens of GPT-2."""
    log_q = torch.tensor([-700.0, -800.0, -5000.0], dtype=torch.float64)
    for method, baseline in (("gdc", None), ("dpg", None), ("gdc++", "none")):
        a = advantage(
            method, log_q + torch.tensor([0.0, 1.0, -1.0]), log_q, torch.zeros(3), 0.0,
            baseline=baseline,
        )  # fmt: skip
        torch.testing.assert_close(a, torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64).exp())


def test_a_row_of_metrics_is_of_the_policy_by_texts_of_the_proposal(base, target):
    """π, q and the target are three laws here, so that no column can stand for another."""
    q = dmgen.TabularLM.random("abc.", 4, eos=".", seed=5)
    policy = dmgen.TabularLM.random("abc.", 4, eos=".", seed=6).copy()
    sampler = dmgen.GDCpp(policy, target, config(), proposal=q)
    samples = q.sample(256, generator=dmgen.GDCpp(policy, target, config()).state.generator)
    log_q, log_pi = samples.log_prob, policy.log_prob(samples).detach()
    log_w = target.log_score(samples) - log_q
    row = sampler.train(1).iloc[0]
    weights = torch.softmax(log_w, 0)
    log_z = log_w.logsumexp(0) - math.log(256)
    u = (log_pi - log_q).exp()
    phi = torch.tensor(["ab" in text for text in samples.texts], dtype=torch.float64)
    log_p = log_w + log_q - log_z
    assert row["kl_target_policy"] == pytest.approx(float(weights @ (log_p - log_pi)), rel=1e-9)
    assert row["kl_target_proposal"] == pytest.approx(float(weights @ (log_p - log_q)), rel=1e-9)
    assert row["moment/ab"] == pytest.approx(float(u @ phi / u.sum()), rel=1e-9)
    assert row["ess"] == pytest.approx(1 / float(weights @ weights), rel=1e-9)
    assert row["largest_weight"] == pytest.approx(float(weights.max()), rel=1e-9)


def test_the_norm_of_a_gradient_is_clipped(base, target):
    """By SGD a first step is the rate times the gradient: of the norm that is allowed."""
    norms = []
    for allowed in (None, 1e-3):
        settings = config(optimizer="sgd", learning_rate=1.0, warmup_steps=0, max_grad_norm=allowed)
        policy = base.copy()
        dmgen.GDCpp(policy, target, settings).train(1)
        norms.append(float((policy.logits.detach() - base.logits).norm()))
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)  # torch adds 1e-6 to the norm it divides by


def test_adamw_decays_the_weights(base, target):
    after = {}
    for optimizer in ("adam", "adamw"):
        policy = base.copy()
        dmgen.GDCpp(policy, target, config(optimizer=optimizer, warmup_steps=0)).train(1)
        after[optimizer] = policy.logits.detach()
    # The decay that torch takes is 0.01, times the rate.
    expected = after["adam"] - 0.05 * 0.01 * base.logits.detach()
    torch.testing.assert_close(after["adamw"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"reuse": 2, "learning_rate": "auto"}])
def test_gradients_are_not_kept_while_texts_are_drawn_and_judged(
    settings, base, target, monkeypatch
):
    policy, kept = base.copy(), []
    sample = policy.sample

    def watch(*arguments, **options):
        kept.append([p.grad for p in policy.parameters()])
        return sample(*arguments, **options)

    monkeypatch.setattr(policy, "sample", watch)
    dmgen.DPG(policy, target, config(batch_size=64, **settings)).train(3)
    assert kept == [[None]] * 3
    assert [p.grad for p in policy.parameters()] == [None]
