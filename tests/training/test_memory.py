"""How many texts a pass has room for, against memory that is counted or measured."""

import psutil
import pytest
import torch

import dmgen
from dmgen.models.samples import Samples
from dmgen.training import memory


class Power:
    """A model whose forward pass keeps exactly `n_kept` vectors a text, each of `width` floats."""

    def __init__(self, n_kept, width):
        self.weight = torch.nn.Parameter(torch.ones(1000))
        self.n_kept, self.width = n_kept, width

    def parameters(self):
        return iter([self.weight])

    def log_prob(self, samples, grad):
        assert grad
        x = self.weight[:1].expand(len(samples), self.width)
        x = x * self.weight[1]  # keeps a view of the weights, which costs nothing
        for _ in range(self.n_kept):
            x = x.exp()  # keeps its result
        return x.sum(1)


def texts(n):
    tokens = torch.zeros(n, 3, dtype=torch.long)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Samples(tokens, mask, torch.zeros(n).double(), ["x"] * n, [""] * n)


def with_free(monkeypatch, n_bytes):
    monkeypatch.setattr(memory, "free_bytes", lambda device: n_bytes)


def test_it_counts_what_the_backward_pass_needs(monkeypatch):
    model = Power(n_kept=5, width=100)
    a_text = 5 * 100 * 4
    for free, expected in [(4 * 7 * a_text, 7), (4 * 7 * a_text + 3, 7), (4 * 8 * a_text, 8)]:
        with_free(monkeypatch, free)
        assert memory.micro_batch(model, texts(2)) == expected


def test_it_is_at_least_one_text_and_at_most_what_is_fast(monkeypatch):
    model = Power(n_kept=5, width=100)
    for free, expected in [(0, 1), (2**40, 32)]:
        with_free(monkeypatch, free)
        assert memory.micro_batch(model, texts(1)) == expected


def test_the_longest_text_counts(monkeypatch, gpt2_lm):
    policy = gpt2_lm.copy()
    samples = gpt2_lm.sample(64, seed=0)
    order = samples.n_tokens.argsort()
    assert samples.n_tokens[order[0]] < samples.n_tokens[order[-1]]
    with_free(monkeypatch, 2**17)
    long = memory.micro_batch(policy, samples[order[-1:]])
    assert 1 < long < 32
    assert memory.micro_batch(policy, samples) == long
    assert memory.micro_batch(policy, samples[order[:1]]) > long


def test_weights_do_not_count_with_an_adapter_either(monkeypatch, gpt2_lm):
    pytest.importorskip("peft")
    samples = gpt2_lm.sample(4, seed=0)
    with_free(monkeypatch, 2**18)
    plain = memory.micro_batch(gpt2_lm.copy(), samples)
    adapted = memory.micro_batch(gpt2_lm.copy(adapter="lora", rank=1), samples)
    # An adapter keeps a little more a text; the weights under it are several times as much.
    assert 0.5 * plain < adapted < 1.5 * plain


def test_free_memory_is_some_of_what_there_is():
    free = memory.free_bytes(torch.device("cpu"))
    assert 2**26 < free < psutil.virtual_memory().total


def test_a_trainer_takes_it_once_unless_told(monkeypatch, world):
    target = dmgen.EBM(world, [dmgen.Moment(dmgen.features.word("a"), 0.5)], [1.0])
    asked = []
    monkeypatch.setattr(
        "dmgen.training.state.micro_batch", lambda policy, samples: asked.append(1) or 5
    )
    sampler = dmgen.GDCpp(world.copy(), target, dmgen.TrainerConfig(batch_size=12))
    sampler.train(3)
    assert len(asked) == 1
    assert sampler.state.micro_batch_size == 5
    told = dmgen.GDCpp(world.copy(), target, dmgen.TrainerConfig(batch_size=12, micro_batch_size=3))
    told.train(1)
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_with_it_fits_on_the_device():
    base = dmgen.CausalLM.from_pretrained("tiny-bios", device="cuda")
    policy = base.copy()
    samples = base.sample(2048, seed=0)
    size = memory.micro_batch(policy, samples)
    free = memory.free_bytes(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy.log_prob(samples[:size], grad=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < free / 2
