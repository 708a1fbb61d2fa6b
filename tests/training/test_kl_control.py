"""KL-controlled PPO against exact answers on an enumerable model."""

import json
import math
import textwrap

import pandas as pd
import pytest
import torch
from launching import launch
from worlds import as_table, batch_of, config

import dmgen
from dmgen.training.gradient import backward as backward_of
from dmgen.training.methods import KLControl
from dmgen.training.ppo import gae, token_rewards, whiten


def table(world, logits=None):
    """A trainable table over the tokens of `world`."""
    other = world.copy()
    if logits is not None:
        other.load_state_dict({"logits": logits})
    return other


@pytest.fixture(scope="module")
def base():
    return dmgen.TabularLM.random("abc.", 4, eos=".", seed=1)


@pytest.fixture(scope="module")
def has_ab():
    return dmgen.feature(lambda text: "ab" in text, name="ab")


@pytest.fixture(scope="module")
def target(base, has_ab):
    return dmgen.EBM(base, [dmgen.Pointwise(has_ab)])


# -------------------------------------------------------- the gradient, exactly, on all texts


def exact_value(policy, rewards, every):
    """V of each token's prefix under the policy: the mean of what is still to come."""
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)  # (N, T)
    weights = policy.log_prob(every).exp()
    rows = policy._prefix_rows(every.tokens)[every.mask]
    n_rows = len(policy.logits)
    per_row = [
        torch.zeros(n_rows, dtype=torch.float64).index_add_(0, rows, x[every.mask])
        for x in (weights[:, None] * to_come, weights[:, None] * torch.ones_like(to_come))
    ]
    by_row = per_row[0] / per_row[1].clamp(min=1e-300)
    return torch.where(every.mask, by_row[policy._prefix_rows(every.tokens)], 0.0)


def token_gradient(policy, base, reward, beta, lam, values=None):
    """`E_π[Σ_t Â_t ∇log π(x_t)]` as a sum over all texts."""
    every = base.enumerate()
    log_pi = policy.token_log_prob(every, grad=True)
    rewards = token_rewards(reward, log_pi.detach(), base.token_log_prob(every), every.mask, beta)
    values = exact_value(policy, rewards, every) if values is None else values(every)
    weights = log_pi.detach().sum(-1).exp()[:, None] * gae(rewards, values, 1.0, lam)
    return torch.autograd.grad((weights * log_pi).sum(), policy.logits)[0]


def objective_gradient(policy, base, reward, beta):
    """`∇(E_π[r] − β KL(π‖a))` by differentiating the sum over all texts."""
    every = base.enumerate()
    log_pi = policy.log_prob(every, grad=True)
    objective = (log_pi.exp() * (reward - beta * (log_pi - every.log_prob))).sum()
    return torch.autograd.grad(objective, policy.logits)[0]


def test_the_advantages_give_the_gradient_of_the_penalised_reward(base, target):
    every = base.enumerate()
    policy = table(base, dmgen.TabularLM.random("abc.", 4, eos=".", seed=8).logits)
    reward = target.values(every)["ab"]
    expected = objective_gradient(policy, base, reward, 0.3)

    def any_values(samples):
        made_up = torch.randn(len(base.logits), generator=torch.Generator().manual_seed(2)).double()
        return samples.mask * made_up[base._prefix_rows(samples.tokens)]

    # With λ = 1 whatever the values are, with less where they are right.
    for lam, values in ((1.0, any_values), (0.95, None), (0.0, None)):
        found = token_gradient(policy, base, reward, 0.3, lam, values)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    wrong = token_gradient(policy, base, reward, 0.3, 0.5, any_values)
    assert (wrong - expected).abs().max() > 0.01


def test_at_its_own_target_every_advantage_is_0(base, target):
    own = KLControl(table(base), target, config(), kl_coefficient=0.4, kl_target=None).own_target()
    every = base.enumerate()
    policy = table(base, as_table(base, own.exact().log_prob).logits)
    log_pi = policy.token_log_prob(every)
    reward = target.values(every)["ab"]
    rewards = token_rewards(reward, log_pi, base.token_log_prob(every), every.mask, 0.4)
    values = exact_value(policy, rewards, every)
    for lam in (0.0, 0.95, 1.0):
        # Rounding of sums of 4 float64 numbers of size 1.
        assert gae(rewards, values, 1.0, lam).abs().max() < 1e-13
    wrong = token_rewards(reward, log_pi, base.token_log_prob(every), every.mask, 0.5)
    assert gae(wrong, exact_value(policy, wrong, every), 1.0, 0.95).abs().max() > 0.01


