"""The running log Z: equal to the plain mean, right in law, and its error calibrated."""

import math

import numpy as np
import pytest
import torch
from laws import is_calibrated

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.estimates import weights as log_weights
from dmgen.estimates.running_z import RunningZ
from dmgen.estimates.score import Score
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM

HAS_A = feature(lambda text: "a" in text, name="a")
LENGTH = feature(len, name="length")


def test_a_pool_is_the_plain_mean_of_all_weights():
    log_w = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_w[::7] = -math.inf
    pool = RunningZ()
    for part in log_w.split(13):
        pool = pool.add(part)
    value, stderr = log_weights.log_z(log_w)
    assert (pool.n, pool.n_hits) == (100, int((log_w > -math.inf).sum()))
    assert pool.log_z == pytest.approx(value, abs=1e-12)
    assert pool.stderr == pytest.approx(stderr, rel=1e-9)


def test_weights_far_outside_the_range_of_exp_are_no_trouble():
    log_w = torch.tensor([-2000.0, -2001.0, -math.inf], dtype=torch.float64)
    pool = RunningZ().add(log_w)
    assert pool.log_z == pytest.approx(-2000 + math.log((1 + math.exp(-1)) / 3), abs=1e-12)
    assert pool.stderr == pytest.approx(log_weights.log_z(log_w)[1], rel=1e-9)
    pool = pool.add(torch.tensor([2000.0], dtype=torch.float64))
    assert pool.log_z == pytest.approx(2000 - math.log(4), abs=1e-9)


def test_without_a_hit_z_is_zero_and_nothing_is_known():
    empty = RunningZ()
    assert (empty.log_z, empty.stderr, empty.n_hits) == (-math.inf, math.inf, 0)
    pool = empty.add(torch.full((50,), -math.inf, dtype=torch.float64))
    assert (pool.n, pool.n_hits, pool.log_z, pool.stderr) == (50, 0, -math.inf, math.inf)
    pool = pool.add(torch.zeros(50, dtype=torch.float64))
    assert pool.log_z == pytest.approx(math.log(0.5), abs=1e-12)


def test_equal_weights_have_no_error():
    assert (
        RunningZ().add(torch.full((9,), 0.3, dtype=torch.float64)).stderr < 1e-7
    )  # rounding of 1-1


def test_one_weight_has_no_known_error():
    assert RunningZ().add(torch.zeros(1, dtype=torch.float64)).stderr == math.inf


def test_adding_leaves_the_old_pool_as_it_was():
    pool = RunningZ().add(torch.zeros(3, dtype=torch.float64))
    pool.add(torch.ones(3, dtype=torch.float64))
    assert (pool.n, pool.log_z) == (3, 0.0)


# ---------------------------------------------------------------- from_score


def test_from_score_goes_on_where_the_estimate_ended():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 400, generator=generator, dtype=torch.float64).unbind()
    score = Score(*log_weights.log_z(first), n=400)
    pool = RunningZ.from_score(score)
    assert (pool.n, pool.log_z) == (400, pytest.approx(score.value, abs=1e-12))
    assert pool.stderr == pytest.approx(score.stderr, rel=1e-9)
    both = pool.add(second)
    value, stderr = log_weights.log_z(torch.cat([first, second]))
    assert both.log_z == pytest.approx(value, abs=1e-12)
    assert both.stderr == pytest.approx(stderr, rel=1e-9)


@pytest.mark.parametrize(
    "score",
    [None, Score(-math.inf, math.inf, 100), Score(math.nan, math.nan, 5), Score(0.5, 0.0, 0)],
)
def test_from_nothing_usable_comes_an_empty_pool(score):
    assert RunningZ.from_score(score) == RunningZ()


def test_from_a_single_weight():
    pool = RunningZ.from_score(Score(*log_weights.log_z(torch.tensor([0.7])), n=1))
    pool = pool.add(torch.tensor([0.1, -0.4], dtype=torch.float64))
    value, stderr = log_weights.log_z(torch.tensor([0.7, 0.1, -0.4]))
    assert (pool.log_z, pool.stderr) == (pytest.approx(value), pytest.approx(stderr))


# ---------------------------------------------------------------- law


def z_scores(target, proposals, n_repeats=400):
    """(log Ẑ − log Z) / stderr, over repeats, of pools of texts from all proposals.

    Texts are drawn from the exact law of each proposal, as positions in the list of all.
    """
    exact = target.exact()
    rng = np.random.default_rng(0)
    laws = []
    for proposal, n in proposals:
        log_q = proposal.log_prob(exact.samples)
        q = log_q.exp().numpy()
        laws.append((exact.log_prob + exact.log_z - log_q, q / q.sum(), n))
    z = []
    for _ in range(n_repeats):
        pool = RunningZ()
        for log_w, q, n in laws:
            pool = pool.add(log_w[rng.choice(len(q), n, p=q)])
        z.append((pool.log_z - exact.log_z) / pool.stderr)
    return torch.tensor(z)


@pytest.mark.parametrize(
    "constraints",
    [[Pointwise(HAS_A)], [Moment(LENGTH, 2.0)], [Pointwise(HAS_A), Moment(LENGTH, 2.0)]],
)
def test_z_of_several_proposals_is_exact_in_law_and_calibrated(world, constraints):
    lambdas = [0.4] * sum(isinstance(c, Moment) for c in constraints)
    target = EBM(world, constraints, lambdas)
    near = TabularLM.random("abc.", 4, eos=".", scale=1.0, seed=0)
    with torch.no_grad():
        near.logits[0] += torch.tensor([1.0, 0.0, 0.3, -0.5])
    z = z_scores(target, [(world, 600), (near, 300)])
    assert is_calibrated(z)


def test_weights_of_the_wrong_proposal_are_seen_by_that_very_check(world):
    """The power of the test above: weights taken against the base for texts of another model."""
    target = EBM(world, [Pointwise(HAS_A)])
    other = world.copy()
    with torch.no_grad():
        other.logits[0, 0] += 0.5
    log_z = target.exact().log_z
    z = []
    for seed in range(50):
        samples = other.sample(900, seed=seed)
        pool = RunningZ().add(target.log_score(samples) - world.log_prob(samples))
        z.append((pool.log_z - log_z) / pool.stderr)
    assert abs(torch.tensor(z).mean()) > 5 / math.sqrt(len(z))
