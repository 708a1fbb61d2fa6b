"""Monte Carlo samplers against the exact law of what they return, and against wrong laws."""

import math
from contextlib import suppress
from itertools import pairwise

import contracts
import pytest
import torch
from contracts import LEVEL, chi_square_p

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import FeatureError, feature
from dmgen.models import LanguageModel, Samples, TabularLM
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.mcmc import MetropolisHastings, _walk
from dmgen.monte_carlo.quasi_rejection import QuasiRejection
from dmgen.monte_carlo.rejection import Rejection
from dmgen.monte_carlo.resampling import ImportanceResampling, _resample
from dmgen.target.ebm import EBM

INF = math.inf
HAS_A = feature(lambda text: "a" in text, name="a")
STARTS_B = feature(lambda text: text.startswith("b"), name="b first")
LENGTH = feature(len, name="length")
NEVER = feature(lambda text: False, name="never")
N = 6000


@pytest.fixture
def world():
    """15 texts over "ab" of at most 3 tokens that end with ".": each is seen often."""
    return TabularLM.random("ab.", 3, eos=".", scale=1.0, seed=0)


@pytest.fixture
def target(world):
    """Hard and soft: every text has an "a", and texts that begin with "b" are favoured."""
    return EBM(world, [Pointwise(HAS_A), Moment(STARTS_B, 0.6)], [1.2])


@pytest.fixture
def proposal():
    """Another law over the same texts: p/q is at most 8.9, and most of its texts are forbidden."""
    return TabularLM.random("ab.", 3, eos=".", scale=0.7, seed=8)


def weights(target, proposal):
    """log q and log P − log q of every text."""
    exact = target.exact()
    log_q = proposal.log_prob(exact.samples)
    return log_q, exact.log_prob + exact.log_z - log_q


def law(log_q, log_r):
    """log of q·r, normalised."""
    return (log_q + log_r).log_softmax(0)


def follows(samples, target, log_prob):
    """Whether the texts follow a law; one of probability 0 is no chance event."""
    space = target.exact().samples
    index = {text: i for i, text in enumerate(space.texts)}
    if any(log_prob[index[text]] == -INF for text in set(samples.texts)):
        return False
    return chi_square_p(samples, space, log_prob) > LEVEL


class Counting(TabularLM):
    """Knows how many texts it drew and scored."""

    n_drawn = n_scored = 0

    def sample(self, n, **options):
        self.n_drawn += n
        return super().sample(n, **options)

    def log_prob(self, samples, **options):
        self.n_scored += len(samples)
        return super().log_prob(samples, **options)


def counting(model):
    return Counting(model.vocab, model.logits, model.max_new_tokens, eos=model.eos)


SAMPLERS = {
    "quasi": lambda target, proposal, **o: QuasiRejection(target, proposal, 0.5, **o),
    "rejection": Rejection,
    "resampling": lambda target, proposal, **o: ImportanceResampling(
        target, proposal, n_pool=50, **o
    ),
    "chains": lambda target, proposal, **o: MetropolisHastings(
        target, proposal, n_chains=4, burn_in=5, thin=2, **o
    ),
}


# ---------------------------------------------------------------- quasi-rejection: law


@pytest.mark.parametrize("scale", [1e-9, 0.3, 1.0, 1.7])
def test_quasi_rejection_follows_p_beta(target, proposal, scale):
    """From q restricted to the texts with P > 0 up to p itself."""
    log_q, log_w = weights(target, proposal)
    top = float(log_w.max())
    sampler = QuasiRejection(target, proposal, scale * math.exp(top))
    samples = sampler.sample(N, seed=1)
    assert len(samples) == N
    p_beta = law(log_q, acceptance.log_acceptance(log_w, top + math.log(scale)))
    assert follows(samples, target, p_beta)
    restricted = law(log_q, torch.where(log_w > -INF, 0.0, -INF))
    p = target.exact().log_prob
    torch.testing.assert_close(samples.log_prob, proposal.log_prob(samples), rtol=0, atol=1e-12)
    # The power of this test: the laws at both ends are told apart, and from that in between.
    assert follows(samples, target, restricted) == (scale == 1e-9)
    assert follows(samples, target, p) == (scale >= 1)


