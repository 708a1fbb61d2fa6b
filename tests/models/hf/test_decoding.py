"""Cached decoding: which rows are computed, what a text depends on, and the cache argument."""

import contracts
import pytest
import torch
from worlds import tiny_gpt2

from dmgen.models.hf.decoding import cache_argument, decode
from dmgen.models.hf.scoring import score


def test_rows_that_ended_leave_the_batch_and_nothing_else_changes():
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
    torch.testing.assert_close(together.log_prob, alone.log_prob, rtol=0, atol=contracts.FLOAT32)


def test_text_i_depends_on_row_i_of_the_uniforms_only(gpt2_lm):
    start = torch.tensor([0])
    u = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, log_prob = decode(gpt2_lm.model, start, u, 0)
    backwards, log_prob_backwards = decode(gpt2_lm.model, start, u.flip(0), 0)
    assert torch.equal(tokens, backwards.flip(0))
    torch.testing.assert_close(log_prob, log_prob_backwards.flip(0), rtol=0, atol=contracts.FLOAT32)


def test_a_prompt_is_read_once_for_all_texts(llama_lm, monkeypatch):
    """Also: an output layer on a slice of longer states would copy its weights for every text."""
    seen = []
    forward = llama_lm.model.forward
    monkeypatch.setattr(
        llama_lm.model,
        "forward",
        lambda ids, **k: seen.append(tuple(ids.shape)) or forward(ids, **k),
    )
    start = torch.tensor([0, 1, 2, 1])
    u = torch.rand(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, log_prob = decode(llama_lm.model, start, u, eos=10**6)
    assert seen == [(1, 3), (9, 1), (9, 1), (9, 1)]
    monkeypatch.undo()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        scored = score(llama_lm.model, start, tokens, mask, chunked=False).sum(-1)
    torch.testing.assert_close(log_prob, scored.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_that_the_model_has_for_it(named):
    """Also where a class passes the rest on, as `**options`."""

    class Outer(torch.nn.Module):
        def forward(self, inputs, cache=None, **options): ...

    class Own(Outer):
        def forward(self, inputs, past_key_values=None, **options): ...

    class PassingOn(Outer if named == "cache" else Own):
        def forward(self, inputs, **options): ...

    assert cache_argument(PassingOn()) == named
