"""The size and the composition of forward passes."""

import contracts
import pytest
import torch
from worlds import lm_of, pass_shapes, texts_of_lengths, tied_llama, tiny_gpt2, tiny_llama

from dmgen.models.hf import batching, scoring
from dmgen.models.hf.decoding import cache_argument
from dmgen.models.hf.kv_cache import buffered_cache
from dmgen.models.hf.precision import autocast


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_decoding_counts_keys_and_values(make, dtype, monkeypatch):
    lm = make(dtype)
    cache = buffered_cache(lm.model.config, 7)
    with torch.no_grad(), autocast(lm.device, lm.dtype):
        past = {cache_argument(lm.model): cache}
        lm.model(torch.zeros(5, 2, dtype=torch.long), **past, use_cache=True)
    held = sum(x.key_buffer.nbytes + x.value_buffer.nbytes for x in cache.layers)
    assert held == 5 * 7 * batching.cache_bytes(lm.model, dtype)
    # Room for five such texts, and for no text of ten times the length, of which one is decoded.
    monkeypatch.setattr(batching, "_CACHE_BYTES", held)
    assert batching.texts_per_draw(lm.model, 7, dtype) == 5
    assert batching.texts_per_draw(lm.model, 70, dtype) == 1
    assert len(lm.sample(12, seed=0)) == 12


def test_a_model_that_names_no_heads_has_no_bound_by_its_cache():
    lm = tiny_gpt2()
    config = type("Config", (), {"get_text_config": lambda self: self, "vocab_size": 4})()
    model = type("Model", (), {"config": config, "parameters": lm.model.parameters})()
    assert batching.cache_bytes(model, torch.float32) == 0
    assert batching.texts_per_draw(model, 10**9, torch.float32) == 1024


def test_texts_of_like_length_share_a_pass():
    lm = lm_of(tied_llama, scale=0.3)
    texts = texts_of_lengths(1, 5, 1, 4, 2, 5, 2)
    for call in (lm.log_prob, lm.hidden_states):
        shapes = pass_shapes(lm, lambda call=call: call(texts, batch_size=2))
        assert shapes == [(2, 5), (2, 4), (2, 2), (1, 1)]
    single = torch.cat([lm.log_prob(text) for text in texts.split(1)])
    torch.testing.assert_close(
        lm.log_prob(texts, batch_size=2), single, rtol=0, atol=contracts.FLOAT32
    )


def test_passes_are_filled_by_memory(monkeypatch):
    lm = lm_of(tied_llama, scale=0.3)
    monkeypatch.setattr(batching, "_PASS_TOKENS_ON_CPU", 12)
    texts = texts_of_lengths(1, 5, 1, 4, 2, 5, 2, prompt="a")
    assert pass_shapes(lm, lambda: lm.log_prob(texts)) == [(2, 5), (2, 4), (3, 2)]


def test_how_many_texts_have_ended_makes_few_shapes(monkeypatch):
    """Few shapes matter because a library may keep compiled code for each of them."""
    lm = lm_of(tied_llama, scale=0.3, length=12)
    monkeypatch.setattr(batching, "_PASS_TOKENS_ON_CPU", 400)
    n_states, real = set(), scoring.chosen_log_prob
    monkeypatch.setattr(
        scoring, "chosen_log_prob", lambda h, *rest: n_states.add(len(h)) or real(h, *rest)
    )

    def run():
        samples = [lm.sample(128, seed=seed) for seed in range(10)]
        counts = {int(s.mask.sum()) for s in samples}
        assert len(counts) > 5
        for s in samples:
            lm.log_prob(s)

    n_rows = {n for n, _ in pass_shapes(lm, run)}
    assert all(n % 16 == 0 for n in n_rows | n_states)
    assert {16, 32, 64} < n_rows  # finished texts are dropped, if by sixteens


def test_how_many_texts_are_scored_makes_few_shapes():
    """Such as those of a batch that have a gradient, another number at every step."""
    lm = lm_of(tied_llama, scale=0.3, length=3, dtype=torch.bfloat16)
    samples = lm.sample(48, seed=0)

    def run():
        for n in range(1, 49):
            lm.log_prob(samples[:n])

    assert {n for n, _ in pass_shapes(lm, run)} == {1, 2, 4, 8, 16, 32, 48}


@pytest.mark.parametrize("chunked", [True, False])
def test_rows_of_no_text_change_nothing(chunked, monkeypatch):
    policy = lm_of(tied_llama, scale=0.3, length=4, chunked_head=chunked).copy()
    samples = policy.sample(11, seed=0)

    def found():
        policy.model.zero_grad()
        log_prob = policy.log_prob(samples, grad=True)
        (log_prob @ torch.linspace(-1, 2, 11, dtype=torch.float64)).backward()
        grads = torch.cat([p.grad.flatten() for p in policy.parameters()])
        return log_prob.detach(), policy.hidden_states(samples), grads

    plain = found()
    monkeypatch.setattr(batching, "n_computed_rows", lambda n, *_: n + 5)
    rows = pass_shapes(policy, lambda: torch.testing.assert_close(
        found(), plain, rtol=1e-5, atol=1e-5
    ))  # fmt: skip
    assert {n for n, _ in rows} == {16}