def backward(sampler, samples, moved=None):
    """The gradients of one backward pass over `samples`, the last one that of the value head.

    With `moved`, the policy has these logits by now, and was itself when the texts were drawn.
    """
    batch = batch_of(sampler, samples, log_policy=samples.log_prob)
    if moved is not None:
        sampler.policy.load_state_dict({"logits": moved})
    backward_of(sampler.state, batch, sampler.setup)
    return [p.grad.clone() for p in sampler.state.parameters]


def with_values(sampler, seed=4):
    """The sampler with a value head that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head = sampler.state.objective["value_head"]
        head.copy_(torch.randn(head.shape, generator=generator, dtype=head.dtype))
    return sampler


def test_the_first_pass_is_the_advantage_gradient(base, target):
    policy = table(base, dmgen.TabularLM.random("abc.", 4, eos=".", seed=8).logits)
    samples = policy.sample(32, seed=5)
    sampler = with_values(KLControl(policy, target, config(batch_size=32)))
    of_policy, of_head = backward(sampler, samples)

    log_pi = policy.token_log_prob(samples, grad=True)
    rows = base._prefix_rows(samples.tokens)
    head = sampler.state.objective["value_head"].detach()
    values = torch.where(samples.mask, head[rows] + head[-1], 0.0)
    reward = torch.tensor([float("ab" in text) for text in samples.texts]).double()
    log_base = base.token_log_prob(samples)
    rewards = token_rewards(reward, log_pi.detach(), log_base, samples.mask, 0.2)
    advantage = gae(rewards, values, 1.0, 0.95)
    n_tokens = samples.mask.sum()
    loss = -(whiten(advantage, samples.mask) * log_pi).sum() / n_tokens
    torch.testing.assert_close(
        of_policy, torch.autograd.grad(loss, policy.logits)[0], rtol=1e-10, atol=1e-14
    )
    # The value loss is ½ (V − G)² with G − V = Â, and V is one weight a prefix and a bias.
    slope = -0.1 * torch.where(samples.mask, advantage, 0.0) / n_tokens
    by_row = torch.zeros_like(head[:-1]).index_add_(0, rows.flatten(), slope.flatten())
    torch.testing.assert_close(of_head, torch.cat([by_row, slope.sum()[None]]))


def test_later_passes_are_corrected_for_the_policy_that_has_moved(base, target):
    samples = base.sample(64, seed=5)
    moved = base.logits + 0.3 * dmgen.TabularLM.random("abc.", 4, eos=".", seed=9).logits
    sampler = with_values(KLControl(table(base), target, config(batch_size=64)))
    found, _ = backward(sampler, samples, moved=moved)

    policy = table(base, moved)
    log_pi = policy.token_log_prob(samples, grad=True)
    with_columns = table(base)
    own = batch_of(
        with_values(KLControl(with_columns, target, config(batch_size=64))), samples
    ).tokens
    torch.testing.assert_close(own["log_old"], base.token_log_prob(samples), rtol=0, atol=0)
    reward = torch.tensor([float("ab" in text) for text in samples.texts]).double()
    rewards = token_rewards(reward, own["log_old"], own["log_base"], own["mask"].bool(), 0.2)
    white = whiten(gae(rewards, own["values"], 1.0, 0.95), own["mask"].bool())
    ratio = (log_pi - own["log_old"]).exp()
    # The gradient of the clipped objective: none where the clip is in force.
    stopped = ((ratio > 1.2) & (white > 0)) | ((ratio < 0.8) & (white < 0))
    assert 0 < stopped.sum() < own["mask"].bool().sum()
    weights = torch.where(stopped, 0.0, white * ratio.detach())
    loss = -(weights * log_pi).sum() / own["mask"].bool().sum()
    torch.testing.assert_close(
        found, torch.autograd.grad(loss, policy.logits)[0], rtol=1e-10, atol=1e-14
    )


def test_micro_batches_change_nothing(base, target):
    samples = base.sample(8, seed=5)
    by_size = [
        backward(
            with_values(KLControl(table(base), target, config(batch_size=8, micro_batch_size=k))),
            samples,
            moved=1.3 * base.logits,
        )
        for k in (1, 3, 8)
    ]
    for other in by_size[1:]:
        torch.testing.assert_close(other, by_size[0], rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------- its own target


def targets(base):
    """Targets of all kinds of constraint, with their reward by hand."""
    a, b, c = (dmgen.feature(lambda text, x=x: x in text, name=x) for x in "abc")
    n_a = dmgen.feature(lambda text: text.count("a"), name="how many a")
    hard, soft, number = dmgen.Pointwise(a), dmgen.Moment(b, 0.5), dmgen.Moment(n_a, 1.5)
    given, never = dmgen.Moment(c, 0.7, given=a), dmgen.Moment(c, 0.0)
    always_given = dmgen.Moment(c, 1.0, given=b)

    def ebm(constraints, *lambdas):
        return dmgen.EBM(base, constraints, lambdas)

    return {
        "hard": (ebm([hard]), lambda x: "a" in x),
        "two hard": (ebm([hard, dmgen.Pointwise(b)]), lambda x: "a" in x and "b" in x),
        "soft": (ebm([soft, number], 1.5, -0.5), lambda x: 1.5 * ("b" in x) - 0.5 * x.count("a")),
        "both": (
            ebm([soft, hard, never], 2.0, -math.inf),
            lambda x: 2 * ("b" in x) + ("a" in x and "c" not in x),
        ),
        "given": (
            ebm([given, hard, always_given], 2.0, math.inf),
            lambda x: (
                2 * ("a" in x) * (("c" in x) - 0.7) + ("a" in x and ("c" in x or "b" not in x))
            ),
        ),
    }


@pytest.mark.parametrize("kind", ["hard", "two hard", "soft", "both", "given"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_what_is_maximised_is_the_divergence_from_its_own_target(kind, beta, base):
    """Theorem 1: E_π[r] − β KL(π‖a) = β log Z − β KL(π‖p_z), for every policy."""
    target, reward_of = targets(base)[kind]
    every = base.enumerate()
    sampler = KLControl(table(base), target, config(), kl_coefficient=beta, kl_target=None)
    reward = batch_of(sampler, every).reward
    expected = torch.tensor([reward_of(text) for text in every.texts], dtype=torch.float64)
    torch.testing.assert_close(reward, expected)
    own = sampler.own_target()
    torch.testing.assert_close(own.log_score(every), every.log_prob + expected / beta)
    exact = own.exact()
    for seed in range(5):
        policy = dmgen.TabularLM.random("abc.", 4, eos=".", seed=seed, scale=2.0)
        log_pi = policy.log_prob(every)
        gain = float(log_pi.exp() @ expected) - beta * exact.kl_policy_base(policy)
        left = beta * exact.log_z - gain
        assert left == pytest.approx(beta * exact.kl_policy_target(policy), rel=1e-9, abs=1e-12)
        assert left > 0.01  # and none of them is at the maximum


def test_its_own_target_keeps_names_prompt_and_length(base, has_ab):
    target = dmgen.EBM(base, [dmgen.Pointwise(has_ab)], max_new_tokens=3)
    own = KLControl(table(base), target, config(), kl_target=None).own_target()
    assert (own.base, own.prompt, own.max_new_tokens) == (base, "", 3)
    assert [c.name for c in own.constraints] == ["all of: ab"]
    c = dmgen.feature(lambda text: "c" in text, name="c")
    mixed = dmgen.EBM(base, [dmgen.Pointwise(has_ab), dmgen.Moment(c, 0.0)], [-math.inf])
    own = KLControl(table(base), mixed, config(), kl_target=None).own_target()
    assert own.constraints[0].name == "all of: ab, c = 0"


def test_no_target_of_its_own_where_there_is_none(base, target):
    with pytest.raises(ValueError, match="there is no fixed target: pass kl_target=None"):
        KLControl(table(base), target, config()).own_target()
    with pytest.raises(ValueError, match="pass gamma=1"):
        KLControl(table(base), target, config(), kl_target=None, gamma=0.9).own_target()


# ------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("beta", "reuse", "n_steps"), [(0.2, 1, 150), (0.5, 3, 50)])
def test_training_at_a_fixed_coefficient_reaches_its_own_target(beta, reuse, n_steps, base, target):
    policy = table(base)
    settings = config(schedule="linear", total_steps=n_steps, reuse=reuse)
    sampler = KLControl(policy, target, settings, kl_coefficient=beta, kl_target=None)
    exact = sampler.own_target().exact()
    before = exact.kl_policy_target(base)
    sampler.train(n_steps)
    # How far from there a wrong β would lead.
    other = KLControl(table(base), target, config(), kl_coefficient=2 * beta, kl_target=None)
    elsewhere = other.own_target().exact().kl_policy_target(policy)
    after = exact.kl_policy_target(policy)
    # The least that it must do: the noise of the last steps is what is left.
    assert after < before / 50
    assert elsewhere > 4 * after


def test_reward_is_paid_for_and_not_enforced(base, target):
    """It ends where E[b] is that of its own target: below 1, and far above the base's."""
    policy = table(base)
    settings = config(schedule="linear", total_steps=100)
    sampler = KLControl(policy, target, settings, kl_coefficient=0.5, kl_target=None)
    sampler.train(100)
    exact = sampler.own_target().exact()
    (wanted,) = exact.moments.values()
    holds = float(policy.log_prob(exact.samples).exp() @ target.values(exact.samples)["ab"])
    assert wanted > 2 * target.exact().base_moments["ab"]
    # TV ≤ sqrt(KL/2) bounds how far the mean of a binary feature can be off.
    assert abs(holds - wanted) <= math.sqrt(exact.kl_policy_target(policy) / 2) < 0.02
    assert wanted < 0.95
    assert target.exact().kl_policy_target(policy) == math.inf


