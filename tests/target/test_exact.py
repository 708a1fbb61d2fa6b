"""The truth about a target, against sums written out by hand."""

import math

import pytest
import torch

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM

HAS_A = feature(lambda text: "a" in text, name="a")
STARTS_C = feature(lambda text: text.startswith("c"), name="c first")
LENGTH = feature(len, name="length")


@pytest.fixture
def target(world):
    return EBM(
        world, [Moment(LENGTH, 2.0), Pointwise(HAS_A), Moment(STARTS_C, 0.5, given=HAS_A)], [0.5, 1]
    )


def by_hand(world):
    """(text, a, p) of every text, and Z, in plain Python."""
    every = world.enumerate()
    rows = []
    for text, log_a in zip(every.texts, every.log_prob.tolist(), strict=True):
        tilt = 0.5 * len(text) + ("a" in text) * (text.startswith("c") - 0.5)
        rows.append((text, math.exp(log_a), math.exp(log_a + tilt) if "a" in text else 0.0))
    z = sum(row[2] for row in rows)
    return [(text, a, p / z) for text, a, p in rows], z


def test_z_moments_and_kl_are_sums(world, target):
    rows, z = by_hand(world)
    exact = target.exact()
    assert exact.log_z == pytest.approx(math.log(z), abs=1e-12)
    assert exact.base_moments["length"] == pytest.approx(sum(a * len(t) for t, a, _ in rows))
    assert exact.moments["length"] == pytest.approx(sum(p * len(t) for t, _, p in rows))
    assert exact.moments["a"] == 1.0
    with_a = [(t, a) for t, a, _ in rows if "a" in t]
    given = sum(a * t.startswith("c") for t, a in with_a) / sum(a for _, a in with_a)
    assert exact.base_moments["c first | a"] == pytest.approx(given)
    kl = sum(p * math.log(p / a) for _, a, p in rows if p)
    assert exact.kl_target_base == pytest.approx(kl, abs=1e-12)


def test_divergences_from_a_policy_are_sums(world, target):
    rows, _ = by_hand(world)
    policy = TabularLM.random("abc.", 4, eos=".", seed=7)
    pi = policy.log_prob(world.enumerate()).exp().tolist()
    p = [row[2] for row in rows]
    exact = target.exact()
    kl = sum(x * math.log(x / y) for x, y in zip(p, pi, strict=True) if x)
    assert exact.kl_target_policy(policy) == pytest.approx(kl, abs=1e-12)
    tv = 0.5 * sum(abs(x - y) for x, y in zip(p, pi, strict=True))
    assert exact.tv(policy) == pytest.approx(tv, abs=1e-12)
    js = sum(
        0.5 * x * math.log(2 * x / (x + y)) if x else 0.0 for x, y in zip(p, pi, strict=True)
    ) + sum(0.5 * y * math.log(2 * y / (x + y)) for x, y in zip(p, pi, strict=True))
    assert exact.js(policy) == pytest.approx(js, abs=1e-12)
    assert exact.kl_policy_target(policy) == math.inf  # it says texts without "a"
    a = [row[1] for row in rows]
    kl = sum(y * math.log(y / x) for x, y in zip(a, pi, strict=True))
    assert exact.kl_policy_base(policy) == pytest.approx(kl, abs=1e-12)


def test_reverse_kl_of_a_soft_target_is_a_sum(world):
    target = EBM(world, [Moment(LENGTH, 2.0)], [0.5])
    exact = target.exact()
    policy = TabularLM.random("abc.", 4, eos=".", seed=7)
    log_pi = policy.log_prob(world.enumerate())
    kl = float((log_pi.exp() * (log_pi - exact.log_prob)).sum())
    assert exact.kl_policy_target(policy) == pytest.approx(kl, abs=1e-12)
    assert exact.kl_target_policy(world) == exact.kl_target_base


def test_the_table_is_the_distribution(world, target):
    rows, _ = by_hand(world)
    frame = target.exact().to_frame()
    assert list(frame.columns) == ["text", "a", "p"]
    assert frame["text"].tolist() == [row[0] for row in rows]
    assert frame["a"].sum() == pytest.approx(1, abs=1e-12)
    assert frame["p"].sum() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(
        torch.tensor(frame["p"].to_numpy()), torch.tensor([r[2] for r in rows]).double(),
        rtol=0, atol=1e-7,
    )  # fmt: skip


def test_max_new_tokens_of_the_target_limits_the_list(world):
    short = EBM(world, [Pointwise(HAS_A)], max_new_tokens=2).exact()
    assert max(map(len, short.samples.texts)) == 2
    assert float(short.log_base.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_base_that_cannot_list_its_texts_is_refused(world):
    class Unlistable:
        max_new_tokens = 4

    with pytest.raises(TypeError, match=r"not a Unlistable: use dmgen\.evaluate"):
        EBM(Unlistable(), [Pointwise(HAS_A)]).exact()


def test_an_empty_target_has_no_distribution(world):
    never = feature(lambda text: "z" in text, name="never")
    with pytest.raises(ValueError, match="Z is 0"):
        EBM(world, [Pointwise(never)]).exact()


def test_a_policy_over_other_texts_is_refused(target):
    wider = TabularLM.random("abc.d", 4, eos=".", seed=0)
    with pytest.raises(ValueError, match="total probability"):
        target.exact().kl_target_policy(wider)
