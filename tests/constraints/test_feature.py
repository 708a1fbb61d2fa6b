"""Features: declaration, values, errors, and whether they are binary."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmgen.constraints.feature import Feature, FeatureError, feature

TEXTS = ["a b c", "", "a", "longer text here, with ö and 漢字"]

n_words = feature(lambda text: len(text.split()), name="n_words")
has_a = feature(lambda text: "a" in text, name="has_a")


@feature
def shouting(text):
    return text.isupper()


class TestFeatureDeclaration:
    def test_bare_decorator_takes_the_name_of_the_function(self):
        assert isinstance(shouting, Feature)
        assert shouting.name == "shouting"

    def test_decorator_with_arguments(self):
        @feature(name="other", binary=True)
        def f(text):
            return 1

        assert (f.name, f.binary) == ("other", True)

    def test_decorator_with_arguments_keeps_the_function_name_when_none_is_given(self):
        @feature(batched=True)
        def sizes(texts):
            return [len(t) for t in texts]

        assert sizes.name == "sizes"
        assert sizes(TEXTS).tolist() == [5, 0, 1, 31]

    @pytest.mark.parametrize("fn", [lambda text: 1, functools.partial(len)])
    def test_a_function_without_a_name_needs_one(self, fn):
        with pytest.raises(ValueError, match="name="):
            feature(fn)
        assert feature(fn, name="f").name == "f"

    @pytest.mark.parametrize("name", ["", "  ", "two\nlines"])
    def test_unusable_names_are_refused(self, name):
        with pytest.raises(ValueError, match="name"):
            feature(len, name=name)

    @pytest.mark.parametrize("fn", [3, "text", None])
    def test_not_callable(self, fn):
        with pytest.raises(TypeError, match="function"):
            Feature(fn, "f")

    def test_a_feature_of_a_feature_is_refused(self):
        with pytest.raises(TypeError, match="function"):
            feature(has_a, name="again")

    @pytest.mark.parametrize("option", ["batched", "with_prompt", "binary"])
    def test_flags_must_be_bools(self, option):
        with pytest.raises(TypeError, match=option):
            feature(len, name="f", **{option: 1})

    def test_a_misspelt_option_is_a_type_error(self):
        with pytest.raises(TypeError, match="batch"):
            feature(len, name="f", batch=True)

    def test_features_are_immutable_hashable_and_compare_by_their_fields(self):
        with pytest.raises(AttributeError):
            has_a.name = "b"
        assert feature(len) == feature(len)
        assert hash(feature(len)) == hash(feature(len))
        assert feature(len) != feature(len, binary=False)


class TestFeatureValues:
    def test_values_are_float64_in_order(self):
        values = n_words(TEXTS)
        assert values.dtype == torch.float64
        assert values.tolist() == [3, 0, 1, 7]

    @pytest.mark.parametrize("batched", [False, True])
    def test_no_texts(self, batched):
        def never(texts):
            raise AssertionError("called without texts")

        values, binary = feature(never, batched=batched).evaluate([])
        assert values.shape == (0,)
        assert values.dtype == torch.float64
        assert binary is False

    @pytest.mark.parametrize(
        "wrap",
        [
            list,
            tuple,
            np.array,
            torch.tensor,
            lambda v: torch.tensor(v, requires_grad=True),
            lambda v: torch.tensor(v, dtype=torch.bfloat16),
            lambda v: [torch.tensor(x) for x in v],
            lambda v: [np.float32(x) for x in v],
        ],
    )
    def test_batched_may_return_any_kind_of_sequence(self, wrap):
        f = feature(lambda texts: wrap([float(len(t)) for t in texts]), name="f", batched=True)
        assert f(TEXTS).tolist() == [5, 0, 1, 31]

    @pytest.mark.parametrize(
        "wrap", [bool, int, float, np.float32, np.int8, torch.tensor, np.array]
    )
    def test_one_text_may_return_any_kind_of_number(self, wrap):
        assert feature(lambda t: wrap(1), name="f")(["x"]).tolist() == [1.0]

    def test_prompts_reach_the_function_only_when_asked_for(self):
        f = feature(lambda text, prompt: len(text) > len(prompt), name="f", with_prompt=True)
        assert f(["aaa", "b"], ["p", "pp"]).tolist() == [1, 0]
        g = feature(
            lambda texts, prompts: [len(t + p) for t, p in zip(texts, prompts, strict=True)],
            name="g",
            with_prompt=True,
            batched=True,
        )
        assert g(["aaa", "b"], ["p", "pp"]).tolist() == [4, 3]
        assert n_words(["a b"], ["ignored"]).tolist() == [2]

    def test_prompts_missing_or_too_few(self):
        f = feature(lambda text, prompt: 1, name="f", with_prompt=True)
        with pytest.raises(ValueError, match="'f' reads the prompt"):
            f(["a"])
        with pytest.raises(ValueError, match="2 texts but 1 prompts"):
            f(["a", "b"], ["p"])

    def test_a_single_string_is_refused(self):
        with pytest.raises(TypeError, match=r"\[text\]"):
            n_words("a b c")
        with pytest.raises(TypeError, match="strings"):
            n_words(["a", 3])

    @given(st.lists(st.text(max_size=20), max_size=8), st.integers(0, 8))
    def test_a_batch_equals_its_parts(self, texts, cut):
        whole = n_words(texts)
        assert torch.equal(whole, torch.cat([n_words(texts[:cut]), n_words(texts[cut:])]))


class TestFeatureErrors:
    def test_a_raised_error_names_feature_and_text(self):
        def fragile(text):
            return 1 / len(text)

        with pytest.raises(FeatureError, match=r"'fragile' raised ZeroDivisionError.*''") as info:
            feature(fragile)(["ok", ""])
        assert isinstance(info.value.__cause__, ZeroDivisionError)
        assert isinstance(info.value, ValueError)

    def test_long_texts_are_shortened(self):
        f = feature(lambda text: math.nan, name="f")
        with pytest.raises(FeatureError) as info:
            f(["start " + "x" * 10_000])
        assert "start" in str(info.value)
        assert len(str(info.value)) < 200

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("batched", [False, True])
    def test_values_must_be_finite(self, bad, batched):
        def f(x):
            return [bad if t == "bad" else 0.5 for t in x] if batched else bad if x == "bad" else 0

        with pytest.raises(FeatureError, match=f"'f' returned {bad}, not a finite.*'bad'"):
            feature(f, batched=batched)(["fine", "bad"])

    @pytest.mark.parametrize("bad", [None, "1", [1.0], 1j, {}, torch.ones(2)])
    def test_one_text_must_give_one_number(self, bad):
        with pytest.raises(FeatureError, match=r"'f' returned .*not one number.*'text'"):
            feature(lambda text: bad, name="f")(["text"])

    @pytest.mark.parametrize(
        "bad", [None, 3, [1], [1, 2, 3], ["a", "b"], [[1], [2]], [[1], [2, 3]], [None, 1]]
    )
    def test_a_batch_must_give_as_many_numbers(self, bad):
        f = feature(lambda texts: bad, name="f", batched=True)
        with pytest.raises(FeatureError, match=r"'f' returned .*each of 2 texts.*begins with: 'x'"):
            f(["x", "y"])

    def test_a_batch_that_raises(self):
        f = feature(lambda texts: texts[7], name="f", batched=True)
        with pytest.raises(FeatureError, match=r"IndexError.*batch of 2 that begins with: 'x'"):
            f(["x", "y"])

    def test_declared_binary_is_enforced(self):
        f = feature(lambda text: len(text), name="f", binary=True)
        assert f(["a", ""]).tolist() == [1, 0]
        with pytest.raises(FeatureError, match="declared binary but returned 2 on the text: 'ab'"):
            f(["a", "ab"])

    def test_interruption_is_not_swallowed(self):
        def stop(text):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            feature(stop)(["x"])


class TestBinary:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([True, False], True),
            ([np.True_, np.False_], True),
            ([torch.tensor(True), torch.tensor(False)], True),
            ([1, 0], False),
            ([1.0, 0.0], False),
            ([True, 1], False),
        ],
    )
    @pytest.mark.parametrize("batched", [False, True])
    def test_left_open_it_is_binary_if_every_value_is_a_bool(self, values, expected, batched):
        lookup = {"0": values[0], "1": values[1]}

        def f(x):
            return [lookup[t] for t in x] if batched else lookup[x]

        made = feature(f, batched=batched)
        assert made.evaluate(["0", "1"])[1] is expected
        assert made.binary is None

    @pytest.mark.parametrize("wrap", [np.array, torch.tensor])
    def test_arrays_of_bools(self, wrap):
        f = feature(lambda texts: wrap([t == "a" for t in texts]), name="f", batched=True)
        values, binary = f.evaluate(["a", "b"])
        assert values.tolist() == [1, 0]
        assert binary is True

    def test_the_declaration_wins(self):
        assert feature(lambda t: 1, name="f", binary=True).evaluate(["x"])[1] is True
        assert feature(lambda t: True, name="f", binary=False).evaluate(["x"])[1] is False


class TestDescription:
    def test_phrase_noun_and_config_are_kept_and_no_part_of_equality(self):
        described = Feature(
            len, "n", phrase=("has n", "have n"), noun="size", config={"sizes": "characters"}
        )
        assert described == Feature(len, "n")
        assert hash(described) == hash(Feature(len, "n"))
        assert (described.phrase, described.noun) == (("has n", "have n"), "size")
        assert described.config == {"sizes": "characters"}

    def test_a_function_has_none(self):
        assert (n_words.phrase, n_words.noun, n_words.config) == (None, None, None)

    @pytest.mark.parametrize(
        "phrase",
        ["has n", "hn", ["has n", "have n"], ("has n",), ("has n", "have n", "had n"), (1, 2)],
    )
    def test_a_phrase_is_of_one_text_and_of_several(self, phrase):
        with pytest.raises(TypeError, match="one text and of several"):
            Feature(len, "n", phrase=phrase)
