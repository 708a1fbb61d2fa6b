"""Constraints: what they hold, what they measure, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import FeatureError, feature

TEXTS = ["a b c", "", "a", "longer text here, with ö and 漢字"]

n_words = feature(lambda text: len(text.split()), name="n_words")
has_a = feature(lambda text: "a" in text, name="has_a")


@feature
def shouting(text):
    return text.isupper()


class TestPointwise:
    def test_holds(self):
        constraint = Pointwise(has_a)
        values = {"has_a": torch.tensor([1.0, 0.0])}
        assert constraint.holds(values).tolist() == [True, False]
        assert constraint.name == "has_a"
        assert constraint.features == (has_a,)

    def test_other_values_than_0_and_1_are_refused(self):
        with pytest.raises(FeatureError, match=r"'n_words' gave 3"):
            Pointwise(n_words).holds({"n_words": n_words(TEXTS)})

    def test_declared_not_binary(self):
        with pytest.raises(ValueError, match="declared a number"):
            Pointwise(feature(len, name="size", binary=False))

    def test_plain_functions_become_features(self):
        def polite(text):
            return "please" in text

        assert Pointwise(polite).feature == feature(polite)
        with pytest.raises(ValueError, match="name="):
            Pointwise(lambda text: True)

    @pytest.mark.parametrize("bad", [0.5, "female", None])
    def test_not_a_feature(self, bad):
        with pytest.raises(TypeError, match="needs a Feature"):
            Pointwise(bad)


class TestMoment:
    def test_single_target(self):
        moment = Moment(n_words, 3)
        assert (moment.name, moment.target, moment.given) == ("n_words", 3.0, None)
        assert moment.features == (n_words,)
        assert moment.bounds == (3.0, 3.0)
        assert moment.statistic({"n_words": n_words(TEXTS)}).tolist() == [3, 0, 1, 7]

    @pytest.mark.parametrize("interval", [(0.4, 0.6), [0.4, 0.6], (np.float64(0.4), 0.6)])
    def test_interval(self, interval):
        moment = Moment(has_a, interval)
        assert moment.bounds == moment.target == (0.4, 0.6)
        assert moment.statistic({"has_a": has_a(TEXTS)}).tolist() == [1, 0, 1, 1]

    def test_conditional_moment_is_zero_exactly_where_the_conditional_mean_is_the_target(self):
        f, g = torch.tensor([1.0, 0.0, 1.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
        moment = Moment(n_words, 2 / 3, given=has_a)
        column = moment.statistic({"n_words": f, "has_a": g})
        assert column.dtype == torch.float64
        # Mean of f where g holds is 2/3; 4 terms of at most 1 leave a rounding below 4 ulp.
        assert abs(column.sum().item()) < 4 * 2**-52
        assert column[3] == 0
        assert moment.bounds == (0.0, 0.0)
        assert moment.features == (n_words, has_a)
        assert moment.name == "n_words | has_a"
        off = Moment(n_words, 0.5, given=has_a).statistic({"n_words": f, "has_a": g})
        assert off.sum().item() == 0.5

    @given(
        st.lists(st.tuples(st.booleans(), st.floats(-10, 10)), min_size=1, max_size=20),
        st.floats(-5, 5),
    )
    def test_conditional_statistic_under_any_weights(self, rows, target):
        g = torch.tensor([float(a) for a, _ in rows], dtype=torch.float64)
        f = torch.tensor([b for _, b in rows], dtype=torch.float64)
        moment = Moment(n_words, target, given=has_a)
        weights = torch.arange(1, len(rows) + 1, dtype=torch.float64)
        left = (weights * moment.statistic({"n_words": f, "has_a": g})).sum()
        right = (weights * g * f).sum() - target * (weights * g).sum()
        # At most 20 terms below 20 * 15 in size: 40 roundings of the sum of sizes, 210 * 15.
        assert abs(left - right) < 40 * 2**-53 * 210 * 15

    def test_condition_must_be_binary(self):
        with pytest.raises(ValueError, match="declared a number"):
            Moment(has_a, 0.5, given=feature(len, name="size", binary=False))
        moment = Moment(has_a, 0.5, given=n_words)
        with pytest.raises(FeatureError, match="'n_words' gave 3"):
            moment.statistic({"has_a": has_a(TEXTS), "n_words": n_words(TEXTS)})

    def test_condition_on_itself_or_with_an_interval(self):
        with pytest.raises(ValueError, match="its own condition"):
            Moment(has_a, 0.5, given=has_a)
        with pytest.raises(ValueError, match="not supported"):
            Moment(shouting, (0.4, 0.6), given=has_a)

    @pytest.mark.parametrize("target", ["0.5", None, True, (0.1,), (0.1, 0.2, 0.3), (0, "1"), 1j])
    def test_target_of_a_wrong_type(self, target):
        with pytest.raises(TypeError, match="target"):
            Moment(has_a, target)

    @pytest.mark.parametrize("target", [math.nan, math.inf, (0.1, math.nan), (-math.inf, 0.2)])
    def test_target_not_finite(self, target):
        with pytest.raises(ValueError, match="finite"):
            Moment(has_a, target)

    @pytest.mark.parametrize("target", [(0.5, 0.5), (0.6, 0.4)])
    def test_interval_of_no_width(self, target):
        with pytest.raises(ValueError, match="low < high"):
            Moment(has_a, target)

    @pytest.mark.parametrize("target", [-0.1, 1.1, 50, (0.9, 1.1), (-0.1, 0.5)])
    def test_target_of_a_binary_feature_lies_between_0_and_1(self, target):
        declared = feature(lambda text: True, name="f", binary=True)
        with pytest.raises(ValueError, match=r"'f' is binary.*\[0, 1\]"):
            Moment(declared, target)
        Moment(n_words, target)

    def test_edges_are_legal_for_a_binary_feature(self):
        declared = feature(lambda text: True, name="f", binary=True)
        assert Moment(declared, 1).target == 1.0
        assert Moment(declared, 0).target == 0.0
        assert Moment(declared, (0, 1)).target == (0.0, 1.0)

    def test_arguments_in_the_wrong_order_and_unknown_options(self):
        with pytest.raises(TypeError, match="needs a Feature"):
            Moment(0.5, has_a)
        with pytest.raises(TypeError, match="when"):
            Moment(has_a, 0.5, when=shouting)

    def test_plain_functions_become_features(self):
        def short(text):
            return len(text) < 3

        moment = Moment(short, 0.5, given=has_a)
        assert moment.feature == feature(short)
        assert moment == Moment(short, 0.5, given=has_a)
        assert moment != Moment(short, 0.4, given=has_a)
