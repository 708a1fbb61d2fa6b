import re
import unicodedata
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmgen import features

LEXICONS = [
    "art",
    "business",
    "insults",
    "military",
    "music",
    "politics",
    "religion",
    "royalty",
    "science",
    "sports",
]


def entries(lexicon):
    path = files("dmgen.features") / "lexicons" / f"{lexicon}.txt"
    return path.read_text(encoding="utf-8").splitlines()


class TestLexicons:
    def test_these_are_all_and_an_unknown_one_is_refused_with_the_list(self):
        with pytest.raises(ValueError, match=", ".join(LEXICONS) + "$"):
            features.wordlist("sport")

    @pytest.mark.parametrize("lexicon", LEXICONS)
    def test_entries_are_clean(self, lexicon):
        words = entries(lexicon)
        assert 60 <= len(words) <= 150
        assert words == sorted(set(words))
        assert all(word == " ".join(word.lower().split()) and word for word in words)

    @pytest.mark.parametrize("lexicon", LEXICONS)
    def test_no_entry_is_made_superfluous_by_another(self, lexicon):
        words = entries(lexicon)
        pattern = features.wordlist(lexicon).pattern
        for word in words:
            assert pattern.fullmatch(word)
            rest = features.wordlist([w for w in words if w != word], name="rest")
            assert not rest([word]).item(), word

    @pytest.mark.parametrize("lexicon", LEXICONS)
    def test_every_entry_is_found_in_a_sentence_in_any_case(self, lexicon):
        f = features.wordlist(lexicon)
        assert (f.name, f.binary) == (lexicon, True)
        texts = [f"It was ({w.upper()}), then." for w in entries(lexicon)]
        assert f(texts).tolist() == [1.0] * len(texts)

    @pytest.mark.parametrize(
        ("lexicon", "hit"),
        [
            ("art", "He became a painter in Paris."),
            ("business", "He ran a department store with his brother."),
            ("insults", "What an idiot, he said."),
            ("military", "His regiment was sent to the front."),
            ("music", "Their second album sold well."),
            ("politics", "She stood as a candidate for mayor."),
            ("religion", "In 1201 he was made bishop."),
            ("royalty", "The duke married the king's sister."),
            ("science", "Her experiments on electricity were famous."),
            ("sports", "He took five wickets in the first innings."),
        ],
    )
    def test_a_sentence_belongs_to_its_own_topic_alone(self, lexicon, hit):
        assert [name for name in LEXICONS if features.wordlist(name)([hit]).item()] == [lexicon]

    def test_an_everyday_sentence_belongs_to_none(self):
        text = "He was born in a small town, where he met his wife after school."
        assert not any(features.wordlist(name)([text]).item() for name in LEXICONS)


