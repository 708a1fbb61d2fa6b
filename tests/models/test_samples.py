"""`Samples`: picking, splitting, joining, and the shapes that are refused."""

import dataclasses

import pytest
import torch

from dmgen.models import Samples


def samples_of(*lengths, width=None, prompt="p"):
    """Texts "0", "1", ... of the given lengths whose tokens are 10 i + position."""
    width = width or max(lengths)
    n = len(lengths)
    return Samples(
        10 * torch.arange(n).unsqueeze(1) + torch.arange(width),
        torch.arange(width) < torch.tensor(lengths).unsqueeze(1),
        -torch.arange(n, dtype=torch.float64),
        [str(i) for i in range(n)],
        [f"{prompt}{i}" for i in range(n)],
    )


class TestSamples:
    def test_lengths(self):
        samples = samples_of(2, 1, 3, width=5)
        assert len(samples) == 3
        assert samples.n_tokens.tolist() == [2, 1, 3]
        assert samples.longest == 3
        assert samples[:0].longest == 0

    @pytest.mark.parametrize(
        "index",
        [
            slice(1, 3),
            [1, 2],
            torch.tensor([1, 2]),
            torch.tensor([False, True, True, False]),
        ],
    )
    def test_any_index_picks_the_same_rows_of_all_fields(self, index):
        part = samples_of(2, 1, 3, 2)[index]
        assert part.texts == ["1", "2"]
        assert part.prompts == ["p1", "p2"]
        assert part.log_prob.tolist() == [-1, -2]
        assert part.tokens[:, 0].tolist() == [10, 20]
        assert part.n_tokens.tolist() == [1, 3]

    def test_an_empty_pick_is_a_batch_of_no_text(self):
        none = samples_of(2, 1)[torch.tensor([False, False])]
        assert len(none) == 0
        assert none.tokens.shape == (0, 2)

    def test_split_keeps_the_tail(self):
        parts = list(samples_of(1, 1, 1, 1, 1).split(2))
        assert [part.texts for part in parts] == [["0", "1"], ["2", "3"], ["4"]]

    def test_cat_pads_to_the_widest_and_keeps_the_order(self):
        first, second = samples_of(2, 1, prompt="x"), samples_of(4, prompt="y")
        both = Samples.cat([first, second])
        assert both.tokens.shape == both.mask.shape == (3, 4)
        assert both.n_tokens.tolist() == [2, 1, 4]
        assert both.prompts == ["x0", "x1", "y0"]
        assert both.texts == ["0", "1", "0"]
        assert torch.equal(both.tokens[:2, :2], first.tokens)
        assert torch.equal(both.log_prob, torch.cat([first.log_prob, second.log_prob]))

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            samples_of(1).texts = []

    def test_log_prob_may_be_minus_infinity(self):
        samples = dataclasses.replace(samples_of(1), log_prob=torch.tensor([-torch.inf]))
        assert samples.log_prob.item() == -torch.inf

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_log_prob_may_not_be_nan_or_infinity_and_the_text_is_named(self, value):
        with pytest.raises(ValueError, match=r"text 1 \('1'\) is NaN or infinite"):
            dataclasses.replace(samples_of(1, 1), log_prob=torch.tensor([0.0, value]))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"tokens": torch.zeros(2, 4, dtype=torch.long)}, r"tokens \(2, 4\)"),
            ({"tokens": torch.zeros(2, dtype=torch.long)}, r"tokens \(2,\)"),
            ({"log_prob": torch.zeros(3)}, r"log_prob \(3,\)"),
            ({"texts": ["a"]}, r"N = 1 texts"),
            ({"prompts": ["a"]}, "1 prompts"),
            ({"mask": torch.tensor([[True, False, True]] * 2)}, "up to the end of its text"),
            ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, "one token at least"),
        ],
    )
    def test_fields_that_do_not_fit_are_refused(self, changed, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(samples_of(3, 2), **changed)

    def test_bad_calls_are_refused(self):
        with pytest.raises(TypeError, match=r"samples\[0:1\]"):
            samples_of(1)[0]
        with pytest.raises(ValueError, match="at least one part"):
            Samples.cat([])
        with pytest.raises(ValueError, match="size=0"):
            list(samples_of(1).split(0))
