"""`evaluate` on worlds where every number is known."""

import math

import pytest
import torch
from laws import is_close

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.estimates import weights as log_weights
from dmgen.evaluation import distinct_n, self_bleu
from dmgen.evaluation.evaluate import evaluate
from dmgen.models import Samples, TabularLM
from dmgen.target.ebm import EBM

HAS_A = feature(lambda text: "a" in text, name="a")
STARTS_C = feature(lambda text: text.startswith("c"), name="c first")
LENGTH = feature(len, name="length")


@pytest.fixture
def policy():
    return TabularLM.random("abc.", 4, eos=".", seed=8, scale=0.7)


TARGETS = {
    "soft": ([Moment(HAS_A, 0.5), Moment(LENGTH, 2.0)], [1.5, 0.3]),
    "hard": ([Pointwise(HAS_A)], None),
    "hybrid": ([Pointwise(HAS_A), Moment(LENGTH, (2.5, 3.5))], [0.4]),
    "conditional": ([Moment(STARTS_C, 0.3, given=HAS_A)], [-1.0]),
}


@pytest.mark.parametrize("constraints", TARGETS.values(), ids=TARGETS)
def test_every_number_is_within_its_error_of_the_truth(world, policy, constraints):
    target = EBM(world, *constraints)
    exact = target.exact()
    found = evaluate(policy, target, seed=0)
    every = exact.samples
    laws = {
        "base": exact.log_base.exp(),
        "target": exact.log_prob.exp(),
        "policy": policy.log_prob(every).exp(),
    }
    truth = {
        "kl_target_policy": exact.kl_target_policy(policy),
        "kl_policy_base": exact.kl_policy_base(policy),
        "kl_target_base": exact.kl_target_base,
        "excess": exact.kl_policy_base(policy) - exact.kl_target_base,
        "gain": exact.kl_target_base - exact.kl_target_policy(policy),
        "tv": exact.tv(policy),
        "js": exact.js(policy),
    }
    for name, value in truth.items():
        assert is_close(getattr(found, name), value), name
        assert not is_close(getattr(found, name), value + 0.5), name  # the errors are not just wide
    for model, law in laws.items():
        assert is_close(found.length[model], float(law @ every.n_tokens.double()))
        surprise = float(law @ -exact.log_base) / float(law @ every.n_tokens.double())
        assert is_close(found.perplexity[model], math.exp(surprise))
    policy_as_target = EBM(policy, target.constraints, target.lambdas).exact()
    for row in found.moments:
        assert is_close(row.base, exact.base_moments[row.name])
        assert is_close(row.reachable, exact.moments[row.name])
        assert is_close(row.policy, policy_as_target.base_moments[row.name])


def test_the_target_itself_meets_everything_at_the_least_price(world, as_tabular):
    fitted = EBM.fit(world, [Pointwise(HAS_A), Moment(LENGTH, 3.0)], n_samples=20_000, seed=0)
    policy = as_tabular(fitted.exact().log_prob)
    found = evaluate(policy, fitted, n_samples=10_000, seed=1, tolerance=0.1)
    assert [row.verdict for row in found.moments] == ["met", "met"]
    assert is_close(found.excess, 0)
    assert abs(found.kl_target_policy.value) < 0.02
    assert found.kl_target_base.value == pytest.approx(found.kl_policy_base.value, abs=0.05)


def test_the_base_meets_nothing_and_has_paid_nothing(world):
    target = EBM(world, [Moment(HAS_A, 0.5)], [2.0])
    found = evaluate(world.copy(), target, seed=0)
    assert [row.verdict for row in found.moments] == ["not met"]
    assert found.kl_policy_base.value == 0
    assert found.excess.value == pytest.approx(-found.kl_target_base.value)
    assert (found.gain.value, found.gain.stderr) == (0, 0)