def test_quasi_rejection_from_the_base_is_exact_where_the_factor_is_bounded(world):
    """P/a is at most e^λ: β = e^λ gives p, and the base is not scored for its own texts."""
    base = counting(world)
    target = EBM(base, [Moment(STARTS_B, 0.6)], [1.2])
    samples = QuasiRejection(target, base, math.exp(1.2)).sample(N, seed=2)
    assert base.n_scored == 0
    assert follows(samples, target, target.exact().log_prob)
    assert not follows(samples, target, target.exact().log_base)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_an_acceptance_rate_is_reached_and_judged_on_other_texts(target, proposal, rate):
    log_q, log_w = weights(target, proposal)
    z = []
    for seed in range(200):
        sampler = QuasiRejection(
            target, proposal, acceptance_rate=rate, n_estimation=400, seed=seed
        )
        log_r = acceptance.log_acceptance(log_w, sampler.log_beta)
        exact = acceptance.acceptance_rate(log_r, log_q.exp()).value
        found = sampler.diagnostics()["acceptance_rate"]
        # On the texts that β was chosen on it would be the rate asked for, whatever is true.
        assert found.value != pytest.approx(rate, abs=1e-9)
        z.append((found.value - exact) / found.stderr)
    assert standard(z)


def test_beta_is_chosen_on_texts_of_the_proposal(target, proposal):
    drawn = counting(proposal)
    sampler = QuasiRejection(target, drawn, acceptance_rate=0.2, n_estimation=3000, seed=4)
    assert (drawn.n_drawn, sampler.n_drawn) == (3000, 3000)
    log_q, log_w = weights(target, proposal)
    log_r = acceptance.log_acceptance(log_w, sampler.log_beta)
    exact = acceptance.acceptance_rate(log_r, log_q.exp()).value
    # The rate at a β with that rate on 3000 texts: the error is at most that of a Bernoulli.
    assert abs(exact - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 3000)
    assert sampler.beta == pytest.approx(math.exp(sampler.log_beta))


def standard(z):
    """Mean 0 and spread 1, up to five of their own standard errors."""
    z = torch.tensor(z)
    return abs(z.mean()) < 5 / math.sqrt(len(z)) and abs(z.std() - 1) < 5 / math.sqrt(2 * len(z))


@pytest.mark.parametrize("beta", [0.4, 2.0])
def test_diagnostics_agree_with_the_sums_over_all_texts(target, proposal, beta):
    log_q, log_w = weights(target, proposal)
    log_beta, q = math.log(beta), log_q.exp()
    log_r = acceptance.log_acceptance(log_w, log_beta)
    exact = {
        "acceptance_rate": acceptance.acceptance_rate(log_r, q),
        "tv": acceptance.tv(log_w, log_r, q),
        "tv_bound": acceptance.tv_bound(log_w, log_beta, q),
        "kl": acceptance.kl(log_w, log_r, q),
        "beta_normalised": beta / math.exp(target.exact().log_z),
    }
    z = {name: [] for name in exact}
    for seed in range(60):
        sampler = QuasiRejection(target, proposal, beta, n_estimation=2000, seed=seed)
        found = sampler.diagnostics()
        assert found.keys() == exact.keys()
        for name, score in found.items():
            z[name].append((score.value - float(exact[name])) / score.stderr)
        assert all(score.n == 2000 for score in found.values())
    assert {name for name, values in z.items() if not standard(values)} == set()
    # The power of this check: the distance at a β larger by a quarter is refused.
    wrong = acceptance.tv(log_w, acceptance.log_acceptance(log_w, log_beta + 0.25), q).value
    shift = (exact["tv"].value - wrong) / found["tv"].stderr
    assert not standard([value + shift for value in z["tv"]])


def test_diagnostics_are_drawn_once(target, proposal):
    sampler = QuasiRejection(target, proposal, 0.5, n_estimation=100)
    assert sampler.diagnostics() == sampler.diagnostics()
    assert sampler.n_drawn == 100


def test_beta_normalised_does_not_depend_on_the_unit_of_p(world, proposal):
    """A λ on a feature that is always 1 changes P by a factor and p not at all."""
    always = feature(lambda text: True, name="always")
    found = []
    for unit in (0.0, 3.0, -800.0, 800.0):
        target = EBM(world, [Moment(STARTS_B, 0.6), Moment(always, (0.5, 2.0))], [1.2, unit])
        sampler = QuasiRejection(target, proposal, acceptance_rate=0.3, n_estimation=500, seed=5)
        found.append((sampler.log_beta - unit, sampler.diagnostics(), sampler.sample(20, seed=1)))
    assert sampler.beta == INF
    for log_beta, scores, samples in found[1:]:
        assert log_beta == pytest.approx(found[0][0], abs=1e-9)
        assert samples.texts == found[0][2].texts
        for name, score in scores.items():
            assert score.value == pytest.approx(found[0][1][name].value, abs=1e-9)


