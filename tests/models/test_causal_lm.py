"""`CausalLM`: the contracts, prompts, caches, folders, precision, and errors."""

import dataclasses
import inspect
import json
import shutil

import contracts
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)
from worlds import letters, randomised, space_of, tiny_gpt2, tiny_llama

from dmgen.models import CausalLM, LanguageModel, Samples
from dmgen.models.hf import loading, scoring
from dmgen.models.hf.kv_cache import roomy_cache
from dmgen.models.hf.loading import default_device

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def endless_gpt2():
    """A GPT-2 whose EOS has the logit -inf: every text has 4 tokens."""
    lm = tiny_gpt2()

    def forbid_eos(module, inputs, output):
        output.logits[..., 0] = -torch.inf
        return output

    lm.model.register_forward_hook(forbid_eos)
    return lm


def tiny_mistral():
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    config = MistralConfig(**dimensions(len(tokenizer)), sliding_window=2)
    model = randomised(MistralForCausalLM(config), scale=0.3, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=4)


def tiny_gemma3():
    """It scales its embedding, here by √24."""
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    config = Gemma3TextConfig(**(dimensions(len(tokenizer)) | {"hidden_size": 24}))
    model = randomised(Gemma3ForCausalLM(config), scale=0.3, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=4)


def dimensions(vocab_size):
    return {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


WORLDS = {
    "gpt2": (tiny_gpt2, ""),
    "gpt2 prompted": (tiny_gpt2, "ab"),
    "gpt2 without end": (endless_gpt2, ""),
    "llama": (tiny_llama, ""),
    "llama prompted": (tiny_llama, "c"),
    "mistral": (tiny_mistral, "a"),
}


@pytest.mark.parametrize(("make", "prompt"), WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("check", contracts.CHECKS, ids=contracts.name)
def test_contract(check, make, prompt):
    lm = make()
    check(lm, space_of(lm, prompt), contracts.FLOAT32)


def test_is_a_language_model(gpt2_lm):
    assert isinstance(gpt2_lm, LanguageModel)


class TestEnd:
    """EOS, BOS and padding are one token in the GPT-2 here: its position alone tells them apart."""

    def test_a_text_ends_with_its_first_eos_and_hides_it(self, gpt2_lm):
        samples = gpt2_lm.sample(300, seed=0)
        is_eos = samples.tokens == 0
        assert set(samples.n_tokens.tolist()) == {1, 2, 3, 4}
        for i, text in enumerate(samples.texts):
            used = int(samples.n_tokens[i])
            ended = bool(is_eos[i].any())
            assert used == (int(is_eos[i].nonzero()[0]) + 1 if ended else 4)
            assert text == "".join("_abc"[t] for t in samples.tokens[i, :used] if t != 0)

    def test_a_text_has_no_special_tokens(self, llama_lm):
        tokens = torch.tensor([[2, 0, 3, 1]])  # a, the BOS, b, the EOS
        assert loading.texts_of(llama_lm.tokenizer, tokens, tokens != 1) == ["ab"]

    def test_the_eos_is_scored(self, gpt2_lm):
        samples = gpt2_lm.sample(100, seed=0)
        ended = samples[samples.tokens[:, 0] == 0]
        per_token = gpt2_lm.token_log_prob(ended)
        assert len(ended) > 0
        assert (per_token[:, 0] < 0).all()
        assert (per_token[:, 1:] == 0).all()

    def test_rows_that_ended_leave_the_batch_and_nothing_else_changes(self):
        lm = tiny_gpt2()
        sizes = []
        lm.model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
        )
        together = lm.sample(50, max_new_tokens=8, seed=0)
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < 25 < 50 == sizes[0]
        alone = lm.sample(50, max_new_tokens=8, seed=0, batch_size=1)
        assert torch.equal(together.tokens, alone.tokens)
        torch.testing.assert_close(
            together.log_prob, alone.log_prob, rtol=0, atol=contracts.FLOAT32
        )

    def test_text_i_depends_on_row_i_of_the_uniforms_only(self, gpt2_lm):
        start = torch.tensor([0])
        u = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        tokens, log_prob = scoring.decode(gpt2_lm.model, start, u, 0)
        backwards, log_prob_backwards = scoring.decode(gpt2_lm.model, start, u.flip(0), 0)
        assert torch.equal(tokens, backwards.flip(0))
        torch.testing.assert_close(
            log_prob, log_prob_backwards.flip(0), rtol=0, atol=contracts.FLOAT32
        )


class TestCache:
    """The buffered cache against transformers' own, and architectures with caches of their kind."""

    def test_equals_the_plain_cache(self, monkeypatch):
        lm = tiny_llama()
        fast = lm.sample(200, prompt="ab", max_new_tokens=5, seed=0)
        monkeypatch.setattr(scoring, "roomy_cache", lambda config, _: DynamicCache(config=config))
        plain = lm.sample(200, prompt="ab", max_new_tokens=5, seed=0)
        assert torch.equal(fast.tokens, plain.tokens)
        torch.testing.assert_close(fast.log_prob, plain.log_prob, rtol=0, atol=contracts.FLOAT32)

    def test_keys_are_narrowed_once_and_not_at_every_token(self):
        # Under autocast, a rotary embedding in float32 widens them.
        layer = roomy_cache(LlamaConfig(**dimensions(5)), 4).layers[0]
        values = torch.ones(2, 1, 1, 8, dtype=torch.bfloat16)
        for used in (1, 2):
            keys, _ = layer.update(torch.full((2, 1, 1, 8), 1 / 3), values)
            assert keys.dtype == torch.bfloat16
            assert torch.equal(keys, torch.full((2, 1, used, 8), 1 / 3).bfloat16())

    @pytest.mark.parametrize(
        "make",
        [
            # one sliding layer, one that sees all
            lambda v: Gemma2ForCausalLM(Gemma2Config(**dimensions(v), sliding_window=2)),
            # the last two layers read the keys of the first two
            lambda v: Gemma3nForCausalLM(
                Gemma3nTextConfig(
                    **dimensions(v) | {"num_hidden_layers": 4, "intermediate_size": [32] * 4},
                    num_kv_shared_layers=2,
                    sliding_window=3,
                    vocab_size_per_layer_input=v,
                    hidden_size_per_layer_input=8,
                    layer_types=["sliding_attention", "full_attention"] * 2,
                    activation_sparsity_pattern=[0.0] * 4,
                )
            ),
            # no positions, so no limit of the context either
            lambda v: BloomForCausalLM(
                BloomConfig(vocab_size=v, hidden_size=16, n_layer=2, n_head=2)
            ),
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
    def test_sampling_equals_scoring(self, make):
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
    def test_models_without_a_causal_cache_are_refused(self, make):
        tokenizer = letters("<end>", eos="<end>")
        with pytest.raises(ValueError, match="between cached decoding and scoring"):
            CausalLM(randomised(make(len(tokenizer)), scale=0.5, seed=0), tokenizer)


def bert_dimensions(v):
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"vocab_size": v} | {key: dimensions(v)[key] for key in kept}


class TestHiddenStates:
    @pytest.fixture(params=["gpt2_lm", "llama_lm"])
    def lm(self, request):
        return request.getfixturevalue(request.param)

    def test_are_what_the_output_layer_reads(self, lm):
        samples = Samples.cat([lm.sample(20, prompt=p, seed=0) for p in ("", "ab")])
        states = lm.hidden_states(samples)
        assert states.shape == (*samples.tokens.shape, 16)
        logits = lm.model.lm_head(states)
        chosen = logits.log_softmax(-1).gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
        expected = lm.token_log_prob(samples)
        torch.testing.assert_close(
            torch.where(samples.mask, chosen, 0.0), expected, rtol=0, atol=contracts.FLOAT32
        )

    def test_carry_the_gradient_of_the_trunk(self, lm):
        policy, weights = lm.copy(), torch.randn(16, generator=torch.Generator().manual_seed(0))
        samples = lm.sample(10, seed=0)
        states = policy.hidden_states(samples, grad=True)
        (states @ weights).sum().backward()
        parameter = next(p for name, p in policy.model.named_parameters() if ".0." in name)
        slope = parameter.grad.clone()
        # The slope along itself, from values a step apart; errors are of second order in the step.
        step = 1e-3 / slope.norm()
        with torch.no_grad():
            values = []
            for side in (1, -2):
                parameter += side * step * slope
                values.append((policy.hidden_states(samples).double() @ weights.double()).sum())
        rate = (values[0] - values[1]) / (2 * step)
        assert rate.item() == pytest.approx(slope.square().sum().item(), rel=1e-2)

    def test_are_float32_and_on_their_own_unless_asked(self, gpt2_lm):
        narrow = CausalLM(tiny_gpt2().model.to(torch.bfloat16), gpt2_lm.tokenizer)
        samples = gpt2_lm.sample(10, seed=0)
        for lm in (narrow, narrow.copy(), gpt2_lm.copy()):
            assert lm.hidden_states(samples).dtype == torch.float32
            assert not lm.hidden_states(samples).requires_grad
        assert gpt2_lm.copy().hidden_states(samples, grad=True).requires_grad
        off = narrow.hidden_states(samples) - gpt2_lm.hidden_states(samples)
        assert 1e-4 < off.abs().max() < 0.2

    def test_do_not_fit_the_context(self, gpt2_lm):
        samples = gpt2_lm.sample(3, max_new_tokens=8, seed=0)
        moved = dataclasses.replace(samples, prompts=["abcabc"] * 3)
        with pytest.raises(ValueError, match="context of 8"):
            gpt2_lm.hidden_states(moved)
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            gpt2_lm.hidden_states(samples, batch_size=0)


class TestPrompts:
    def test_one_batch_may_mix_prompts(self, gpt2_lm):
        parts = [gpt2_lm.sample(5, prompt=prompt, seed=1) for prompt in ("a", "", "bc")]
        mixed = Samples.cat(parts)[[4, 10, 0, 5, 14, 2, 7]]
        scored = torch.cat([gpt2_lm.log_prob(text) for text in mixed.split(1)])
        torch.testing.assert_close(gpt2_lm.log_prob(mixed), scored, rtol=0, atol=contracts.FLOAT32)
        torch.testing.assert_close(mixed.log_prob, scored, rtol=0, atol=contracts.FLOAT32)
        moved = dataclasses.replace(mixed, prompts=["c"] * len(mixed))
        assert (gpt2_lm.log_prob(moved) - scored).abs().min() > 10 * contracts.FLOAT32

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
    def test_ids_before_the_text(self, llama_lm, settings, prompt, ids):
        lm = CausalLM(llama_lm.model, letters("<s>", "</s>", eos="</s>", **settings))
        assert lm._prompt_ids(prompt, 1).tolist() == ids

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


class TestFolders:
    def test_plain_transformers_loads_what_was_saved(self, gpt2_lm, tmp_path):
        policy = gpt2_lm.copy()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        policy.save_pretrained(tmp_path)
        assert sorted(p.suffix for p in tmp_path.iterdir()).count(".safetensors") == 1
        samples = policy.sample(40, seed=0)

        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        inputs = torch.cat([torch.zeros(40, 1, dtype=torch.long), samples.tokens[:, :-1]], dim=1)
        with torch.no_grad():
            plain = model(inputs).logits.log_softmax(-1)
        chosen = plain.gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(
            (chosen * samples.mask).sum(-1).double(),
            samples.log_prob,
            rtol=0,
            atol=contracts.FLOAT32,
        )
        loaded = CausalLM.from_pretrained(tmp_path, device="cpu", max_new_tokens=4)
        assert torch.equal(loaded.sample(40, seed=0).tokens, samples.tokens)
        assert (gpt2_lm.log_prob(samples) - samples.log_prob).abs().max() > 0.1

    def test_generation_settings_of_a_checkpoint_do_not_leak(self, gpt2_lm, tmp_path):
        gpt2_lm.save_pretrained(tmp_path)
        settings = {
            "do_sample": False,
            "temperature": 0.1,
            "top_k": 1,
            "top_p": 0.2,
            "repetition_penalty": 2.0,
            "forced_bos_token_id": 2,
            "suppress_tokens": [1],
            "eos_token_id": [1, 2],
            "max_new_tokens": 1,
        }
        (tmp_path / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
        loaded = CausalLM.from_pretrained(tmp_path, device="cpu", max_new_tokens=4)
        assert loaded.model.generation_config.top_k == 1  # they were read, and not obeyed
        expected = gpt2_lm.sample(200, seed=0)
        samples = loaded.sample(200, seed=0)
        assert torch.equal(samples.tokens, expected.tokens)
        assert torch.equal(samples.mask, expected.mask)
        torch.testing.assert_close(samples.log_prob, expected.log_prob, rtol=0, atol=1e-12)
        loaded.copy().save_pretrained(tmp_path / "policy")

    @pytest.fixture
    def folder(self, gpt2_lm, tmp_path):
        gpt2_lm.save_pretrained(tmp_path)
        return tmp_path

    def test_weights_are_never_unpickled(self, folder, gpt2_lm):
        (folder / "model.safetensors").unlink()
        torch.save(gpt2_lm.model.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"could not load .*no file named model.safetensors"):
            CausalLM.from_pretrained(folder)

    def test_broken_weights(self, folder):
        (folder / "model.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(ValueError, match="could not load"):
            CausalLM.from_pretrained(folder)

    def test_missing_weights_are_not_made_up(self, folder, gpt2_lm):
        model = GPT2LMHeadModel(gpt2_lm.model.config)
        name = "transformer.h.0.mlp.c_fc.weight"
        rest = {key: value for key, value in model.state_dict().items() if key != name}
        model.save_pretrained(folder, state_dict=rest)
        with pytest.raises(ValueError, match=f"lack {name}"):
            CausalLM.from_pretrained(folder)

    def test_weights_of_another_shape(self, folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["n_positions"] = 9
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match="could not load"):
            CausalLM.from_pretrained(folder)

    def test_a_tokenizer_without_eos(self, folder, gpt2_lm):
        letters("<s>", bos="<s>").save_pretrained(folder)
        with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer.eos_token"):
            CausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="no EOS token"):
            CausalLM(gpt2_lm.model, letters("<s>", bos="<s>"))

    def test_a_folder_without_its_tokenizer(self, folder):
        # transformers makes up an empty GPT-2 tokenizer instead of raising.
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ValueError, match="tokenizer"):
            CausalLM.from_pretrained(folder)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"(?s)could not load .*save_pretrained"):
            CausalLM.from_pretrained(tmp_path)


class TestNames:
    @pytest.fixture
    def requests(self, monkeypatch):
        """Names asked for at a hub that cannot be reached."""
        names = []

        def unreachable(name, _):
            names.append(name)
            raise ConnectionError("no network in tests")

        monkeypatch.setattr(loading, "file_exists", unreachable)
        return names

    @pytest.mark.parametrize("name", ["/abs/nothing", "./nothing", "../nothing", "a/b/c", "~/x"])
    def test_a_path_that_is_not_there_is_not_sought_on_the_hub(self, name, requests):
        with pytest.raises(ValueError, match=f"could not load '{name}'.*neither a folder"):
            CausalLM.from_pretrained(name)
        assert requests == []

    def test_a_file_is_no_folder(self, tmp_path, requests):
        shutil.copy(__file__, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="neither a folder"):
            CausalLM.from_pretrained(tmp_path / "model.safetensors")
        assert requests == []

    @pytest.mark.parametrize("name", ["runs/nothing", "no-such-model-here"])
    def test_without_the_network_there_is_one_request_and_one_error(self, name, requests):
        with pytest.raises(
            ValueError, match=rf"(?s)could not load '{name}' \(no folder here.*save_pretrained"
        ):
            CausalLM.from_pretrained(name)
        assert requests == [name]

    def test_a_name_that_the_hub_does_not_know(self, monkeypatch):
        monkeypatch.setattr(loading, "file_exists", lambda name, file: False)
        with pytest.raises(ValueError, match="the hub has no such model"):
            CausalLM.from_pretrained("runs/nothing")


class TestPrecision:
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
    def test_bfloat16_records_what_it_drew(self, gpt2_lm, weights):
        # E_q[p / q f] = E_p[f] holds exactly if q is the law of the draw, however far from p.
        lm = CausalLM(
            tiny_gpt2().model.to(weights),
            gpt2_lm.tokenizer,
            max_new_tokens=4,
            dtype=torch.bfloat16,
        )
        recorded_law_is_the_law_of_the_draw(lm, gpt2_lm)

    def test_bfloat16_logits_are_lifted_before_the_softmax(self, gpt2_lm):
        # One text of one token is the same computation in sampling, scoring and here.
        lm = CausalLM(tiny_gpt2().model.to(torch.bfloat16), gpt2_lm.tokenizer)
        with torch.no_grad(), lm._computing():
            logits = lm.model(torch.tensor([[0]])).logits[0, 0]
        exact = logits.double().log_softmax(-1)
        assert (logits.log_softmax(-1) - exact).abs().max() > 1e-3
        for seed in range(10):
            samples = lm.sample(1, max_new_tokens=1, seed=seed)
            expected = exact[samples.tokens[0]]
            torch.testing.assert_close(samples.log_prob, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(lm.log_prob(samples), expected, rtol=0, atol=1e-6)

    def test_trainable_weights_stay_float32(self, gpt2_lm, tmp_path):
        gpt2_lm.save_pretrained(tmp_path)
        base = CausalLM.from_pretrained(tmp_path, device="cpu", dtype="bfloat16", max_new_tokens=4)
        assert base.dtype == torch.bfloat16
        matrices = [p for p in base.parameters() if p.dim() > 1]
        assert {p.dtype for p in matrices} == {torch.bfloat16}
        policy = base.copy()
        samples = policy.sample(20, seed=0)
        policy.log_prob(samples, grad=True).sum().backward()
        for parameter in policy.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
        products = policy.model(samples.tokens).logits
        assert products.dtype == torch.float32  # only under _computing is it bfloat16
        with torch.no_grad(), policy._computing():
            assert policy.model(samples.tokens).logits.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("make", "largest"),
        [(tiny_gpt2, 0.0), (tiny_llama, 0.0), (tiny_llama, 300.0), (tiny_gemma3, 0.0)],
    )
    def test_in_bfloat16_a_copy_is_the_same_law(self, make, largest):
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

    def test_a_bfloat16_model_still_computes_by_itself(self):
        lm = tiny_llama()
        plain = lm.model.to(torch.bfloat16)
        with torch.no_grad():
            expected = plain(torch.tensor([[0, 1]])).logits
            base = CausalLM(plain, lm.tokenizer, fast_attention=False, fast_layers=False)
            assert torch.equal(base.model(torch.tensor([[0, 1]])).logits, expected)

    def test_dtype_defaults_to_that_of_the_weights(self, gpt2_lm):
        narrow = tiny_gpt2().model.to(torch.bfloat16)
        assert CausalLM(narrow, gpt2_lm.tokenizer, max_new_tokens=4).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"weights are torch.bfloat16.*torch.float32"):
            CausalLM(narrow, gpt2_lm.tokenizer, dtype=torch.float32)

    @pytest.mark.parametrize("dtype", ["float3", "nn", "int64", torch.float64, torch.int64])
    def test_other_dtypes_are_refused_before_anything_is_loaded(self, dtype, tmp_path, gpt2_lm):
        gpt2_lm.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="one of float32, bfloat16, float16"):
            CausalLM.from_pretrained(tmp_path, dtype=dtype)


