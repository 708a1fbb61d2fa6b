"""Adapters: the contract of a language model, shared weights, independence, merging."""

import json
import sys

import contracts
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from worlds import letters, randomised, space_of, tiny_gpt2, tiny_llama

from dmgen.models import CausalLM
from dmgen.models.hf.tokenization import start_ids

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


class WithAdapter(CausalLM):
    """A model whose trainable copy is an adapter."""

    def copy(self):
        if self.has_adapter:
            return super().copy()
        return super().copy(adapter="lora", rank=2, alpha=8.0)


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def base(request):
    return request.param()


@pytest.fixture
def policy(base):
    return base.copy(adapter="lora", rank=2)


def shaken(policy, *, scale=0.3, seed=0):
    """Return the policy with random numbers in its adapter, so that it is far from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def train(policy, text, steps=3):
    """Make one text more probable."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.log_prob(text, grad=True).sum().neg().backward()
        optimizer.step()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("check", contracts.CHECKS, ids=contracts.name)
def test_contract_of_a_base_whose_copies_are_adapters(check, make):
    plain = make()
    lm = WithAdapter(plain.model, plain.tokenizer, max_new_tokens=plain.max_new_tokens)
    check(lm, space_of(lm), contracts.FLOAT32)


OF_A_POLICY = [c for c in contracts.CHECKS if c is not contracts.copy_is_independent_and_trainable]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("check", OF_A_POLICY, ids=contracts.name)
def test_contract_of_a_policy(check, make):
    policy = shaken(make().copy(adapter="lora", rank=2))
    check(policy, space_of(policy), contracts.FLOAT32)


class TestTheBase:
    def test_the_distribution_is_that_of_the_base_at_first(self, base, policy):
        space = space_of(base)
        # What the adapter adds is exactly 0.
        assert torch.equal(policy.log_prob(space), base.log_prob(space))
        drawn, expected = policy.sample(50, seed=0), base.sample(50, seed=0)
        assert torch.equal(drawn.tokens, expected.tokens)
        assert torch.equal(drawn.log_prob, expected.log_prob)

    def test_keeps_its_distribution_and_its_texts_while_the_adapter_is_trained(self, base, policy):
        space = space_of(base)
        expected, texts = base.log_prob(space), base.sample(50, seed=0)
        weights = {name: p.clone() for name, p in base.model.named_parameters()}
        for step in range(3):
            train(policy, space[:1], steps=1)
            drawn = policy.sample(50, seed=0)
            torch.testing.assert_close(
                drawn.log_prob, policy.log_prob(drawn), rtol=0, atol=contracts.FLOAT32
            )
            assert torch.equal(base.log_prob(space), expected)
            again = base.sample(50, seed=0)
            assert torch.equal(again.tokens, texts.tokens)
            assert torch.equal(again.log_prob, texts.log_prob)
            assert not torch.equal(policy.log_prob(space), expected), step
        for name, parameter in base.model.named_parameters():
            assert torch.equal(parameter, weights[name])
            assert not parameter.requires_grad
            assert parameter.grad is None

    def test_shares_its_weights(self, base, policy):
        shared = {p.data_ptr() for p in base.model.parameters()}
        every = {p.data_ptr() for p in policy.model.parameters()}
        own = {p.data_ptr() for p in policy.parameters()}
        assert shared < every
        assert own == every - shared
        copied = {p.data_ptr() for p in policy.copy().model.parameters()}
        assert copied & every == shared

    def test_every_linear_layer_but_the_output_has_an_adapter(self, base, policy):
        adapted = {name.partition(".lora_")[0] for name in policy.state_dict()}
        linear = {
            name
            for name, module in base.model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
        }
        assert adapted == linear - {"lm_head"}
        assert len(adapted) in (8, 14)

    def test_is_scored_in_blocks_too(self, policy):
        assert policy.chunked_head


