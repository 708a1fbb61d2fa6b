"""`CausalLM`: the contracts, ends, prompts, folders, precision, embeddings, and errors."""

import dataclasses
import json

import contracts
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)
from worlds import SIZES, letters, randomised, space_of, tiny_gpt2, tiny_llama

from dmgen.models import CausalLM, LanguageModel, Samples
from dmgen.models.hf.precision import autocast

gpu = pytest.mark.gpu


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def endless_gpt2():
    """Return a GPT-2 whose EOS has the logit -inf, so that every text has 4 tokens."""
    lm = tiny_gpt2()

    def forbid_eos(module, inputs, output):
        output.logits[..., 0] = -torch.inf
        return output

    lm.model.register_forward_hook(forbid_eos)
    return lm


def tiny_mistral():
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    config = MistralConfig(vocab_size=len(tokenizer), **SIZES, sliding_window=2)
    model = randomised(MistralForCausalLM(config), scale=0.3, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=4)


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

    def test_the_eos_is_scored(self, gpt2_lm):
        samples = gpt2_lm.sample(100, seed=0)
        ended = samples[samples.tokens[:, 0] == 0]
        per_token = gpt2_lm.token_log_prob(ended)
        assert len(ended) > 0
        assert (per_token[:, 0] < 0).all()
        assert (per_token[:, 1:] == 0).all()


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


def test_one_batch_may_mix_prompts(gpt2_lm):
    parts = [gpt2_lm.sample(5, prompt=prompt, seed=1) for prompt in ("a", "", "bc")]
    mixed = Samples.cat(parts)[[4, 10, 0, 5, 14, 2, 7]]
    scored = torch.cat([gpt2_lm.log_prob(text) for text in mixed.split(1)])
    torch.testing.assert_close(gpt2_lm.log_prob(mixed), scored, rtol=0, atol=contracts.FLOAT32)
    torch.testing.assert_close(mixed.log_prob, scored, rtol=0, atol=contracts.FLOAT32)
    moved = dataclasses.replace(mixed, prompts=["c"] * len(mixed))
    assert (gpt2_lm.log_prob(moved) - scored).abs().min() > 10 * contracts.FLOAT32


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


class TestPrecision:
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
    def test_bfloat16_records_what_it_drew(self, gpt2_lm, weights):
        # E_q[p / q f] = E_p[f] holds exactly if q is the distribution of the draw.
        lm = CausalLM(
            tiny_gpt2().model.to(weights),
            gpt2_lm.tokenizer,
            max_new_tokens=4,
            dtype=torch.bfloat16,
        )
        check_recorded_log_prob_is_that_of_the_draw(lm, gpt2_lm)

    def test_bfloat16_logits_are_lifted_before_the_softmax(self, gpt2_lm):
        # One text of one token is the same computation in sampling, scoring and here.
        lm = CausalLM(tiny_gpt2().model.to(torch.bfloat16), gpt2_lm.tokenizer)
        with torch.no_grad(), autocast(lm.device, lm.dtype):
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
        with torch.no_grad(), autocast(policy.device, policy.dtype):
            assert policy.model(samples.tokens).logits.dtype == torch.bfloat16

    def test_dtype_defaults_to_that_of_the_weights(self, gpt2_lm):
        narrow = tiny_gpt2().model.to(torch.bfloat16)
        assert CausalLM(narrow, gpt2_lm.tokenizer, max_new_tokens=4).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"weights are torch.bfloat16.*torch.float32"):
            CausalLM(narrow, gpt2_lm.tokenizer, dtype=torch.float32)

    @pytest.mark.parametrize("dtype", ["float3", "nn", "int64", torch.float64, torch.int64])
    def test_other_dtypes_are_refused_before_anything_is_loaded(self, dtype, tmp_path, gpt2_lm):
        gpt2_lm.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        allowed = r"one of torch\.float32, torch\.bfloat16, torch\.float16"
        with pytest.raises(ValueError, match=allowed):
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

    def test_sizes_must_be_positive(self, gpt2_lm):
        samples = gpt2_lm.sample(3, seed=0)
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
                gpt2_lm.sample(3, batch_size=size)
            with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
                gpt2_lm.log_prob(samples, batch_size=size)
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
            CausalLM(gpt2_lm.model, gpt2_lm.tokenizer, max_new_tokens=0)


def check_recorded_log_prob_is_that_of_the_draw(lm, exact):
    """Check that importance weights from the records of `lm`, `exact` rounded, are unbiased."""
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


class TestEmbed:
    """`embed` against the hidden states of one text at a time."""

    @pytest.fixture(params=["gpt2", "llama"])
    def model(self, request, gpt2_lm, llama_lm):
        return {"gpt2": gpt2_lm, "llama": llama_lm}[request.param]

    def by_hand(self, model, text):
        """Return the mean of the states after each token, from the tokens and one more."""
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[*ids, model.tokenizer.eos_token_id]])
        samples = Samples(
            tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(1).double(), [text], [""]
        )
        states = model.hidden_states(samples)[0]
        return states[1:].mean(0) if ids else states[0]

    def test_texts_of_any_length_are_read_as_alone(self, model):
        texts = ["a", "abc", "", "cb"]
        found = model.embed(texts)
        assert found.dtype == torch.float32
        expected = torch.stack([self.by_hand(model, text) for text in texts])
        # float32 sums over a few positions.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.embed(texts, batch_size=1), found, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[1], found[3], atol=1e-2)

    def test_a_text_longer_than_the_context_is_read_as_far_as_it_fits(self, model):
        context = model.model.config.max_position_embeddings
        whole = "a" * (context - 1)
        found = model.embed([whole, whole + "bc" * 40])
        torch.testing.assert_close(found[0], self.by_hand(model, whole), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0], found[1])

    def test_what_looks_like_a_special_token_is_plain_text(self, gpt2_lm):
        model = CausalLM(gpt2_lm.model, letters("cab", bos="cab", eos="cab"), max_new_tokens=4)
        assert model.tokenizer("acabb")["input_ids"] == [1, 0, 2]
        found = model.embed(["acabb"])[0]
        # The letters of gpt2_lm have the same ids, and its special token cannot be spelled by them.
        torch.testing.assert_close(found, self.by_hand(gpt2_lm, "acabb"), rtol=1e-5, atol=1e-6)

    def test_no_texts_have_no_embeddings(self):
        assert tiny_gpt2().embed([]).shape[0] == 0


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
        check_recorded_log_prob_is_that_of_the_draw(lm, gpt2_lm)

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