# ---------------------------------------------------------------- rejection


def test_rejection_follows_the_proposal_where_the_hard_constraints_hold(target, proposal):
    samples = Rejection(target, proposal).sample(N, seed=1)
    texts = target.exact().samples.texts
    allowed = torch.tensor([0.0 if "a" in text else -INF for text in texts])
    log_q = proposal.log_prob(target.exact().samples)
    assert follows(samples, target, law(log_q, allowed))
    assert not follows(samples, target, target.exact().log_prob)
    assert not follows(samples, target, log_q)


def test_rejection_from_the_base_is_exact_without_soft_moments(world):
    base = counting(world)
    target = EBM(base, [Pointwise(HAS_A), Moment(STARTS_B, 0.0)], [-INF])
    sampler = Rejection(target, base)
    samples = sampler.sample(N, seed=1)
    assert (base.n_scored, base.n_drawn) == (0, sampler.n_drawn)
    assert follows(samples, target, target.exact().log_prob)
    assert all("a" in text and not text.startswith("b") for text in samples.texts)


def test_rejection_only_looks_at_features(target, proposal):
    target.base = None
    assert len(Rejection(target, proposal).sample(50, seed=0)) == 50


def test_rejection_says_how_far_it_is_from_the_target(target, proposal):
    log_q, log_w = weights(target, proposal)
    texts = target.exact().samples.texts
    log_r = torch.tensor([0.0 if "a" in text else -INF for text in texts])
    q = log_q.exp()
    exact = {
        "acceptance_rate": acceptance.acceptance_rate(log_r, q).value,
        "tv": acceptance.tv(log_w, log_r, q).value,
        "kl": acceptance.kl(log_w, log_r, q).value,
    }
    # Rejection brings the law closer to p by exactly the log of the rate.
    missing = target.exact().kl_target_policy(proposal)
    assert missing - exact["kl"] == pytest.approx(-math.log(exact["acceptance_rate"]))
    z = {name: [] for name in exact}
    for seed in range(60):
        found = Rejection(target, proposal, n_estimation=1000, seed=seed).diagnostics()
        assert found.keys() == exact.keys()
        for name, score in found.items():
            z[name].append((score.value - exact[name]) / score.stderr)
    assert {name for name, values in z.items() if not standard(values)} == set()


def test_rejection_without_a_hard_constraint_is_refused(world):
    target = EBM(world, [Moment(STARTS_B, 0.6)], [1.2])
    with pytest.raises(ValueError, match=r"no hard constraint.*use QuasiRejection"):
        Rejection(target, world)


# ---------------------------------------------------------------- importance resampling


def law_of_a_pool_of_two(log_q, log_w):
    """Exactly: both texts are one of all, and the second is chosen as often as the first.

    A pool without a text with P > 0 is refused, so the law is that given one.
    """
    q, w = log_q.exp(), log_w.exp()
    pair = q[:, None] * q
    total = w[:, None] + w
    share = torch.where(total > 0, w[:, None] / total, 0.0)
    return (2 * pair * share).sum(1).log().log_softmax(0)


def one_each(sampler, n):
    """One text of each of n pools; a pool without any hit gives none."""
    drawn = []
    for seed in range(n):
        with suppress(RuntimeError):
            drawn.append(sampler.sample(1, seed=seed))
    return Samples.cat(drawn)


def test_a_pool_of_two_has_the_exact_law_of_a_pool_of_two(target, proposal):
    log_q, log_w = weights(target, proposal)
    found = one_each(ImportanceResampling(target, proposal, n_pool=2), 1000)
    assert follows(found, target, law_of_a_pool_of_two(log_q, log_w))
    assert not follows(found, target, target.exact().log_prob)


def test_a_large_pool_gives_p(target, proposal):
    """The bias of order 1/200 is far below what 1000 texts can show."""
    found = one_each(ImportanceResampling(target, proposal, n_pool=200), 1000)
    assert follows(found, target, target.exact().log_prob)
    log_q, log_w = weights(target, proposal)
    assert not follows(found, target, law_of_a_pool_of_two(log_q, log_w))


