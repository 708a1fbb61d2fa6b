"""Targets against sums over every text: scores, refusals when made, the cache, what is printed."""

import json
import math

import numpy as np
import pytest
import torch

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import FeatureError, feature
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM

HAS_A = feature(lambda text: "a" in text, name="a")
HAS_B = feature(lambda text: "b" in text, name="b")
STARTS_C = feature(lambda text: text.startswith("c"), name="c first")
LENGTH = feature(len, name="length")


def tilted(world, hard=lambda text: True, soft=(), lambdas=()):
    """log P of every text by hand: log a, then one term a feature; -inf if `hard` is violated."""
    rows = []
    every = world.enumerate()
    for text, log_a in zip(every.texts, every.log_prob.tolist(), strict=True):
        score = log_a + sum(w * f(text) for f, w in zip(soft, lambdas, strict=True))
        rows.append(score if hard(text) else -math.inf)
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- log_score, by hand


def test_pointwise_score_is_the_base_where_it_holds(world):
    target = EBM(world, [Pointwise(HAS_A), Pointwise(HAS_B)])
    expected = tilted(world, lambda t: "a" in t and "b" in t)
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


def test_moment_score_is_the_exponential_tilt(world):
    target = EBM(world, [Moment(HAS_A, 0.5), Moment(LENGTH, 2.0)], [0.7, -1.3])
    expected = tilted(world, soft=[lambda t: "a" in t, len], lambdas=[0.7, -1.3])
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


def test_hybrid_score_is_the_product(world):
    target = EBM(world, [Moment(LENGTH, 2.0), Pointwise(HAS_A)], [0.4])
    expected = tilted(world, lambda t: "a" in t, soft=[len], lambdas=[0.4])
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


def test_conditional_score_tilts_only_texts_with_the_condition(world):
    target = EBM(world, [Moment(STARTS_C, 0.3, given=HAS_A)], [1.7])
    expected = tilted(world, soft=[lambda t: ("a" in t) * (t.startswith("c") - 0.3)], lambdas=[1.7])
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


def test_interval_score_is_that_of_a_moment(world):
    target = EBM(world, [Moment(LENGTH, (2.0, 3.0))], [0.9])
    expected = tilted(world, soft=[len], lambdas=[0.9])
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("goal", "weight"), [(1.0, math.inf), (0.0, -math.inf)])
def test_infinite_lambda_is_a_hard_factor(world, goal, weight):
    target = EBM(world, [Moment(HAS_A, goal)], [weight])
    expected = tilted(world, lambda t: ("a" in t) == (goal == 1))
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("goal", "weight"), [(1.0, math.inf), (0.0, -math.inf)])
def test_infinite_lambda_of_a_conditional_binds_only_under_its_condition(world, goal, weight):
    target = EBM(world, [Moment(STARTS_C, goal, given=HAS_A)], [weight])
    expected = tilted(world, lambda t: "a" not in t or t.startswith("c") == (goal == 1))
    torch.testing.assert_close(target.log_score(world.enumerate()), expected, rtol=0, atol=1e-12)


def test_a_text_that_the_base_cannot_say_scores_minus_infinity(world):
    base = world.copy()
    with torch.no_grad():
        base.logits[0, 0] = -math.inf  # no text begins with "a"
    target = EBM(base, [Moment(HAS_B, 0.5)], [3.0])
    every = world.enumerate()
    score = target.log_score(every)
    begins = torch.tensor([t.startswith("a") for t in every.texts])
    assert (score[begins] == -math.inf).all()
    assert score[~begins].isfinite().all()


def test_known_base_log_prob_is_used_and_the_base_left_alone(world):
    class Silent(TabularLM):
        def log_prob(self, samples, **_):
            raise AssertionError("the base was scored again")

    silent = Silent(world.vocab, world.logits, 4, eos=".")
    every = world.enumerate()
    score = EBM(silent, [Pointwise(HAS_A)]).log_score(every, base_log_prob=every.log_prob)
    assert torch.equal(score, tilted(world, lambda t: "a" in t))


def test_texts_that_violate_a_constraint_are_not_scored_by_the_base(world):
    scored = []

    class Counting(TabularLM):
        def log_prob(self, samples, **options):
            scored.extend(samples.texts)
            return super().log_prob(samples, **options)

    counting = Counting(world.vocab, world.logits, 4, eos=".")
    EBM(counting, [Pointwise(HAS_A)]).log_score(world.enumerate())
    assert scored == [t for t in world.enumerate().texts if "a" in t]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_base_that_gives_nan_or_infinity_is_refused(world, bad):
    every = world.enumerate()
    log_a = every.log_prob.clone()
    log_a[7] = bad
    target = EBM(world, [Moment(LENGTH, 2.0)], [0.0])
    with pytest.raises(ValueError, match=r"log P\[7\]"):
        target.log_score(every, base_log_prob=log_a)


def test_no_texts_have_no_scores(world):
    none = world.enumerate()[:0]
    assert EBM(world, [Pointwise(HAS_A)]).log_score(none).shape == (0,)


# ---------------------------------------------------------------- construction


def test_moments_without_lambdas_are_refused(world):
    with pytest.raises(ValueError, match=r"'a', 'length' need lambdas.*2 numbers"):
        EBM(world, [Moment(HAS_A, 0.5), Pointwise(HAS_B), Moment(LENGTH, 2.0)])


