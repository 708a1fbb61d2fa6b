"""`chosen_log_prob`: equal to the plain definition in values and gradients, in bounded memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Largest

from dmgen.models.hf import chunked_log_softmax
from dmgen.models.hf.chunked_log_softmax import chosen_log_prob


class Products(TorchDispatchMode):
    """A mode that records the types of the factors of matrix products, and counts these."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.n = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
            self.n += 1
        return function(*args, **(kwargs or {}))


def layer(m, d, v, *, seed=0, dtype=torch.float64, size=1.0):
    """Hidden states, weight, bias, tokens, and a gradient of the log-probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = torch.randint(v, (m,), generator=generator)
    return size * normal(m, d), normal(v, d), normal(v), tokens, normal(m)


def plain(hidden, weight, bias, tokens):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def value_and_gradients(function, inputs, tokens, grad):
    """Return the result, and the gradient of `grad · result` for the inputs that are not None."""
    inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
    value = function(*inputs, tokens)
    found = torch.autograd.grad(value @ grad, [x for x in inputs if x is not None])
    return [value.detach(), *found]


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch):
    """Let the blocks of these small layers be as narrow as `chunk` requests."""
    monkeypatch.setattr(chunked_log_softmax, "_MIN_WIDTH", 1)


class TestEqualsThePlainDefinition:
    @settings(max_examples=60, deadline=None)
    @given(
        m=st.integers(0, 6),
        d=st.integers(1, 4),
        v=st.integers(1, 9),
        chunk=st.integers(1, 60),
        keep=st.sampled_from([0, 2**20]),
        with_bias=st.booleans(),
        seed=st.integers(0, 10**6),
    )
    def test_in_values_and_gradients(self, m, d, v, chunk, keep, with_bias, seed):
        hidden, weight, bias, tokens, grad = layer(m, d, v, seed=seed)
        inputs = (hidden, weight, bias if with_bias else None)

        def chunked(*inputs):
            return chosen_log_prob(*inputs, chunk=chunk, keep=keep)

        found = value_and_gradients(chunked, inputs, tokens, grad)
        expected = value_and_gradients(plain, inputs, tokens, grad)
        # Sums of at most 9 terms of size 20 at most, some ten operations deep.
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=10 * 9 * 20 * 2.0**-53)

    @pytest.mark.parametrize("keep", [0, 2**20])
    def test_gradients_are_the_slopes_of_the_values(self, keep):
        hidden, weight, bias, tokens, _ = layer(4, 3, 7)
        inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

        def log_prob(*inputs):
            return chosen_log_prob(*inputs, tokens, chunk=8, keep=keep)

        assert torch.autograd.gradcheck(log_prob, inputs)

    def test_large_logits_do_not_overflow(self):
        hidden, weight, bias, tokens, _ = layer(5, 3, 8, dtype=torch.float32, size=1e4)
        found = chosen_log_prob(hidden, weight, bias, tokens, chunk=10)
        assert torch.isfinite(found).all()
        exact = plain(hidden.double(), weight.double(), bias.double(), tokens)
        # Each logit is a sum of 4 terms of 1e5 at most; the result is a difference of two.
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2 * 4 * 1e5 * 2.0**-24)

    @pytest.mark.parametrize("keep", [0, 2**20])
    def test_a_block_of_forbidden_tokens(self, keep):
        hidden, weight, bias, tokens, grad = layer(6, 3, 8)
        bias[:4] = -math.inf
        tokens = tokens % 4 + 4

        def chunked(*inputs):
            return chosen_log_prob(*inputs, chunk=12, keep=keep)  # two tokens a block

        found = value_and_gradients(chunked, (hidden, weight, bias), tokens, grad)
        expected = value_and_gradients(plain, (hidden, weight, bias), tokens, grad)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        forbidden = chosen_log_prob(hidden, weight, bias, tokens - 4, chunk=12)
        assert (forbidden == -math.inf).all()

    def test_nan_stays_nan(self):
        hidden, weight, bias, tokens, _ = layer(3, 2, 5)
        weight[2] = math.nan
        assert chosen_log_prob(hidden, weight, bias, tokens, chunk=3).isnan().all()

    def test_a_weight_tied_to_the_embedding_gets_both_gradients(self):
        _, weight, _, tokens, grad = layer(6, 3, 5)
        found, expected = (
            value_and_gradients(
                # The next token from the embedding of this one: the weight is used twice.
                lambda w, t, f=function: f(torch.tanh(w[t.flip(0)]), w, None, t),
                (weight,),
                tokens,
                grad,
            )
            for function in (chosen_log_prob, plain)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class TestGradients:
    def test_only_what_is_trained_gets_one(self):
        hidden, weight, bias, tokens, _ = layer(4, 3, 6)
        for trained in range(3):
            inputs = [x.detach().clone() for x in (hidden, weight, bias)]
            inputs[trained].requires_grad_()
            chosen_log_prob(*inputs, tokens).sum().backward()
            assert [x.grad is not None for x in inputs] == [i == trained for i in range(3)]

    def test_twice_is_refused(self):
        hidden, weight, bias, tokens, _ = layer(4, 3, 6)
        hidden.requires_grad_()
        value = chosen_log_prob(hidden, weight, bias, tokens).sum()
        with pytest.raises(RuntimeError, match=r"no second derivative: use .*chunked_head=False"):
            torch.autograd.grad(value, hidden, create_graph=True)

    def test_weights_changed_in_between_are_noticed(self):
        hidden, weight, bias, tokens, _ = layer(4, 3, 6)
        weight.requires_grad_()
        value = chosen_log_prob(hidden, weight, bias, tokens).sum()
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


class TestPrecision:
    """Componentwise bounds on rounding, for the fast and the plain path against float64."""

    # bfloat16 has 8 significant bits, float32 has 24.
    UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # noqa: RUF012

    def bounds(self, dtype, hidden, weight, bias, tokens, grad):
        """Return the exact value and gradients, and a bound on the error of each.

        A logit is off by u of itself when it is rounded, and by D u₃₂ of the sum of its terms'
        sizes when it is summed up; the largest such error e moves a log-probability by 2e (and the
        log-sum-exp of 2^10 float32 terms at most by some 2^10 u₃₂), so p by a factor of
        exp(± that). Rounding the slope and then each product costs u each, and sums over M or V
        terms cost u₃₂ times their number.
        """
        u, u32 = self.UNIT[dtype], 2.0**-24
        m, d = hidden.shape
        v = len(weight)
        inputs = [x.double() for x in (hidden, weight, bias)]
        exact = value_and_gradients(plain, inputs, tokens, grad.double())
        hidden, weight, bias = inputs
        terms = hidden.abs() @ weight.abs().T + bias.abs()
        off = (u * (hidden @ weight.T + bias).abs() + (d + 1) * u32 * terms).max()
        value_off = 2 * off + (v + 20) * u32
        sizes = (hidden @ weight.T + bias).softmax(-1)
        sizes[range(m), tokens] += 1
        sizes *= grad.double().abs().unsqueeze(-1)  # (M, V)
        relative = torch.expm1(value_off) + 2 * u + (m + v) * u32
        return exact, [
            value_off,
            relative * (sizes @ weight.abs()),
            relative * (sizes.T @ hidden.abs()),
            relative * sizes.sum(0),
        ]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("path", ["again", "kept", "plain"])
    def test_is_within_rounding(self, dtype, path):
        hidden, weight, bias, tokens, grad = layer(40, 24, 500, dtype=torch.float32, size=0.2)
        # What autocast makes of the inputs is exact in both.
        hidden, weight, bias = (x.to(dtype).float() for x in (hidden, weight, bias))
        exact, allowed = self.bounds(dtype, hidden, weight, bias, tokens, grad)

        def lifted(hidden, weight, bias, tokens):
            if path != "plain":
                keep = 2**20 if path == "kept" else 0
                return chosen_log_prob(hidden, weight, bias, tokens, chunk=40 * 64, keep=keep)
            logits = torch.nn.functional.linear(hidden, weight, bias).float()
            return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = value_and_gradients(lifted, (hidden, weight, bias), tokens, grad)
        for one, other, error in zip(found, exact, allowed, strict=True):
            assert one.dtype == torch.float32
            assert ((one.double() - other).abs() <= error).all()
        # The bounds tell: the same with the tokens' own terms left out, or a fifth more of all.
        for one, other, error in zip(found[1:], exact[1:], allowed[1:], strict=True):
            assert ((1.2 * one.double() - other).abs() > error).any()

    @pytest.mark.parametrize("keep", [0, 2**20])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_products_are_made_in_the_precision_of_the_forward_pass(self, dtype, keep):
        hidden, weight, bias, tokens, grad = layer(7, 4, 30, dtype=torch.float32)
        slopes = []
        for inside in (False, True):
            weight = weight.detach().requires_grad_()
            with Products() as products:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    value = chosen_log_prob(hidden, weight, bias, tokens, keep=keep)
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    value.backward(grad)
            assert products.dtypes == {dtype}
            slopes.append(weight.grad)
        assert torch.equal(*slopes)


class TestMemory:
    def test_no_more_logits_than_a_chunk_are_held(self):
        hidden, weight, bias, tokens, _ = layer(64, 4, 1000)
        inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
        with Largest() as chunked:
            chosen_log_prob(*inputs, tokens, chunk=64 * 100, keep=0).sum().backward()
        assert chunked.n == 64 * 100  # larger than the 4,000 of the weight
        with Largest() as all_at_once:
            plain(*inputs, tokens).sum().backward()
        assert all_at_once.n == 64 * 1000

    def test_few_probabilities_are_kept_and_not_computed_again(self):
        hidden, weight, bias, tokens, grad = layer(8, 3, 20)
        inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
        counts, slopes = [], []
        for keep in (8 * 20 * 8, 8 * 20 * 8 - 1):  # bytes of all of them, and one less
            with Products() as products:
                found = chosen_log_prob(*inputs, tokens, chunk=80, keep=keep)
                slopes.append(torch.autograd.grad(found @ grad, inputs))
            counts.append(products.n)
        # Two blocks: forward, and two products in the backward pass; or forward once more.
        assert counts == [2 * 3, 2 * 4]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("keep", [0, 2**20])
    def test_a_token_that_is_almost_certain_keeps_its_slope(self, keep):
        # In bfloat16 a p of 1 - 2^-10 is 1, and onehot - p were nothing.
        gap = math.log(2.0**10 - 1)
        hidden, weight = torch.tensor([[1.0]]), torch.tensor([[gap], [0.0]]).bfloat16().float()
        hidden.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = chosen_log_prob(hidden, weight, None, torch.tensor([0]), keep=keep)
        found.backward()
        p_other = 1 / (1 + math.exp(float(weight[0, 0])))
        # The only rounding that matters is that of p: one unit of bfloat16 for each factor.
        assert float(hidden.grad) == pytest.approx(p_other * float(weight[0, 0]), rel=3 * 2.0**-8)

    def test_the_graph_can_be_used_twice(self):
        hidden, weight, bias, tokens, grad = layer(8, 3, 20)
        hidden.requires_grad_()
        found = chosen_log_prob(hidden, weight, bias, tokens) @ grad
        first, second = (torch.autograd.grad(found, hidden, retain_graph=True)[0] for _ in "ab")
        assert torch.equal(first, second)


def test_without_a_gradient_nothing_is_kept(monkeypatch):
    """Keep nothing under `no_grad`, even if the weight requires a gradient."""
    calls, real = [], chunked_log_softmax._without
    monkeypatch.setattr(chunked_log_softmax, "_without", lambda *a: calls.append(1) or real(*a))
    hidden, weight, _, tokens, _ = layer(6, 4, 10)
    weight.requires_grad_()
    with torch.no_grad():
        chosen_log_prob(hidden, weight, None, tokens)
    assert not calls
    chosen_log_prob(hidden, weight, None, tokens)
    assert calls