def test_texts_of_a_pool_come_in_proportion_to_their_weight(target, proposal):
    sampler = ImportanceResampling(target, proposal, n_pool=300)
    samples = sampler.sample(1000, seed=3)
    assert len(samples) == 1000
    assert sampler.n_drawn == 300
    assert all("a" in text for text in samples.texts)
    torch.testing.assert_close(samples.log_prob, proposal.log_prob(samples), rtol=0, atol=1e-12)
    # In random order: copies are not neighbours more often than chance has it.
    counts = torch.tensor([samples.texts.count(text) for text in set(samples.texts)]).double()
    chance = float((counts * (counts - 1)).sum()) / (1000 * 999)
    alike = sum(x == y for x, y in pairwise(samples.texts)) / 999
    assert abs(alike - chance) < 5 * math.sqrt(chance * (1 - chance) / 999)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_systematic_counts_are_the_expected_ones_rounded(n):
    log_w = torch.tensor([-1.0, -INF, 2.0, 0.5, -INF, 700.0 - 699.5, -300.0, -INF]).double()
    expected = n * log_w.softmax(0)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    mean = torch.zeros_like(log_w)
    for u in grid.tolist():
        rows = _resample(log_w, n, u)
        assert len(rows) == n
        counts = torch.bincount(rows, minlength=len(log_w))
        assert ((counts >= expected.floor()) & (counts <= expected.ceil())).all()
        mean += counts / len(grid)
    # On average over u the counts are exact; each can be off by one cell of the grid.
    torch.testing.assert_close(mean, expected, rtol=0, atol=2 / 2000)


@pytest.mark.parametrize("u", [0.0, math.nextafter(1.0, 0.0)])
def test_a_weight_of_zero_is_never_chosen_not_even_at_the_edges(u):
    log_w = torch.tensor([-INF, 0.0, -INF, 0.1, -INF], dtype=torch.float64)
    for n in (1, 3, 10, 1000):
        assert set(_resample(log_w, n, u).tolist()) <= {1, 3}


def test_ess_of_the_pool_is_reported(target, proposal):
    sampler = ImportanceResampling(target, proposal, n_pool=500)
    with pytest.raises(RuntimeError, match="nothing was sampled yet"):
        sampler.diagnostics()
    log_q, log_w = weights(target, proposal)
    g = torch.exp(log_w - target.exact().log_z)
    exact = 500 / float((log_q.exp() * g**2).sum())
    z = []
    for seed in range(200):
        sampler.sample(1, seed=seed)
        found = sampler.diagnostics()["ess"]
        assert found.n == 500
        z.append((found.value - exact) / found.stderr)
    assert standard(z)


# ---------------------------------------------------------------- Metropolis-Hastings


def transition(log_q, log_w):
    """The matrix K(x, y) of one step; rows of texts with P = 0 are never left nor entered."""
    q, n = log_q.exp(), len(log_q)
    ratio = torch.where(log_w[:, None] > -INF, (log_w - log_w[:, None]).clamp(max=0), -INF)
    moves = q * torch.nan_to_num(ratio, nan=-INF, neginf=-INF).exp()
    stays = 1 - moves.sum(1)
    return moves + torch.diag(stays) if n else moves


def start_law(log_q, log_w):
    return law(log_q, torch.where(log_w > -INF, 0.0, -INF)).exp()


@pytest.mark.parametrize(("burn_in", "thin"), [(0, 1), (2, 1), (1, 2), (40, 1)])
def test_a_chain_has_the_law_of_its_steps(target, proposal, burn_in, thin):
    """One text a chain, so that all are independent: start · K^(burn_in + thin)."""
    log_q, log_w = weights(target, proposal)
    k, start = transition(log_q, log_w), start_law(log_q, log_w)
    sampler = MetropolisHastings(target, proposal, n_chains=N, burn_in=burn_in, thin=thin)
    samples = sampler.sample(N, seed=1)
    steps = burn_in + thin
    expected = (start @ torch.linalg.matrix_power(k, steps)).log()
    assert follows(samples, target, expected)
    # The power of this test: p is told apart early on, and the start and one step at the end.
    assert follows(samples, target, target.exact().log_prob) == (steps > 10)
    assert not follows(samples, target, start.log())
    if steps != 1:
        assert not follows(samples, target, (start @ k).log())
    torch.testing.assert_close(samples.log_prob, proposal.log_prob(samples), rtol=0, atol=1e-12)


