"""The buffered cache: equal to that of transformers, in models with caches of several kinds."""

import inspect

import contracts
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
)
from worlds import SIZES, letters, randomised, tiny_llama

from dmgen.models import CausalLM
from dmgen.models.hf import decoding
from dmgen.models.hf.kv_cache import buffered_cache


def test_equals_the_plain_cache(monkeypatch):
    lm = tiny_llama()
    fast = lm.sample(200, prompt="ab", max_new_tokens=5, seed=0)
    monkeypatch.setattr(decoding, "buffered_cache", lambda config, _: DynamicCache(config=config))
    plain = lm.sample(200, prompt="ab", max_new_tokens=5, seed=0)
    assert torch.equal(fast.tokens, plain.tokens)
    torch.testing.assert_close(fast.log_prob, plain.log_prob, rtol=0, atol=contracts.FLOAT32)


def test_keys_are_narrowed_once_and_not_at_every_token():
    # Under autocast, a rotary embedding in float32 widens them.
    layer = buffered_cache(LlamaConfig(vocab_size=5, **SIZES), 4).layers[0]
    values = torch.ones(2, 1, 1, 8, dtype=torch.bfloat16)
    for used in (1, 2):
        keys, _ = layer.update(torch.full((2, 1, 1, 8), 1 / 3), values)
        assert keys.dtype == torch.bfloat16
        assert torch.equal(keys, torch.full((2, 1, used, 8), 1 / 3).bfloat16())


@pytest.mark.parametrize(
    "make",
    [
        # one sliding layer, one that sees all
        lambda v: Gemma2ForCausalLM(Gemma2Config(vocab_size=v, **SIZES, sliding_window=2)),
        # the last two layers read the keys of the first two
        lambda v: Gemma3nForCausalLM(
            Gemma3nTextConfig(
                vocab_size=v,
                **SIZES | {"num_hidden_layers": 4, "intermediate_size": [32] * 4},
                num_kv_shared_layers=2,
                sliding_window=3,
                vocab_size_per_layer_input=v,
                hidden_size_per_layer_input=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
                activation_sparsity_pattern=[0.0] * 4,
            )
        ),
        # no positions, so no limit of the context either
        lambda v: BloomForCausalLM(BloomConfig(vocab_size=v, hidden_size=16, n_layer=2, n_head=2)),
        # a state in the place of a past, where transformers gives it a cache by that name
        pytest.param(
            lambda v: MambaForCausalLM(
                MambaConfig(vocab_size=v, hidden_size=16, num_hidden_layers=2, state_size=4)
            ),
            marks=pytest.mark.skipif(
                "cache" not in inspect.signature(MambaForCausalLM.forward).parameters,
                reason="this transformers names Mamba's cache otherwise",
            ),
        ),
    ],
    ids=["gemma2", "gemma3n", "bloom", "mamba"],
)
def test_sampling_equals_scoring(make):
    tokenizer = letters("<end>", eos="<end>")
    model = randomised(make(len(tokenizer)), scale=0.3, seed=0)
    lm = CausalLM(model, tokenizer, max_new_tokens=8)
    samples = lm.sample(60, prompt="abc", seed=0)
    assert 1 < samples.n_tokens.double().mean() < 8
    torch.testing.assert_close(
        lm.log_prob(samples), samples.log_prob, rtol=0, atol=contracts.FLOAT32
    )
    parts = lm.sample(60, prompt="abc", seed=0, batch_size=7)
    assert torch.equal(samples.tokens, parts.tokens)
