"""Estimates from the pooled texts of base and policy: calibrated, and bounds that find liars."""

import math

import pytest
import torch
from laws import is_calibrated, uncalibrated

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.estimates import divergences
from dmgen.estimates.divergences import estimate_kl
from dmgen.evaluation.pooled_samples import Pool
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM

HAS_A = feature(lambda text: "a" in text, name="a")
HAS_CB = feature(lambda text: "cb" in text, name="cb")
LENGTH = feature(len, name="length")


@pytest.fixture
def target(world):
    return EBM(world, [Moment(HAS_A, 0.5), Moment(LENGTH, 2.0)], [1.5, 0.3])


@pytest.fixture
def policy():
    return TabularLM.random("abc.", 4, eos=".", seed=8, scale=0.7)


def test_the_error_of_the_excess_knows_what_its_terms_share(world, as_tabular):
    """Near the target both terms go up and down together, on the very same texts."""
    target = EBM(world, [Moment(HAS_A, 0.5)], [3.0])
    exact = target.exact()
    policy = as_tabular(torch.logaddexp(exact.log_prob + math.log(0.9),
                                        exact.log_base + math.log(0.1)))  # fmt: skip
    excess = exact.kl_policy_base(policy) - exact.kl_target_base
    z, of_strangers = [], []
    for seed in range(300):
        pool = Pool.draw(policy, target, 150, seed)
        found = pool.excess()
        parts = [pool.kl_policy_base(), pool.distance(estimate_kl, pool.log_base).score()]
        z.append((found.value - excess) / found.stderr)
        of_strangers.append((found.value - excess) / math.hypot(*(p.stderr for p in parts)))
    assert is_calibrated(z)
    assert not is_calibrated(of_strangers)  # the power of this test


def test_the_error_of_the_gain_knows_what_its_terms_share(world, as_tabular):
    """A policy that has moved a little: both distances are large, and from the very same texts."""
    target = EBM(world, [Moment(LENGTH, 2.0)], [1.0])
    exact = target.exact()
    policy = as_tabular(torch.logaddexp(exact.log_prob + math.log(0.1),
                                        exact.log_base + math.log(0.9)))  # fmt: skip
    gain = exact.kl_target_base - exact.kl_target_policy(policy)
    z, of_strangers = [], []
    for seed in range(300):
        pool = Pool.draw(policy, target, 150, seed)
        found = pool.gain()
        parts = [pool.distance(estimate_kl, x).score() for x in (pool.log_base, pool.log_policy)]
        z.append((found.value - gain) / found.stderr)
        of_strangers.append((found.value - gain) / math.hypot(*(p.stderr for p in parts)))
    assert is_calibrated(z)
    assert not is_calibrated(of_strangers)  # the power of this test


def test_ratios_are_calibrated(target, policy):
    exact = target.exact()
    n_tokens = exact.samples.n_tokens.double()
    laws = {
        "base": exact.log_base.exp(),
        "policy": policy.log_prob(exact.samples).exp(),
        "target": exact.log_prob.exp(),
    }
    z = {name: [] for name in laws}
    for seed in range(120):
        pool = Pool.draw(policy, target, 250, seed)
        drawn = torch.cat([s.n_tokens for s in pool.drawn.values()]).double()
        for name, law in laws.items():
            ratio = float(law @ -exact.log_base) / float(law @ n_tokens)
            score = pool.ratio(name, -pool.log_base, drawn).score()
            z[name].append((score.value - ratio) / score.stderr)
    assert uncalibrated(z) == set()


def test_estimates_equal_those_of_the_columns(target, policy):
    """The joint estimates, whose differences have joint errors, are the very same estimators."""
    pool = Pool.draw(policy, target, 500, 0)
    for other in (pool.log_base, pool.log_policy):
        joint = pool.distance(estimate_kl, other).score()
        assert joint == divergences.kl(pool.log_score, other, pool.log_mixture, strata=pool.strata)
    gap = pool.excess().value + pool.distance(estimate_kl, pool.log_base).value
    assert gap == pytest.approx(pool.kl_policy_base().value, rel=1e-12)


def test_means_of_base_and_policy_are_plain(target, policy):
    pool = Pool.draw(policy, target, 300, 0)
    column = pool.values["length"]
    assert pool.mean("base", column).value == pytest.approx(float(column[:300].mean()))
    assert pool.mean("policy", column).value == pytest.approx(float(column[300:].mean()))
    assert pool.mean("policy", column).n == 300


# ---------------------------------------------------------------- the bounds


