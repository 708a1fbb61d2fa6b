"""The ids before a text, the limit of the context, and the texts of ids."""

import dataclasses

import contracts
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM
from worlds import SIZES, letters, lm_of

from dmgen.models import CausalLM, Samples
from dmgen.models.hf.tokenization import start_ids, texts_of


@pytest.mark.parametrize(
    ("settings", "prompt", "ids"),
    [
        ({"bos": "<s>"}, "", [0]),
        ({"bos": None}, "", [1]),
        ({"bos": "<s>"}, "ab", [2, 3]),
        ({"bos": "<s>", "add_bos": True}, "", [0]),
        ({"bos": "<s>", "add_bos": True}, "ab", [0, 2, 3]),
        # An EOS that the tokenizer appends would end the text before it starts.
        ({"bos": "<s>", "add_eos": True}, "", [0]),
        ({"bos": None, "add_eos": True}, "", [1]),
        ({"bos": None, "add_eos": True}, "ab", [2, 3]),
        ({"bos": "<s>", "add_bos": True, "add_eos": True}, "", [0]),
        ({"bos": "<s>", "add_bos": True, "add_eos": True}, "ab", [0, 2, 3]),
        # One that the user wrote stays.
        ({"bos": "<s>"}, "ab</s>", [2, 3, 1]),
        ({"bos": "<s>", "add_bos": True}, "ab</s>", [0, 2, 3, 1]),
    ],
)
def test_ids_before_the_text(llama_lm, settings, prompt, ids):
    lm = CausalLM(llama_lm.model, letters("<s>", "</s>", eos="</s>", **settings))
    assert start_ids(lm.model, lm.tokenizer, prompt, 1).tolist() == ids


class TestContext:
    def test_the_context_is_used_to_its_last_position(self, gpt2_lm):
        # 8 positions: the fourth new token is drawn but never read.
        samples = gpt2_lm.sample(50, prompt="abcab", seed=0)
        torch.testing.assert_close(
            gpt2_lm.log_prob(samples), samples.log_prob, rtol=0, atol=contracts.FLOAT32
        )

    def test_beyond_the_context_the_limit_is_named(self, gpt2_lm):
        samples = gpt2_lm.sample(20, seed=0)
        moved = dataclasses.replace(samples, prompts=["abcabc"] * 20)
        for call in (
            lambda: gpt2_lm.sample(1, prompt="abcabc"),
            lambda: gpt2_lm.log_prob(moved),
        ):
            with pytest.raises(ValueError, match=r"context of 8: use max_new_tokens <= 3"):
                call()
        with pytest.raises(ValueError, match=r"context of 8: use a shorter prompt"):
            gpt2_lm.sample(1, prompt="abc" * 3, max_new_tokens=1)

    def test_padding_takes_no_room_in_the_context(self, gpt2_lm):
        long_prompt = gpt2_lm.sample(3, prompt="abcabc", max_new_tokens=2, seed=0)
        both = Samples.cat([long_prompt, gpt2_lm.sample(3, max_new_tokens=8, seed=1)])
        torch.testing.assert_close(
            gpt2_lm.log_prob(both), both.log_prob, rtol=0, atol=contracts.FLOAT32
        )

    def test_a_list_of_prompts_is_refused(self, gpt2_lm):
        with pytest.raises(TypeError, match="one string, got list"):
            gpt2_lm.sample(2, prompt=["a", "b"])


def test_longrope_ends_where_its_frequencies_change():
    """Beyond this position, decoding and scoring use different distributions."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
    }
    limits = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    options = SIZES | limits | {"pad_token_id": 0, "rope_parameters": rope}
    lm = lm_of(lambda v: Phi3ForCausalLM(Phi3Config(vocab_size=v, **options)), scale=0.3, length=8)
    samples = lm.sample(20, prompt="ab" * 4, seed=0)
    torch.testing.assert_close(
        lm.log_prob(samples), samples.log_prob, rtol=0, atol=contracts.FLOAT32
    )
    with pytest.raises(ValueError, match="context of 16"):
        lm.sample(1, prompt="ab" * 8)


def test_a_text_has_no_special_tokens(llama_lm):
    tokens = torch.tensor([[2, 0, 3, 1]])  # a, the BOS, b, the EOS
    assert texts_of(llama_lm.tokenizer, tokens, tokens != 1) == ["ab"]
