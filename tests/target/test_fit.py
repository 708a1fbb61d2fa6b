"""λ of targets against exact answers: fit, refit, and what is refused as unreachable."""

import math

import pytest
import torch

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.models import TabularLM
from dmgen.target import factor
from dmgen.target.ebm import EBM
from dmgen.target.moments import MomentsUnreachable

HAS_A = feature(lambda text: "a" in text, name="a")
HAS_B = feature(lambda text: "b" in text, name="b")
STARTS_C = feature(lambda text: text.startswith("c"), name="c first")
LENGTH = feature(len, name="length")
NEVER = feature(lambda text: "z" in text, name="never")


def solve(world, statistics, hard=lambda text: True):
    """λ for which the means of `statistics` are 0, and log Z, by Newton on the exact sums."""
    every = world.enumerate()
    possible = torch.tensor([hard(text) for text in every.texts])
    log_b = every.log_prob.masked_fill(~possible, -math.inf)
    phi = torch.tensor([[f(t) for f in statistics] for t in every.texts], dtype=torch.float64)
    lambdas = torch.zeros(len(statistics), dtype=torch.float64)
    for _ in range(50):
        p = torch.softmax(log_b + phi @ lambdas, 0)
        mean = p @ phi
        cov = (phi - mean).T @ ((phi - mean) * p[:, None])
        step = torch.linalg.solve(cov, mean)
        lambdas = lambdas - step / max(1.0, float(step.norm()))  # far away Newton overshoots
    assert mean.abs().max() < 1e-12
    return lambdas, float(torch.logsumexp(log_b + phi @ lambdas, 0))


def within(value, exact, stderr):
    """Five standard errors: one false alarm in two million."""
    return abs(float(value) - float(exact)) < 5 * float(stderr)


# ---------------------------------------------------------------- fit


def test_fit_recovers_lambda_and_log_z(world):
    exact, log_z = solve(world, [lambda t: ("a" in t) - 0.4, lambda t: len(t) - 2.0])
    # Moments enter as phi, not phi - target, so Z differs by exp(lambda·target).
    log_z += float(exact @ torch.tensor([0.4, 2.0], dtype=torch.float64))
    target = EBM.fit(world, [Moment(HAS_A, 0.4), Moment(LENGTH, 2.0)], seed=3)
    fit = target.moment_fit
    for j in range(2):
        assert within(target.lambdas[j], exact[j], fit.lambdas_stderr[j])
        assert not within(target.lambdas[j], exact[j] + 0.5, fit.lambdas_stderr[j])
    # log_z is that of the λ found, not of the exact one.
    assert within(target.log_z, target.exact().log_z, target.log_z.stderr)
    kl = float(exact @ torch.tensor([0.4, 2.0], dtype=torch.float64)) - log_z
    assert within(fit.kl_target_base, kl, fit.kl_target_base_stderr)


def test_fit_of_a_hybrid_counts_the_pointwise_part(world):
    exact, _ = solve(world, [lambda t: len(t) - 3.0], hard=lambda t: "a" in t)
    target = EBM.fit(world, [Pointwise(HAS_A), Moment(LENGTH, 3.0)], seed=0)
    fit = target.moment_fit
    assert within(target.lambdas[0], exact[0], fit.lambdas_stderr[0])
    best = EBM(world, [Pointwise(HAS_A), Moment(LENGTH, 3.0)], exact).exact()
    assert within(fit.kl_target_base, best.kl_target_base, fit.kl_target_base_stderr)
    # Without the pointwise part it would be much too small.
    without = fit.kl_target_base + math.log(target.base_moments["a"].value)
    assert not within(without, best.kl_target_base, fit.kl_target_base_stderr)


def test_fit_of_a_conditional_moment(world):
    exact, _ = solve(world, [lambda t: ("a" in t) * (t.startswith("c") - 0.3)])
    target = EBM.fit(world, [Moment(STARTS_C, 0.3, given=HAS_A)], seed=0)
    assert within(target.lambdas[0], exact[0], target.moment_fit.lambdas_stderr[0])
    best = EBM(world, target.constraints, exact).exact()
    assert best.moments["c first | a"] == pytest.approx(0.3, abs=1e-12)
    assert best.base_moments["c first | a"] > 0.5


