"""`GuidedLM` is a distribution: it sums to 1, and is drawn and scored alike."""

from __future__ import annotations

import pytest
import torch

import dmgen
from dmgen.models.guided import GuidedLM
from dmgen.target.prefix_value import PrefixValue

FEATURE = dmgen.feature(lambda text: " a " in f" {text} ", name="has a")


@pytest.fixture(scope="module")
def guided() -> GuidedLM:
    base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=3)
    feature = dmgen.feature(lambda text: "aa" in text, name="aa")
    target = dmgen.EBM.fit(base, [dmgen.Moment(feature, 0.5)], n_samples=2_000, seed=0)
    return GuidedLM(base, PrefixValue.fit(target))


def test_it_sums_to_one(guided: GuidedLM) -> None:
    assert float(guided.log_prob(guided.base.enumerate()).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_texts_are_drawn_from_what_is_scored(guided: GuidedLM) -> None:
    drawn = guided.sample(20_000, seed=1)
    torch.testing.assert_close(drawn.log_prob, guided.log_prob(drawn), rtol=0, atol=1e-5)
    texts = guided.base.enumerate()
    probs = guided.log_prob(texts).exp()
    counts = {text: drawn.texts.count(text) for text in texts.texts[:20]}
    for text, p in zip(texts.texts[:20], probs.tolist(), strict=False):
        assert abs(counts[text] / 20_000 - p) < 5 * (p * (1 - p) / 20_000) ** 0.5 + 1e-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformer_is_drawn_and_scored_alike(dtype: str) -> None:
    base = dmgen.CausalLM.from_pretrained("tiny-bios-0.1", dtype=dtype, max_new_tokens=8)
    target = dmgen.EBM.fit(base, [dmgen.Moment(FEATURE, 0.5)], n_samples=600, seed=0)
    guided = GuidedLM(base, PrefixValue.fit(target, n_texts=400, n_heldout=50))
    drawn = guided.sample(64, seed=1)
    gap = (drawn.log_prob - guided.log_prob(drawn)).abs().max()
    assert gap < (1e-3 if dtype == "float32" else 1.0)
    one = guided.sample(64, seed=1, batch_size=16)
    assert one.texts == drawn.texts
