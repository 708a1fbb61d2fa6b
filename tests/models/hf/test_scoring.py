"""Forward passes: which models may be scored in blocks, equality with the plain path, and cost."""

import contracts
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from worlds import SIZES, Largest, letters, randomised, tied_llama, tiny_gpt2, tiny_llama

from dmgen.models import CausalLM, Samples
from dmgen.models.hf import scoring
from dmgen.models.hf.kv_cache import roomy_cache


def gptj(v):
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(vocab_size=v, **sizes))


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


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_decoding_counts_keys_and_values(make, dtype, monkeypatch):
    lm = make(dtype)
    cache = roomy_cache(lm.model.config, 7)
    with torch.no_grad(), lm._computing():
        past = {scoring._cache_argument(lm.model): cache}
        lm.model(torch.zeros(5, 2, dtype=torch.long), **past, use_cache=True)
    held = sum(x.key_buffer.nbytes + x.value_buffer.nbytes for x in cache.layers)
    assert held == 5 * 7 * scoring.cache_bytes(lm.model, dtype)
    # Room for five such texts, and for no text of ten times the length, of which one is decoded.
    monkeypatch.setattr(scoring, "_CACHE_BYTES", held)
    assert scoring.texts_a_draw(lm.model, 7, dtype) == 5
    assert scoring.texts_a_draw(lm.model, 70, dtype) == 1
    assert len(lm.sample(12, seed=0)) == 12


def test_a_model_that_names_no_heads_has_no_bound_by_its_cache():
    lm = tiny_gpt2()
    config = type("Config", (), {"get_text_config": lambda self: self, "vocab_size": 4})()
    model = type("Model", (), {"config": config, "parameters": lm.model.parameters})()
    assert scoring.cache_bytes(model, torch.float32) == 0
    assert scoring.texts_a_draw(model, 10**9, torch.float32) == 1024


def lm_of(make, *, scale, length=5, **options):
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    model = randomised(make(len(tokenizer)), scale=scale, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=length, **options)


def gradients(policy, samples):
    """Of the sum of log-probabilities, each text with another weight; by the parameter's name."""
    weights = torch.linspace(-1, 1, len(samples), dtype=torch.float64)
    (policy.log_prob(samples, grad=True) @ weights).backward()
    return {name: p.grad for name, p in policy.model.named_parameters()}


def plain_log_prob(lm, samples):
    """From the logits that the model itself gives, text by text."""
    sums = []
    for i in range(len(samples)):
        used = int(samples.n_tokens[i])
        start = lm._prompt_ids(samples.prompts[i], used)
        ids = samples.tokens[i, :used]
        with torch.no_grad(), lm._computing():
            logits = lm.model(torch.cat([start, ids]).unsqueeze(0)).logits[0, len(start) - 1 : -1]
        sums.append(logits.float().log_softmax(-1)[range(used), ids].double().sum())
    return torch.stack(sums)


class TestWhichModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.02, 0.5])
    @pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
    def test_a_linear_output_layer_is_taken_in_blocks(self, make, scale, dtype):
        assert lm_of(make, scale=scale, dtype=dtype)._chunked_head

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [0.02, 0.5])
    @pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
    def test_other_logits_are_left_to_the_model(self, make, scale, dtype):
        lm = lm_of(make, scale=scale, dtype=dtype)
        assert not lm._chunked_head
        assert not lm.copy()._chunked_head
        # The probe leaves nothing behind.
        assert not lm.model.base_model._forward_hooks

    def test_small_logits_do_not_hide_a_cap(self):
        lm = lm_of(OTHER["gemma2 caps"], scale=0.02)
        samples = lm.sample(20, prompt="ab", seed=0)
        plain = lm.log_prob(samples)
        lm._chunked_head = True  # the same without the cap
        assert (lm.log_prob(samples) - plain).abs().max() < contracts.FLOAT32
        grown = lm.copy()
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter.mul_(50)
        assert (grown.log_prob(samples) - plain_log_prob(grown, samples)).abs().max() > 1

    @pytest.mark.parametrize("make", [*LINEAR.values(), *OTHER.values()], ids=[*LINEAR, *OTHER])
    def test_the_law_is_that_of_the_models_own_logits(self, make):
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


class TestEqualsThePlainPath:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("make", [tied_llama, gptj, None], ids=["llama", "gptj", "gpt2"])
    def test_in_values_and_gradients(self, make, dtype):
        lm = tiny_gpt2(dtype) if make is None else lm_of(make, scale=0.3, dtype=dtype)
        policy, plain = lm.copy(), lm.copy()
        plain._chunked_head = False
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
            CausalLM.from_pretrained("tiny-bios", device="cpu", chunked_head=False),
        ):
            assert not off._chunked_head
            assert not off.copy()._chunked_head


