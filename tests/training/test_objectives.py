"""Expected gradients against autograd of the exact objective, and the choice of texts."""

import itertools
import math

import pytest
import torch
from worlds import config

import dmgen
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import feature
from dmgen.estimates.f_divergence import f_divergence
from dmgen.models import TabularLM
from dmgen.target.ebm import EBM
from dmgen.training import objectives
from dmgen.training.baselines import BASELINES, Baseline
from dmgen.training.objectives import METHODS, advantage

FIXED = (
    objectives.DPG,
    objectives.GDC,
    objectives.GDCPP,
    objectives.REINFORCE,
    objectives.VARGRAD,
)
HAS_A = feature(lambda text: "a" in text, name="a")
LENGTH = feature(len, name="length")
ALPHAS = [("alpha", a) for a in (-1.0, 0.0, 0.3, 0.5, 1.0, 1.7, 2.0)]
DIVERGENCES = ["kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2", *ALPHAS]
FINITE_AT_ZERO = [d for d in DIVERGENCES if math.isfinite(f_divergence(d).f_prime_at_infinity)]


def soft(world):
    return EBM(world, [Moment(LENGTH, 2.0), Moment(HAS_A, 0.5)], [0.6, -0.8])


def hard(world):
    return EBM(world, [Moment(LENGTH, 2.0), Pointwise(HAS_A)], [0.6])


class Case:
    """A target, a policy and a proposal on one world; everything that follows is a sum."""

    def __init__(self, world, target, on_policy):
        self.every = world.enumerate()
        exact = target.exact()
        self.log_p, self.log_z, self.log_base = exact.log_prob, exact.log_z, exact.log_base
        self.log_score = target.log_score(self.every)
        self.policy = TabularLM.random("abc.", 4, eos=".", seed=5).copy()
        proposal = TabularLM.random("abc.", 4, eos=".", seed=6)
        self.log_pi = self.policy.log_prob(self.every)
        self.log_q = self.log_pi if on_policy else proposal.log_prob(self.every)

    def advantage(self, method, **options):
        args = (self.log_score, self.log_q, self.log_pi, self.log_z)
        return advantage(method, *args, **options)

    def expected_gradient(self, a):
        """E_q[A ∇log π], summed over every text."""
        log_pi = self.policy.log_prob(self.every, grad=True)
        return self.gradient((self.log_q.exp() * a) @ log_pi)

    def gradient(self, objective):
        return torch.autograd.grad(objective, list(self.policy.parameters()))[0]

    def forward_kl(self):
        log_pi = self.policy.log_prob(self.every, grad=True)
        seen = self.log_p > -math.inf
        return (self.log_p[seen].exp() * (self.log_p[seen] - log_pi[seen])).sum()

    def f_divergence(self, name):
        """E_p[f(π/p)], with f'(∞) π where p = 0."""
        f = f_divergence(name)
        pi = self.policy.log_prob(self.every, grad=True).exp()
        p = self.log_p.exp()
        seen = p > 0
        total = (p[seen] * f.f(pi[seen] / p[seen])).sum()
        return total if bool(seen.all()) else total + f.f_prime_at_infinity * pi[~seen].sum()


@pytest.fixture(params=[True, False], ids=["on-policy", "off-policy"])
def on_policy(request):
    return request.param


@pytest.fixture(params=[soft, hard])
def case(request, world, on_policy):
    return Case(world, request.param(world), on_policy)


def assert_same(gradient, exact):
    assert exact.abs().max() > 1e-3  # a gradient of 0 would agree with anything small
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", ["dpg", "gdc", "gdc++"])
def test_expected_gradient_descends_the_forward_kl(case, method):
    gradient = case.expected_gradient(case.advantage(method))
    assert_same(gradient, -case.gradient(case.forward_kl()))


@pytest.mark.parametrize("name", DIVERGENCES, ids=str)
def test_expected_gradient_of_fdpg_descends_its_divergence(world, on_policy, name):
    case = Case(world, soft(world), on_policy)
    gradient = case.expected_gradient(case.advantage("fdpg", divergence=name))
    assert_same(gradient, -case.gradient(case.f_divergence(name)))


