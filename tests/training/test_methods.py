"""The methods by name against exact answers on an enumerable model."""

import math

import pytest
import torch
from worlds import as_table, batch_of, config, exact_kl

import dmgen
from dmgen.estimates.running_z import RunningZ
from dmgen.training.batch import Batch

MATCHING = [dmgen.DPG, dmgen.GDC, dmgen.GDCpp, dmgen.FDPG, dmgen.VarGrad]


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


def test_pointwise_target(base):
    begins = dmgen.feature(lambda text: text.startswith("ca"), name="ca")
    target = dmgen.EBM(base, [dmgen.Pointwise(begins)])
    policy = base.copy()
    dmgen.GDCpp(policy, target, config()).train(100)
    assert exact_kl(target, base) > 3  # -log Z: one text in twenty or fewer
    assert exact_kl(target, policy) < exact_kl(target, base) / 10
