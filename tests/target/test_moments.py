"""lambda from moments: closed forms, errors over repeats, and every way it can be impossible."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import is_calibrated

from dmgen.target.moments import MomentsUnreachable, fit_lambdas

INF = math.inf
REPEATS = 400
BINARY = np.array([[0.0], [1.0]])


def tilted(phi, log_w, lambdas):
    """Return the probabilities under p and log Z, the plain way."""
    logits = log_w + phi @ lambdas
    p = np.exp(logits - logits.max())
    log_z = logits.max() + math.log(p.sum()) - math.log(np.exp(log_w - log_w.max()).sum())
    return p / p.sum(), log_z - log_w.max()


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize(
    ("rate", "value", "z", "kl"),
    [
        (0.074, 2.52681, 1.8520, 0.64714),
        (0.001, 6.90675, 1.9980, 2.76123),
        (0.0001, 9.21024, 1.9998, 3.91207),
    ],
)
def test_one_binary_feature_at_one_half(rate, value, z, kl):
    fit = fit_lambdas(BINARY, [0.5], np.log([1 - rate, rate]))
    assert fit.lambdas[0] == pytest.approx(value, abs=1e-5)
    assert math.exp(fit.log_z) == pytest.approx(z, abs=5e-5)  # the digits given
    assert fit.kl_target_base == pytest.approx(kl, abs=1e-5)
    # Beyond the digits given: logit(½) - logit(rate), whose slope in the moment is 4.
    assert fit.lambdas[0] == pytest.approx(math.log((1 - rate) / rate), abs=4e-8)
    assert fit.base_moments[0] == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("rate", "target"), [(0.3, 0.9), (0.3, 0.01), (0.5, 1e-7)])
def test_one_binary_feature_at_other_targets(rate, target):
    fit = fit_lambdas(BINARY, [target], np.log([1 - rate, rate]))
    logit = math.log(target / (1 - target)) - math.log(rate / (1 - rate))
    # The moment is met to 1e-8 standard deviations s, and d(lambda) = d(moment) / s².
    assert fit.lambdas[0] == pytest.approx(logit, abs=1e-8 / math.sqrt(target * (1 - target)))
    kl = target * math.log(target / rate) + (1 - target) * math.log((1 - target) / (1 - rate))
    # lambda·target - log Z is least at the solution, so its error is of second order.
    assert fit.kl_target_base == pytest.approx(kl, abs=1e-14)


def test_weights_below_the_smallest_float_are_seen():
    fit = fit_lambdas(BINARY, [0.5], [0.0, -1000.0])
    assert fit.lambdas[0] == pytest.approx(1000.0, abs=1e-6)
    assert fit.log_z == pytest.approx(math.log(2), abs=1e-6)


def mixed(n, seed=0):
    """Return five features of very different scales and the lambda to be found again."""
    g = np.random.default_rng(seed)
    long = 100 + 40 * g.normal(size=(n, 2))
    phi = np.column_stack([g.random(n) < 0.03, g.random(n) < 0.4, long, g.normal(size=n)])
    return phi, np.array([3.0, -0.7, 0.02, -0.01, 0.5])


def test_known_lambdas_of_mixed_features_come_back():
    phi, lambdas = mixed(20_000)
    p, log_z = tilted(phi, np.zeros(20_000), lambdas)
    fit = fit_lambdas(phi, p @ phi)
    assert np.abs(fit.lambdas - lambdas).max() < 1e-6
    assert fit.n_steps < 60
    assert fit.log_z == pytest.approx(log_z, abs=1e-6)
    assert fit.kl_target_base == pytest.approx(lambdas @ (p @ phi) - log_z, abs=1e-6)
    assert fit.ess == pytest.approx(1 / (p @ p), rel=1e-6)


def test_hard_and_soft_feature():
    g = np.random.default_rng(1)
    hard, soft = g.random(5000) < 0.2, g.random(5000) < 0.1
    log_w = np.where(hard, 0.0, -INF)
    fit = fit_lambdas(soft[:, None], [0.5], log_w)
    expected = math.log((hard & ~soft).sum() / (hard & soft).sum())
    assert fit.lambdas[0] == pytest.approx(expected, abs=4e-8)
    assert (fit.n_samples, fit.hits[0]) == (5000, (hard & soft).sum())


def test_samples_without_weight_change_nothing_but_the_count():
    phi, _ = mixed(2000)
    log_w = np.random.default_rng(2).normal(size=2000)
    log_w[::3] = -INF
    keep = np.isfinite(log_w)
    target = phi[keep].mean(0) + 0.3 * phi[keep].std(0)
    whole, part = fit_lambdas(phi, target, log_w), fit_lambdas(phi[keep], target, log_w[keep])
    assert (whole.n_samples, part.n_samples) == (2000, keep.sum())
    for field in ("lambdas", "lambdas_stderr", "moments_stderr", "log_z", "log_z_stderr", "ess"):
        assert np.array_equal(getattr(whole, field), getattr(part, field)), field


def test_merging_equal_rows_is_exact():
    g = np.random.default_rng(3)
    phi = (g.random((3000, 6)) < [0.5, 0.3, 0.1, 0.05, 0.7, 0.2]).astype(float)
    log_w = g.normal(size=3000) * 2
    targets = np.array([0.6, 0.4, 0.3, 0.1, 0.5, 0.2])
    merged, plain = fit_lambdas(phi, targets, log_w), fit_lambdas(2 * phi, 2 * targets, log_w)
    # Both solve to 1e-8 standard deviations; what follows differs by that, or by rounding.
    assert np.allclose(merged.lambdas, 2 * plain.lambdas, atol=1e-6)
    assert np.allclose(merged.lambdas_stderr, 2 * plain.lambdas_stderr, rtol=1e-6)
    assert np.allclose(merged.moments_stderr, plain.moments_stderr / 2, rtol=1e-6)
    assert np.allclose(merged.base_moments_stderr, plain.base_moments_stderr / 2, rtol=1e-12)
    for field in ("log_z", "log_z_stderr", "kl_target_base", "kl_target_base_stderr", "ess"):
        assert getattr(merged, field) == pytest.approx(getattr(plain, field), rel=1e-6), field
    assert np.array_equal(merged.hits, plain.hits)


def test_torch_numpy_and_types_agree():
    g = np.random.default_rng(4)
    phi = g.random((500, 2)) < [0.4, 0.2]
    log_w = g.normal(size=500)
    fits = [
        fit_lambdas(phi, [0.5, 0.5], log_w),
        fit_lambdas(torch.from_numpy(phi), torch.tensor([0.5, 0.5]), torch.from_numpy(log_w)),
        fit_lambdas(phi.astype(np.float32).tolist(), (0.5, 0.5), log_w.tolist()),
    ]
    for fit in fits[1:]:
        assert np.array_equal(fit.lambdas, fits[0].lambdas)
        assert fit.lambdas.dtype == np.float64


def test_binary_fit_of_usual_size_is_exact_in_few_steps():
    phi = np.random.default_rng(5).random((20_000, 4)) < [0.5, 0.1, 0.01, 0.002]
    fit = fit_lambdas(phi, [0.5, 0.5, 0.5, 0.1])
    assert np.abs(fit.moments - [0.5, 0.5, 0.5, 0.1]).max() < 1e-8
    assert fit.n_steps <= 15  # beyond which a linear programme is asked


def test_sixty_features_need_tens_of_steps():
    phi = np.random.default_rng(6).random((4000, 60)) < 0.15
    fit = fit_lambdas(phi, np.full(60, 0.22))
    assert np.abs(fit.moments - 0.22).max() < 1e-8
    assert fit.n_steps <= 15
    # Twice the base rate for all sixty at once is more than any weighting of 4,000 texts gives.
    error = unreachable(
        phi,
        np.full(60, 0.3),
        "and 53 more",
        "(53 smaller terms)",
        names=[f"f{j}" for j in range(60)],
    )
    assert len(str(error)) < 600


def test_a_small_ess_is_reported_and_not_refused():
    phi = np.zeros((1000, 1))
    phi[7] = 1
    fit = fit_lambdas(phi, [0.9])
    assert fit.moments[0] == pytest.approx(0.9, abs=1e-8)
    assert fit.ess == pytest.approx(1 / (0.9**2 + 0.1**2 / 999), rel=1e-6)
    assert fit.hits[0] == 1


def test_no_features_at_all():
    fit = fit_lambdas(np.zeros((10, 0)), [], [0.0] * 5 + [-INF] * 5)
    assert (fit.log_z, fit.kl_target_base, fit.n_steps) == (0.0, 0.0, 0)
    assert fit.ess == pytest.approx(5.0)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("interval", "edge"),
    [
        ((0.2, 0.4), None),
        ((0.4, 0.6), 0.4),
        ((0.1, 0.2), 0.2),
        ((0.4, INF), 0.4),
        ((-INF, 0.1), 0.1),
    ],
)
def test_an_interval_acts_only_where_it_must(interval, edge):
    fit = fit_lambdas(BINARY, [interval], np.log([0.7, 0.3]))
    if edge is None:
        assert fit.lambdas[0] == 0
        assert fit.moments[0] == pytest.approx(0.3, abs=1e-15)
        assert fit.lambdas_stderr[0] == 0
        assert fit.log_z == fit.kl_target_base == 0
    else:
        exact = fit_lambdas(BINARY, [edge], np.log([0.7, 0.3]))
        assert fit.lambdas[0] == pytest.approx(exact.lambdas[0], abs=1e-7)
        assert fit.moments[0] == pytest.approx(edge, abs=1e-8)


def test_a_point_interval_is_a_target():
    phi, _ = mixed(1000)
    target = phi.mean(0) + 0.2 * phi.std(0)
    a, b = fit_lambdas(phi, target), fit_lambdas(phi, np.stack([target, target], 1))
    assert np.array_equal(a.lambdas, b.lambdas)
    assert b.targets.shape == (5, 2)


def test_an_interval_that_another_target_satisfies_lets_go():
    # The second is asked to rise, but raising the first lifts it far enough.
    g = np.random.default_rng(7)
    first = g.random(5000) < 0.2
    second = np.where(first, g.random(5000) < 0.9, g.random(5000) < 0.1)
    phi = np.column_stack([first, second])
    fit = fit_lambdas(phi, [(0.7, 0.7), (0.4, 1.0)])
    assert fit.base_moments[1] < 0.4
    assert fit.lambdas[1] == 0
    assert fit.moments[1] > 0.6
    alone = fit_lambdas(phi[:, :1], [0.7])
    assert fit.lambdas[0] == pytest.approx(alone.lambdas[0], abs=1e-7)


def test_overlapping_intervals_of_one_feature_given_twice():
    phi = (np.arange(1000) < 300).astype(float)[:, None]
    fit = fit_lambdas(np.hstack([phi, phi]), [(0.6, 0.7), (0.65, 0.8)])
    assert fit.moments == pytest.approx([0.65, 0.65], abs=1e-8)
    assert fit.lambdas[0] == 0
    assert fit.lambdas[1] == pytest.approx(fit_lambdas(phi, [0.65]).lambdas[0], abs=1e-7)
    with pytest.raises(MomentsUnreachable, match=r"0\.1 is requested"):
        fit_lambdas(np.hstack([phi, phi]), [(0.6, 0.7), (0.8, 0.9)])


def random_problem(seed):
    """Return features of mixed kinds, weights, and intervals around moments within the hull."""
    g = np.random.default_rng(seed)
    n, k = int(g.integers(20, 200)), int(g.integers(1, 6))
    binary = g.random((n, k)) < g.random(k)
    real = g.normal(size=(n, k)) * 10 ** g.uniform(-3, 3, k) + 10 ** g.uniform(-2, 3, k)
    phi = np.where(g.random(k) < 0.5, binary, real)
    if k > 2 and g.random() < 0.3:
        phi[:, 2] = phi[:, 0] + phi[:, 1]
    centre = g.dirichlet(np.ones(n)) @ phi
    width = g.random((k, 2)) * phi.std(0)[:, None] * (g.random((k, 1)) < 0.6)
    targets = np.column_stack([centre - width[:, 0], centre + width[:, 1]])
    return phi, g.normal(size=n) * 10 ** g.uniform(-2, 1.5), targets


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_reachable_intervals_end_in_the_kkt_conditions(seed):
    phi, log_w, targets = random_problem(seed)
    fit = fit_lambdas(phi, targets, log_w)
    p, _ = tilted(phi, log_w, fit.lambdas)
    mean = p @ phi
    # tol (1e-8 standard deviations under p), and rounding of large values.
    slack = 2e-8 * np.sqrt(p @ (phi - mean) ** 2) + 1e-12 * np.abs(phi).max(0)
    low, high = targets.T
    off = np.where(fit.lambdas > 0, np.abs(mean - low), np.abs(mean - high))
    off = np.where(fit.lambdas == 0, np.maximum(low - mean, mean - high), off)
    assert (off <= slack).all()


# ---------------------------------------------------------------- collinear features


def test_collinear_features_that_agree_are_fitted():
    g = np.random.default_rng(8)
    a, b = g.random((2, 4000)) < [[0.3], [0.1]]
    phi = np.column_stack([a, ~a, b, a, 3 + 2.0 * b])
    fit = fit_lambdas(phi, [0.6, 0.4, 0.2, 0.6, 3.4])
    plain = fit_lambdas(phi[:, [0, 2]], [0.6, 0.2])
    assert (fit.rank, plain.rank) == (2, 2)
    assert fit.moments == pytest.approx([0.6, 0.4, 0.2, 0.6, 3.4], abs=1e-7)
    # Only lambda·phi is determined, up to a constant.
    exponent = phi @ fit.lambdas - phi[:, [0, 2]] @ plain.lambdas
    assert np.ptp(exponent) < 1e-6
    assert fit.kl_target_base == pytest.approx(plain.kl_target_base, abs=1e-7)
    assert fit.ess == pytest.approx(plain.ess, rel=1e-6)
    assert np.isfinite(fit.lambdas_stderr).all()


def test_equal_features_share_lambda():
    phi = (np.arange(1000) < 300).astype(float)[:, None]
    fit = fit_lambdas(np.hstack([phi, phi]), [0.5, 0.5])
    alone = fit_lambdas(phi, [0.5])
    assert fit.lambdas == pytest.approx(np.full(2, alone.lambdas[0] / 2), abs=1e-7)


def test_a_constant_feature_at_its_value_is_no_obstacle():
    phi = np.column_stack([np.full(100, 3.0), np.arange(100) < 40])
    fit = fit_lambdas(phi, [3.0, 0.5])
    assert fit.lambdas[0] == 0
    assert fit.rank == 1


# ---------------------------------------------------------------- out of reach


def unreachable(phi, targets, *patterns, log_w=None, names=("female", "male"), **options):
    """Return the error after checking its message and, where there is one, its certificate."""
    phi = np.asarray(phi, dtype=float)
    with pytest.raises(MomentsUnreachable) as caught:
        fit_lambdas(phi, targets, log_w, names=names[: phi.shape[1]], **options)
    error, message = caught.value, str(caught.value)
    for pattern in patterns:
        assert pattern in message
    proof = error.certificate
    if proof is not None:
        t = np.asarray(targets, dtype=float)
        low, high = (t, t) if t.ndim == 1 else t.T
        v = proof.direction
        used = v != 0
        asked = v[used] @ np.where(v > 0, low, high)[used]
        reach = phi @ v
        assert asked >= reach.max() - 1e-9
        assert (asked <= reach.max() + 1e-9) == proof.on_edge
        assert proof.asked == pytest.approx(asked, abs=1e-9)
        assert proof.largest_seen == pytest.approx(reach.max(), abs=1e-9)
        assert proof.n_at_largest == (reach > reach.max() - 1e-9).sum()
    return error


HALF = (np.arange(1000) < 300).astype(float)[:, None]


def test_a_target_outside_the_range():
    unreachable(HALF, [1.2], "'female'", "1.2", "1,000 samples", "0 to 1", "300", "Draw more")
    unreachable(HALF * 2 - 5, [-6.0], "'female'", "-6", "-5 to -3", "700")
    unreachable(HALF, [(1.1, 1.3)], "1.1 to 1.3")
    unreachable(HALF, [(-INF, -0.1)], "-inf to -0.1")


def test_a_target_on_the_edge_of_its_range():
    for target, count in ((1.0, "300"), (0.0, "700"), ((1.0, 2.0), "300")):
        error = unreachable(
            HALF, [target], "from 0 to 1", "on the edge", "infinite lambda", count, "Pointwise"
        )
        assert error.certificate.on_edge


def test_a_feature_that_was_never_seen():
    error = unreachable(HALF * 0, [0.5], "'female'", "never seen", "1,000 samples", "proposal")
    assert not error.certificate.on_edge
    unreachable(HALF * 0 + 3, [0.5], "is 3 in all 1,000")
    # Seen, but only where a pointwise constraint is violated.
    log_w = np.where(HALF[:, 0] == 1, -INF, 0.0)
    with pytest.raises(MomentsUnreachable, match="never seen: it is 0 in all 700 samples"):
        fit_lambdas(HALF, [0.5], log_w)


def test_no_sample_has_weight():
    error = unreachable(HALF, [0.5], "none of the 1,000 samples", log_w=np.full(1000, -INF))
    assert error.fit is None
    assert error.certificate is None


def test_duplicates_that_contradict():
    error = unreachable(
        np.hstack([HALF, HALF]), [0.7, 0.6], "'female' - 'male' is always 0", "0.1 is requested"
    )
    assert error.fit is not None


def test_complementary_features_that_contradict():
    both = np.hstack([HALF, 1 - HALF])
    error = unreachable(
        both, [0.7, 0.7], "'female' + 'male' is always 1", "1.4 is requested", "1,000"
    )
    # The best attempt violates both alike.
    assert error.fit.moments == pytest.approx([0.5, 0.5], abs=1e-7)
    unreachable(both, [(0.7, 1.0), (0.6, 0.9)], "1.3 is requested")
    fit_lambdas(both, [(0.7, 1.0), (0.3, 0.9)])


def test_exclusive_features_that_leave_no_room():
    rows = np.repeat([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [200, 300, 500], axis=0)
    unreachable(rows, [0.6, 0.6], "'female' + 'male' is at most 1", "(500 reach it)", "1.2 is")
    error = unreachable(rows, [0.6, 0.4], "'female' + 'male'", "exactly that", "only the 500")
    assert error.certificate.on_edge
    assert error.fit.lambdas.min() > 3  # the best attempt is on its way to infinity
    assert fit_lambdas(rows, [0.6, 0.4 - 1e-6]).moments.sum() == pytest.approx(1 - 1e-6, abs=1e-8)


def test_a_part_of_another_feature_cannot_outnumber_it():
    part = HALF * (np.arange(1000)[:, None] % 3 == 0)
    rows = np.hstack([HALF, part])
    unreachable(rows, [0.3, 0.4], "- 'female' + 'male' is at most 0", "0.1 is requested")
    unreachable(rows, [0.3, 0.3], "exactly that")
    unreachable(rows, [(0.1, 0.3), (0.35, INF)], "0.05 is requested")


def test_a_far_corner_of_many_samples():
    g = np.random.default_rng(9)
    phi = g.normal(size=(100_000, 3))
    error = unreachable(phi, [3.0, 3.0, 3.0], "100,000 samples", names=("a", "b", "c"))
    assert error.certificate.largest_seen < error.certificate.asked


def test_steps_run_out():
    phi, _ = mixed(1000)
    error = unreachable(
        phi, phi.mean(0) + 0.5 * phi.std(0), "in 2 steps", "max_steps", names="abcde", max_steps=2
    )
    assert error.fit.n_steps == 2
    assert error.certificate is None


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_refusal_carries_a_valid_proof(seed):
    g = np.random.default_rng(seed)
    phi, log_w, _ = random_problem(seed)
    targets = phi.mean(0) + g.normal(size=phi.shape[1]) * phi.std(0)
    try:
        fit = fit_lambdas(phi, targets, log_w)
    except MomentsUnreachable as error:
        v = error.certificate.direction
        # LP and rounding tolerance, in half-ranges of the features.
        slack = 1e-8 * np.ptp(phi, axis=0) @ np.abs(v) + 1e-12 * np.abs(phi).max(0) @ np.abs(v)
        assert v @ targets >= (phi @ v).max() - slack
    else:
        assert np.allclose(fit.moments, targets, rtol=1e-7, atol=1e-7 * phi.std(0).max())


# ---------------------------------------------------------------- errors of the fit


def small_world():
    """Return 16 states: features, log a, log q (another proposal), lambda and exact answers."""
    g = np.random.default_rng(10)
    phi = np.column_stack([g.random(16) < 0.4, g.random(16) < 0.3, 5 + 2 * g.normal(size=16)])
    log_a = np.log(g.dirichlet(np.full(16, 3.0)))
    log_q = np.log(g.dirichlet(np.full(16, 5.0)))
    lambdas = np.array([0.9, -0.6, 0.3])
    p, log_z = tilted(phi, log_a, lambdas)
    return phi, log_a, log_q, lambdas, p, log_z


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_calibrated(weighted):
    phi, log_a, log_q, lambdas, p, log_z = small_world()
    if weighted:  # a pointwise constraint, and samples of another proposal
        log_a[[2, 5]] = -INF
        p, log_z = tilted(phi, log_a, lambdas)
    drawn = np.exp(log_q if weighted else log_a)
    target = p @ phi
    kl = lambdas @ target - log_z
    z = {name: [] for name in ("lambdas", "moments", "base", "log_z", "kl", "heldout", "fresh")}
    g = np.random.default_rng(11)
    base = np.exp(log_a) @ phi / np.exp(log_a).sum()
    for _ in range(REPEATS):
        x, y = (g.choice(16, 3000, p=drawn / drawn.sum()) for _ in range(2))
        weights = (log_a - log_q)[x] if weighted else None
        fit = fit_lambdas(phi[x], target, weights)
        fit = fit.with_heldout(phi[y], (log_a - log_q)[y] if weighted else None)
        assert fit.ess > 200
        true_moments = tilted(phi, log_a, fit.lambdas)[0] @ phi
        z["lambdas"].append((fit.lambdas - lambdas) / fit.lambdas_stderr)
        z["moments"].append((true_moments - fit.moments) / fit.moments_stderr)
        z["base"].append((fit.base_moments - base) / fit.base_moments_stderr)
        z["log_z"].append((fit.log_z - log_z) / fit.log_z_stderr)
        z["kl"].append((fit.kl_target_base - kl) / fit.kl_target_base_stderr)
        z["heldout"].append((fit.moments_heldout - true_moments) / fit.moments_heldout_stderr)
        both = np.hypot(fit.moments_stderr, fit.moments_heldout_stderr)
        z["fresh"].append((fit.moments_heldout - target) / both)
    for name, scores in z.items():
        scores = np.reshape(scores, (REPEATS, -1))
        for column in scores.T:
            assert is_calibrated(column), name
            assert not is_calibrated(1.3 * column), name


def test_errors_of_intervals_are_calibrated():
    phi, log_a, _, lambdas, _, _ = small_world()
    lambdas = lambdas * [1, 0, 0]
    p, log_z = tilted(phi, log_a, lambdas)
    mean = p @ phi
    targets = [(mean[0], INF), (mean[1] - 0.2, mean[1] + 0.2), (mean[2] - 1, mean[2] + 1)]
    z = []
    g = np.random.default_rng(12)
    for _ in range(REPEATS):
        fit = fit_lambdas(phi[g.choice(16, 3000, p=np.exp(log_a))], targets)
        assert np.array_equal(fit.lambdas[1:], [0, 0])
        true = tilted(phi, log_a, fit.lambdas)[0] @ phi
        z.append(
            [
                (fit.lambdas[0] - lambdas[0]) / fit.lambdas_stderr[0],
                (fit.log_z - log_z) / fit.log_z_stderr,
                *((true - fit.moments) / fit.moments_stderr),
            ]
        )
    for column in np.array(z).T:
        assert is_calibrated(column)


def test_samples_for_a_wanted_error():
    phi, log_a, *_, p, _ = small_world()
    g = np.random.default_rng(13)
    fit = fit_lambdas(phi[g.choice(16, 2000, p=np.exp(log_a))], p @ phi)
    n = int(fit.n_samples_for(0.02).max())
    assert n == math.ceil(2000 * (fit.lambdas_stderr.max() / 0.02) ** 2)
    again = fit_lambdas(phi[g.choice(16, n, p=np.exp(log_a))], p @ phi)
    # The error of an error from 2,000 samples is a few percent.
    assert again.lambdas_stderr.max() == pytest.approx(0.02, rel=0.15)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="stderr must be positive"):
            fit.n_samples_for(bad)
    alone = fit_lambdas([[0.5]], [0.5])
    with pytest.raises(ValueError, match="no finite error"):
        alone.n_samples_for(0.02)


# ---------------------------------------------------------------- what is shown, what is refused


def test_the_table():
    fit = fit_lambdas(HALF, [0.5], names=["female"])
    text = str(fit)
    head, row, foot = text.splitlines()
    assert head.split("  ")[0] == "feature"
    assert row.startswith("female")
    for part in ("0.300 ± 0.014", "0.5", "0.847 ± 0.069", "0.500 ± 0.017", "300"):
        assert part in row
    for part in ("ESS 840 of 1,000", "log Z", "KL(p‖a)", "rank 1 of 1", "steps"):
        assert part in foot
    assert "held out" not in text
    assert "held out" in str(fit.with_heldout(HALF))
    assert "0.4 to inf" in str(fit_lambdas(HALF, [(0.4, INF)]))
    assert "0.4 to 0.4" not in str(fit_lambdas(HALF, [(0.4, 0.4)]))
    # Columns line up.
    assert head.index("hits") == row.rindex("300")


def test_results_are_frozen():
    fit = fit_lambdas(HALF, [0.5])
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.ess = 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(3), [0.5]), "features must have shape"),
        ((np.zeros((0, 1)), [0.5]), "features must have shape"),
        ((np.array([[0.0], [math.nan]]), [0.5]), r"features\[1, 0\] is nan"),
        ((np.array([[0.0, INF], [0.0, 1.0]]), [0.5, 0.5]), r"features\[0, 1\] is inf"),
        ((HALF, [0.5, 0.5]), r"moments must be \(1,\) or \(1, 2\)"),
        ((HALF, [math.nan]), "moments must be"),
        ((HALF, [(0.6, 0.4)]), "low <= high"),
        ((HALF, [INF]), "low <= high"),
        ((HALF, [0.5], np.zeros(3)), r"log_weights must have shape \(1000,\)"),
        ((HALF[:2], [0.5], [0.0, math.nan]), r"log_weights\[1\] is nan"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit_lambdas(*arguments)
    assert not isinstance(caught.value, MomentsUnreachable)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="names must have 1"):
        fit_lambdas(HALF, [0.5], names=["a", "b"])
    with pytest.raises(ValueError, match="tol must be"):
        fit_lambdas(HALF, [0.5], tol=0.0)
    with pytest.raises(ValueError, match="max_steps"):
        fit_lambdas(HALF, [0.5], max_steps=0)
    with pytest.raises(ValueError, match="features must have 1 columns"):
        fit_lambdas(HALF, [0.5]).with_heldout(np.zeros((5, 2)))


def test_the_planned_size_gives_the_planned_error():
    """Closed form: one binary feature of rate r has Var λ = 1/(n r (1 − r))."""
    rate, wanted = 0.1, 0.05
    phi = (np.arange(1000) < 100)[:, None].astype(float)
    fit = fit_lambdas(phi, [0.5])
    (needed,) = fit.n_samples_for(wanted)
    assert needed == pytest.approx(1 / (wanted**2 * rate * (1 - rate)), rel=2e-3)  # n against n − 1
