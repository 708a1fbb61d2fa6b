"""Attention by matrix products against its definition, and against torch's own kernel in models."""

import json
from types import SimpleNamespace

import pytest
import torch

from dmgen.models import CausalLM
from dmgen.models.hf import fast_attention

LAYER = SimpleNamespace(is_causal=True)


def plainly(query, key, value, scaling):
    """softmax(scaling QKᵀ)V with repeated keys, in float64; queries are the last positions."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, dim=1) for x in (key, value))
    logits = query.double() @ key.transpose(-1, -2) * scaling
    t, n_keys = logits.shape[-2:]
    seen = torch.arange(n_keys) <= torch.arange(n_keys - t, n_keys)[:, None]
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def tensors(heads, key_heads, t, n_keys, *, dtype=torch.float32, width=8):
    generator = torch.Generator().manual_seed(heads + t)
    shapes = [(heads, t), (key_heads, n_keys), (key_heads, n_keys)]
    return [torch.randn(3, h, n, width, generator=generator).to(dtype) for h, n in shapes]


@pytest.fixture
def fused(monkeypatch):
    """Return a list with one entry per call of torch's kernel."""
    calls = []
    real = fast_attention.sdpa_attention_forward
    monkeypatch.setattr(
        fast_attention, "sdpa_attention_forward", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    return calls


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("t", "n_keys"), [(1, 1), (1, 7), (5, 5)])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_it_is_its_definition(fused, heads, key_heads, t, n_keys, scaling):
    q, k, v = tensors(heads, key_heads, t, n_keys)
    found, weights = fast_attention.attend(LAYER, q, k, v, None, scaling=scaling)
    expected = plainly(q, k, v, scaling or 8**-0.5)
    assert weights is None
    assert not fused
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_gradients(fused):
    leaves = [x.double().requires_grad_() for x in tensors(6, 2, 5, 5)]
    found, _ = fast_attention.attend(LAYER, *leaves, None)
    outside = torch.randn(found.shape, dtype=torch.float64)
    by_hand = torch.autograd.grad((plainly(*leaves, 8**-0.5) * outside).sum(), leaves)
    # The logits go through float32.
    for a, b in zip(torch.autograd.grad((found * outside).sum(), leaves), by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not fused


def test_bfloat16_is_as_exact_as_the_fused_kernel(fused):
    for t, n_keys in ((1, 40), (40, 40)):
        q, k, v = tensors(6, 2, t, n_keys, dtype=torch.bfloat16, width=64)
        expected = plainly(q, k, v, 64**-0.5)
        own, _ = fast_attention.attend(LAYER, q, k, v, None)
        layer = SimpleNamespace(is_causal=True, num_key_value_groups=3)
        other, _ = fast_attention.sdpa_attention_forward(layer, q, k, v, None)
        assert own.dtype == torch.bfloat16
        errors = [(x.double() - expected).square().mean().sqrt() for x in (own, other)]
        # Its logits are rounded once more than those inside the fused kernel.
        assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 4, 3, 5), {}),  # later positions of a text that is read in parts
        ((4, 4, 300, 300), {}),
        ((4, 4, 5, 5), {"is_causal": False}),
        ((4, 4, 5, 5), {"dropout": 1e-9}),
        ((4, 4, 5, 5), {"position_bias": torch.zeros(1, 4, 5, 5)}),
    ],
)
def test_what_it_does_not_know_goes_to_torch(fused, shape, options):
    fast_attention.attend(LAYER, *tensors(*shape), None, **options)
    assert len(fused) == 1


def test_a_mask_goes_to_torch(fused):
    q, k, v = tensors(4, 4, 5, 5)
    only_itself = torch.eye(5, dtype=torch.bool).expand(3, 1, 5, 5)
    found, _ = fast_attention.attend(LAYER, q, k, v, only_itself)
    assert len(fused) == 1
    torch.testing.assert_close(found, v.transpose(1, 2))


@pytest.mark.parametrize("name", ["gpt2_lm", "llama_lm"])
def test_a_model_keeps_its_distribution(request, name, tmp_path):
    own = request.getfixturevalue(name)
    own.save_pretrained(tmp_path)
    assert fast_attention.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    fast, plain = (
        CausalLM.from_pretrained(tmp_path, device="cpu", max_new_tokens=6, fast_attention=flag)
        for flag in (True, False)
    )
    assert fast.model.config._attn_implementation == fast_attention.NAME
    assert plain.model.config._attn_implementation == "sdpa"
    assert fast.copy().model.config._attn_implementation == fast_attention.NAME
    samples = plain.sample(50, prompt="ab", seed=0)
    again = fast.sample(50, prompt="ab", seed=0)
    assert again.texts == samples.texts
    torch.testing.assert_close(again.log_prob, samples.log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.log_prob(samples), plain.log_prob(samples), rtol=0, atol=1e-5)


def test_a_model_that_has_chosen_otherwise_keeps_its_choice(gpt2_lm, tmp_path):
    gpt2_lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    model = type(gpt2_lm.model).from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager", config
    assert CausalLM(model, gpt2_lm.tokenizer).model.config._attn_implementation == "eager"