@pytest.mark.parametrize("name", FINITE_AT_ZERO, ids=str)
def test_fdpg_descends_with_hard_constraints_too(world, on_policy, name):
    case = Case(world, hard(world), on_policy)
    gradient = case.expected_gradient(case.advantage("fdpg", divergence=name))
    assert_same(gradient, -case.gradient(case.f_divergence(name)))


def test_expected_gradient_of_reinforce_ascends_the_reward(case):
    reward = torch.randn(len(case.every), generator=torch.Generator().manual_seed(0)).double()
    gradient = case.expected_gradient(case.advantage("reinforce", reward=reward))
    pi = case.policy.log_prob(case.every, grad=True).exp()
    assert_same(gradient, case.gradient(pi @ reward))


def test_log_z_may_be_given_for_each_text(case):
    one = case.advantage("gdc++")
    case.log_z = torch.full_like(case.log_p, case.log_z)
    assert torch.equal(case.advantage("gdc++"), one)


def test_a_wrong_log_z_only_scales_dpg(case):
    right = case.expected_gradient(case.advantage("dpg"))
    case.log_z += math.log(2)
    assert_same(2 * case.expected_gradient(case.advantage("dpg")), right)


# ---------------------------------------------------------------- baselines


def test_the_baseline_has_no_expected_gradient(case):
    ratio = torch.exp(case.log_pi - case.log_q)
    gradient = case.expected_gradient(ratio)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    # A constant that is not multiplied by π/q is a baseline on-policy only.
    constant = case.expected_gradient(torch.ones_like(ratio)).abs().max()
    assert (constant < 1e-12) == torch.equal(case.log_pi, case.log_q)


def test_gdcpp_advantage_has_mean_zero(case):
    assert float(case.log_q.exp() @ case.advantage("gdc++")) == pytest.approx(0, abs=1e-12)
    assert float(case.log_q.exp() @ case.advantage("gdc")) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("method", ["gdc++", *DIVERGENCES], ids=str)
def test_advantage_is_exactly_zero_where_the_policy_is_the_target(case, method):
    case.log_pi = case.log_score - case.log_z
    if method == "gdc++":
        a = case.advantage(method)
    else:
        seen = case.log_p > -math.inf
        a = advantage(
            "fdpg",
            case.log_score[seen],
            case.log_q[seen],
            case.log_pi[seen],
            case.log_z,
            divergence=method,
        )
    assert (a == 0).all()  # every text, to the last bit
    assert (case.advantage("gdc") != 0).any()


def test_the_baseline_takes_the_variance_away_near_the_target(case):
    """As π → p the variance of A under q vanishes with the baseline, and not without."""
    direction = torch.linspace(-1, 1, len(case.every), dtype=torch.float64)
    spread = {}
    for distance in (0.1, 0.01):
        log_pi = torch.log_softmax(case.log_p + distance * direction, 0)
        a = advantage("gdc++", case.log_score, case.log_q, log_pi, case.log_z)
        spread[distance] = float(case.log_q.exp() @ a**2)
    assert spread[0.01] == pytest.approx(spread[0.1] / 100, rel=0.1)  # second order
    assert float(case.log_q.exp() @ case.advantage("gdc") ** 2) > 1


def test_forward_kl_fdpg_is_gdcpp(case):
    torch.testing.assert_close(
        case.advantage("fdpg", divergence="kl"), case.advantage("gdc++"), rtol=1e-12, atol=1e-14
    )


class Batches:
    """All batches of 3 texts on a world of 7, with their probabilities: expectations are sums."""

    def __init__(self, on_policy):
        base, self.policy, other = (
            TabularLM.random("ab.", 2, eos=".", seed=seed) for seed in (2, 3, 4)
        )
        self.policy = self.policy.copy()
        target = EBM(base, [Moment(LENGTH, 1.0), Moment(HAS_A, 0.5)], [0.6, -0.8])
        self.every = base.enumerate()
        self.log_score = target.log_score(self.every)
        self.log_z = target.exact().log_z
        self.log_pi = self.policy.log_prob(self.every)
        self.log_q = self.log_pi if on_policy else other.log_prob(self.every)
        self.reward = torch.linspace(-1, 2, len(self.every), dtype=torch.float64)

    def expected(self, method, of=None, **options):
        """E over batches of the mean of A ∇log π; or of `of(A)`."""
        if method == "reinforce":
            options["reward"] = self.reward
        total = torch.zeros(len(self.every), dtype=torch.float64)
        value = 0.0
        for rows in map(list, itertools.product(range(len(self.every)), repeat=3)):
            mass = float(self.log_q[rows].sum().exp())
            given = dict(options)
            if "reward" in given:
                given["reward"] = self.reward[rows]
            a = advantage(
                method,
                self.log_score[rows],
                self.log_q[rows],
                self.log_pi[rows],
                self.log_z,
                **given,
            )
            total.index_add_(0, torch.tensor(rows), mass * a / 3)
            value += mass * float(of(a)) if of else 0.0
        if of:
            return value
        log_pi = self.policy.log_prob(self.every, grad=True)
        return torch.autograd.grad(total @ log_pi, self.policy.logits)[0]


