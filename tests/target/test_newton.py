"""The numerics below `moments`: merged rows, rank, and the linear programme on few rows."""

import numpy as np
import pytest
from scipy.optimize import linprog

from dmgen.target.dual import Problem, Rows, scatter, varying
from dmgen.target.newton import minimise
from dmgen.target.reachability import separating_direction

INF = np.inf


def test_merged_rows_keep_every_sum():
    g = np.random.default_rng(0)
    phi = (g.random((500, 3)) < 0.4).astype(float)
    log_w = g.normal(size=500) * 3
    log_w[::7] = -INF
    rows = Rows.of(phi, log_w)
    keep = np.isfinite(log_w)
    assert rows.n == keep.sum()
    assert rows.counts.sum() == rows.n
    assert len(rows.phi) == len(np.unique(phi[keep], axis=0))
    for row, total, share, count in zip(
        rows.phi, rows.log_w, rows.concentration, rows.counts, strict=True
    ):
        w = np.exp(log_w[keep & (phi == row).all(1)])
        assert count == len(w)
        assert total == pytest.approx(np.log(w.sum()), rel=1e-13)
        assert share == pytest.approx((w**2).sum() / w.sum() ** 2, rel=1e-12)


@pytest.mark.parametrize("k", [1, 8, 9, 16, 17, 52])
def test_rows_are_merged_for_every_width_of_the_code(k):
    g = np.random.default_rng(k)
    patterns = np.unique((g.random((6, k)) < 0.5).astype(float), axis=0)
    picks = g.integers(len(patterns), size=200)
    rows = Rows.of(patterns[picks], np.zeros(200))
    order = np.lexsort(rows.phi.T[::-1])
    assert np.array_equal(rows.phi[order], patterns)
    assert np.array_equal(rows.counts[order], np.bincount(picks))


def test_other_features_are_left_alone():
    phi = np.array([[0.0, 2.0], [0.0, 2.0]])
    assert len(Rows.of(phi, np.zeros(2)).phi) == 2


def test_scatter_in_blocks_is_the_weighted_covariance():
    g = np.random.default_rng(1)
    phi, p = g.normal(size=(30_000, 3)), g.dirichlet(np.ones(30_000))  # more than one block
    centre = p @ phi
    expected = np.cov(phi.T, aweights=p, bias=True)
    assert np.allclose(scatter(phi, centre, p), expected, rtol=1e-12, atol=1e-15)


def test_rounding_is_not_variation():
    least, most = np.array([0.3, 0.0, 1e9]), np.array([0.3 + 1e-16, 1e-16, 1e9 + 1])
    assert varying(least, most).tolist() == [False, True, True]


def test_rank_counts_independent_features():
    g = np.random.default_rng(2)
    a, b = g.normal(size=(2, 1000))
    phi = np.column_stack([a, 1000 + 40 * b, a - b, np.full(1000, 3.0)])
    problem = Problem(Rows.of(phi, np.zeros(1000)), np.zeros(4), np.zeros(4))
    assert problem.rank == 2
    # One row in a million is enough to tell two features apart.
    near = np.zeros((1_000_000, 2))
    near[::2] = 1
    near[0, 0] = 0
    # Tripled: not binary, so the rows are not merged.
    assert Problem(Rows.of(3 * near, np.zeros(1_000_000)), *np.zeros((2, 2))).rank == 2


@pytest.mark.parametrize("seed", range(8))
def test_the_programme_on_few_rows_is_the_one_on_all(seed):
    g = np.random.default_rng(seed)
    k = 1 + seed % 4
    phi = g.normal(size=(400, k))
    target = g.normal(size=k) * 2.5
    problem = Problem(Rows.of(phi, np.zeros(400)), target, target)
    x = (phi - problem.centre) / problem.scale
    t = problem.low
    # maximise t·v - z over v = v⁺ - v⁻ with |v|₁ <= 1 and v·x <= z for all rows
    solved = linprog(
        np.concatenate([-t, t, [1.0]]),
        A_ub=np.vstack(
            [np.hstack([x, -x, -np.ones((400, 1))]), np.concatenate([np.ones(2 * k), [0.0]])]
        ),
        b_ub=np.concatenate([np.zeros(400), [1.0]]),
        bounds=[(0, None)] * (2 * k) + [(None, None)],
    )
    proof = separating_direction(problem)
    if solved.fun > -1e-7:
        assert proof is None
        return
    assert not proof.on_edge
    v = proof.direction * problem.scale
    margin = (proof.asked - proof.largest_seen) / np.abs(v).sum()
    assert margin == pytest.approx(-solved.fun, rel=1e-7)


def test_both_outcomes_of_the_programme_were_tested():
    found = []
    for seed in range(8):
        g = np.random.default_rng(seed)
        k = 1 + seed % 4
        phi = g.normal(size=(400, k))
        target = g.normal(size=k) * 2.5
        found.append(separating_direction(Problem(Rows.of(phi, np.zeros(400)), target, target)))
    assert 0 < sum(proof is None for proof in found) < 8


def test_an_edge_is_not_passed_off_as_reached():
    # With a loose tolerance the moments match to 1e-3 long before lambda shows where it goes.
    phi = np.repeat([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [20, 30, 50], axis=0)
    target = np.array([0.6, 0.4])
    problem = Problem(Rows.of(phi, np.zeros(100)), target, target)
    _, _, reached, proof = minimise(problem, tol=1e-1, max_steps=200)
    assert not reached
    assert proof.on_edge
    inside = Problem(problem.rows, target - 1e-4, target - 1e-4)
    assert minimise(inside, tol=1e-8, max_steps=200)[2]
