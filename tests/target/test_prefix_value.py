"""`PrefixValue`: what it learns on a world where all is known, its forms, and its refusals."""

from __future__ import annotations

import pytest
import torch

import dmgen
from dmgen.models.guided import GuidedLM
from dmgen.target.prefix_value import PrefixValue

FEATURE = dmgen.feature(lambda text: text.count("a") >= 2, name="two a")


def make_target(constraint=None, eos: str | None = ".") -> dmgen.EBM:
    base = dmgen.TabularLM.random("abc.", 4, eos=eos, seed=3)
    return dmgen.EBM.fit(base, [constraint or dmgen.Moment(FEATURE, 0.6)], n_samples=4_000, seed=0)


@pytest.fixture(scope="module")
def target() -> dmgen.EBM:
    return make_target()


@pytest.fixture(scope="module")
def value(target: dmgen.EBM) -> PrefixValue:
    return PrefixValue.fit(target)


def kl(target: dmgen.EBM, model) -> float:
    exact = target.exact()
    log_ratio = exact.log_prob - model.log_prob(exact.samples)
    return float((exact.log_prob.exp() * torch.where(exact.log_prob > -60, log_ratio, 0.0)).sum())


@pytest.mark.parametrize("eos", [".", None])
def test_the_guided_base_is_far_closer_to_the_target_than_the_base(eos: str | None) -> None:
    target = make_target(eos=eos)
    guided = GuidedLM(target.base, PrefixValue.fit(target))
    assert kl(target, guided) < 0.1 * kl(target, target.base)


def test_a_hard_constraint_makes_no_text_impossible() -> None:
    target = make_target(dmgen.Pointwise(FEATURE))
    guided = GuidedLM(target.base, PrefixValue.fit(target))
    assert bool((guided.log_prob(target.exact().samples) > -40).all())
    assert kl(target, guided) < 0.1 * kl(target, target.base)


def test_it_beats_a_constant_on_texts_it_has_not_seen(value: PrefixValue) -> None:
    entropy, constant, predicted, observed = value.report.tolist()
    assert entropy < 0.9 * constant
    assert abs(predicted - observed) < 0.05
    assert "cross-entropy" in str(value)


def test_one_token_at_a_time_equals_the_whole_text(target: dmgen.EBM, value: PrefixValue) -> None:
    texts = target.exact().samples
    states = target.base.hidden_states(texts)
    together = value.log_values(texts.tokens, states)
    for t in range(texts.tokens.shape[1]):
        alone = value.next_log_values(texts.tokens[:, :t], states[:, t])
        torch.testing.assert_close(alone, together[:, t])


def test_the_value_of_a_finished_text_does_not_depend_on_the_base(
    target: dmgen.EBM, value: PrefixValue
) -> None:
    texts = target.exact().samples
    states = target.base.hidden_states(texts)
    last = value.log_values(texts.tokens, states)[:, -1]
    torch.testing.assert_close(last, value.log_values(texts.tokens, states.flip(0))[:, -1])


def test_it_comes_back_from_the_disk(value: PrefixValue, tmp_path) -> None:
    value.save(tmp_path)
    again = PrefixValue.load(tmp_path)
    assert all(torch.equal(x, again.tensors()[name]) for name, x in value.tensors().items())
    with pytest.raises(ValueError, match="no prefix value"):
        PrefixValue.load(tmp_path / "elsewhere")


def test_it_is_fitted_once_and_alike(target: dmgen.EBM, value: PrefixValue) -> None:
    fitted = PrefixValue.of(target)
    assert PrefixValue.of(target) is fitted
    assert torch.equal(fitted.value_net, value.value_net)


def test_unlabelled_prefixes_leave_finished_texts() -> None:
    target = make_target()
    value = PrefixValue.fit(target, n_labelled=0)
    assert kl(target, GuidedLM(target.base, value)) < 0.3 * kl(target, target.base)


def test_a_target_without_texts_is_refused() -> None:
    base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=3)
    with pytest.raises(ValueError, match=r"EBM\.fit"):
        PrefixValue.fit(dmgen.EBM(base, [dmgen.Moment(FEATURE, 0.6)], [1.0]))


def test_a_factor_that_never_changes_is_refused() -> None:
    base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=3)
    everything = dmgen.feature(lambda text: True, name="all")
    target = dmgen.EBM.fit(base, [dmgen.Pointwise(everything)], n_samples=100, seed=0)
    with pytest.raises(ValueError, match="nothing to learn"):
        PrefixValue.fit(target)