def test_the_law_of_the_chain_closes_in_as_promised(target, proposal):
    log_q, log_w = weights(target, proposal)
    k, now = transition(log_q, log_w), start_law(log_q, log_w)
    p = target.exact().log_prob.exp()
    torch.testing.assert_close(p @ k, p, rtol=0, atol=1e-12)
    worst = float(torch.exp(log_w.max() - target.exact().log_z))
    for step in range(40):
        assert float((now - p).abs().sum() / 2) <= (1 - 1 / worst) ** step + 1e-12
        now = now @ k


@pytest.mark.parametrize("thin", [1, 3])
def test_kept_states_of_a_chain_are_as_far_apart_as_thinning_says(target, proposal, thin):
    log_q, log_w = weights(target, proposal)
    k = torch.linalg.matrix_power(transition(log_q, log_w), thin)
    p = target.exact().log_prob.exp()
    chains = 4000
    sampler = MetropolisHastings(target, proposal, n_chains=chains, burn_in=60, thin=thin)
    texts = sampler.sample(2 * chains, seed=7).texts
    same = sum(x == y for x, y in zip(texts[:chains], texts[chains:], strict=True))
    exact = float((p * k.diagonal()).sum())
    stderr = math.sqrt(exact * (1 - exact) / chains)
    assert abs(same / chains - exact) < 5 * stderr
    other = float((p * torch.linalg.matrix_power(k, 2).diagonal()).sum())
    assert abs(same / chains - other) > 5 * stderr  # the power of this test
    # Neighbouring chains are strangers.
    alike = sum(x == y for x, y in zip(texts[:chains:2], texts[1:chains:2], strict=True))
    alone = float((p * p).sum())
    assert abs(2 * alike / chains - alone) < 5 * math.sqrt(alone * (1 - alone) / (chains / 2))


def test_the_acceptance_rate_is_that_of_the_stationary_chain(target, proposal):
    log_q, log_w = weights(target, proposal)
    p, q = target.exact().log_prob.exp(), log_q.exp()
    seen = log_w > -INF
    ratio = torch.exp((log_w - log_w[seen][:, None]).clamp(max=0))
    exact = float((p[seen][:, None] * q * ratio).sum())
    sampler = MetropolisHastings(target, proposal, n_chains=50, burn_in=40, thin=2)
    with pytest.raises(RuntimeError, match="nothing was sampled yet"):
        sampler.diagnostics()
    z = []
    for seed in range(100):
        sampler.sample(500, seed=seed)
        found = sampler.diagnostics()["acceptance_rate"]
        assert found.n == 50 * 2 * 10
        z.append((found.value - exact) / found.stderr)
    # Errors from the spread of 50 chains: a t law with 49 degrees of freedom, sd √(49/47).
    assert standard([value / math.sqrt(49 / 47) for value in z])


def test_a_single_chain_has_no_known_error(target, proposal):
    sampler = MetropolisHastings(target, proposal, n_chains=1, burn_in=2, thin=1)
    assert len(sampler.sample(5, seed=0)) == 5
    assert math.isnan(sampler.diagnostics()["acceptance_rate"].stderr)
    # No more chains are started than texts are asked for.
    many = MetropolisHastings(target, proposal, n_chains=1000, burn_in=2, thin=1)
    assert len(many.sample(3, seed=0)) == 3
    assert many.n_drawn < 100


def test_a_walk_by_hand():
    log_w = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [-INF, 0.5], [2.0, -5.0]], dtype=torch.float64)
    # e^-1 = 0.37, e^-0.5 = 0.61
    u = torch.tensor([[0.36, 0.99], [0.0, 0.62], [0.99, 0.9]], dtype=torch.float64)
    assert _walk(log_w, u).tolist() == [[1, 1], [1, 1], [3, 1]]
    u = torch.tensor([[0.38, 0.99], [0.0, 0.60], [0.99, 0.0]], dtype=torch.float64)
    assert _walk(log_w, u).tolist() == [[0, 1], [0, 2], [3, 3]]


# ---------------------------------------------------------------- what all share


