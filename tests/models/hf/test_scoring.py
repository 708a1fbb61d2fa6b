"""Scoring in blocks of the vocabulary: equality with the plain path, and memory."""

import contracts
import pytest
import torch
from worlds import Largest, gptj, gradients, lm_of, texts_of_lengths, tied_llama, tiny_gpt2

from dmgen.models import CausalLM, Samples
from dmgen.models.hf import scoring


class TestEqualsThePlainPath:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("make", [tied_llama, gptj, None], ids=["llama", "gptj", "gpt2"])
    def test_in_values_and_gradients(self, make, dtype):
        lm = tiny_gpt2(dtype) if make is None else lm_of(make, scale=0.3, dtype=dtype)
        policy, plain = lm.copy(), lm.copy()
        plain.chunked_head = False
        samples = Samples.cat([lm.sample(15, prompt=p, seed=0) for p in ("", "ab")])
        assert len(samples.n_tokens.unique()) > 2
        # Both round the same logits in the same way, but they may sum up in another order: in
        # bfloat16 that moves a logit by one unit, 2^-7 of 4, of each of 5 tokens.
        error = contracts.FLOAT32 if dtype == torch.float32 else 5 * 2 * 2.0**-7 * 4
        torch.testing.assert_close(
            policy.log_prob(samples), plain.log_prob(samples), rtol=0, atol=error
        )
        found, expected = gradients(policy, samples), gradients(plain, samples)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            # The same error in each of 30 texts, as a share of the whole.
            size = expected[name].norm()
            assert (gradient - expected[name]).norm() <= error * size + contracts.FLOAT32, name

    @pytest.mark.parametrize("chunked", [True, False])
    def test_from_hidden_states_too(self, chunked, monkeypatch):
        lm = lm_of(tied_llama, scale=0.3, chunked_head=chunked)
        policy, twin = lm.copy(), lm.copy()
        samples = Samples.cat([lm.sample(15, prompt=p, seed=0) for p in ("", "ab")])
        expected = gradients(twin, samples)
        n_passes, trunk = [], scoring.states
        monkeypatch.setattr(scoring, "states", lambda *a: n_passes.append(1) or trunk(*a))
        hidden = policy.hidden_states(samples, grad=True)
        n_passes.clear()
        found = policy.token_log_prob(samples, grad=True, hidden=hidden)
        assert not n_passes
        torch.testing.assert_close(
            found.detach(), twin.token_log_prob(samples), rtol=0, atol=contracts.FLOAT32
        )
        weights = torch.linspace(-1, 1, len(samples), dtype=torch.float64)
        (found.double().sum(-1) @ weights).backward()
        for name, parameter in policy.model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-4, atol=contracts.FLOAT32
            )

    def test_a_tied_embedding_gets_both_gradients(self):
        policy = lm_of(tied_llama, scale=0.3).copy()
        samples = policy.sample(30, prompt="ab", seed=0)
        both = gradients(policy, samples)["model.embed_tokens.weight"].clone()
        weight = policy.model.lm_head.weight.detach().clone()
        policy.model.lm_head.weight = torch.nn.Parameter(weight)  # no longer tied
        policy.model.zero_grad()
        parts = gradients(policy, samples)
        apart = parts["model.embed_tokens.weight"], parts["lm_head.weight"]
        assert all(part.norm() > 0.1 * both.norm() for part in apart)
        torch.testing.assert_close(both, sum(apart), rtol=0, atol=contracts.FLOAT32)

    def test_the_argument_turns_it_off(self):
        for off in (
            lm_of(tied_llama, scale=0.3, chunked_head=False),
            CausalLM.from_pretrained("tiny-bios-0.1", device="cpu", chunked_head=False),
        ):
            assert not off.chunked_head
            assert not off.copy().chunked_head


class TestMemory:
    def test_the_head_sees_unmasked_positions_only(self, monkeypatch):
        lm = lm_of(tied_llama, scale=0.3)
        rows, real = [], scoring.chosen_log_prob
        monkeypatch.setattr(
            scoring, "chosen_log_prob", lambda h, *rest: rows.append(len(h)) or real(h, *rest)
        )
        lm.log_prob(texts_of_lengths(*[1] * 30, *[5] * 3))
        assert rows == [48]  # the next multiple of 16 after 30 + 15, not 33 * 5

    @pytest.mark.parametrize("chunked", [True, False])
    def test_the_logits_of_all_positions_are_never_held(self, chunked, monkeypatch):
        v, n, length = 4000, 30, 5
        lm = lm_of(lambda _: tied_llama(v), scale=0.3, chunked_head=chunked)
        policy = lm.copy()
        texts = texts_of_lengths(*[length] * n)
        sizes = {"chunk": n * length * 300, "keep": 0}
        monkeypatch.setattr(scoring.chosen_log_prob, "__kwdefaults__", sizes)
        with Largest() as largest:
            policy.log_prob(texts, grad=True).sum().backward()
        # The largest tensor is then the weight itself, or its gradient.
        assert largest.n == (v * 16 if chunked else n * length * v)