def test_the_coefficient_adapts_as_its_formula_says(base, target):
    def run(kl_target):
        sampler = KLControl(table(base), target, config(), kl_target=kl_target, horizon=1000)
        return sampler, sampler.train(20)

    for kl_target, up in ((1e-3, True), (50.0, False)):
        sampler, history = run(kl_target)
        beta = 0.2
        for found, kl in zip(history["kl_coefficient"], history["kl_policy_base"], strict=True):
            assert found == beta
            beta = beta * (1 + min(max(kl / kl_target - 1, -0.2), 0.2) * 256 / 1000)
        assert sampler.kl_coefficient == pytest.approx(beta, rel=1e-12)
        assert (beta > 0.2 * 1.5) if up else (beta < 0.2 / 1.5)
    _, history = run(None)
    assert (history["kl_coefficient"] == 0.2).all()


def test_a_dear_kl_keeps_the_policy_nearer_to_the_base(base, target):
    far, near = (
        KLControl(table(base), target, config(), kl_target=kl_target, horizon=256)
        for kl_target in (None, 0.05)
    )
    kls = [sampler.train(60)["kl_policy_base"].iloc[-10:].mean() for sampler in (far, near)]
    assert kls[0] > 0.5
    assert kls[1] < 0.2


def test_the_row_of_the_first_step(base, target):
    """π = a and V = 0: the first token's advantage is λ^(n−1) b(x) for a text of n tokens."""
    row = KLControl(table(base), target, config()).train(1).iloc[0]
    samples = base.sample(256, generator=KLControl(table(base), target, config()).state.generator)
    b = torch.tensor([float("ab" in text) for text in samples.texts]).double()
    expected = b * 0.95 ** (samples.n_tokens - 1)
    assert row["advantage_mean"] == pytest.approx(float(expected.mean()))
    assert row["advantage_var"] == pytest.approx(float(expected.var(correction=0)))
    assert row["kl_policy_base"] == 0
    assert row["moment/ab"] == pytest.approx(float(b.mean()))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"average_decay": 0.9}, {"horizon": 600}),
        ({"reuse": 2, "learning_rate": "auto", "warmup_steps": 0}, {"horizon": 600}),
        ({"optimizer": "sgd", "max_grad_norm": 0.1}, {"kl_target": None}),
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(settings, options, base, target, tmp_path):
    def make():
        return KLControl(table(base), target, config(**settings), **options)

    whole = make()
    expected = whole.train(15, out=tmp_path / "whole")
    make().train(7, out=tmp_path / "parts")
    second = make()
    second.resume(tmp_path / "parts")
    found = second.train(8, out=tmp_path / "parts")
    pd.testing.assert_frame_equal(expected.drop(columns="seconds"), found.drop(columns="seconds"))
    assert torch.equal(whole.policy.logits, second.policy.logits)
    assert torch.equal(whole.state.objective["value_head"], second.state.objective["value_head"])
    assert whole.state.objective["value_head"].abs().max() > 0
    assert whole.kl_coefficient == second.kl_coefficient
    assert (whole.kl_coefficient == 0.2) == ("kl_target" in options)
    of_head = [
        sampler.state.optimizer.state[sampler.state.objective["value_head"]]
        for sampler in (whole, second)
    ]
    assert of_head[0].keys() == of_head[1].keys() != set()
    for name, state in of_head[0].items():
        assert torch.equal(state, of_head[1][name])