@pytest.fixture
def batches(on_policy):
    return Batches(on_policy)


@pytest.mark.parametrize("baseline", ["z", "leave_one_out", "optimal"])
@pytest.mark.parametrize("method", ["gdc", "fdpg", "reinforce"])
def test_no_baseline_moves_the_expected_gradient(batches, method, baseline):
    options = {"divergence": "js"} if method == "fdpg" else {}
    if (method, baseline) == ("reinforce", "z"):
        pytest.skip("no Z to speak of")
    plain = batches.expected(method, baseline="none", **options)
    assert_same(batches.expected(method, baseline=baseline, **options), plain)


def test_a_baseline_that_looks_at_its_own_text_would_move_it(batches, monkeypatch):
    """The power of the check above: the plain mean of the batch is no such baseline."""
    plain = batches.expected("gdc", baseline="none")
    mean = Baseline("leave_one_out", lambda gain, ratio, at_target: gain.mean(), needs_batch=True)
    monkeypatch.setitem(BASELINES, "leave_one_out", mean)
    wrong = batches.expected("gdc", baseline="leave_one_out")
    assert (wrong - plain).abs().max() > 1e-3


def test_baselines_of_the_batch_are_zero_where_the_policy_is_the_target(case):
    case.log_q = case.log_pi = case.log_score - case.log_z
    seen = case.log_p > -math.inf
    args = (case.log_score[seen], case.log_q[seen], case.log_pi[seen], case.log_z)
    for baseline in ("z", "leave_one_out", "optimal"):
        assert advantage("gdc", *args, baseline=baseline).abs().max() < 1e-12


def test_expected_gradient_of_vargrad_descends_the_variance(batches):
    log_pi = batches.policy.log_prob(batches.every, grad=True)
    terms, q = batches.log_score - log_pi, batches.log_q.exp()
    variance = q @ terms.square() - (q @ terms).square()
    exact = torch.autograd.grad(-variance / 2, batches.policy.logits)[0]
    assert_same(batches.expected("vargrad"), exact)
    batches.log_z += 1.0  # needs no Z
    assert_same(batches.expected("vargrad"), exact)


def test_on_policy_vargrad_descends_the_reverse_kl():
    batches = Batches(on_policy=True)
    reverse = batches.expected("fdpg", divergence="reverse_kl")
    assert_same(batches.expected("vargrad"), reverse)


# ---------------------------------------------------------------- KL control


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_kl_control_is_reverse_kl_to_the_tilted_base(world, beta, seed):
    """E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p_z), p_z ∝ a exp(r/β), for every π."""
    every = world.enumerate()
    generator = torch.Generator().manual_seed(seed)
    noise = dict(
        zip(every.texts, torch.randn(len(every), generator=generator).tolist(), strict=True)
    )
    reward = feature(lambda text: noise[text], name="reward")
    exact = EBM(world, [Moment(reward, 0.0)], [1 / beta]).exact()
    policy = TabularLM.random("abc.", 4, eos=".", seed=seed + 10)
    pi = policy.log_prob(every).exp()
    mean_reward = float(pi @ torch.tensor([noise[t] for t in every.texts], dtype=torch.float64))
    left = mean_reward - beta * exact.kl_policy_base(policy)
    right = beta * exact.log_z - beta * exact.kl_policy_target(policy)
    assert left == pytest.approx(right, abs=1e-10)


# ---------------------------------------------------------------- refusals


def numbers(n=3):
    return torch.zeros(n, dtype=torch.float64)