class TestCost:
    def texts(self, *lengths, prompt=""):
        width = max(lengths)
        tokens = torch.randint(1, 4, (len(lengths), width), generator=torch.Generator())
        mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        n = len(lengths)
        return Samples(tokens, mask, torch.zeros(n, dtype=torch.float64), [""] * n, [prompt] * n)

    def widths(self, lm, call):
        """The shapes `(n, L + T - 1)` of the forward passes."""
        shapes = []
        handle = lm.model.base_model.register_forward_pre_hook(
            lambda module, args, named: shapes.append(tuple((*args, *named.values())[0].shape)),
            with_kwargs=True,
        )
        call()
        handle.remove()
        return shapes

    def test_texts_of_like_length_share_a_pass(self):
        lm = lm_of(tied_llama, scale=0.3)
        texts = self.texts(1, 5, 1, 4, 2, 5, 2)
        for call in (lm.log_prob, lm.hidden_states):
            shapes = self.widths(lm, lambda call=call: call(texts, batch_size=2))
            assert shapes == [(2, 5), (2, 4), (2, 2), (1, 1)]
        single = torch.cat([lm.log_prob(text) for text in texts.split(1)])
        torch.testing.assert_close(
            lm.log_prob(texts, batch_size=2), single, rtol=0, atol=contracts.FLOAT32
        )

    def test_passes_are_filled_by_memory(self, monkeypatch):
        lm = lm_of(tied_llama, scale=0.3)
        monkeypatch.setattr(scoring, "_PASS_TOKENS_ON_CPU", 12)
        texts = self.texts(1, 5, 1, 4, 2, 5, 2, prompt="a")
        assert self.widths(lm, lambda: lm.log_prob(texts)) == [(2, 5), (2, 4), (3, 2)]

    def test_the_head_sees_unmasked_positions_only(self, monkeypatch):
        lm = lm_of(tied_llama, scale=0.3)
        rows, real = [], scoring.chosen_log_prob
        monkeypatch.setattr(
            scoring, "chosen_log_prob", lambda h, *rest: rows.append(len(h)) or real(h, *rest)
        )
        lm.log_prob(self.texts(*[1] * 30, *[5] * 3))
        assert rows == [48]  # the next multiple of 16 after 30 + 15, not 33 * 5

    def test_how_many_texts_have_ended_makes_few_shapes(self, monkeypatch):
        """A library may keep code for every shape of a product that it meets."""
        lm = lm_of(tied_llama, scale=0.3, length=12)
        monkeypatch.setattr(scoring, "_PASS_TOKENS_ON_CPU", 400)
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

        n_rows = {n for n, _ in self.widths(lm, run)}
        assert all(n % 16 == 0 for n in n_rows | n_states)
        assert {16, 32, 64} < n_rows  # finished texts are dropped, if by sixteens

    def test_how_many_texts_are_scored_makes_few_shapes(self):
        """Such as those of a batch that have a gradient, another number at every step."""
        lm = lm_of(tied_llama, scale=0.3, length=3, dtype=torch.bfloat16)
        samples = lm.sample(48, seed=0)

        def run():
            for n in range(1, 49):
                lm.log_prob(samples[:n])

        assert {n for n, _ in self.widths(lm, run)} == {1, 2, 4, 8, 16, 32, 48}

    @pytest.mark.parametrize("chunked", [True, False])
    def test_rows_of_no_text_change_nothing(self, chunked, monkeypatch):
        policy = lm_of(tied_llama, scale=0.3, length=4, chunked_head=chunked).copy()
        samples = policy.sample(11, seed=0)

        def found():
            policy.model.zero_grad()
            log_prob = policy.log_prob(samples, grad=True)
            (log_prob @ torch.linspace(-1, 2, 11, dtype=torch.float64)).backward()
            grads = torch.cat([p.grad.flatten() for p in policy.parameters()])
            return log_prob.detach(), policy.hidden_states(samples), grads

        plain = found()
        monkeypatch.setattr(scoring, "rows_computed", lambda n, *_: n + 5)
        rows = self.widths(policy, lambda: torch.testing.assert_close(
            found(), plain, rtol=1e-5, atol=1e-5
        ))  # fmt: skip
        assert {n for n, _ in rows} == {16}

    @pytest.mark.parametrize("chunked", [True, False])
    def test_the_logits_of_all_positions_are_never_held(self, chunked, monkeypatch):
        v, n, length = 4000, 30, 5
        lm = lm_of(lambda _: tied_llama(v), scale=0.3, chunked_head=chunked)
        policy = lm.copy()
        texts = self.texts(*[length] * n)
        sizes = {"chunk": n * length * 300, "keep": 0}
        monkeypatch.setattr(scoring.chosen_log_prob, "__kwdefaults__", sizes)
        with Largest() as largest:
            policy.log_prob(texts, grad=True).sum().backward()
        # The largest tensor is then the weight itself, or its gradient.
        assert largest.n == (v * 16 if chunked else n * length * v)


def test_the_check_of_a_model_is_on_its_own_words():
    """A model whose trunk alone says something else than the whole is scored as a whole."""

    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids, **options):
            return super().forward((input_ids + 1) % 4, **options)

    lm = lm_of(lambda v: Shifted(LlamaConfig(vocab_size=v, **SIZES)), scale=0.4)
    assert not lm._chunked_head
    samples = lm.sample(20, seed=0)
    torch.testing.assert_close(
        lm.log_prob(samples), samples.log_prob, rtol=0, atol=contracts.FLOAT32
    )


def test_llama_and_gpt2_are_fast():
    assert tiny_llama()._chunked_head
    assert tiny_gpt2()._chunked_head


@pytest.mark.parametrize("named", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_model_has_for_it(named):
    """Also where a class passes the rest on, as `**options`."""

    class Outer(torch.nn.Module):
        def forward(self, inputs, cache=None, **options): ...

    class Own(Outer):
        def forward(self, inputs, past_key_values=None, **options): ...

    class PassingOn(Outer if named == "cache" else Own):
        def forward(self, inputs, **options): ...

    assert scoring._cache_argument(PassingOn()) == named


def test_longrope_ends_where_its_frequencies_change():
    """Beyond it, a text has another law when it is scored than while it is decoded."""
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


def test_the_default_dtype_of_torch_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        lm = CausalLM.from_pretrained("tiny-bios", device="cpu")
        samples = lm.sample(3, seed=0)
        gap = (lm.log_prob(samples) - samples.log_prob).abs().max()
    finally:
        torch.set_default_dtype(torch.float32)
    assert gap < 1e-3


def test_no_texts_have_no_embeddings():
    assert tiny_gpt2().embed([]).shape[0] == 0
