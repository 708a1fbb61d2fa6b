"""The formulas of KL-controlled PPO against their plain definitions, token by token."""

import pytest
import torch

from dmgen.training.ppo import adapted, gae, ppo_loss, token_rewards, whiten


def random_batch(seed, n=7, length=5):
    """A mask of texts of unequal lengths, and a maker of columns that are 0 after their end."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = torch.randint(1, length + 1, (n,), generator=generator)
    n_tokens[0] = length
    mask = torch.arange(length) < n_tokens[:, None]

    def column(scale=1.0):
        x = scale * torch.randn(n, length, generator=generator, dtype=torch.float64)
        return torch.where(mask, x, 0.0)

    return mask, column


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_sum_that_defines_it(seed, gamma, lam):
    mask, column = random_batch(seed)
    rewards, values = column(), column()
    found = gae(rewards, values, gamma, lam)
    for i, n_tokens in enumerate(mask.sum(-1).tolist()):
        r, v = rewards[i].tolist(), [*values[i, :n_tokens].tolist(), 0.0]
        for t in range(mask.shape[1]):
            expected = sum(
                (gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s])
                for s in range(t, n_tokens)
            )
            assert found[i, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_with_lambda_1_the_advantage_is_what_came_less_what_was_expected():
    _, column = random_batch(3)
    rewards, values = column(), column()
    to_come = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(gae(rewards, values, 1.0, 1.0), to_come - values)
    assert not torch.allclose(gae(rewards, values, 1.0, 0.95), to_come - values)


def test_the_reward_comes_with_the_last_token_and_every_token_pays_its_kl():
    mask, column = random_batch(4)
    log_old, log_base = column(), column()
    reward = torch.randn(len(mask), generator=torch.Generator().manual_seed(1)).double()
    found = token_rewards(reward, log_old, log_base, mask, 0.3)
    for i, n_tokens in enumerate(mask.sum(-1).tolist()):
        for t in range(mask.shape[1]):
            expected = -0.3 * (log_old[i, t] - log_base[i, t]).item() if t < n_tokens else 0.0
            expected += reward[i].item() if t == n_tokens - 1 else 0.0
            assert found[i, t].item() == pytest.approx(expected, rel=1e-12)


def test_whitened_is_of_mean_0_and_variance_1_over_the_real_tokens():
    mask, column = random_batch(5)
    x = column(scale=30.0) + 100 * mask
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].var(correction=0).item() == pytest.approx(1, rel=1e-8)
    assert (white[~mask] == 0).all()
    # What stands in the padding, and how much of it there is, makes no difference.
    wider = torch.nn.functional.pad(x.masked_fill(~mask, 77.0), (0, 3), value=-5.0)
    again = whiten(wider, torch.nn.functional.pad(mask, (0, 3)))
    torch.testing.assert_close(again[:, :5], white, rtol=0, atol=0)
    # Advantages that are all equal say nothing, and one token is not a division by 0.
    assert (whiten(3 * mask.double(), mask) == 0).all()
    assert whiten(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).item() == 0


def slow_ppo(log_pi, values, advantage, log_old, returns, old_values, clip, coefficient):
    """The loss of one token from its definition, with what each maximum chose."""
    ratio = torch.exp(log_pi - log_old)
    clipped = torch.tensor(min(max(ratio.item(), 1 - clip), 1 + clip), dtype=torch.float64)
    policy_terms = [-advantage * ratio, -advantage * clipped]
    if clipped == ratio:
        policy_terms = policy_terms[:1]
    moved = values - old_values
    near = old_values + min(max(moved.item(), -clip), clip)
    value_terms = [(values - returns) ** 2, (near - returns) ** 2]
    if abs(moved.item()) <= clip:
        value_terms = value_terms[:1]
    chosen = [int(torch.stack(terms).argmax()) for terms in (policy_terms, value_terms)]
    loss = policy_terms[chosen[0]] + coefficient * 0.5 * value_terms[chosen[1]]
    return loss, tuple(chosen)


def test_the_ppo_loss_is_its_definition_with_both_clips():
    _, column = random_batch(6, n=20)
    log_pi, values = column(0.4).requires_grad_(), column(0.4).requires_grad_()
    fixed = [column(), column(0.4), column(), column(0.4)]
    found = ppo_loss(log_pi, values, *fixed, clip=0.2, value_coefficient=0.7)
    slow, branches = [], set()
    for i in range(found.shape[0]):
        for t in range(found.shape[1]):
            loss, chosen = slow_ppo(
                log_pi[i, t], values[i, t], *(x[i, t] for x in fixed), clip=0.2, coefficient=0.7
            )
            slow.append(loss)
            branches.add(chosen)
    assert branches == {(0, 0), (0, 1), (1, 0), (1, 1)}  # each clip was in force, and was not
    expected = torch.stack(slow).view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for x in (log_pi, values):
        ours, theirs = (
            torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0]
            for y in (found, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),
        (6.6, 0.2 * (1 + 0.1 * 256 / 10_000)),
        (5.7, 0.2 * (1 - 0.05 * 256 / 10_000)),
        (100.0, 0.2 * (1 + 0.2 * 256 / 10_000)),
        (0.0, 0.2 * (1 - 0.2 * 256 / 10_000)),
        (-3.0, 0.2 * (1 - 0.2 * 256 / 10_000)),  # an estimate can be negative
    ],
)
def test_the_coefficient_follows_the_error_up_to_a_fifth(kl, expected):
    assert adapted(0.2, kl, 6.0, 10_000, 256) == pytest.approx(expected, rel=1e-14)