def test_an_interval_binds_at_its_nearest_edge_or_not_at_all(world):
    edge, _ = solve(world, [lambda t: len(t) - 2.0])
    bound = EBM.fit(world, [Moment(LENGTH, (2.0, 3.0))], seed=0)
    assert within(bound.lambdas[0], edge[0], bound.moment_fit.lambdas_stderr[0])
    free = EBM.fit(world, [Moment(LENGTH, (0.0, 3.0))], seed=0)
    assert free.lambdas.tolist() == [0.0]


@pytest.mark.parametrize("constraints", [[Pointwise(HAS_A)], [Pointwise(HAS_A), Pointwise(HAS_B)]])
def test_pure_pointwise_targets_fit(world, constraints):
    target = EBM.fit(world, constraints, seed=0)
    exact = target.exact()
    assert within(target.log_z, exact.log_z, target.log_z.stderr)
    assert target.moment_fit.kl_target_base == -target.log_z.value
    assert within(target.base_moments["a"], exact.base_moments["a"], target.log_z.stderr)
    assert target.lambdas.shape == (0,)


def test_a_proposal_gives_the_same_answer(world):
    # A proposal with far more "a" than the base.
    proposal = TabularLM.random("abc.", 4, eos=".", scale=0.3, seed=9)
    rare = feature(lambda text: text.startswith("aa"), name="rare")
    exact, _ = solve(world, [lambda t: t.startswith("aa") - 0.5])
    constraints = [Moment(rare, 0.5)]
    target = EBM.fit(world, constraints, n_samples=4000, seed=0, proposal=proposal)
    fit = target.moment_fit
    assert within(target.lambdas[0], exact[0], fit.lambdas_stderr[0])
    assert within(target.log_z, target.exact().log_z, target.log_z.stderr)
    plain = EBM.fit(world, constraints, n_samples=4000, seed=0)
    assert fit.lambdas_stderr[0] < 0.5 * plain.moment_fit.lambdas_stderr[0]
    # Weights left out, λ would belong to the proposal.
    wrong = EBM.fit(proposal, constraints, n_samples=4000, seed=0)
    assert not within(wrong.lambdas[0], exact[0], fit.lambdas_stderr[0])
    assert target.fit_samples is None


@pytest.mark.parametrize(("goal", "weight"), [(1.0, math.inf), (0.0, -math.inf)])
def test_edge_targets_harden_in_fit(world, goal, weight):
    target = EBM.fit(world, [Moment(HAS_A, goal), Moment(LENGTH, 2.0)], seed=0)
    assert target.lambdas[0] == weight
    assert target.lambdas[1].isfinite()
    assert target.moment_fit.names == ("length",)
    assert target.exact().moments["a"] == goal  # to the last digit, not to a tolerance
    finite = EBM(world, [Moment(HAS_A, goal)], [2.0])  # only fit hardens
    assert 0 < finite.exact().moments["a"] < 1


@pytest.mark.parametrize(("goal", "weight"), [(1.0, math.inf), (0.0, -math.inf)])
def test_edge_targets_of_conditionals_harden(world, goal, weight):
    target = EBM.fit(world, [Moment(STARTS_C, goal, given=HAS_A)], seed=0)
    assert target.lambdas.tolist() == [weight]
    assert target.exact().moments["c first | a"] == goal


def test_edge_targets_of_numbers_do_not_harden(world):
    target = EBM.fit(world, [Moment(LENGTH, 1.0)], seed=0)
    assert target.lambdas.isfinite().all()
    as_number = feature(lambda text: float("a" in text), name="a")  # 0 and 1, but not declared
    with pytest.raises(MomentsUnreachable, match=r"'a'.*edge"):
        EBM.fit(world, [Moment(as_number, 1.0)], seed=0)


def test_fit_draws_what_the_seed_says(world):
    constraints = [Moment(LENGTH, 2.0)]
    one = EBM.fit(world, constraints, n_samples=200, seed=4)
    held = EBM.fit(world, constraints, n_samples=200, n_heldout=50, seed=4)
    by_generator = EBM.fit(
        world, constraints, n_samples=200, generator=torch.Generator().manual_seed(4)
    )
    assert one.lambdas.equal(held.lambdas)
    assert one.lambdas.equal(by_generator.lambdas)
    assert not one.lambdas.equal(EBM.fit(world, constraints, n_samples=200, seed=5).lambdas)
    assert torch.equal(one.fit_samples.tokens, world.sample(200, seed=4).tokens)