class TestWordlist:
    def test_whole_words_only(self):
        f = features.wordlist(["art", "Bank of England"], name="f")
        texts = ["art", "party", "Art.", "state-of-the-art", "arts", "art_", "smart"]
        assert f(texts).tolist() == [1, 0, 1, 1, 0, 0, 0]

    def test_phrases_allow_any_white_space(self):
        f = features.wordlist(["bank  of england"], name="f")
        texts = ["the Bank of\n England's gold", "bank of", "bank-of-england"]
        assert f(texts).tolist() == [1, 0, 0]

    def test_entries_may_begin_or_end_in_signs(self):
        f = features.wordlist(["C++", ".net", "r&b"], name="f")
        texts = ["in C++, yes", "C+", "c++", "C++x", "the .NET", "R&B", "a.net"]
        assert f(texts).tolist() == [1, 0, 1, 0, 1, 1, 0]

    def test_an_accent_belongs_to_its_letter_however_it_is_written(self):
        apart = "at the cafe\u0301, later"
        for text in (apart, unicodedata.normalize("NFC", apart)):
            assert features.word("café")([text]).tolist() == [1]
            assert features.word("cafe\u0301")([text]).tolist() == [1]
            assert features.word("cafe")([text]).tolist() == [0]
            assert features.wordlist(["tea", "café"], name="x")([text]).tolist() == [1]

    def test_both_apostrophes(self):
        f = features.wordlist(["knight's cross"], name="f")
        assert f(["the Knight's Cross", "the Knight’s Cross"]).tolist() == [1, 1]
        assert features.word("Knight’s")(["the Knight's", "the Knight’s"]).tolist() == [1, 1]

    def test_case_sensitive(self):
        f = features.wordlist(["US", "Apple"], name="f", case_sensitive=True)
        assert f(["us", "US", "apple", "Apple"]).tolist() == [0, 1, 0, 1]

    def test_spans_mark_the_longest_phrase(self):
        f = features.wordlist(["gold", "gold medal", "medal"], name="f")
        text = "Gold, a gold  medal and a medal"
        assert [text[a:b] for a, b in f.spans(text)] == ["Gold", "gold  medal", "medal"]

    def test_a_letter_that_lower_case_makes_longer_does_not_shift_the_spans(self):
        text = "İstanbul İİ football"
        assert features.wordlist("sports").spans(text) == [(12, 20)]

    @given(
        st.lists(st.sampled_from(["a", "ab", "a b", "b a", "B", "é", "ab c"]), min_size=1),
        st.text("abBc é-", max_size=12),
    )
    def test_equals_one_pattern_a_word(self, words, text):
        expected = any(
            re.search(rf"(?<!\w){re.escape(w).replace(chr(92) + ' ', '[ ]+')}(?!\w)", text, re.I)
            for w in words
        )
        assert features.wordlist(words, name="f")([text]).item() == expected

    def test_bad_lists(self):
        with pytest.raises(ValueError, match="needs a name"):
            features.wordlist(["goal"])
        with pytest.raises(ValueError, match="at least one"):
            features.wordlist([], name="f")
        with pytest.raises(ValueError, match="blank"):
            features.wordlist(["goal", " "], name="f")
        with pytest.raises(TypeError, match="strings"):
            features.wordlist(["goal", 3], name="f")
        with pytest.raises(TypeError, match="ignore_case"):
            features.wordlist("sports", ignore_case=True)

    def test_equality_follows_the_words(self):
        a, b = features.wordlist(["x", "y"], name="f"), features.wordlist(["y", "x"], name="f")
        assert a == b
        assert a != features.wordlist(["x"], name="f")
        assert features.wordlist("sports") == features.wordlist("sports")


class TestWord:
    def test_whole_and_in_any_case(self):
        f = features.word("amazing")
        assert (f.name, f.binary) == ("amazing", True)
        texts = ["Amazing!", "amazingly", "so amazing.", "", "un-amazing"]
        assert f(texts).tolist() == [1, 0, 1, 0, 1]

    def test_case_sensitive(self):
        assert features.word("US", case_sensitive=True)(["us", "the US."]).tolist() == [0, 1]
        assert features.word("US") != features.word("US", case_sensitive=True)

    def test_name(self):
        assert features.word("US", name="country").name == "country"

    def test_bad_words(self):
        with pytest.raises(ValueError, match="blank"):
            features.word("")
        with pytest.raises(TypeError, match="strings"):
            features.word(3)


class TestRegex:
    def test_found_anywhere_and_case_counts(self):
        f = features.regex(r"\d{4}")
        assert (f.name, f.binary) == (r"\d{4}", True)
        assert f(["born 1901.", "born 190", ""]).tolist() == [1, 0, 0]
        assert features.regex("abc")(["ABC"]).item() == 0
        assert features.regex("(?i)abc")(["ABC"]).item() == 1

    def test_compiled(self):
        f = features.regex(re.compile("abc", re.I), name="abc")
        assert f(["xABCx"]).item() == 1
        assert f.name == "abc"

    def test_bad_patterns(self):
        with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
            features.regex("(")
        for bad in (3, b"abc", re.compile(b"abc")):
            with pytest.raises(TypeError, match="pattern"):
                features.regex(bad)