def test_unknown_methods_and_missing_arguments_are_refused():
    args = (numbers(), numbers(), numbers(), 0.0)
    with pytest.raises(ValueError, match=r"'ppo'.*'gdc\+\+'"):
        advantage("ppo", *args)
    with pytest.raises(ValueError, match="divergence="):
        advantage("fdpg", *args)
    with pytest.raises(ValueError, match="reward="):
        advantage("reinforce", *args)
    with pytest.raises(ValueError, match="baseline must be one of None, 'none'"):
        advantage("gdc", *args, baseline="best")
    with pytest.raises(ValueError, match="baseline of 'reinforce' must be"):
        advantage("reinforce", *args, reward=numbers(), baseline="z")
    with pytest.raises(ValueError, match="baseline of 'vargrad' must be"):
        advantage("vargrad", *args, baseline="leave_one_out")
    assert METHODS == ("dpg", "gdc", "gdc++", "fdpg", "reinforce", "vargrad")


def test_vargrad_refuses_texts_that_the_target_cannot_show():
    log_score = torch.tensor([0.0, -math.inf, 0.0])
    with pytest.raises(ValueError, match="infinite where P = 0, as for 1 of 3 texts"):
        advantage("vargrad", log_score, numbers(), numbers(), 0.0)


@pytest.mark.parametrize("name", [d for d in DIVERGENCES if d not in FINITE_AT_ZERO], ids=str)
def test_divergences_that_are_infinite_at_zero_refuse_hard_constraints(name):
    log_score = torch.tensor([0.0, -math.inf, 0.0])
    with pytest.raises(ValueError, match="infinite where P = 0, as for 1 of 3 texts"):
        advantage("fdpg", log_score, numbers(), numbers(), 0.0, divergence=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DIVERGENCES, ids=str)
def test_it_is_known_which_methods_take_no_text_with_p_0(method, name):
    log_score = torch.tensor([0.0, -math.inf, 0.0])
    try:
        advantage(method, log_score, numbers(), numbers(), 0.0, divergence=name, reward=numbers())
        refused = False
    except ValueError:
        refused = True
    values = {o.name: o for o in (*FIXED, objectives.fdpg(name))}
    assert values[method].needs_support == refused


def test_what_overflows_is_named():
    log_score = torch.tensor([0.0, 800.0])
    with pytest.raises(FloatingPointError, match=r"a text is inf: log P 800"):
        advantage("gdc", log_score, numbers(2), numbers(2), 0.0)
    with pytest.raises(FloatingPointError, match=r"a text is nan"):
        advantage("gdc++", numbers(1), numbers(1), torch.tensor([math.nan]), 0.0)


@pytest.mark.parametrize("name", ["kl", ("alpha", 1.0)], ids=str)
def test_a_policy_that_hardly_says_a_text_of_the_target_is_no_overflow(name):
    """p/π is exp(800), but (π/q)(p/π) is 1."""
    a = advantage("fdpg", numbers(1), numbers(1), torch.tensor([-800.0]), 0.0, divergence=name)
    assert a.tolist() == [1.0]


def test_everything_is_float64_even_from_float32():
    args = [torch.full((2,), -1.0, dtype=torch.float32) for _ in range(3)]
    for method in ("gdc", "gdc++", "fdpg"):
        assert advantage(method, *args, 0.0, divergence="js").dtype == torch.float64


def test_gdc_does_not_need_log_policy_however_improbable_a_text_is():
    """Beyond e^709, 1/q overflows: a text of some 200 tokens of GPT-2."""
    log_q = torch.tensor([-700.0, -800.0, -5000.0], dtype=torch.float64)
    for method, baseline in (("gdc", None), ("dpg", None), ("gdc++", "none")):
        a = advantage(
            method, log_q + torch.tensor([0.0, 1.0, -1.0]), log_q, torch.zeros(3), 0.0,
            baseline=baseline,
        )  # fmt: skip
        torch.testing.assert_close(a, torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64).exp())


def test_the_advantage_that_is_not_finite_is_named(base, target):
    sampler = dmgen.DPG(base.copy(), target, config())
    with torch.no_grad():
        sampler.policy.logits[0, 0] = math.nan
    with pytest.raises((FloatingPointError, ValueError), match="text"):
        sampler.train(1)
