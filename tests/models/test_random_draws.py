"""The block of uniforms, generators by purpose, and the exact distribution of `draw_tokens`."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmgen.models.random_draws import draw_tokens, stream, uniforms

LAST = 1 - 2.0**-53  # the largest uniform


class TestUniforms:
    def test_are_reproducible_and_lie_in_the_half_open_interval(self):
        u = uniforms(100, 7, seed=3, generator=None)
        assert u.shape == (100, 7)
        assert u.dtype == torch.float64
        assert 0 <= u.min() < u.max() < 1
        assert torch.equal(u, uniforms(100, 7, seed=3, generator=None))
        same = torch.Generator().manual_seed(3)
        assert torch.equal(u, uniforms(100, 7, seed=None, generator=same))
        assert not torch.equal(u, uniforms(100, 7, seed=None, generator=same))

    def test_without_a_seed_each_block_is_new_and_no_global_state_moves(self):
        before = torch.get_rng_state()
        np_before, py_before = np.random.get_state(), random.getstate()  # noqa: NPY002
        a, b = (uniforms(2, 2, seed=None, generator=None) for _ in range(2))
        assert not torch.equal(a, b)
        assert torch.equal(before, torch.get_rng_state())
        assert str(np_before) == str(np.random.get_state())  # noqa: NPY002
        assert py_before == random.getstate()

    @pytest.mark.parametrize(("n", "length"), [(0, 1), (-1, 1), (1, 0)])
    def test_refuse_empty_blocks(self, n, length):
        with pytest.raises(ValueError, match=f"n={n}, T={length}"):
            uniforms(n, length, seed=0, generator=None)

    def test_refuse_two_sources(self):
        with pytest.raises(ValueError, match="not both"):
            uniforms(1, 1, seed=0, generator=torch.Generator())


class TestStream:
    def test_purposes_share_a_seed_and_no_number(self):
        def first(purpose, seed):
            return torch.rand(4, generator=stream(purpose, seed)).tolist()

        assert first("fit", 0) == first("fit", 0)
        others = [first("train", 0), first("fit", 1), first("fit", -1), first("fit", None)]
        assert all(first("fit", 0) != other for other in others)
        assert first("fit", None) != first("fit", None)


def naive(logits, u):
    """Draw by plain inversion in the dtype of the logits, without the two levels."""
    edges = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(edges, u.to(edges).unsqueeze(-1), right=True).squeeze(-1)
    token = token.clamp(max=logits.shape[-1] - 1)
    return token, logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)


def bins(draw, logits, tokens):
    """Left and right edge in u of the bin of each token, by bisection: exact to 2^-53."""

    def first_u_past(bound):  # the smallest u whose token is at least bound
        low, high = torch.zeros(len(tokens)).double(), torch.ones(len(tokens)).double()
        for _ in range(54):
            middle = (low + high) / 2
            past = draw(logits.expand(len(tokens), -1), middle.clamp(max=LAST))[0] >= bound
            low, high = torch.where(past, low, middle), torch.where(past, middle, high)
        return high

    left = first_u_past(tokens)
    return torch.where(tokens == 0, 0.0, left), first_u_past(tokens + 1)


def long_tail(v, seed=0):
    """Zipf's law with exponent 1.5 over v tokens in random order: p from 0.4 down to 4e-8."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(v, generator=generator) + 1
    return (-1.5 * rank.double().log()).float()


