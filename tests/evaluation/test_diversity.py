import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from dmgen.evaluation import distinct_n, entropy, most_repeated, self_bleu

NAMES = (self_bleu, distinct_n, entropy, most_repeated)


def naive(texts, n):
    """Self-BLEU as it is defined: sacrebleu on each text against the list of the others."""
    bleu = BLEU(tokenize="none", effective_order=True, max_ngram_order=n)
    scores = [
        bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)
    ]
    return float(np.mean(scores))


def zipf_texts(n_texts, seed, shortest=3, longest=30, n_words=200):
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, n_words + 1)
    return [
        " ".join(f"w{i}" for i in rng.choice(n_words, rng.integers(shortest, longest), p=share))
        for share in [share / share.sum()]
        for _ in range(n_texts)
    ]


class TestSelfBleuIsExact:
    @pytest.mark.parametrize(
        ("n_texts", "n"), [(2, 4), (3, 4), *((50, n) for n in range(1, 6)), (100, 3), (200, 5)]
    )
    def test_equals_sacrebleu_one_against_the_rest(self, n_texts, n):
        texts = zipf_texts(n_texts, seed=n)
        # The same statistics go through the same code; only the mean may round differently.
        assert abs(self_bleu(texts, n).value - naive(texts, n)) < 1e-9

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.lists(st.sampled_from("abc"), max_size=7).map(" ".join), min_size=2, max_size=8
        ),
        st.integers(1, 5),
    )
    def test_equals_sacrebleu_with_copies_empty_and_short_texts(self, texts, n):
        assert abs(self_bleu(texts, n).value - naive(texts, n)) < 1e-9

    def test_table(self):
        assert self_bleu(["a b c d", "a b c d"], 4).value == pytest.approx(100, abs=1e-9)
        assert self_bleu(["a b", "c d"], 2).value == 0
        # Unigrams 1/2; the one bigram is not found: 1/2 of 1; both lengths agree.
        assert self_bleu(["a b", "a c"], 2).value == pytest.approx(50, abs=1e-9)
        # "a a": one of two a's is elsewhere; "a": found, but shorter than 2: exp(1 - 2/1).
        expected = (50 + 100 * math.exp(-1)) / 2
        assert self_bleu(["a a", "a"], 1).value == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(
        ("texts", "value"),
        [(["", ""], 0), (["", "a"], 0), (["", "a", "a"], 200 / 3), (["", "", "a b", "a b"], 50)],
    )
    def test_empty_texts_score_0_and_do_not_hide_the_others(self, texts, value):
        assert self_bleu(texts).value == pytest.approx(value, abs=1e-9)
        assert naive(texts, 5) == pytest.approx(value, abs=1e-9)

    def test_orders_longer_than_the_texts_are_left_out(self):
        texts = ["a b c", "a b c"]
        assert self_bleu(texts, 9).value == pytest.approx(self_bleu(texts, 3).value, abs=1e-9)

    def test_a_tie_in_length_goes_to_the_shorter(self):
        texts = ["a b c d", "a b", "a b c d e f"]
        assert abs(self_bleu(texts, 2).value - naive(texts, 2)) < 1e-9

    def test_order_of_texts_does_not_matter_to_the_value(self):
        texts = zipf_texts(40, seed=0)
        # A mean of 40 numbers up to 100 in another order: 40 roundings of 4000.
        assert abs(self_bleu(texts).value - self_bleu(texts[::-1]).value) < 2**-53 * 4000 * 40

    def test_case_and_punctuation_count_as_written(self):
        assert self_bleu(["A b.", "a b"], 1).value == 0

    def test_characters(self):
        assert self_bleu(["abc", "abd"], 1, tokenize=list).value == pytest.approx(200 / 3)