class TestErrors:
    @pytest.mark.parametrize("v", [4, 300])
    def test_nan_weights_are_named_when_drawn_and_when_scored(self, v):
        # 300 is no multiple of the block in which tokens are drawn.
        config = GPT2Config(vocab_size=v, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        lm = CausalLM(GPT2LMHeadModel(config), letters("<end>", eos="<end>"), max_new_tokens=4)
        samples = lm.sample(3, seed=0)
        broken = lm.copy()
        with torch.no_grad():
            next(broken.parameters()).fill_(torch.nan)
        with pytest.raises(ValueError, match=r"text 0 .* is NaN or infinite.*diverged"):
            broken.sample(3, seed=0)
        with pytest.raises(ValueError, match=r"text 0 .* is NaN or infinite.*diverged"):
            broken.log_prob(samples)

    def test_an_eos_that_the_model_cannot_write(self, gpt2_lm):
        tokenizer = letters("<1>", "<2>", eos="<2>")
        tokenizer.add_special_tokens({"eos_token": "<new>"})
        with pytest.raises(ValueError, match=r"EOS has id 5, but .* has 4 tokens"):
            CausalLM(gpt2_lm.model, tokenizer)

    def test_sizes_must_be_positive(self, gpt2_lm):
        samples = gpt2_lm.sample(3, seed=0)
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
                gpt2_lm.sample(3, batch_size=size)
            with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
                gpt2_lm.log_prob(samples, batch_size=size)
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
            CausalLM(gpt2_lm.model, gpt2_lm.tokenizer, max_new_tokens=0)


def recorded_law_is_the_law_of_the_draw(lm, exact):
    """`lm` is `exact` in lower precision: importance weights from its records are unbiased."""
    space = space_of(exact)
    mean_length = (exact.log_prob(space).exp() * space.n_tokens).sum().item()
    samples = lm.sample(contracts.N_DRAWS, seed=5)
    log_weights = exact.log_prob(samples) - samples.log_prob
    assert log_weights.abs().max() > 10 * contracts.FLOAT32  # precision was indeed lost
    for values, expected in (
        (torch.ones(len(samples)), 1.0),
        (samples.n_tokens, mean_length),
    ):
        weighted = log_weights.exp() * values
        stderr = weighted.std().item() / len(samples) ** 0.5
        assert abs(weighted.mean().item() - expected) < 5 * stderr + contracts.FLOAT32
    # The check tells: a record that is off by 5 % does not pass.
    wrong = (log_weights + 0.05).exp()
    stderr = wrong.std().item() / len(samples) ** 0.5
    assert abs(wrong.mean().item() - 1) > 5 * stderr + contracts.FLOAT32


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def on_cuda(lm):
    return CausalLM(lm.model.cuda(), lm.tokenizer, max_new_tokens=lm.max_new_tokens, dtype=lm.dtype)


@gpu
@needs_cuda
class TestCuda:
    @pytest.mark.parametrize(("make", "prompt"), WORLDS.values(), ids=WORLDS)
    @pytest.mark.parametrize("check", contracts.CHECKS, ids=contracts.name)
    def test_contract(self, check, make, prompt):
        lm = make()
        lm.model.cuda()
        check(lm, space_of(lm, prompt), contracts.FLOAT32)

    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
    def test_bfloat16_records_what_it_drew(self, gpt2_lm, weights):
        model = tiny_gpt2().model.to("cuda", weights)
        lm = CausalLM(model, gpt2_lm.tokenizer, max_new_tokens=4, dtype=torch.bfloat16)
        recorded_law_is_the_law_of_the_draw(lm, gpt2_lm)

    def test_gives_the_texts_of_the_cpu(self, gpt2_lm):
        # One block of uniforms, drawn on the CPU: texts differ only where a uniform lies within
        # rounding, some 1e-6, of the edge between two tokens.
        lm = on_cuda(tiny_gpt2())
        samples, expected = lm.sample(1000, seed=0), gpt2_lm.sample(1000, seed=0)
        assert (samples.tokens == expected.tokens).double().mean() > 0.99
        assert samples.tokens.device.type == samples.log_prob.device.type == "cpu"
        assert lm.log_prob(samples).device.type == "cpu"
        assert lm.copy().log_prob(samples, grad=True).device.type == "cuda"

    def test_takes_a_generator_of_either_device(self):
        lm = on_cuda(tiny_gpt2())
        for device in ("cpu", "cuda"):
            draws = [
                lm.sample(20, generator=torch.Generator(device).manual_seed(3)) for _ in range(2)
            ]
            assert torch.equal(draws[0].tokens, draws[1].tokens)

    def test_is_chosen_by_default(self, gpt2_lm, tmp_path):
        gpt2_lm.save_pretrained(tmp_path)
        assert CausalLM.from_pretrained(tmp_path).device.type == "cuda"
        assert CausalLM.from_pretrained(tmp_path, device="cpu").device.type == "cpu"
