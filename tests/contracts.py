"""Checks that every `LanguageModel` must pass, of a model and all of its texts.

Each check takes `(model, space, tolerance)`: a model, every text of its space once (see
`every_text`), and the largest error of one text's log-probability in nats that the model's
precision allows.

Use it so:

    @pytest.mark.parametrize("check", contracts.CHECKS, ids=contracts.name)
    def test_contract(check):
        check(model, contracts.every_text(5, 3, eos=1), contracts.FLOAT32)
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dmgen.models import Samples

FLOAT64 = 1e-12
# Of the tiny models here: 8 tokens, each from a sum of 16 or 32 products of size 10 at most, some
# ten layers deep: 8 * 10 * sqrt(32) * 10 * 2**-24. Ten times below the promise.
FLOAT32 = 1e-4
N_DRAWS = 10_000
# One false alarm in a million seeds; the wrong distributions below are rejected at the same level.
LEVEL = 1e-6


def every_text(n_tokens: int, length: int, *, eos: int, prompt: str = "") -> Samples:
    """Return every text of at most `length` tokens once, with log-probability 0 and no strings."""
    letters = [token for token in range(n_tokens) if token != eos]
    heads = [head for used in range(length + 1) for head in itertools.product(letters, repeat=used)]
    tokens = torch.tensor([[*head] + [eos] * (length - len(head)) for head in heads])
    is_eos = tokens == eos
    mask = (is_eos.cumsum(-1) - is_eos.long()) == 0
    n = len(heads)
    return Samples(tokens, mask, torch.zeros(n, dtype=torch.float64), [""] * n, [prompt] * n)


def probabilities_sum_to_one(model: Any, space: Samples, tolerance: float) -> None:
    # Errors of at most tolerance in every log-probability move the sum by a factor exp(tolerance).
    total = model.log_prob(space).exp().sum().item()
    assert abs(math.log(total)) <= tolerance
    # The same holds for shorter texts, and a space with one text missing is noticed.
    heads = _heads(space, space.longest - 1)
    assert abs(math.log(model.log_prob(heads).exp().sum().item())) <= tolerance
    likely = int(model.log_prob(space).argmax())
    rest = space[[i for i in range(len(space)) if i != likely]]
    assert abs(math.log(model.log_prob(rest).exp().sum().item())) > 10 * tolerance


def sampled_log_prob_is_scored_log_prob(model: Any, space: Samples, tolerance: float) -> None:
    samples = _draw(model, space, 500)
    torch.testing.assert_close(
        model.log_prob(samples), samples.log_prob, rtol=0, atol=tolerance, check_device=False
    )
    assert samples.log_prob.dtype == torch.float64
    assert (samples.n_tokens < samples.tokens.shape[1]).any() or not _ends(space)


def token_log_probs_sum_to_log_prob(model: Any, space: Samples, tolerance: float) -> None:
    per_token = model.token_log_prob(space)
    assert per_token.shape == space.tokens.shape
    assert (per_token[~space.mask] == 0).all()
    assert (per_token <= 0).all()
    # The sum itself is float64, so it is exact but for its own rounding.
    torch.testing.assert_close(
        model.log_prob(space), per_token.double().sum(-1), rtol=1e-12, atol=1e-12
    )
    known = model.token_log_prob(space, hidden=model.hidden_states(space))
    torch.testing.assert_close(known, per_token, rtol=0, atol=tolerance)


def batches_score_like_single_texts(model: Any, space: Samples, tolerance: float) -> None:
    order = torch.randperm(len(space), generator=torch.Generator().manual_seed(0))
    some = space[order[:25]]
    single = torch.cat([model.log_prob(text) for text in some.split(1)])
    for batch_size in (None, 1, 7):
        batched = model.log_prob(some, batch_size=batch_size)
        torch.testing.assert_close(batched, single, rtol=0, atol=tolerance)
    torch.testing.assert_close(model.log_prob(space)[order[:25]], single, rtol=0, atol=tolerance)
    assert model.log_prob(space[:0]).shape == (0,)
    assert model.token_log_prob(space[:0]).shape == space[:0].tokens.shape


def batch_size_changes_no_draw(model: Any, space: Samples, tolerance: float) -> None:
    whole = _draw(model, space, 20)
    for batch_size in (1, 7, 20, 1000):
        parts = _draw(model, space, 20, batch_size=batch_size)
        assert torch.equal(parts.tokens, whole.tokens)
        assert torch.equal(parts.mask, whole.mask)
        assert parts.texts == whole.texts
        torch.testing.assert_close(parts.log_prob, whole.log_prob, rtol=0, atol=tolerance)


def padding_changes_nothing(model: Any, space: Samples, tolerance: float) -> None:
    expected = model.token_log_prob(space)
    scored = model.token_log_prob(_padded(space))
    width = space.tokens.shape[1]
    torch.testing.assert_close(scored[:, :width], expected, rtol=0, atol=tolerance)
    assert (scored[:, width:] == 0).all()

    short = _draw(model, space, 40, max_new_tokens=1)
    long = _draw(model, space, 40)
    both = Samples.cat([short, long])
    assert both.tokens.shape == (80, long.tokens.shape[1])
    separate = torch.cat([model.log_prob(short), model.log_prob(long)])
    torch.testing.assert_close(model.log_prob(both), separate, rtol=0, atol=tolerance)
    assert (both.n_tokens[:40] == 1).all()


def hidden_states_depend_on_the_prefix_alone(model: Any, space: Samples, tolerance: float) -> None:
    states = model.hidden_states(space)
    assert states.shape[:-1] == space.tokens.shape
    assert not states.requires_grad
    assert (states[~space.mask] == 0).all()
    # States are of size 1, as the log-probabilities are, so their errors are as large at most.
    of_prefix: dict[tuple[int, ...], torch.Tensor] = {}
    for key, row in zip(keys(space), states, strict=True):
        for t in range(len(key)):
            known = of_prefix.setdefault(key[:t], row[t])
            torch.testing.assert_close(row[t], known, rtol=0, atol=tolerance)
    # States differ after different last tokens; a model may forget earlier ones.
    for one, other in itertools.combinations(of_prefix, 2):
        if len(one) == len(other) and one[-1:] != other[-1:]:
            assert (of_prefix[one] - of_prefix[other]).abs().max() > 10 * tolerance


def hidden_states_of_batches_and_padding(model: Any, space: Samples, tolerance: float) -> None:
    expected = model.hidden_states(space)
    order = torch.randperm(len(space), generator=torch.Generator().manual_seed(0))[:25]
    for batch_size in (None, 1, 7):
        states = model.hidden_states(space[order], batch_size=batch_size)
        torch.testing.assert_close(states, expected[order], rtol=0, atol=tolerance)
    wide = model.hidden_states(_padded(space))
    width = space.tokens.shape[1]
    torch.testing.assert_close(wide[:, :width], expected, rtol=0, atol=tolerance)
    assert (wide[:, width:] == 0).all()
    assert model.hidden_states(space[:0]).shape == expected[:0].shape


def seed_and_generator_own_the_randomness(model: Any, space: Samples, tolerance: float) -> None:
    del tolerance
    before = global_states()
    first, again, other = (_draw(model, space, 50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_prob, again.log_prob)
    assert not torch.equal(first.tokens, other.tokens)

    generator = torch.Generator().manual_seed(1)
    same = _draw(model, space, 50, seed=None, generator=generator)
    later = _draw(model, space, 50, seed=None, generator=generator)
    assert torch.equal(first.tokens, same.tokens)
    assert not torch.equal(same.tokens, later.tokens)

    free = [_draw(model, space, 50, seed=None) for _ in range(2)]
    assert not torch.equal(free[0].tokens, free[1].tokens)
    assert before == global_states()


def frequencies_follow_the_probabilities(model: Any, space: Samples, tolerance: float) -> None:
    del tolerance
    samples = _draw(model, space, N_DRAWS, seed=11)
    log_prob = model.log_prob(space)
    assert chi_square_p(samples, space, log_prob) > LEVEL
    # The test can tell: a temperature off by a quarter, and a distribution without the EOS.
    hotter = (log_prob / 1.25).log_softmax(0)
    assert chi_square_p(samples, space, hotter) < LEVEL
    if _ends(space):
        per_token = model.token_log_prob(space).double()
        ended = space.n_tokens < space.tokens.shape[1]
        of_eos = per_token[range(len(space)), space.n_tokens - 1].where(ended, 0.0)
        assert chi_square_p(samples, space, (log_prob - of_eos).log_softmax(0)) < LEVEL


def copy_is_independent_and_trainable(model: Any, space: Samples, tolerance: float) -> None:
    base = model.log_prob(space)
    assert not base.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    copy = model.copy()
    assert all(p.requires_grad for p in copy.parameters())
    torch.testing.assert_close(copy.log_prob(space), base, rtol=0, atol=tolerance)
    assert not copy.log_prob(space).requires_grad

    saved = {name: value.clone() for name, value in copy.state_dict().items()}
    optimizer = torch.optim.SGD(copy.parameters(), lr=0.1)
    copy.log_prob(space[:1], grad=True).sum().neg().backward()
    optimizer.step()
    assert copy.log_prob(space)[0] > base[0] + 10 * tolerance
    assert torch.equal(model.log_prob(space), base)

    copy.load_state_dict(saved)
    torch.testing.assert_close(copy.log_prob(space), base, rtol=0, atol=tolerance)


def expected_score_is_zero(model: Any, space: Samples, tolerance: float) -> None:
    # E_p[grad log p] = 0: the gradient of the sum of all probabilities, which is constant.
    copy = model.copy()
    log_prob = copy.log_prob(space, grad=True)
    weights = log_prob.detach().exp()
    parameters = list(copy.parameters())
    mean = torch.autograd.grad(
        (weights.to(log_prob) * log_prob).sum(), parameters, retain_graph=True
    )
    single = torch.autograd.grad(log_prob[0], parameters)
    size = max(g.abs().max().item() for g in single)
    assert size > 0
    assert max(g.abs().max().item() for g in mean) <= tolerance * max(size, 1)


def bad_arguments_are_refused(model: Any, space: Samples, tolerance: float) -> None:
    del tolerance
    prompt = space.prompts[0]
    with pytest.raises(ValueError, match="n=0"):
        model.sample(0, prompt=prompt)
    with pytest.raises(ValueError, match="seed or generator, not both"):
        model.sample(1, prompt=prompt, seed=0, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"0"):
        model.sample(1, prompt=prompt, max_new_tokens=0)
    with pytest.raises(TypeError, match="temperature"):
        model.sample(1, prompt=prompt, temperature=0.5)


CHECKS: list[Callable[[Any, Samples, float], None]] = [
    probabilities_sum_to_one,
    sampled_log_prob_is_scored_log_prob,
    token_log_probs_sum_to_log_prob,
    batches_score_like_single_texts,
    batch_size_changes_no_draw,
    padding_changes_nothing,
    hidden_states_depend_on_the_prefix_alone,
    hidden_states_of_batches_and_padding,
    seed_and_generator_own_the_randomness,
    frequencies_follow_the_probabilities,
    copy_is_independent_and_trainable,
    expected_score_is_zero,
    bad_arguments_are_refused,
]


def name(check: Callable[..., None]) -> str:
    return check.__name__


def chi_square_p(samples: Samples, space: Samples, log_prob: torch.Tensor) -> float:
    """Return the probability of counts this far from `log_prob` of `space`, if that is true.

    Texts expected fewer than 10 times share one bin, so that the chi-square approximation holds. A
    text outside of the space has probability 0.
    """
    index = {key: i for i, key in enumerate(keys(space))}
    counts = np.zeros(len(space))
    for key in keys(samples):
        if key not in index:
            return 0.0
        counts[index[key]] += 1
    expected = log_prob.double().cpu().softmax(0).numpy() * len(samples)
    rare = expected < 10
    bins = counts[~rare], expected[~rare]
    if rare.any():
        bins = tuple(
            np.append(b, x[rare].sum()) for b, x in zip(bins, (counts, expected), strict=True)
        )
    if bins[1][-1] < 10:  # the rare texts together are rare: into the bin before
        bins = tuple(np.append(b[:-2], b[-2] + b[-1]) for b in bins)
    return float(stats.chisquare(bins[0], bins[1]).pvalue)


def _draw(model: Any, space: Samples, n: int, *, seed: int | None = 0, **options: Any) -> Samples:
    options.setdefault("max_new_tokens", space.tokens.shape[1])
    return model.sample(n, prompt=space.prompts[0], seed=seed, **options)


def _padded(space: Samples) -> Samples:
    """Return the same texts with 20 more columns and illegal ids where masked."""
    # Masked ids must not be looked up.
    garbage = space.tokens.masked_fill(~space.mask, 10**9)
    return Samples(
        torch.nn.functional.pad(garbage, (0, 20), value=-5),
        torch.nn.functional.pad(space.mask, (0, 20)),
        space.log_prob,
        space.texts,
        space.prompts,
    )


def keys(samples: Samples) -> list[tuple[int, ...]]:
    return [
        tuple(row[:used])
        for row, used in zip(samples.tokens.tolist(), samples.n_tokens.tolist(), strict=True)
    ]


def _heads(space: Samples, length: int) -> Samples:
    """Return each text of the space once, cut off after `length` tokens."""
    first = {key[:length]: i for i, key in reversed(list(enumerate(keys(space))))}
    rows = space[sorted(first.values())]
    return Samples(
        rows.tokens[:, :length], rows.mask[:, :length], rows.log_prob, rows.texts, rows.prompts
    )


def _ends(space: Samples) -> bool:
    return bool((space.n_tokens < space.tokens.shape[1]).any())


def global_states() -> list[str]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is what is watched
    return [str(torch.get_rng_state().tolist()), str(numpy_state), str(random.getstate())]