def test_resume_refuses_a_coefficient_of_another_kind(base, target, tmp_path):
    KLControl(table(base), target, config(), kl_target=None).train(1, out=tmp_path)
    policy = table(base)
    with pytest.raises(ValueError, match=r"another kl_coefficient: 0\.2, not adaptive"):
        KLControl(policy, target, config()).resume(tmp_path)
    assert torch.equal(policy.logits, base.logits)


def test_a_step_without_hits_changes_nothing_but_the_coefficient(base):
    never = dmgen.feature(lambda text: text == "zz", name="zz")
    sampler = KLControl(table(base), dmgen.EBM(base, [dmgen.Pointwise(never)]), config())
    history = sampler.train(2)
    assert torch.equal(sampler.policy.logits, base.logits)
    assert (history["kl_policy_base"] == 0).all()
    assert sampler.kl_coefficient == pytest.approx(0.2 * (1 - 0.2 * 256 / 10_000) ** 2)


def test_the_base_is_scored_once_a_step(base, target):
    calls = []

    class Counting(dmgen.TabularLM):
        def token_log_prob(self, samples, **options):
            calls.append(len(samples))
            return super().token_log_prob(samples, **options)

    counting = Counting(base.vocab, base.logits, base.max_new_tokens, eos=base.eos)
    sampler = KLControl(table(base), dmgen.EBM(counting, target.constraints), config())
    calls.clear()
    sampler.train(3)
    assert calls == [256] * 3