class TestSelfBleuStderr:
    def test_equals_the_jackknife_by_hand(self):
        texts = zipf_texts(43, seed=3)
        blocks = np.array_split(np.arange(43), 20)
        values = [
            self_bleu([t for i, t in enumerate(texts) if i not in block], 4).value
            for block in blocks
        ]
        expected = math.sqrt(19 / 20 * np.sum((np.array(values) - np.mean(values)) ** 2))
        # Values up to 100, each a mean of 43 in the same order: far below 1e-9.
        assert abs(self_bleu(texts, 4).stderr - expected) < 1e-9

    def test_with_fewer_texts_than_blocks_each_text_is_a_block(self):
        texts = zipf_texts(5, seed=4)
        values = [self_bleu(texts[:i] + texts[i + 1 :], 2).value for i in range(5)]
        expected = math.sqrt(4 / 5 * np.sum((np.array(values) - np.mean(values)) ** 2))
        assert abs(self_bleu(texts, 2).stderr - expected) < 1e-9

    def test_two_texts_have_a_value_and_no_error(self):
        assert math.isnan(self_bleu(["a b", "a c"]).stderr)
        assert not math.isnan(self_bleu(["a b", "a c", "a d"]).stderr)

    def test_copies_have_no_error(self):
        assert self_bleu(["a b c d e"] * 30).stderr == 0

    def test_it_covers_the_spread_over_repeats_and_is_not_far_above(self):
        n_repeats = 200
        scores = [self_bleu(zipf_texts(60, seed), 4) for seed in range(n_repeats)]
        spread = np.std([s.value for s in scores], ddof=1)
        stated = math.sqrt(np.mean([s.stderr**2 for s in scores]))
        error = 1 / math.sqrt(2 * n_repeats)  # of the spread, relative
        # Efron and Stein: the jackknife is not below the truth on average; the upper limit is
        # what the docstring promises. The second check shows that a halved error is caught.
        assert 1 - 5 * error < stated / spread < 1.4 * (1 + 5 * error)
        assert not 1 - 5 * error < stated / 2 / spread


class TestSelfBleuArguments:
    def test_max_texts_draws_without_replacement_and_by_seed(self):
        texts = zipf_texts(100, seed=5)
        some = self_bleu(texts, max_texts=30, seed=1)
        assert some.n == 30
        assert some == self_bleu(texts, max_texts=30, seed=1)
        assert some.value != self_bleu(texts, max_texts=30, seed=2).value
        # No two texts share a token: drawn with replacement, some would meet themselves.
        words = [f"{a} {b}" for a in "abcdefgh" for b in "stuvwxyz"]
        distinct = self_bleu([w.replace(" ", "") for w in words], max_texts=50)
        assert distinct.value == 0

    @pytest.mark.parametrize("max_texts", [None, 100, 1000])
    def test_max_texts_that_do_not_bind(self, max_texts):
        texts = zipf_texts(100, seed=6)
        assert self_bleu(texts, max_texts=max_texts, seed=9) == self_bleu(texts)

    def test_signature(self):
        texts = zipf_texts(10, seed=7)
        expected = "self-bleu-3|tok:str.split|smooth:exp|eff:yes|case:mixed|texts:10|seed:all"
        assert self_bleu(texts, 3).signature == expected
        drawn = self_bleu(texts, 3, tokenize=list, max_texts=4, seed=8).signature
        assert drawn == "self-bleu-3|tok:list|smooth:exp|eff:yes|case:mixed|texts:4|seed:8"

    def test_refused(self):
        for texts in ([], ["one"]):
            with pytest.raises(ValueError, match=f"at least 2 texts, got {len(texts)}"):
                self_bleu(texts)
        with pytest.raises(ValueError, match="at least 1, got 0"):
            self_bleu(["a", "b"], 0)
        with pytest.raises(ValueError, match="max_texts must be at least 2"):
            self_bleu(["a", "b"], max_texts=1)

    def test_two_thousand_texts_of_forty_words_take_seconds_and_not_minutes(self):
        texts = zipf_texts(2000, seed=8, shortest=40, longest=41, n_words=5000)
        start = time.process_time()
        self_bleu(texts)
        # 0.7 s on a slow core; pairs of texts would take minutes.
        assert time.process_time() - start < 5