@pytest.mark.parametrize("n", [100, 600])
@pytest.mark.parametrize(
    ("constraints", "lambdas"),
    [
        ([Moment(HAS_A, 0.5)], [2.0]),  # the first bound is tight at π = p
        ([Pointwise(HAS_CB)], None),  # the second is, and the target is rare
        ([Pointwise(HAS_A), Moment(HAS_CB, 0.5)], [1.0]),
    ],
)
@pytest.mark.parametrize("mix", [0.0, 0.02, 1.0])
def test_honest_models_are_never_accused(world, as_tabular, constraints, lambdas, mix, n):
    target = EBM(world, constraints, lambdas)
    exact = target.exact()
    policy = as_tabular(((1 - mix) * exact.log_prob.exp() + mix * exact.log_base.exp()).log())
    for seed in range(15):
        Pool.draw(policy, target, n, seed).check_bounds()


def gaps(policy, target, bound, n_repeats=300):
    """z-scores of the gap of one of the two kinds of bound, over repeats."""
    pools = (Pool.draw(policy, target, 250, seed) for seed in range(n_repeats))
    found = [(left, gap) for pool in pools for left, _, gap in pool.bounds()]
    return [gap.value / gap.stderr for left, gap in found if left.startswith(bound)]


def test_the_first_gap_is_calibrated_where_the_bound_is_tight(world, as_tabular):
    target = EBM(world, [Moment(HAS_A, 0.5)], [2.0])
    policy = as_tabular(target.exact().log_prob)
    assert is_calibrated(gaps(policy, target, "KL(π‖a)"))


def test_the_second_gap_is_calibrated_where_the_bound_is_tight(world, as_tabular):
    """Half of the policy is p, half is what p forbids: KL(p‖π) = log 2 = −log E_π[P > 0]."""
    target = EBM(world, [Pointwise(HAS_A)])
    exact = target.exact()
    other = exact.log_base.masked_fill(exact.log_prob > -math.inf, -math.inf).log_softmax(0)
    policy = as_tabular(torch.logaddexp(exact.log_prob, other) - math.log(2))
    assert exact.kl_target_policy(policy) == pytest.approx(math.log(2))
    assert is_calibrated(gaps(policy, target, "KL(p‖π)"))


class Liar(TabularLM):
    """Draws from its own law and reports another's log-probabilities."""

    def __init__(self, law, claimed):
        super().__init__(law.vocab, law.logits, law.max_new_tokens, eos=law.eos)
        self.claimed = claimed

    def sample(self, n, **options):
        drawn = super().sample(n, **options)
        honest = self.claimed.log_prob(drawn)
        return type(drawn)(drawn.tokens, drawn.mask, honest, drawn.texts, drawn.prompts)

    def log_prob(self, samples, **options):
        return self.claimed.log_prob(samples, **options)


def test_a_policy_that_hides_what_it_paid_is_found_out(world, as_tabular):
    """It draws from p and claims to be the base: KL(π‖a) = 0, with a moment far from the base's."""
    target = EBM(world, [Moment(HAS_A, 0.5)], [2.0])
    liar = Liar(as_tabular(target.exact().log_prob), world)
    with pytest.raises(ArithmeticError, match=r"KL\(π‖a\) = 0 nats.*KL\(Bern\(0\.\d+\)‖.*'a' is 1"):
        Pool.draw(liar, target, 2048, 0).check_bounds()


def test_a_policy_that_hides_what_it_says_beside_the_target_is_found_out(world, as_tabular):
    """It claims to be half p, half one rare text, and says that text nearly always."""
    target = EBM(world, [Pointwise(HAS_A)])
    exact = target.exact()
    forbidden = torch.tensor(["a" not in text for text in exact.samples.texts])
    spike = torch.zeros_like(exact.log_base)
    spike[exact.log_base.masked_fill(~forbidden, 0).argmin()] = 1
    claimed, law = (
        as_tabular((share * exact.log_prob.exp() + (1 - share) * spike).log())
        for share in (0.5, 0.05)
    )
    with pytest.raises(ArithmeticError, match=r"KL\(p‖π\) = .*must not be less than −log\(0\.0"):
        Pool.draw(Liar(law, claimed), target, 2048, 0).check_bounds()
    Pool.draw(Liar(claimed, claimed), target, 2048, 0).check_bounds()


def test_few_texts_are_not_judged(world, as_tabular):
    target = EBM(world, [Moment(HAS_A, 0.5)], [2.0])
    liar = Liar(as_tabular(target.exact().log_prob), world)
    Pool.draw(liar, target, 99, 0).check_bounds()


def test_numbers_without_bounds_are_left_alone(world, policy):
    target = EBM(world, [Moment(LENGTH, 2.0)], [0.5])
    Pool.draw(policy, target, 500, 0).check_bounds()


def test_a_text_that_the_base_cannot_say_costs_infinity_and_violates_nothing(world, policy):
    base = world.copy()
    with torch.no_grad():
        base.logits[0, 0] = -math.inf
    target = EBM(base, [Moment(HAS_CB, 0.5)], [0.5])
    pool = Pool.draw(policy, target, 500, 0)
    pool.check_bounds()
    assert pool.kl_policy_base().value == math.inf
    assert pool.mean("policy", -pool.log_base).value == math.inf