def test_undecided_says_how_many_texts_would_decide(world):
    goal = 0.13  # the base has 0.10: near the edge of ± 0.05
    target = EBM(world, [Moment(HAS_A, goal), Moment(STARTS_C, 0.5, given=HAS_A)], [0.3, 0.0])
    found = evaluate(world.copy(), target, n_samples=300, seed=0)
    plain, conditional = found.moments
    assert (plain.verdict, conditional.verdict) == ("undecided", "undecided")
    assert f"undecided (about {plain.n_to_decide:,} texts would decide)" in str(found)
    # It counts texts drawn, of which only one in ten meets the condition.
    assert conditional.n_to_decide > 3 * plain.policy.n
    # What the true distance to the edge needs, twice over: the plan above rests on 300 texts.
    exact = target.exact().base_moments["a"]
    needed = (2.576 / (exact - (goal - 0.05))) ** 2 * exact * (1 - exact)
    again = evaluate(world.copy(), target, n_samples=4 * math.ceil(needed), seed=3)
    assert again.moments[0].verdict == "met"


def test_a_condition_that_never_came_up_is_undecided(world):
    never = feature(lambda text: "z" in text, name="never")
    target = EBM(world, [Moment(HAS_A, 0.5, given=never)], [0.0])
    row = evaluate(world.copy(), target, n_samples=200, seed=0).moments[0]
    assert (row.verdict, row.n_to_decide, row.policy.n) == ("undecided", None, 0)
    assert math.isnan(row.policy.value)


def test_diversity_is_keyed_by_model_and_order_on_equal_numbers_of_texts(world, policy):
    target = EBM(world, [Moment(HAS_A, 0.5)], [1.0])
    found = evaluate(policy, target, n_samples=300, seed=0)
    assert set(found.self_bleu) == {(m, n) for m in ("base", "policy") for n in (3, 4, 5)}
    assert set(found.distinct) == {(m, n) for m in ("base", "policy") for n in (1, 2, 3)}
    for (model, n), score in found.self_bleu.items():
        assert score == self_bleu(found.samples[model].texts, n)
    for (model, n), score in found.distinct.items():
        assert score == distinct_n(found.samples[model].texts, n)
    assert {score.n for score in found.self_bleu.values()} == {300}


def test_the_seed_fixes_every_number(world, policy):
    target = EBM(world, [Moment(HAS_A, 0.5)], [1.0])
    one, same, other = (
        evaluate(policy, target, n_samples=200, seed=s).to_dict() for s in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_no_global_randomness_is_touched(world, policy):
    before = torch.get_rng_state()
    evaluate(policy, EBM(world, [Moment(HAS_A, 0.5)], [1.0]), n_samples=50)
    assert torch.equal(before, torch.get_rng_state())


def test_features_are_looked_at_once_for_each_text(world, policy):
    seen = []
    counted = feature(lambda text: bool(seen.append(text)) or "a" in text, name="counted")
    evaluate(policy, EBM(world, [Moment(counted, 0.5)], [1.0]), n_samples=500, seed=0)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_samples": 1}, "n_samples must be at least 2"), ({"tolerance": -0.1}, "tolerance"),
     ({"tolerance": math.nan}, "tolerance")],
)  # fmt: skip
def test_impossible_settings_are_refused(world, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(world.copy(), EBM(world, [Pointwise(HAS_A)]), **options)


def test_it_says_how_many_texts_count_for_the_target(world, policy):
    rare = feature(lambda text: text.startswith("cac"), name="cac")
    for target, few in (
        (EBM(world, [Pointwise(rare)]), True),
        (EBM(world, [Moment(HAS_A, 0.5)], [0.0]), False),
    ):
        found = evaluate(policy, target, n_samples=400, seed=1)
        texts = Samples.cat([found.samples["base"], found.samples["policy"]])
        mixture = torch.logaddexp(world.log_prob(texts), policy.log_prob(texts))
        assert found.ess == pytest.approx(log_weights.ess(target.log_score(texts) - mixture))
        assert ("Too few effective texts of p" in str(found)) == few == (found.ess < 100)
        (row,) = [row for row in found.to_dict()["rows"] if row["metric"] == "ess"]
        assert row["value"] == found.ess