class TestTheAdapter:
    def test_is_what_the_formula_says(self, base):
        # Llama's weights are (outputs, inputs), GPT-2's the other way round.
        policy = shaken(base.copy(adapter="lora", rank=2, alpha=3.0))
        by_hand = base.copy()
        state = policy.state_dict()
        with torch.no_grad():
            for name, weight in by_hand.model.named_parameters():
                layer = name.removesuffix(".weight")
                if f"{layer}.lora_A.default.weight" in state:
                    a, b = (state[f"{layer}.lora_{x}.default.weight"] for x in "AB")
                    part = 3.0 / 2 * b @ a
                    weight += part if type(base.model).__name__.startswith("Llama") else part.T
        space = space_of(base)
        found, expected = policy.log_prob(space), by_hand.log_prob(space)
        torch.testing.assert_close(found, expected, rtol=0, atol=contracts.FLOAT32)
        assert (found - base.log_prob(space)).abs().max() > 1

    def test_starts_with_uniform_a_and_zero_b_from_its_own_seed(self, base):
        before = torch.get_rng_state()
        states = [base.copy(adapter="lora", rank=4, seed=s).state_dict() for s in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), before)
        pooled = []
        for name, first in states[0].items():
            assert first.dtype == torch.float32
            assert torch.equal(first, states[1][name])
            if ".lora_B." in name:
                assert (first == 0).all()
            else:
                assert first.shape[0] == 4
                assert not torch.equal(first, states[2][name])
                pooled.append((first * first.shape[1] ** 0.5).flatten())
        # Uniform in ±1: its square has mean 1/3 and variance 4/45.
        values = torch.cat(pooled).double()
        assert values.abs().max() <= 1
        assert values.mean().abs() < 5 * (1 / 3 / len(values)) ** 0.5
        assert (values.square().mean() - 1 / 3).abs() < 5 * (4 / 45 / len(values)) ** 0.5

    def test_is_all_that_is_saved_and_loaded(self, base, policy):
        assert all(".lora_" in name for name in policy.state_dict())
        assert [p.shape for p in policy.parameters()] == [
            v.shape for v in policy.state_dict().values()
        ]
        other = base.copy(adapter="lora", rank=2, seed=1)
        other.load_state_dict(shaken(policy).state_dict())
        space = space_of(base)
        assert torch.equal(other.log_prob(space), policy.log_prob(space))

    def test_a_copy_is_independent_of_it(self, base, policy):
        space = space_of(base)
        copy = shaken(policy).copy()
        before = policy.log_prob(space)
        assert torch.equal(copy.log_prob(space), before)
        train(copy, space[:1])
        assert torch.equal(policy.log_prob(space), before)
        assert (copy.log_prob(space) - before).abs().max() > 1e-3
        assert all(p.requires_grad for p in copy.parameters())
        before = copy.log_prob(space)
        train(policy, space[1:2])
        assert torch.equal(copy.log_prob(space), before)

    def test_over_bfloat16_weights_stays_float32_and_records_what_it_drew(self):
        exact = shaken(tiny_gpt2().copy(adapter="lora", rank=2))
        narrow = CausalLM(tiny_gpt2().model.to(torch.bfloat16), exact.tokenizer, max_new_tokens=4)
        policy = narrow.copy(adapter="lora", rank=2)
        space = space_of(narrow)
        assert torch.equal(policy.log_prob(space), narrow.log_prob(space))
        train(policy, space[:1], steps=1)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        # E_q[p / q] = 1 for the q that was recorded, however far from p.
        policy.load_state_dict(exact.state_dict())
        samples = policy.sample(contracts.N_DRAWS, seed=0)
        ratio = (exact.log_prob(samples) - samples.log_prob).exp()
        stderr = ratio.std().item() / len(samples) ** 0.5
        assert abs(ratio.mean().item() - 1) < 5 * stderr
        assert abs(1.05 * ratio.mean().item() - 1) > 5 * stderr


class TestSaving:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_writes_a_plain_folder_with_the_adapter_merged(self, base, dtype, tmp_path):
        narrow = CausalLM(base.model.to(dtype), base.tokenizer, max_new_tokens=3)
        policy = shaken(narrow.copy(adapter="lora", rank=2))
        space = space_of(policy)
        before = policy.log_prob(space)
        policy.save_pretrained(tmp_path)
        assert torch.equal(policy.log_prob(space), before)

        assert not list(tmp_path.glob("adapter*"))
        assert "peft" not in (tmp_path / "config.json").read_text(encoding="utf-8").lower()
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
        loaded = CausalLM.from_pretrained(tmp_path, device="cpu", max_new_tokens=3)
        assert not any("lora" in name for name in loaded.state_dict())
        if dtype == torch.float32:
            torch.testing.assert_close(
                loaded.log_prob(space), before, rtol=0, atol=contracts.FLOAT32
            )
        else:  # the saved weights are exact where the policy computes in bfloat16
            assert 1e-4 < (loaded.log_prob(space) - before).abs().max() < 1

        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        start = start_ids(policy.model, policy.tokenizer, "", 3).expand(len(space), -1)
        with torch.no_grad():
            logits = model(torch.cat([start, space.tokens[:, :-1]], dim=1)).logits
        chosen = logits.log_softmax(-1).gather(-1, space.tokens.unsqueeze(-1)).squeeze(-1)
        plain = (chosen * space.mask).double().sum(-1)
        torch.testing.assert_close(plain, loaded.log_prob(space), rtol=0, atol=contracts.FLOAT32)


class TestErrors:
    def test_without_peft_what_to_install_is_named(self, base, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r'pip install "dmgen\[peft\]"'):
            base.copy(adapter="lora")

    def test_another_kind(self, base):
        with pytest.raises(ValueError, match=r'must be None or "lora", got \'dora\''):
            base.copy(adapter="dora")
        with pytest.raises(TypeError, match="dropout"):
            base.copy(adapter="lora", dropout=0.1)

    @pytest.mark.parametrize("settings", [{"rank": 4}, {"alpha": 8.0}, {"seed": 1}])
    def test_settings_without_an_adapter(self, base, settings):
        with pytest.raises(ValueError, match='of an adapter: say adapter="lora"'):
            base.copy(**settings)

    @pytest.mark.parametrize(
        "settings", [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("nan")}]
    )
    def test_sizes_that_are_none(self, base, settings):
        with pytest.raises(ValueError, match="rank >= 1 and a finite alpha > 0"):
            base.copy(adapter="lora", **settings)

    def test_weights_that_are_trained_are_not_shared(self, base, policy):
        for trained in (base.copy(), policy):
            with pytest.raises(ValueError, match=r'use base.copy\(adapter="lora"\)'):
                trained.copy(adapter="lora")


def test_no_warnings_of_peft(base, recwarn):
    base.copy(adapter="lora")
    assert [w for w in recwarn if "peft" in w.filename] == []


def test_a_mixture_of_experts_is_refused():
    """peft would wrap the experts, which are parameters and no layers."""
    pytest.importorskip("peft")
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    settings = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=16,
    )  # fmt: skip
    base = CausalLM(randomised(MixtralForCausalLM(settings), scale=0.3, seed=0), tokenizer)
    before = base.log_prob(base.sample(8, max_new_tokens=4, seed=0))
    with pytest.raises(ValueError, match="mixture of experts, such as MixtralForCausalLM"):
        base.copy(adapter="lora")
    assert torch.equal(base.log_prob(base.sample(8, max_new_tokens=4, seed=0)), before)