@pytest.mark.parametrize("lambdas", [[], [1.0, 2.0], [math.nan], [[1.0]]])
def test_lambdas_must_be_one_number_a_moment(world, lambdas):
    with pytest.raises(ValueError, match="lambdas must be 1 numbers"):
        EBM(world, [Moment(HAS_A, 0.5)], lambdas)


@pytest.mark.parametrize(
    ("moment", "weight"),
    [
        (Moment(HAS_A, 0.5), math.inf),
        (Moment(HAS_A, 1.0), -math.inf),
        (Moment(HAS_A, 0.0), math.inf),
        (Moment(HAS_A, (0.5, 1.0)), math.inf),
        (Moment(feature(len, name="n", binary=False), 1.0), math.inf),
    ],
)
def test_an_infinite_lambda_needs_a_binary_feature_on_its_edge(world, moment, weight):
    with pytest.raises(ValueError, match="a hard factor"):
        EBM(world, [moment], [weight])


def test_the_lambdas_given_are_copied(world):
    given = torch.tensor([0.5], dtype=torch.float64)
    target = EBM(world, [Moment(HAS_A, 0.5)], given)
    given[0] = 9.0
    assert target.lambdas.tolist() == [0.5]


def test_no_constraints_are_refused(world):
    with pytest.raises(ValueError, match="at least one Pointwise or Moment"):
        EBM(world, [])


def test_a_bare_feature_is_not_a_constraint(world):
    with pytest.raises(TypeError, match=r"dmgen\.Pointwise\(feature\)"):
        EBM(world, [HAS_A])


def test_two_features_of_one_name_are_refused(world):
    other = feature(lambda text: "b" in text, name="a")
    with pytest.raises(ValueError, match="two different features are called 'a'"):
        EBM(world, [Pointwise(HAS_A), Moment(other, 0.5)], [0.0])
    assert len(EBM(world, [Pointwise(HAS_A), Moment(HAS_A, 0.5)], [0.0]).features) == 1


def test_a_hard_feature_must_be_zero_or_one(world):
    with pytest.raises(FeatureError, match="'length' gave"):
        EBM(world, [Pointwise(LENGTH)]).log_score(world.enumerate())


# ---------------------------------------------------------------- features and their cache


def counting_feature():
    seen = []

    def count(text):
        seen.append(text)
        return len(text)

    return seen, feature(count, name="counted")


def test_each_distinct_text_is_looked_at_once(world):
    seen, counted = counting_feature()
    target = EBM(world, [Moment(counted, 2.0)], [0.1])
    samples = world.sample(500, seed=0)
    target.log_score(samples)
    target.values(samples)
    target.log_score(world.sample(500, seed=1))
    assert len(seen) == len(set(seen))
    assert len(seen) < 500  # texts repeat, or this would show nothing


def test_fit_refit_and_heldout_never_look_twice(world):
    seen, counted = counting_feature()
    target = EBM.fit(world, [Moment(counted, 2.0)], n_samples=300, n_heldout=300, seed=0)
    target.refit([(world, target.fit_samples), (world.copy(), world.sample(300, seed=5))])
    assert len(seen) == len(set(seen))


def test_a_feature_that_reads_the_prompt_is_asked_for_each_prompt(world):
    reads = feature(lambda text, prompt: len(prompt), name="p", with_prompt=True)
    target = EBM(world, [Moment(reads, 2.0)], [0.1])
    one = world.enumerate()[:1]
    both = type(one).cat([one, one])
    both = type(one)(both.tokens, both.mask, both.log_prob, both.texts, ["x", "long"])
    assert target.values(both)["p"].tolist() == [1.0, 4.0]


# ---------------------------------------------------------------- print and to_dict


def test_print_shows_what_was_asked_and_found(world):
    target = EBM.fit(
        world,
        [Pointwise(HAS_A), Moment(LENGTH, (2.5, 3.0)), Moment(STARTS_C, 0.2, given=HAS_B)],
        n_samples=2000,
        n_heldout=500,
        seed=0,
    )
    shown = str(target)
    for part in ("every text", "mean 2.5 to 3", "mean 0.2", "hard", "held out", "log Z", "KL(p‖a)"):
        assert part in shown
    assert str(target.base_moments["a"]) in shown
    assert "'c first | b' is the mean of b · (c first − 0.2)" in shown
    assert "KL(p‖a)" in str(EBM.fit(world, [Pointwise(HAS_A)], n_samples=500, seed=0))
    assert "lambda 0.3" in str(EBM(world, [Moment(LENGTH, 2.0)], [0.3]))


def test_to_dict_is_plain_and_exact(world):
    target = EBM(world, [Pointwise(HAS_A), Moment(HAS_B, 1.0), Moment(LENGTH, (1, 2))],
                 [math.inf, 0.1 + 0.2])  # fmt: skip
    assert target.to_dict() == {
        "constraints": [
            {"pointwise": "a"},
            {"moment": "b", "target": 1.0, "lambda": "inf"},
            {"moment": "length", "target": (1.0, 2.0), "lambda": "0.30000000000000004"},
        ],
        "prompt": "",
        "max_new_tokens": 4,
    }


def test_numbers_of_numpy_are_plain_in_to_dict(world):
    """A checkpoint holds it as JSON, written after the work of many steps."""
    moment = Moment(HAS_A, np.float32(0.5))
    target = EBM(world, [moment], [np.float32(0.25)], max_new_tokens=np.int64(3))
    plain = EBM(world, [Moment(HAS_A, 0.5)], [0.25], max_new_tokens=3)
    assert json.loads(json.dumps(target.to_dict())) == json.loads(json.dumps(plain.to_dict()))
