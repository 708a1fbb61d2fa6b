"""Which models are refused, and which may be scored in blocks of the vocabulary."""

import contracts
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)
from worlds import SIZES, gptj, letters, lm_of, randomised, tied_llama, tiny_gpt2, tiny_llama

from dmgen.models import CausalLM, Samples
from dmgen.models.hf.precision import autocast
from dmgen.models.hf.tokenization import start_ids


def projected_opt(v):
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=v, **sizes, word_embed_proj_dim=8))


def gemma2(v, **options):
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=v, **SIZES, **options))


LINEAR = {
    "tied llama": tied_llama,
    "gptj, with a bias": gptj,
    "gemma2 uncapped": lambda v: gemma2(v, final_logit_softcapping=None),
    "granite at 1": lambda v: GraniteForCausalLM(GraniteConfig(vocab_size=v, **SIZES)),
}


OTHER = {
    # It calls a part of its base model, so its states cannot be replaced to see what follows.
    "opt, projected": projected_opt,
    "gemma2 caps": lambda v: gemma2(v, final_logit_softcapping=30.0),
    "cohere scales": lambda v: CohereForCausalLM(CohereConfig(vocab_size=v, **SIZES)),
    "granite scales": lambda v: GraniteForCausalLM(
        GraniteConfig(vocab_size=v, **SIZES, logits_scaling=1.25)
    ),
}


def bert_dimensions(v):
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"vocab_size": v} | {key: SIZES[key] for key in kept}


@pytest.mark.parametrize(
    "make",
    [
        # looks at later tokens; has no cache at all
        lambda v: BertLMHeadModel(BertConfig(**bert_dimensions(v))),
        lambda v: OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(vocab_size=v, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        ),
    ],
    ids=["bert", "openai-gpt"],
)
def test_models_without_a_causal_cache_are_refused(make):
    tokenizer = letters("<end>", eos="<end>")
    with pytest.raises(ValueError, match="between cached decoding and scoring"):
        CausalLM(randomised(make(len(tokenizer)), scale=0.5, seed=0), tokenizer)


def test_an_eos_that_the_model_cannot_write(gpt2_lm):
    tokenizer = letters("<1>", "<2>", eos="<2>")
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    with pytest.raises(ValueError, match=r"EOS has id 5, but .* has 4 tokens"):
        CausalLM(gpt2_lm.model, tokenizer)


def plain_log_prob(lm, samples):
    """From the logits that the model itself gives, text by text."""
    sums = []
    for i in range(len(samples)):
        used = int(samples.n_tokens[i])
        start = start_ids(lm.model, lm.tokenizer, samples.prompts[i], used)
        ids = samples.tokens[i, :used]
        with torch.no_grad(), autocast(lm.device, lm.dtype):
            logits = lm.model(torch.cat([start, ids]).unsqueeze(0)).logits[0, len(start) - 1 : -1]
        sums.append(logits.float().log_softmax(-1)[range(used), ids].double().sum())
    return torch.stack(sums)


class TestWhichModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.02, 0.5])
    @pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
    def test_a_linear_output_layer_is_taken_in_blocks(self, make, scale, dtype):
        assert lm_of(make, scale=scale, dtype=dtype).chunked_head

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.02, 0.5])
    @pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
    def test_other_logits_are_left_to_the_model(self, make, scale, dtype):
        lm = lm_of(make, scale=scale, dtype=dtype)
        assert not lm.chunked_head
        assert not lm.copy().chunked_head
        # The probe leaves nothing behind.
        assert not lm.model.base_model._forward_hooks

    def test_small_logits_do_not_hide_a_cap(self):
        lm = lm_of(OTHER["gemma2 caps"], scale=0.02)
        samples = lm.sample(20, prompt="ab", seed=0)
        plain = lm.log_prob(samples)
        lm.chunked_head = True  # the same without the cap
        assert (lm.log_prob(samples) - plain).abs().max() < contracts.FLOAT32
        grown = lm.copy()
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter.mul_(50)
        assert (grown.log_prob(samples) - plain_log_prob(grown, samples)).abs().max() > 1

    @pytest.mark.parametrize("make", [*LINEAR.values(), *OTHER.values()], ids=[*LINEAR, *OTHER])
    def test_scores_are_those_of_the_models_own_logits(self, make):
        lm = lm_of(make, scale=0.4)
        samples = Samples.cat([lm.sample(12, prompt=p, seed=0) for p in ("", "ab")])
        plain = plain_log_prob(lm, samples)
        torch.testing.assert_close(lm.log_prob(samples), plain, rtol=0, atol=contracts.FLOAT32)
        torch.testing.assert_close(samples.log_prob, plain, rtol=0, atol=contracts.FLOAT32)

    @pytest.mark.parametrize(
        "put",
        [
            lambda model: model.register_forward_hook(halve),
            lambda model: model.lm_head.register_forward_hook(lambda m, i, out: out / 2),
            lambda model: model.lm_head.register_forward_pre_hook(lambda m, i: (i[0] / 2,)),
            lambda model: setattr(model.lm_head, "forward", halved(model.lm_head)),
            lambda model: setattr(model, "lm_head", torch.nn.Sequential(model.lm_head, Half())),
            lambda model: setattr(model.lm_head, "__class__", HalfLinear),
            lambda model: torch.nn.utils.parametrize.register_parametrization(
                model.lm_head, "weight", Half()
            ),
        ],
        ids=["model", "head", "before head", "forward", "module", "subclass", "parametrization"],
    )
    def test_what_is_put_on_the_output_later_counts(self, put):
        lm = lm_of(lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, **SIZES)), scale=0.4)
        samples = lm.sample(20, seed=0)
        before = lm.log_prob(samples)
        put(lm.model)
        after = lm.log_prob(samples)
        assert (after - before).abs().max() > 0.1
        torch.testing.assert_close(
            after, plain_log_prob(lm, samples), rtol=0, atol=contracts.FLOAT32
        )


class Half(torch.nn.Module):
    def forward(self, x):
        return x / 2


class HalfLinear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def halve(module, inputs, output):
    output.logits = output.logits / 2
    return output


def halved(layer):
    forward = layer.forward
    return lambda x: forward(x) / 2


def test_a_model_that_shifts_its_inputs_is_not_chunked():
    """A model whose output is not that of its base model and output layer is scored as a whole."""

    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids, **options):
            return super().forward((input_ids + 1) % 4, **options)

    lm = lm_of(lambda v: Shifted(LlamaConfig(vocab_size=v, **SIZES)), scale=0.4)
    assert not lm.chunked_head
    samples = lm.sample(20, seed=0)
    torch.testing.assert_close(
        lm.log_prob(samples), samples.log_prob, rtol=0, atol=contracts.FLOAT32
    )


def test_llama_and_gpt2_are_fast():
    assert tiny_llama().chunked_head
    assert tiny_gpt2().chunked_head