def test_heldout_moments_know_what_became_hard(world):
    target = EBM.fit(
        world, [Moment(HAS_A, 1.0), Moment(LENGTH, 3.0)], n_samples=4000, n_heldout=4000, seed=1
    )
    fit = target.moment_fit
    exact = target.exact().moments["length"]
    assert within(fit.moments_heldout[0], exact, fit.moments_heldout_stderr[0])


def test_heldout_moments_are_those_of_fresh_texts(world):
    target = EBM.fit(
        world, [Pointwise(HAS_A), Moment(LENGTH, 3.0)], n_samples=4000, n_heldout=4000, seed=1
    )
    fit = target.moment_fit
    assert within(fit.moments_heldout[0], target.exact().moments["length"],
                  fit.moments_heldout_stderr[0])  # fmt: skip
    assert fit.moments_heldout[0] != fit.moments[0]
    assert EBM.fit(world, [Moment(LENGTH, 2.0)], n_samples=99, seed=0).moment_fit.moments_heldout \
        is None  # fmt: skip
    with pytest.raises(ValueError, match="n_heldout"):
        EBM.fit(world, [Moment(LENGTH, 2.0)], n_heldout=-1)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ([Pointwise(NEVER)], r"none of 500 texts.*'never' 0 times.*proposal="),
        ([Pointwise(HAS_A), Moment(HAS_A, 0.0)], r"none of 500 texts.*'a' \d+ times.*'a' \d+ time"),
        ([Moment(LENGTH, 9.0)], r"9 is requested of 'length'.*500 samples it goes from 0 to 4"),
        ([Moment(NEVER, 0.5)], r"'never', but it was never seen.*500"),
        ([Pointwise(HAS_A), Moment(HAS_A, 0.7)], r"0\.7 is requested of 'a'"),
        ([Moment(LENGTH, 1.0), Moment(LENGTH, 2.0)], r"'length'.*'length'.*cannot hold together"),
        (
            [Moment(HAS_A, 0.5, given=NEVER)],
            r"0\.5 is requested of 'a \| never'.*holds for 0 of 500",
        ),
        ([Moment(NEVER, 0.5, given=HAS_A)], r"'a' holds for \d+ of 500.*'never' is always 0"),
        ([Moment(LENGTH, 7.0, given=HAS_A)], r"'length' goes from 1 to 4"),
    ],
)
def test_the_unreachable_is_refused_by_name_and_number(world, constraints, message):
    with pytest.raises(MomentsUnreachable, match=message):
        EBM.fit(world, constraints, n_samples=500, seed=0)


def test_a_proposal_that_shares_no_text_with_the_base_is_refused(world):
    base = world.copy()
    proposal = world.copy()
    with torch.no_grad():
        base.logits[0, 0] = -math.inf
        proposal.logits[0, 1:] = -math.inf
    with pytest.raises(MomentsUnreachable, match="probability 0 to all 50 texts"):
        EBM.fit(base, [Moment(LENGTH, 2.0)], n_samples=50, seed=0, proposal=proposal)


# ---------------------------------------------------------------- refit


def rare_world():
    """A world in which 1 text in 5,000 begins with "a", and a model in which most do."""
    world = TabularLM.random("abc.", 3, eos=".", seed=2)
    with torch.no_grad():
        others = torch.logsumexp(world.logits[0, 1:], 0)
        world.logits[0, 0] = others + math.log(1 / 4999)
    better = world.copy()
    with torch.no_grad():
        better.logits[0, 0] = others + 1.0
    return world, better


def test_refit_nails_down_what_the_base_hardly_shows():
    world, better = rare_world()
    rare = feature(lambda text: text.startswith("a"), name="rare")
    first = EBM.fit(world, [Moment(rare, 0.5)], n_samples=10_000, seed=1)
    exact = math.log(4999)  # logit(1/2) − logit(1/5000)
    assert 0 < first.moment_fit.hits[0] < 10
    second = first.refit([(world, first.fit_samples), (better, better.sample(10_000, seed=2))])
    assert within(second.lambdas[0], exact, second.moment_fit.lambdas_stderr[0])
    assert second.moment_fit.lambdas_stderr[0] < 0.05 < first.moment_fit.lambdas_stderr[0]
    assert within(second.log_z, second.exact().log_z, second.log_z.stderr)
    assert second.log_z.stderr < 0.05
    assert second.base_moments["rare"].value == pytest.approx(1 / 5000, rel=0.1)
    assert second.constraints == first.constraints
    assert first.lambdas[0] != second.lambdas[0]  # the first target is as it was