def test_a_text_that_the_base_cannot_say_is_named(base, has_ab):
    logits = base.logits.detach().clone()
    logits[0, 0] = -math.inf
    narrow = dmgen.TabularLM(base.vocab, logits, base.max_new_tokens, eos=base.eos)
    sampler = KLControl(table(base), dmgen.EBM(narrow, [dmgen.Pointwise(has_ab)]), config())
    with pytest.raises(
        FloatingPointError,
        match=r"\('a.*to which the base assigns probability 0, so KL\(π‖a\) is infinite",
    ):
        sampler.train(1)


def test_no_global_randomness(base, target):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    KLControl(table(base), target, config()).train(2)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------- a transformer as policy


def test_the_value_loss_trains_the_shared_trunk(gpt2_lm):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM(gpt2_lm, [dmgen.Moment(has_ab, 0.5)], [1.0])
    samples = gpt2_lm.sample(32, seed=0)
    grads = {}
    for coefficient in (0.0, 0.5):
        policy = gpt2_lm.copy()
        sampler = KLControl(
            policy, target, config(batch_size=32), value_coefficient=coefficient, gae_lambda=1.0
        )
        backward(with_values(sampler), samples)
        grads[coefficient] = torch.cat([p.grad.flatten() for p in sampler.state.parameters])
    # With λ = 1, G is what is still to come: the text's reward, since π = a.
    reward = target.values(samples)["ab"]
    policy.model.zero_grad()
    values = (
        policy.hidden_states(samples, grad=True)
        @ sampler.state.objective["value_head"].detach()[:-1]
    )
    error = (values + sampler.state.objective["value_head"].detach()[-1] - reward[:, None])[
        samples.mask
    ]
    (0.25 * error.square().mean()).backward()
    expected = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()]
    )
    found = (grads[0.5] - grads[0.0])[: len(expected)]
    assert expected.abs().max() > 0.01
    # float32, through two layers, as a difference of two gradients.
    torch.testing.assert_close(found, expected.to(found), rtol=1e-3, atol=1e-5)
    assert (grads[0.0][len(expected) :] == 0).all()


def test_micro_batches_of_a_transformer_change_nothing(gpt2_lm):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM(gpt2_lm, [dmgen.Moment(has_ab, 0.5)], [1.0])
    samples = gpt2_lm.sample(10, seed=0)
    by_size = []
    for size in (10, 3):
        settings = config(batch_size=10, micro_batch_size=size)
        sampler = with_values(KLControl(gpt2_lm.copy(), target, settings))
        backward(sampler, samples)
        by_size.append(torch.cat([p.grad.flatten() for p in sampler.state.parameters]))
    torch.testing.assert_close(*by_size, rtol=1e-3, atol=1e-5)


