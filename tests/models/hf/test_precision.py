"""Half precision with hidden states in float32: a model and its copy are the same distribution."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from worlds import SIZES, letters, randomised, tiny_gpt2, tiny_llama

from dmgen.models import CausalLM


def tiny_gemma3():
    """Return a Gemma 3, which scales its embeddings, here by √24."""
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    config = Gemma3TextConfig(vocab_size=len(tokenizer), **SIZES | {"hidden_size": 24})
    model = randomised(Gemma3ForCausalLM(config), scale=0.3, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=4)


@pytest.mark.parametrize(
    ("make", "largest"),
    [(tiny_gpt2, 0.0), (tiny_llama, 0.0), (tiny_llama, 300.0), (tiny_gemma3, 0.0)],
)
def test_in_bfloat16_a_copy_is_the_same_law(make, largest):
    # A state of 300 in the residual stream, as real models have some: in bfloat16 its
    # neighbours are 2 apart, and what the layers add to it would be lost.
    lm = make()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[:, 0] += largest
    base = CausalLM(lm.model.to(torch.bfloat16), lm.tokenizer, max_new_tokens=4)
    policy, samples = base.copy(), base.sample(100, seed=0)
    assert torch.equal(policy.token_log_prob(samples), base.token_log_prob(samples))
    again = policy.sample(100, seed=0)
    assert torch.equal(again.tokens, samples.tokens)
    assert torch.equal(again.log_prob, samples.log_prob)


def test_a_bfloat16_model_still_computes_by_itself():
    lm = tiny_llama()
    plain = lm.model.to(torch.bfloat16)
    with torch.no_grad():
        expected = plain(torch.tensor([[0, 1]])).logits
        base = CausalLM(plain, lm.tokenizer, fast_attention=False, fast_layers=False)
        assert torch.equal(base.model(torch.tensor([[0, 1]])).logits, expected)