def test_refit_is_calibrated():
    world, better = rare_world()
    rare = feature(lambda text: text.startswith("a"), name="rare")
    start = EBM(world, [Moment(rare, 0.5)], [0.0])
    z = []
    for seed in range(200):
        drawn = [(world, world.sample(300, seed=seed)), (better, better.sample(100, seed=seed))]
        fitted = start.refit(drawn)
        z.append((fitted.log_z.value - fitted.exact().log_z) / fitted.log_z.stderr)
    z = torch.tensor(z)
    # λ and Z come from the same texts, so log Z is right for any λ to first order.
    assert abs(z.mean()) < 5 / math.sqrt(len(z))
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * len(z))


def test_refit_uses_every_density_once(world):
    calls = []

    class Counting(TabularLM):
        def log_prob(self, samples, **options):
            calls.append(len(samples))
            return super().log_prob(samples, **options)

    base, other = (Counting(world.vocab, m.logits, 4, eos=".") for m in (world, world.copy()))
    target = EBM.fit(base, [Moment(LENGTH, 2.0)], n_samples=50, seed=0)
    target.refit([(base, target.fit_samples), (other, other.sample(30, seed=1))])
    assert sorted(calls) == [30, 50]  # each model scores the other's texts, and no more


def test_refit_without_the_base_scores_it(world):
    proposal = TabularLM.random("abc.", 4, eos=".", scale=0.3, seed=9)
    start = EBM(world, [Moment(LENGTH, 2.0)], [0.0])
    exact, _ = solve(world, [lambda t: len(t) - 2.0])
    fitted = start.refit([(proposal, proposal.sample(5000, seed=0))])
    assert within(fitted.lambdas[0], exact[0], fitted.moment_fit.lambdas_stderr[0])


def test_refit_refuses_nothing_and_other_prompts(world):
    target = EBM(world, [Pointwise(HAS_A)])
    with pytest.raises(ValueError, match="at least one"):
        target.refit([])
    own = world.sample(3, seed=0)
    foreign = type(own)(own.tokens, own.mask, own.log_prob, own.texts, ["x", "x", "x"])
    with pytest.raises(ValueError, match=r"the target's prompt is ''.*\['x'\]"):
        target.refit([(world, foreign)])
    # Texts that were cut earlier have another law, though all of them would fit.
    for length in (2, 4):
        shorter = EBM(world, [Pointwise(HAS_A)], max_new_tokens=3)
        with pytest.raises(ValueError, match=rf"at most 3 tokens.*at most \[{length}\]"):
            shorter.refit([(world, world.sample(8, max_new_tokens=length, seed=0))])


def test_the_error_of_a_condition_is_that_of_the_texts_with_it():
    given = feature(lambda text: "a" in text, name="a")
    moment = Moment(feature(len, name="length"), 3.0, given=given)
    lengths, with_a = [3.0, 5.0, 4.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    values = {
        "length": torch.tensor(lengths, dtype=torch.float64),
        "a": torch.tensor(with_a, dtype=torch.float64),
    }
    found = factor.constraint_mean(moment, values)
    assert (found.value, found.n) == (4.0, 3)
    assert found.stderr == pytest.approx(1 / math.sqrt(3))  # spread 1, from three texts
    values["a"] = torch.tensor([1.0] + [0.0] * 5, dtype=torch.float64)
    alone = factor.constraint_mean(moment, values)
    assert (alone.value, alone.n) == (3.0, 1)
    assert math.isnan(alone.stderr)  # one text shows no spread


def test_a_condition_that_no_text_meets_is_refused_for_a_mean_of_0_too(world):
    """No value is seen, which is not a value of 0."""
    never = feature(lambda text: False, name="never")
    signed = feature(lambda text: len(text) - 2.0, name="signed length")
    with pytest.raises(MomentsUnreachable, match="'never' holds for 0 of"):
        EBM.fit(world, [Moment(signed, 0.0, given=never)], n_samples=500, seed=0)