class TestDistributionOfDrawTokens:
    """The bin of u that gives a token is as wide as the recorded probability says.

    A bin is known to 2^-53 on either side and the draw adds roundings of the same size, so that a
    probability above 1e-8 has a relative error below 1e-6 with room to spare.
    """

    def test_all_tokens_of_a_vocabulary_of_600(self):
        # 600 = 2 blocks and a part of a third.
        generator = torch.Generator().manual_seed(0)
        logits = 2.5 * torch.randn(600, generator=generator)
        logits[[0, 3, 255, 256, 599]] = -torch.inf
        in_support = torch.isfinite(logits).nonzero().squeeze(-1)
        left, right = bins(draw_tokens, logits, in_support)
        token, log_prob = draw_tokens(logits.expand(len(in_support), -1), (left + right) / 2)
        assert torch.equal(token, in_support)
        torch.testing.assert_close(right - left, log_prob.exp(), rtol=1e-6, atol=1e-15)
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)
        # The bins leave no gap, so that they leave no room for tokens of probability 0.
        torch.testing.assert_close(left[1:], right[:-1], rtol=0, atol=1e-15)

    def test_a_long_tail_over_49152_tokens(self):
        logits = long_tail(49_152)
        by_probability = logits.argsort()
        spread = by_probability[torch.linspace(0, 49_151, 14).long()]  # the rarest too
        ends = torch.tensor([0, 255, 256, 511, 49_151 - 256, 49_151])
        tokens = torch.cat([spread, ends])
        left, right = bins(draw_tokens, logits, tokens)
        token, log_prob = draw_tokens(logits.expand(len(tokens), -1), (left + right) / 2)
        assert torch.equal(token, tokens)
        torch.testing.assert_close(right - left, log_prob.exp(), rtol=1e-6, atol=0)

        left, right = bins(naive, logits, spread[:4])
        wrong = (right - left) / logits.softmax(-1)[spread[:4]].double() - 1
        assert wrong.abs().max() > 0.1  # the check tells: a float32 cumsum fails it by far

    def test_probabilities_are_those_of_the_softmax(self):
        # Rounding in float32: the logit less the maximum, exp, and the sum of a block of 256 (in
        # a tree, or in 8 lanes of 32).
        logits = long_tail(49_152)
        u = uniforms(200, 1, seed=0, generator=None).squeeze(-1)
        token, log_prob = draw_tokens(logits.expand(200, -1), u)
        exact = logits.double().log_softmax(-1)[token]
        rounding = 2.0**-24 * ((logits.max() - logits[token]).double() + 2 + 32)
        assert ((log_prob - exact).abs() <= rounding).all()

    def test_float64_is_exact(self):
        logits = 3 * torch.randn(50, 700, generator=torch.Generator().manual_seed(1)).double()
        u = uniforms(50, 1, seed=0, generator=None).squeeze(-1)
        token, log_prob = draw_tokens(logits, u)
        assert torch.equal(token, naive(logits, u)[0])
        exact = logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(log_prob, exact, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_is_drawn_as_if_alone_and_in_float32(self, dtype):
        # More rows than are taken at a time.
        generator = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(50, 49_152, generator=generator)).to(dtype)
        u = uniforms(50, 1, seed=0, generator=None).squeeze(-1)
        token, log_prob = draw_tokens(logits, u)
        for i in range(50):
            own = draw_tokens(logits[i : i + 1].float(), u[i : i + 1])
            assert (own[0].item(), own[1].item()) == (token[i], log_prob[i])

    def test_logits_are_left_as_they_are(self):
        logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
        before = logits.clone()
        draw_tokens(logits, torch.full((3,), 0.5).double())
        assert torch.equal(logits, before)


class TestEdgesOfDrawTokens:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("v", [1, 2, 255, 256, 257, 300, 1000])
    @pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, LAST])
    def test_a_token_of_probability_one_is_always_drawn(self, v, u, dtype):
        only = torch.tensor(sorted({0, v // 2, v - 1}))
        logits = torch.full((len(only), v), -torch.inf, dtype=dtype)
        logits[range(len(only)), only] = 700.0
        token, log_prob = draw_tokens(logits, torch.full((len(only),), u).double())
        assert torch.equal(token, only)
        assert (log_prob == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_tokens_of_probability_zero_around_the_edges_are_never_drawn(self, dtype):
        # Blocks of probability 0 at either end, and single tokens beside edges.
        logits = torch.randn(4 * 256 + 100, generator=torch.Generator().manual_seed(0)).to(dtype)
        logits[:300] = -torch.inf
        logits[700:] = -torch.inf
        logits[[511, 512, 600]] = -torch.inf
        left, right = bins(draw_tokens, logits, torch.arange(300, 700))
        u = torch.cat([left, right.clamp(max=LAST), torch.tensor([0.0, LAST]).double()])
        u = torch.cat([u, torch.nextafter(u, u.new_tensor(-1)).clamp(min=0)])
        token, log_prob = draw_tokens(logits.expand(len(u), -1), u)
        assert torch.isfinite(logits[token]).all()
        assert torch.isfinite(log_prob).all()

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        v=st.integers(1, 700),
        # Below the maximum by 87 nats float32 starts to lose digits, and 2^-53 is 37 nats away.
        scale=st.sampled_from([0.0, 1.0, 8.0]),
        zero_fraction=st.floats(0, 0.99),
        u=st.one_of(
            st.floats(0, LAST), st.sampled_from([0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-52, LAST])
        ),
    )
    def test_the_token_is_in_the_support(self, seed, v, scale, zero_fraction, u):
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(3, v, generator=generator)
        logits[torch.rand(3, v, generator=generator) < zero_fraction] = -torch.inf
        logits[:, torch.randint(v, (1,), generator=generator)] = 0.0
        token, log_prob = draw_tokens(logits, torch.tensor([u, 0.0, LAST], dtype=torch.float64))
        chosen = logits.double().log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        assert torch.isfinite(chosen).all()
        gap = logits.amax(-1) - logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        assert ((log_prob - chosen).abs() <= 2.0**-24 * (gap.double() + 34)).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("v", [3, 300])
    def test_nan_stays_in_its_row_and_the_token_stays_a_legal_input(self, bad, v):
        logits = torch.zeros(3, v)
        logits[1, 1] = bad
        token, log_prob = draw_tokens(logits, torch.full((3,), 0.99).double())
        assert ((token >= 0) & (token < v)).all()
        assert math.isnan(log_prob[1])
        assert log_prob[[0, 2]].tolist() == pytest.approx([-math.log(v)] * 2)
