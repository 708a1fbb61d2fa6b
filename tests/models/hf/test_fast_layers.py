"""Norms and gated layers: equality with the plain definition, which modules are taken, memory."""

import copy

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from worlds import SIZES, letters, randomised, tied_llama

from dmgen.models import CausalLM
from dmgen.models.hf.fast_layers import GatedMLP, RMSNorm, use_fast_layers
from dmgen.models.hf.tokenization import start_ids


def plain(x, weight, eps):
    """Return the norm by its definition, in float64."""
    x, weight = x.double(), weight.double()
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def states(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fast_norms(model):
    return [m for m in model.modules() if isinstance(m, RMSNorm)]


def fast_mlps(model):
    return [m for m in model.modules() if isinstance(m, GatedMLP)]


def bytes_kept(call):
    """Return the bytes that autograd keeps of a call for its backward pass."""
    own = {}

    def count(tensor):
        own[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        result = call()
    del result  # until here the graph keeps every storage, so that no address comes twice
    return sum(own.values())


class TestNormEqualsThePlainDefinition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
    @pytest.mark.parametrize("shape", [(7,), (3, 5, 64), (2, 1, 3, 576)])
    def test_in_values(self, shape, scale, dtype):
        x = states(*shape, dtype=dtype) * scale
        weight = torch.nn.Parameter(states(shape[-1], dtype=dtype, seed=1))
        found = RMSNorm(weight, 1e-5)(x)
        assert found.dtype == dtype
        # Rounded once to dtype; before that float32, of a mean over D and five operations.
        rounding = torch.finfo(dtype).eps / 2 + (shape[-1] + 8) * 2.0**-24
        torch.testing.assert_close(
            found.double(), plain(x, weight, 1e-5), rtol=rounding, atol=torch.finfo(dtype).tiny
        )

    def test_gradients_are_the_slopes_of_the_values(self):
        x = states(3, 4, 6).double().requires_grad_()
        weight = torch.nn.Parameter(states(6, seed=1).double())
        norm = RMSNorm(weight, 0.1)
        assert torch.autograd.gradcheck(lambda x, w: norm(x), (x, weight))

    def test_one_state_alone(self):
        x = states(6).double().requires_grad_()
        norm = RMSNorm(torch.nn.Parameter(states(6, seed=1).double()), 0.1)
        assert torch.autograd.gradcheck(lambda x, w: norm(x), (x, norm.weight))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_gradients(self, dtype):
        x = states(8, 5, 48, dtype=dtype).requires_grad_()
        weight = torch.nn.Parameter(states(48, dtype=dtype, seed=1))
        slope = states(8, 5, 48, dtype=dtype, seed=2)
        found = torch.autograd.grad(RMSNorm(weight, 1e-5)(x), (x, weight), slope)
        exact = torch.autograd.grad(plain(x, weight, 1e-5), (x, weight), slope.double())
        for own, other, n_terms in zip(found, exact, (48, 40), strict=True):
            error = (torch.finfo(dtype).eps + (n_terms + 8) * 2.0**-24) * other.abs().max()
            assert ((own - other).abs() <= error).all()

    def test_under_autocast_the_result_is_what_linear_layers_would_make_of_it(self):
        x, weight = states(4, 64), torch.nn.Parameter(states(64, seed=1))
        norm = RMSNorm(weight, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            found = norm(x)
        assert torch.equal(found, norm(x).bfloat16())

    def test_a_second_derivative_is_refused(self):
        x = states(2, 8).requires_grad_()
        norm = RMSNorm(torch.nn.Parameter(torch.ones(8)), 1e-5)
        with pytest.raises(RuntimeError, match="fast_layers=False"):
            torch.autograd.grad(norm(x).sum(), x, create_graph=True)

    def test_the_graph_can_be_used_twice(self):
        x = states(2, 8).requires_grad_()
        y = RMSNorm(torch.nn.Parameter(states(8, seed=1)), 1e-5)(x)[0].sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


class TestGatedMLP:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_plain_one_to_the_last_bit(self, dtype):
        plain_mlp = LlamaMLP(LlamaConfig(**SIZES)).to(dtype)
        fast = GatedMLP(plain_mlp.gate_proj, plain_mlp.up_proj, plain_mlp.down_proj)
        x = states(5, 7, 16, dtype=dtype).requires_grad_()
        found = []
        for mlp in (fast, plain_mlp):
            y = mlp(x)
            leaves = [x, *(dict(mlp.named_parameters())[name] for name in sorted(plain_names()))]
            found.append([y, *torch.autograd.grad((y * states(*y.shape, seed=1)).sum(), leaves)])
        for own, other in zip(*found, strict=True):
            assert torch.equal(own, other)

    def test_a_second_derivative_is_refused(self):
        mlp = LlamaMLP(LlamaConfig(**SIZES))
        fast = GatedMLP(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        x = states(2, 16).requires_grad_()
        with pytest.raises(RuntimeError, match="fast_layers=False"):
            torch.autograd.grad(fast(x).sum(), x, create_graph=True)

    def test_one_state_less_is_kept_for_the_backward_pass(self):
        mlp = LlamaMLP(LlamaConfig(**SIZES | {"intermediate_size": 640}))
        fast = GatedMLP(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        x = states(50, 16)
        one = 4 * 50 * 640  # bytes of one state between the layers
        assert bytes_kept(lambda: mlp(x)) - bytes_kept(lambda: fast(x)) == one


def plain_names():
    return [f"{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]


class TestWhichModules:
    def test_those_of_llama_and_of_qwen_and_their_weights_stay_the_same(self):
        qwen = Qwen3ForCausalLM(Qwen3Config(vocab_size=11, **SIZES))
        for model, n in ((tied_llama(11), 5), (qwen, 9)):
            before = {name: p.data_ptr() for name, p in model.named_parameters()}
            use_fast_layers(model)
            assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
            assert len(fast_norms(model)) == n
            assert len(fast_mlps(model)) == 2

    def test_others_keep_their_own(self):
        # Gemma's norms have weights less 1, and its gates are no SiLU.
        gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=11, **SIZES))
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2))
        for model in (gemma, gpt2):
            use_fast_layers(model)
            assert not fast_norms(model)
            assert not fast_mlps(model)

    def test_those_with_hooks_keep_them(self):
        model = tied_llama(11)
        first, second = model.model.layers
        for layer in (first.mlp, second.mlp.up_proj, model.model.norm):
            layer.register_forward_hook(lambda module, inputs, output: output)
        use_fast_layers(model)
        assert (len(fast_norms(model)), len(fast_mlps(model))) == (4, 0)

    @pytest.mark.parametrize("change", ["eps", "mean", "shift", "two results"])
    def test_norms_that_compute_something_else_are_seen(self, change):
        class OtherRMSNorm(LlamaRMSNorm):
            def forward(self, x):
                if change == "eps":
                    return plain(x, self.weight, 1.1e-5).to(x.dtype)
                if change == "mean":
                    x = x - 1e-3 * x.mean(-1, keepdim=True)
                if change == "shift":
                    return plain(x, 1 + self.weight, 1e-5).to(x.dtype)
                normed = super().forward(x)
                return (normed, x) if change == "two results" else normed

        # In bfloat16, weights about 50 and 51 look nearly alike.
        norms = [OtherRMSNorm(16, eps=1e-5), LlamaRMSNorm(16, eps=1e-5)]
        for norm in norms:
            norm.weight.data *= 50
        model = torch.nn.Sequential(*norms).bfloat16()
        use_fast_layers(model)
        assert [type(m) for m in model] == [OtherRMSNorm, RMSNorm]

    def test_a_norm_with_more_weights_is_left_alone(self):
        norm = LlamaRMSNorm(16, eps=1e-5)
        norm.bias = torch.nn.Parameter(torch.zeros(16))
        model = torch.nn.Sequential(norm)
        use_fast_layers(model)
        assert not fast_norms(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("change", ["clamp", "act", "shape", None])
    def test_gated_layers_that_compute_something_else_are_seen(self, change, dtype):
        class OtherMLP(LlamaMLP):
            def forward(self, x):
                if change == "shape":
                    assert x.ndim == 1, "made for something else than states"
                gate = self.gate_proj(x)
                if change == "clamp":
                    gate = gate.clamp(max=10)
                return self.down_proj(self.act_fn(gate) * self.up_proj(x))

        mlp = OtherMLP(LlamaConfig(**SIZES, hidden_act="gelu" if change == "act" else "silu"))
        model = torch.nn.Sequential(mlp.to(dtype)).eval()
        use_fast_layers(model)
        assert bool(fast_mlps(model)) == (change is None)
        assert not any(m.training for m in model.modules())

    def test_can_be_turned_off(self, llama_lm):
        lm = CausalLM(tied_llama(5), llama_lm.tokenizer, fast_layers=False)
        assert not fast_norms(lm.model)
        assert fast_norms(llama_lm.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_no_less_exact_than_with_its_own_norms(dtype):
    """Beside the same model in float64: of log-probabilities and of their gradients."""
    tokenizer = letters("<end>", bos="<end>", eos="<end>")
    model = randomised(tied_llama(len(tokenizer)), scale=0.3, seed=0)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, LlamaRMSNorm)):
        norm.weight.data = 1 + states(16, seed=i) / 2
    exact = copy.deepcopy(model).double()
    policies = [
        CausalLM(model, tokenizer, max_new_tokens=6, dtype=dtype, fast_layers=False).copy(),
        CausalLM(copy.deepcopy(model), tokenizer, max_new_tokens=6, dtype=dtype).copy(),
    ]
    samples = policies[0].sample(256, prompt="ab", seed=0)
    start = start_ids(policies[0].model, tokenizer, "ab", 6)
    logits = exact(torch.cat([start.expand(256, -1), samples.tokens], 1)).logits
    token_log_prob = logits[:, len(start) - 1 : -1].log_softmax(-1).gather(
        -1, samples.tokens.unsqueeze(-1)
    )  # fmt: skip
    found = [policy.log_prob(samples, grad=True) for policy in policies]
    found.append((token_log_prob.squeeze(-1) * samples.mask).sum(-1))
    gradients = []
    for log_prob, m in zip(found, [*(p.model for p in policies), exact], strict=True):
        m.requires_grad_(True)
        own = torch.autograd.grad(log_prob.mean(), list(m.parameters()))
        gradients.append(torch.cat([g.double().flatten() for g in own]))
    # The root of a mean square over 256 texts is known to 1/sqrt(512) or 4 %, the ratio of two to
    # 6 %: 1.5 is eight of its deviations above 1.
    for plain_error, fast_error in (
        [(x - of[2]).norm() for x in of[:2]] for of in (found, gradients)
    ):
        assert 0 < fast_error < 1.5 * plain_error


def test_little_is_kept_for_the_backward_pass():
    """In bfloat16 the states and one number per row; the plain norm also keeps float32 states."""
    x = states(64, 576, dtype=torch.bfloat16).requires_grad_()
    weight = torch.nn.Parameter(torch.ones(576, dtype=torch.bfloat16))
    fast, slow = RMSNorm(weight, 1e-5), LlamaRMSNorm(576, eps=1e-5).bfloat16()
    kept = bytes_kept(lambda: fast(x))
    assert kept == 2 * 64 * 576 + 2 * 576 + 4 * 64
    assert bytes_kept(lambda: slow(x)) >= kept + 4 * 64 * 576