class TestDistinct:
    @pytest.mark.parametrize(
        ("texts", "n", "ngrams", "tokens"),
        [
            (["a b c"], 1, 1, 1),
            (["a b c"], 2, 1, 2 / 3),
            (["a a a a"], 1, 1 / 4, 1 / 4),
            (["a a a a"], 2, 1 / 3, 1 / 4),
            (["a b a b"], 2, 2 / 3, 2 / 4),
            (["a b", "a a"], 1, 3 / 4, 3 / 4),
            (["a b", ""], 1, 1 / 2, 1 / 2),
            (["a b"], 3, 0, 0),
            ([""], 1, 0, 0),
        ],
    )
    def test_table(self, texts, n, ngrams, tokens):
        assert distinct_n(texts, n).value == ngrams
        assert distinct_n(texts, n, denominator="tokens").value == tokens

    def test_stderr_is_that_of_a_mean(self):
        score = distinct_n(["a b", "a a", "a a"], 1)
        # Ratios 1, 1/2, 1/2: variance 1/12, over 3 texts.
        assert score.stderr == pytest.approx(math.sqrt(1 / 36), rel=1e-14)
        assert math.isnan(distinct_n(["a b"], 1).stderr)

    def test_signature_states_tokeniser_and_denominator(self):
        score = distinct_n(["ab", "a"], 1, list, denominator="tokens")
        assert score.signature == "distinct-1|tok:list|over:tokens|texts:2"
        assert score.n == 2

    def test_unknown_denominator(self):
        with pytest.raises(ValueError, match="one of 'ngrams', 'tokens'; got 'words'"):
            distinct_n(["a"], 1, denominator="words")

    @given(st.lists(st.text("ab ", max_size=9), min_size=1, max_size=5), st.integers(1, 3))
    def test_between_0_and_1(self, texts, n):
        value = distinct_n(texts, n).value
        assert 0 <= value <= 1
        assert distinct_n(texts, n, denominator="tokens").value <= value


class TestEntropy:
    @pytest.mark.parametrize(
        ("texts", "n", "value"),
        [
            (["a b c d"], 1, math.log(4)),
            (["a b", "c d"], 1, math.log(4)),
            (["a a a a", "a"], 1, 0),
            (["a b a b a"], 2, math.log(2)),
            (["a a b"], 1, math.log(3) - 2 / 3 * math.log(2)),
            (["", "a"], 1, 0),
            (["a b", "b a"], 3, 0),
            ([""], 1, 0),
        ],
    )
    def test_table(self, texts, n, value):
        # Sums of at most 4 terms below 1.4.
        assert entropy(texts, n).value == pytest.approx(value, abs=4 * 2**-52)

    def test_ngrams_do_not_run_over_the_end_of_a_text(self):
        assert entropy(["a b", "c d"], 2).value == pytest.approx(math.log(2), abs=2**-52)

    def test_stderr_equals_the_jackknife_by_hand_and_the_spread_over_repeats(self):
        texts = zipf_texts(43, seed=3)
        values = [
            entropy([t for i, t in enumerate(texts) if i not in block], 2).value
            for block in np.array_split(np.arange(43), 20)
        ]
        expected = math.sqrt(19 / 20 * np.sum((np.array(values) - np.mean(values)) ** 2))
        assert entropy(texts, 2).stderr == pytest.approx(expected, rel=1e-9)
        n_repeats = 200
        scores = [entropy(zipf_texts(60, seed), 1) for seed in range(n_repeats)]
        spread = np.std([s.value for s in scores], ddof=1)
        ratio = math.sqrt(np.mean([s.stderr**2 for s in scores])) / spread
        # Nearly linear in the texts, so the jackknife is unbiased; the error is the spread's.
        assert abs(ratio - 1) < 5 / math.sqrt(2 * n_repeats)
        assert abs(ratio / 2 - 1) > 5 / math.sqrt(2 * n_repeats)

    def test_a_single_text_has_no_error(self):
        assert math.isnan(entropy(["a b c"]).stderr)


class TestMostRepeated:
    def test_counts_texts_and_not_occurrences(self):
        texts = ["x x x x x", "a b", "b a b", "b"]
        ngram, share = most_repeated(texts, 1)
        assert ngram == ("b",)
        assert share.value == 3 / 4
        assert share.stderr == pytest.approx(math.sqrt(3 / 4 * 1 / 4 / 4))
        assert share.signature == "most-repeated-1|tok:str.split|texts:4"

    def test_ties_go_to_the_first(self):
        assert most_repeated(["d c b", "a b c d"], 1)[0] == ("d",)
        assert most_repeated(["d c b", "a b c d"], 2)[0] == ("d", "c")

    def test_no_ngram_at_all(self):
        ngram, share = most_repeated(["a b", ""], 3)
        assert ngram == ()
        assert (share.value, share.stderr) == (0, 0)


@pytest.mark.parametrize("metric", NAMES)
def test_a_single_string_is_refused(metric):
    with pytest.raises(TypeError, match="list of strings"):
        metric("a b c d", 1)


@pytest.mark.parametrize("metric", [distinct_n, entropy, most_repeated])
def test_no_texts_and_order_0(metric):
    with pytest.raises(ValueError, match="at least 1 text, got 0"):
        metric([], 1)
    with pytest.raises(ValueError, match="order n must be at least 1, got 0"):
        metric(["a"], 0)
