"""`CausalLM.embed` against the hidden states of one text at a time."""

import pytest
import torch
from worlds import letters

from dmgen.models import CausalLM, Samples


@pytest.fixture(params=["gpt2", "llama"])
def model(request, gpt2_lm, llama_lm):
    return {"gpt2": gpt2_lm, "llama": llama_lm}[request.param]


def by_hand(model, text):
    """The mean of the states after each token, from the tokens and one more."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[*ids, model.tokenizer.eos_token_id]])
    samples = Samples(
        tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1).double(), [text], [""]
    )
    states = model.hidden_states(samples)[0]
    return states[1:].mean(0) if ids else states[0]


def test_texts_of_any_length_are_read_as_alone(model):
    texts = ["a", "abc", "", "cb"]
    found = model.embed(texts)
    assert found.dtype == torch.float32
    expected = torch.stack([by_hand(model, text) for text in texts])
    # float32 sums over a few positions.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.embed(texts, batch_size=1), found, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[1], found[3], atol=1e-2)


def test_a_text_longer_than_the_context_is_read_as_far_as_it_fits(model):
    context = model.model.config.max_position_embeddings
    whole = "a" * (context - 1)
    found = model.embed([whole, whole + "bc" * 40])
    torch.testing.assert_close(found[0], by_hand(model, whole), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], found[1])


def test_what_looks_like_a_special_token_is_plain_text(gpt2_lm):
    model = CausalLM(gpt2_lm.model, letters("cab", bos="cab", eos="cab"), max_new_tokens=4)
    assert model.tokenizer("acabb")["input_ids"] == [1, 0, 2]
    found = model.embed(["acabb"])[0]
    # The letters of gpt2_lm have the same ids, and its special token cannot be spelled by them.
    torch.testing.assert_close(found, by_hand(gpt2_lm, "acabb"), rtol=1e-5, atol=1e-6)
