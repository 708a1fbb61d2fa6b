"""Policies of few weights: rows of the output layer, and the last layers."""

from __future__ import annotations

import pytest
import torch

import dmgen
from dmgen.storage import read_json

IDS = torch.tensor([5, 9, 100])


@pytest.fixture(scope="module")
def base() -> dmgen.CausalLM:
    return dmgen.CausalLM.from_pretrained("tiny-bios-0.1", max_new_tokens=8)


def changed(policy: dmgen.CausalLM) -> dmgen.CausalLM:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize(
    "options",
    [
        {"last_layers": 1},
        {"last_layers": 0, "output_rows": IDS},
        {"output_rows": IDS},
        {"adapter": "lora", "rank": 2, "output_rows": IDS},
    ],
)
def test_a_copy_begins_as_its_base_and_comes_back_from_the_disk(base, options, tmp_path) -> None:
    texts = base.sample(20, seed=1)
    policy = base.copy(**options)
    assert torch.equal(policy.log_prob(texts), base.log_prob(texts))
    before = base.log_prob(texts)
    changed(policy)
    assert torch.equal(base.log_prob(texts), before)
    assert not torch.allclose(policy.log_prob(texts), before)
    again = policy.copy()
    assert torch.equal(again.log_prob(texts), policy.log_prob(texts))
    assert again.state_dict().keys() == policy.state_dict().keys()
    policy.save_pretrained(tmp_path)
    # Loaders that follow the configuration would tie the output layer to the embedding again.
    is_tied = read_json(tmp_path / "config.json")["tie_word_embeddings"]
    assert is_tied is ("output_rows" not in options)
    read = dmgen.CausalLM.from_pretrained(tmp_path, max_new_tokens=8)
    torch.testing.assert_close(read.log_prob(texts), policy.log_prob(texts), rtol=0, atol=1e-3)


def test_rows_leave_the_odds_of_all_other_tokens(base) -> None:
    texts = base.sample(4, seed=1)
    policy = base.copy(last_layers=0, output_rows=IDS)
    rows = policy.state_dict()["lm_head.change"]
    with torch.no_grad():
        rows.normal_(generator=torch.Generator().manual_seed(0))
    new, old = (m.vocabulary_log_prob(texts) for m in (policy, base))
    others = torch.ones(base.vocab_size, dtype=torch.bool)
    others[IDS] = False
    gap = (new - old)[..., others]
    torch.testing.assert_close(gap, gap[..., :1].expand_as(gap), rtol=0, atol=1e-3)


def test_the_last_layers_alone_have_gradients(base) -> None:
    names = base.copy(last_layers=1).state_dict().keys()
    assert {n.split(".")[2] for n in names if ".h." in n} == {"3"}
    assert "transformer.wpe.weight" not in names
    with pytest.raises(ValueError, match="has 4 layers"):
        base.copy(last_layers=5)
    with pytest.raises(ValueError, match="give one of them"):
        base.copy(last_layers=1, adapter="lora")
    with pytest.raises(ValueError, match="rows must be ids"):
        base.copy(output_rows=torch.tensor([10**6]))