def test_a_transformer_is_trained_and_resumed(gpt2_lm, tmp_path):
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM(gpt2_lm, [dmgen.Pointwise(has_ab)])

    def make():
        settings = config(batch_size=64, learning_rate=1e-3, warmup_steps=0)
        return KLControl(gpt2_lm.copy(), target, settings, horizon=100)

    whole, second = make(), make()
    history = whole.train(20)
    assert history["moment/ab"].iloc[-5:].mean() > 1.5 * history["moment/ab"].iloc[:5].mean()
    make().train(9, out=tmp_path)
    second.resume(tmp_path)
    second.train(11, out=tmp_path)
    for one, other in zip(whole.state.parameters, second.state.parameters, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl_coeficient": 0.1}, TypeError, "kl_coeficient"),
        ({"beta": 0.1}, TypeError, "beta"),
        ({"kl_coefficient": "0.2"}, TypeError, "kl_coefficient must be a number, got '0.2'"),
        ({"clip": True}, TypeError, "clip must be a number"),
        ({"kl_coefficient": 0.0}, ValueError, "kl_coefficient must be above 0 and finite"),
        ({"kl_target": 0}, ValueError, "kl_target must be above 0 and finite"),
        ({"kl_target": math.nan}, ValueError, "kl_target"),
        ({"horizon": 255}, ValueError, "horizon must be at least 256 and finite"),
        ({"horizon": math.inf}, ValueError, "horizon must be above 0 and finite"),
        ({"gamma": 1.1}, ValueError, "gamma must be at least 0 and at most 1"),
        ({"gae_lambda": -0.1}, ValueError, "gae_lambda must be at least 0 and at most 1"),
        ({"clip": 0}, ValueError, "clip must be above 0 and at most 1"),
        ({"value_coefficient": -1}, ValueError, "value_coefficient must be at least 0"),
    ],
    ids=str,
)
def test_options_are_checked(options, error, message, base, target):
    with pytest.raises(error, match=message):
        KLControl(table(base), target, config(), **options)


def test_a_fixed_coefficient_needs_no_horizon(base, target):
    KLControl(table(base), target, config(), kl_target=None, horizon=1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"proposal_rule": "kl"}, "draws from the policy"),
        ({"base_share": 0.1}, "draws from the policy"),
        ({"first_batches_from_fit": True}, "draws from the policy"),
        ({"baseline": "z"}, "value head"),
        ({"backward_size": 8}, "belong to tokens"),
        ({"diagnose_every": 5}, "belong to tokens"),
    ],
    ids=str,
)
def test_settings_of_other_methods_are_refused(settings, reason, base, target):
    (name,) = settings
    with pytest.raises(ValueError, match=f"has no {name}.*{reason}"):
        KLControl(table(base), target, config(**settings))


def test_other_bad_arguments(base, target):
    with pytest.raises(ValueError, match="give no proposal"):
        KLControl(table(base), target, config(), proposal=base)
    with pytest.raises(ValueError, match=r"base\.copy\(\)"):
        KLControl(base, target, config())

    class Blind:
        parameters = base.copy().parameters

    with pytest.raises(TypeError, match="a Blind has none"):
        KLControl(Blind(), target, config())


# ------------------------------------------------------------------------ several processes

SCRIPT = textwrap.dedent(
    """
    import json, pathlib, sys, torch, dmgen
    from dmgen.training.methods import KLControl
    torch.set_num_threads(1)
    base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=1)
    has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
    target = dmgen.EBM(base, [dmgen.Pointwise(has_ab)])
    config = dmgen.TrainerConfig(batch_size=64, learning_rate=0.05, reuse=2, max_grad_norm=0.1)
    sampler = KLControl(base.copy(), target, config, horizon=500)
    history = sampler.train(12).drop(columns="seconds")
    numbers = {
        "logits": sampler.policy.logits.flatten().tolist(),
        "value_head": sampler.state.objective["value_head"].tolist(),
        "kl_coefficient after": [sampler.kl_coefficient],
    } | history.drop(columns="proposal_updated").to_dict("list")
    found = {"count": sampler.setup.processes.count, "numbers": numbers}
    out = pathlib.Path(sys.argv[1])
    (out / f"rank-{sampler.setup.processes.rank}.json").write_text(json.dumps(found))
    """
)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    (one,) = launch(script, tmp_path / "one", 1)
    first, second = launch(script, tmp_path / "two", 2)
    assert (one["count"], first["count"]) == (1, 2)
    # The processes agree to the last bit, and with the single one up to the order of sums.
    assert json.dumps(first["numbers"]) == json.dumps(second["numbers"])
    for name, alone in one["numbers"].items():
        together = torch.tensor(first["numbers"][name], dtype=torch.float64)
        torch.testing.assert_close(
            together,
            torch.tensor(alone, dtype=torch.float64),
            rtol=0,
            atol=1e-8,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
