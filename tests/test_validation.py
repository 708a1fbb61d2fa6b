"""Checks of settings: one line that says what was given and what is allowed."""

import math
import re

import numpy as np
import pytest

from dmgen.validation import (
    check_choice,
    check_integer,
    check_known,
    check_number,
    did_you_mean,
)


class TestInteger:
    @pytest.mark.parametrize("value", [3, np.int64(3), np.int32(3)])
    def test_whole_numbers_become_int(self, value):
        checked = check_integer("n", value, least=3)
        assert (checked, type(checked)) == (3, int)

    @pytest.mark.parametrize("value", [True, 3.0, "3", None, np.bool_(True), math.nan])
    def test_other_types(self, value):
        message = f"n must be a whole number, got {value!r}"
        with pytest.raises(TypeError, match=re.escape(message)):
            check_integer("n", value)

    def test_the_bound_is_legal_and_one_less_is_not(self):
        assert check_integer("n", -(10**30)) == -(10**30)
        assert check_integer("n", 0, least=0) == 0
        with pytest.raises(ValueError, match=r"^n must be at least 0, got -1$"):
            check_integer("n", -1, least=0)


class TestNumber:
    @pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)])
    def test_numbers_become_float(self, value):
        checked = check_number("x", value)
        assert (checked, type(checked)) == (2.0, float)

    @pytest.mark.parametrize("value", [True, "2", None, 2j])
    def test_other_types(self, value):
        with pytest.raises(TypeError, match=re.escape(f"x must be a number, got {value!r}")):
            check_number("x", value)

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_not_finite(self, value):
        with pytest.raises(ValueError, match=f"^x must be finite, got {value}$"):
            check_number("x", value)

    @pytest.mark.parametrize(
        ("bounds", "legal", "illegal", "words"),
        [
            ({"above": 0}, 1e-300, 0, "above 0 and finite"),
            ({"least": 0}, 0, -1e-300, "at least 0 and finite"),
            ({"below": 1}, 1 - 1e-16, 1, "below 1 and finite"),
            ({"most": 1}, 1, 1 + 1e-15, "at most 1 and finite"),
            ({"least": 0, "below": 0.5}, 0, 0.5, "at least 0 and below 0.5"),
        ],
    )
    def test_bounds(self, bounds, legal, illegal, words):
        assert check_number("x", legal, **bounds) == legal
        with pytest.raises(ValueError, match=f"^x must be {words}, got {re.escape(repr(illegal))}"):
            check_number("x", illegal, **bounds)

    def test_two_bounds_refuse_what_is_not_finite_too(self):
        for value in (math.inf, math.nan):
            with pytest.raises(
                ValueError, match=f"^x must be at least 0 and at most 1, got {value}$"
            ):
                check_number("x", value, least=0, most=1)


class TestChoice:
    def test_legal_ones(self):
        check_choice("method", "GDC", ("GDC", "DPG"))
        check_choice("dtype", None, (None, "float32"))

    def test_the_nearest_is_named(self):
        message = "method must be one of 'GDC', 'GDCpp'; got 'GDC++'; did you mean 'GDCpp'?"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_choice("method", "GDC++", ("GDC", "GDCpp"))

    def test_nothing_is_near(self):
        with pytest.raises(ValueError, match=r"got 5$"):
            check_choice("method", 5, ("GDC",))


class TestKnown:
    def test_legal_ones(self):
        check_known("seed", ("seed",), "key")

    @pytest.mark.parametrize(
        ("known", "options", "message"),
        [
            (("seed", "n"), {}, "unknown key 'sed'; did you mean 'seed'? There are seed, n"),
            (("n",), {"place": "fit"}, "unknown key 'sed' in fit. There are n"),
            ((), {}, "unknown key 'sed'. There are none"),
            (
                ("seeds",),
                {"elsewhere": ("fit.sed", "x.sed", "fit.n")},
                "unknown key 'sed'; did you mean 'fit.sed' or 'x.sed'? There are seeds",
            ),
        ],
    )
    def test_unknown_ones(self, known, options, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_known("sed", known, "key", **options)


def test_did_you_mean():
    assert did_you_mean("wordlst", ("word", "wordlist")) == "; did you mean 'wordlist'?"
    assert did_you_mean("zzz", ("word",)) == ""