@pytest.mark.parametrize("name", SAMPLERS)
def test_texts_do_not_depend_on_the_batch_size(target, proposal, name):
    whole = SAMPLERS[name](target, proposal, batch_size=1024).sample(60, seed=3)
    for batch_size in (1, 7, 60):
        parts = SAMPLERS[name](target, proposal, batch_size=batch_size).sample(60, seed=3)
        assert parts.texts == whole.texts
        assert torch.equal(parts.tokens, whole.tokens)
        assert torch.equal(parts.mask, whole.mask)
        torch.testing.assert_close(parts.log_prob, whole.log_prob, rtol=0, atol=1e-12)


def test_pools_do_not_depend_on_the_batch_size(target, proposal):
    found = [
        QuasiRejection(
            target, proposal, acceptance_rate=0.2, n_estimation=100, seed=1, batch_size=size
        )
        for size in (1, 9, 1000)
    ]
    assert len({sampler.log_beta for sampler in found}) == 1
    values = [{k: s.value for k, s in sampler.diagnostics().items()} for sampler in found]
    assert values[1] == pytest.approx(values[0])
    assert values[2] == pytest.approx(values[0])


@pytest.mark.parametrize("name", ["quasi", "chains"])
def test_coins_know_nothing_of_the_texts(name):
    """Of texts of one token, each takes one uniform, as its coin does: were it the same one, tokens
    early in the vocabulary would be accepted always, and late ones never."""
    base = TabularLM.random("abc", 1, scale=0.5, seed=0)
    target = EBM(base, [Moment(HAS_A, 0.5), Moment(STARTS_B, 0.2)], [0.5, -0.5])
    log_q, log_w = weights(target, base)
    if name == "quasi":
        sampler = QuasiRejection(target, base, 2.0)
        expected = law(log_q, acceptance.log_acceptance(log_w, math.log(2.0)))
    else:
        sampler = MetropolisHastings(target, base, n_chains=N, burn_in=0, thin=1)
        expected = (log_q.exp() @ transition(log_q, log_w)).log()
    assert follows(sampler.sample(N, seed=0), target, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_owns_the_randomness(target, proposal, name):
    before = contracts.global_states()
    sampler = SAMPLERS[name](target, proposal)
    first, again, other = (sampler.sample(40, seed=seed) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert first.texts != other.texts
    free = [sampler.sample(40) for _ in range(2)]
    assert free[0].texts != free[1].texts
    sampler.diagnostics()
    assert before == contracts.global_states()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_draw_is_counted(target, proposal, name):
    drawn = counting(proposal)
    sampler = SAMPLERS[name](target, drawn, batch_size=16)
    for seed in range(3):
        sampler.sample(30, seed=seed)
        assert sampler.n_drawn == drawn.n_drawn >= 30
    sampler.diagnostics()
    assert sampler.n_drawn == drawn.n_drawn


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_p_is_zero_everywhere_the_error_says_so(world, proposal, name):
    target = EBM(world, [Pointwise(NEVER)])
    sampler = SAMPLERS[name](target, proposal)
    if name != "resampling":
        sampler.max_draws = 2000
    with pytest.raises(RuntimeError, match=r"none of .* has P > 0.*proposal=.*trained.*draw more"):
        sampler.sample(10, seed=0)
    assert sampler.n_drawn <= 2000


def test_where_p_is_zero_everywhere_no_beta_is_chosen_and_nothing_diagnosed(world, proposal):
    target = EBM(world, [Pointwise(NEVER)])
    with pytest.raises(RuntimeError, match="none of 300 texts of the proposal has P > 0"):
        QuasiRejection(target, proposal, acceptance_rate=0.1, n_estimation=300)
    for sampler in (
        QuasiRejection(target, proposal, 1.0, n_estimation=300),
        Rejection(target, proposal, n_estimation=300),
    ):
        with pytest.raises(RuntimeError, match="none of 300 texts of the proposal has P > 0"):
            sampler.diagnostics()


def test_a_rate_above_the_share_of_possible_texts_is_refused(target, proposal):
    with pytest.raises(ValueError, match=r"of 500 texts .* have P > 0, so no beta .* ask for"):
        QuasiRejection(target, proposal, acceptance_rate=0.99, n_estimation=500, seed=0)


def test_a_search_without_hope_is_given_up_early(target, proposal):
    """At one text in 10^9, a thousandth of max_draws shows that 100,000 are out of reach."""
    log_q, log_w = weights(target, proposal)
    sampler = QuasiRejection(target, proposal, 1e9 * math.exp(float(log_w.max())))
    with pytest.raises(RuntimeError, match=r"0 of [\d,]+ texts .* accepted .* far more draws"):
        sampler.sample(100_000, seed=0)
    assert sampler.n_drawn < 10_000
    # At one in 40 the same is seen from the texts that were accepted.
    rate = float((log_q.exp() * log_w.exp()).sum()) / (40 * math.exp(float(log_w.max())))
    sampler = QuasiRejection(target, proposal, 40 * math.exp(float(log_w.max())), max_draws=10_000)
    with pytest.raises(RuntimeError, match=r"max_draws=10,000.*a smaller beta.*raise max_draws"):
        sampler.sample(5_000, seed=0)
    assert sampler.n_drawn < 10_000
    assert rate * 10_000 < 5_000


def test_a_search_within_reach_is_not_given_up(target, proposal):
    """The cap is the number of draws, not a guess: with some slack every seed succeeds."""
    log_q, log_w = weights(target, proposal)
    beta = math.exp(float(log_w.max()))
    log_r = acceptance.log_acceptance(log_w, math.log(beta))
    rate = acceptance.acceptance_rate(log_r, log_q.exp()).value
    n = 50
    enough = math.ceil((n + 6 * math.sqrt(n)) / rate)  # six standard deviations of the count
    for seed in range(100):
        sampler = QuasiRejection(target, proposal, beta, max_draws=enough)
        assert len(sampler.sample(n, seed=seed)) == n
        assert sampler.n_drawn <= enough
    too_few = QuasiRejection(target, proposal, beta, max_draws=n)
    with pytest.raises(RuntimeError, match="max_draws=50"):
        too_few.sample(n, seed=0)
    assert too_few.n_drawn == n


def test_few_texts_are_drawn_beyond_those_asked_for(target, proposal):
    """The batches grow with the rate seen: at a rate near one they do not double."""
    sampler = Rejection(target, proposal)
    sampler.sample(500, seed=0)
    log_q, log_w = weights(target, proposal)
    rate = float(log_q.exp()[log_w > -INF].sum())
    assert sampler.n_drawn < 1.2 * 500 / rate


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [0, -3, 2.0, True, None])
def test_the_number_of_texts_must_be_a_positive_whole_number(target, proposal, name, n):
    with pytest.raises(ValueError, match="n must be a whole number, at least 1"):
        SAMPLERS[name](target, proposal).sample(n)


@pytest.mark.parametrize("name", SAMPLERS)
def test_arguments_are_refused_when_made(target, proposal, name):
    make = SAMPLERS[name]
    with pytest.raises(TypeError, match=r"an EBM and a language model.*TabularLM and EBM"):
        make(proposal, target)
    with pytest.raises(TypeError, match="got EBM and str"):
        make(target, "gpt2")
    with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1; got 0"):
        make(target, proposal, batch_size=0)
    with pytest.raises(TypeError, match="temperature"):
        make(target, proposal, temperature=0.5)
    if name != "resampling":
        with pytest.raises(ValueError, match="max_draws must be"):
            make(target, proposal, max_draws=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either beta or acceptance_rate"),
        ({"beta": 1.0, "acceptance_rate": 0.1}, "either beta or acceptance_rate"),
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"beta": -1.0}, "beta must be a finite number above 0"),
        ({"beta": INF}, "beta must be a finite number above 0"),
        ({"beta": math.nan}, "beta must be a finite number above 0"),
        ({"acceptance_rate": 0.0}, r"acceptance_rate must lie in \(0, 1\]"),
        ({"acceptance_rate": 1.1}, r"acceptance_rate must lie in \(0, 1\]"),
        ({"acceptance_rate": math.nan}, r"acceptance_rate must lie in \(0, 1\]"),
        ({"beta": 1.0, "n_estimation": 1}, "n_estimation must be"),
    ],
)
def test_beta_and_rate_are_refused_before_anything_is_drawn(target, proposal, arguments, message):
    drawn = counting(proposal)
    with pytest.raises(ValueError, match=message):
        QuasiRejection(target, drawn, **arguments)
    assert drawn.n_drawn == 0


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Rejection, {"n_estimation": 0}, "n_estimation must be"),
        (ImportanceResampling, {"n_pool": 0}, "n_pool must be a whole number, at least 1"),
        (MetropolisHastings, {"n_chains": 0}, "n_chains must be"),
        (MetropolisHastings, {"thin": 0}, "thin must be"),
        (MetropolisHastings, {"burn_in": -1}, "burn_in must be a whole number, at least 0"),
        (MetropolisHastings, {"burn_in": 1.5}, "burn_in must be"),
    ],
)
def test_sizes_are_refused_when_made(target, proposal, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(target, proposal, **arguments)


class Reporting(TabularLM):
    """Draws honestly and reports one log-probability for all."""

    reported = 0.0

    def sample(self, n, **options):
        drawn = super().sample(n, **options)
        log_prob = torch.full((n,), self.reported, dtype=torch.float64)
        return Samples(drawn.tokens, drawn.mask, log_prob, drawn.texts, drawn.prompts)


WEIGHING = [name for name in SAMPLERS if name != "rejection"]


@pytest.mark.parametrize("name", WEIGHING)
def test_a_proposal_that_says_what_it_cannot_say_is_refused(target, proposal, name):
    liar = Reporting(proposal.vocab, proposal.logits, 3, eos=".")
    liar.reported = -INF
    with pytest.raises(ValueError, match=r"log_weights\[\d+\] is (nan|inf)"):
        SAMPLERS[name](target, liar).sample(20, seed=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_of_the_proposal_is_refused(target, proposal, name):
    broken = proposal.copy()
    with torch.no_grad():
        broken.logits[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        SAMPLERS[name](target, broken).sample(20, seed=0)


@pytest.mark.parametrize("name", WEIGHING)
def test_nan_of_the_base_is_refused(world, proposal, name):
    base = world.copy()
    target = EBM(base, [Pointwise(HAS_A)])
    with torch.no_grad():
        base.logits[:] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        SAMPLERS[name](target, proposal).sample(20, seed=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_of_a_feature_is_refused(world, proposal, name):
    broken = feature(lambda text: math.nan if len(text) == 2 else 1.0, name="broken", binary=True)
    target = EBM(world, [Pointwise(broken)])
    with pytest.raises(FeatureError, match="'broken'"):
        SAMPLERS[name](target, proposal).sample(40, seed=0)


@pytest.mark.parametrize("name", WEIGHING)
def test_what_the_base_cannot_say_is_never_returned(world, proposal, name):
    """P = 0 by the base alone, with no hard constraint, is as legal as by a constraint."""
    base = world.copy()
    with torch.no_grad():
        base.logits[0, 0] = -INF  # no text begins with "a"
    target = EBM(base, [Moment(HAS_A, 0.5)], [0.3])
    texts = SAMPLERS[name](target, proposal).sample(200, seed=0).texts
    assert not any(text.startswith("a") for text in texts)
    assert any(text.startswith("b") for text in texts)


# ---------------------------------------------------------------- a transformer


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_transformer_samples_and_proposes(gpt2_lm, name):
    target = EBM(gpt2_lm, [Pointwise(HAS_A), Moment(LENGTH, 2.0)], [0.2], max_new_tokens=3)
    policy = gpt2_lm.copy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    assert isinstance(policy, LanguageModel)
    texts = []
    for batch_size in (5, 64):
        sampler = SAMPLERS[name](target, policy, batch_size=batch_size)
        samples = sampler.sample(20, seed=1)
        assert all("a" in text for text in samples.texts)
        assert len(samples) == 20
        assert samples.longest <= 3
        torch.testing.assert_close(
            samples.log_prob, policy.log_prob(samples), rtol=0, atol=contracts.FLOAT32
        )
        texts.append(samples.texts)
    assert texts[0] == texts[1]


def test_weights_of_the_base_need_no_second_pass(world):
    """The base's own log-probabilities are recorded: P/q is the factor alone."""
    base = counting(world)
    target = EBM(base, [Moment(STARTS_B, 0.6)], [1.2])
    found = ImportanceResampling(target, base, n_pool=100)
    found.sample(10, seed=0)
    assert base.n_scored == 0
    assert 0 < found.diagnostics()["ess"].value <= 100
    samples = base.sample(50, seed=0)
    factor = 1.2 * torch.tensor([t.startswith("b") for t in samples.texts]).double()
    torch.testing.assert_close(found._log_weights(samples), factor, rtol=0, atol=1e-12)
