"""Repetition in a set of texts: between texts (Self-BLEU) and within a text (Distinct-n).

Texts are cut into tokens by `tokenize`, by default at white space (words with their punctuation);
`tokenize=list` gives characters, as in the Self-BLEU results of the GDC papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from dmgen.estimates.score import Score
from dmgen.validation import check_choice, check_integer

Tokenize = Callable[[str], Sequence[str]]
Integers = NDArray[np.int64]

# The cost is proportional to the number of blocks; with 20 the error itself is uncertain by
# 1 / sqrt(2 * 19) = 16 %.
_N_BLOCKS = 20


def self_bleu(
    texts: Sequence[str],
    n: int = 5,
    tokenize: Tokenize = str.split,
    max_texts: int | None = None,
    seed: int = 0,
) -> Score:
    """Return Self-BLEU-n: the mean BLEU of each text against all the others, 0 to 100.

    100 means that every text has a copy. BLEU is sacrebleu's for one sentence: orders 1 to n with
    equal weights, each n-gram clipped at its highest count in one other text, brevity penalty
    against the closest length (the shorter one on a tie), exponential smoothing, effective order,
    case kept. It grows with the number of texts: compare only equal signatures.

    A text without tokens scores 0 (and is a reference of length 0 for the others); orders for
    which a text is too short are left out of its mean (effective order).

    Args:
        texts: N >= 2 texts.
        n: highest order, >= 1.
        tokenize: text to tokens.
        max_texts: of more texts, draw this many without replacement (>= 2); None takes all.
        seed: of that draw; unused otherwise.

    Returns:
        Score with the number of texts used. Its stderr is a delete-block jackknife over up to 20
        consecutive blocks, each value recomputed exactly without the block's texts. It assumes
        that texts of different blocks are independent, is itself uncertain by about 16 %, and is
        conservative (Efron and Stein, 1981): 1.0 to 1.4 times the true spread in simulations.
        It is NaN for two texts. (In a bootstrap, a text drawn twice would be its own reference.)

    Raises:
        TypeError: if texts is a single string, or n no whole number.
        ValueError: if there are fewer than two texts, or n or max_texts is too small.

    Source: Zhu et al. (2018), Texygen, arXiv:1802.01886; BLEU of Papineni et al. (2002) as in
    sacrebleu.

    Differs from the paper: exact in about linear time. The highest count of an n-gram in the other
    texts is the highest of all, or the second highest if the text itself has the highest.
    """
    texts = _list_of_texts(texts, at_least=2)
    check_integer("order n", n, least=1)
    if max_texts is not None:
        check_integer("max_texts", max_texts, least=2)
    drawn = max_texts is not None and max_texts < len(texts)
    if drawn:
        kept = np.random.default_rng(seed).permutation(len(texts))[:max_texts]
        texts = [texts[i] for i in np.sort(kept)]
    counts = _Counts.of(texts, n, tokenize)
    bleu = _Bleu(n)
    value = float(np.mean(bleu(counts)))
    blocks = _blocks(len(texts)) if len(texts) > 2 else []
    stderr = _jackknife([float(np.mean(bleu(counts.without(block)))) for block in blocks])
    sample = f"texts:{len(texts)}|seed:{seed if drawn else 'all'}"
    settings = f"tok:{_name_of(tokenize)}|smooth:exp|eff:yes|case:mixed"
    return Score(value, stderr, len(texts), f"self-bleu-{n}|{settings}|{sample}")


def distinct_n(
    texts: Sequence[str], n: int, tokenize: Tokenize = str.split, *, denominator: str = "ngrams"
) -> Score:
    """Return Distinct-n: the fraction of distinct n-grams of a text, mean over the texts, 0 to 1.

    1 means that no text repeats an n-gram. A text with fewer than n tokens has no n-gram and
    counts as 0, as in the GDC papers.

    Args:
        texts: at least one text.
        n: order, >= 1.
        tokenize: text to tokens.
        denominator: "ngrams", or "tokens" as in the GDC papers (then at most 1 - (n - 1)/length).

    Returns:
        Score; the stderr is that of a mean over independent texts, NaN for a single one.

    Raises:
        TypeError: if texts is a single string, or n no whole number.
        ValueError: if there is no text, n < 1, or the denominator is unknown.

    Source: Li et al. (2016), arXiv:1510.03055, per text as in Khalifa et al. (2021).
    """
    texts = _list_of_texts(texts, at_least=1)
    check_integer("order n", n, least=1)
    check_choice("denominator", denominator, ("ngrams", "tokens"))
    ratios = np.zeros(len(texts))  # (N,)
    for i, text in enumerate(texts):
        tokens = list(tokenize(text))
        ngrams = list(zip(*(tokens[k:] for k in range(n)), strict=False))
        if ngrams:
            ratios[i] = len(set(ngrams)) / len(ngrams if denominator == "ngrams" else tokens)
    stderr = float(ratios.std(ddof=1)) / math.sqrt(len(texts)) if len(texts) > 1 else math.nan
    signature = f"distinct-{n}|tok:{_name_of(tokenize)}|over:{denominator}|texts:{len(texts)}"
    return Score(float(ratios.mean()), stderr, len(texts), signature)


def entropy(texts: Sequence[str], n: int = 1, tokenize: Tokenize = str.split) -> Score:
    """Return the entropy of the n-grams of all texts together, -sum f log f, in nats.

    Args:
        texts: at least one text; those with fewer than n tokens add no n-gram.
        n: order, >= 1.
        tokenize: text to tokens.

    Returns:
        Score, 0 if there is no n-gram at all. The plug-in estimate is below the entropy of the
        generator by about (number of distinct n-grams - 1) / (2 x number of n-grams), which can
        be far more than the stderr (delete-block jackknife, as in `self_bleu`): compare only
        equal numbers of texts of similar length. The stderr of a single text is NaN.

    Raises:
        TypeError: if texts is a single string, or n no whole number.
        ValueError: if there is no text or n < 1.
    """
    texts = _list_of_texts(texts, at_least=1)
    check_integer("order n", n, least=1)
    counts = _Counts.of(texts, n, tokenize, lowest_order=n)
    blocks = _blocks(len(texts)) if len(texts) > 1 else []
    stderr = _jackknife([counts.without(block).entropy() for block in blocks])
    signature = f"entropy-{n}|tok:{_name_of(tokenize)}|texts:{len(texts)}"
    return Score(counts.entropy(), stderr, len(texts), signature)


def most_repeated(
    texts: Sequence[str], n: int = 3, tokenize: Tokenize = str.split
) -> tuple[tuple[str, ...], Score]:
    """Return the n-gram that occurs in most texts, and the fraction of texts that contain it.

    Args:
        texts: at least one text.
        n: order, >= 1.
        tokenize: text to tokens.

    Returns:
        (n-gram, Score): the first of equally frequent ones, and a fraction from 0 to 1; the empty
        tuple and 0 if no text has n tokens. The stderr is binomial and ignores that the n-gram was
        chosen on these texts: the fraction in new texts tends to be lower.

    Raises:
        TypeError: if texts is a single string, or n no whole number.
        ValueError: if there is no text or n < 1.
    """
    texts = _list_of_texts(texts, at_least=1)
    check_integer("order n", n, least=1)
    n_texts: dict[tuple[str, ...], int] = {}
    for text in texts:
        tokens = list(tokenize(text))
        # A dict keeps the order of the n-grams, a set would not.
        for ngram in dict.fromkeys(zip(*(tokens[k:] for k in range(n)), strict=False)):
            n_texts[ngram] = n_texts.get(ngram, 0) + 1
    best = max(n_texts, key=n_texts.__getitem__, default=())
    fraction = n_texts.get(best, 0) / len(texts)
    stderr = math.sqrt(fraction * (1 - fraction) / len(texts))
    signature = f"most-repeated-{n}|tok:{_name_of(tokenize)}|texts:{len(texts)}"
    return best, Score(fraction, stderr, len(texts), signature)


@dataclass(frozen=True)
class _Counts:
    """Counts of each n-gram in each text: one entry for each pair that occurs, by n-gram.

    A text that is left out keeps its entries with count 0, so that the order does not change.
    """

    lengths: Integers  # (N,) tokens of each text
    present: NDArray[np.bool_]  # (N,) false for a text that is left out
    text: Integers  # (E,) text of an entry
    order: Integers  # (E,) length of its n-gram
    count: Integers  # (E,)
    starts: Integers  # (G,) first entry of each n-gram

    @classmethod
    def of(cls, texts: Sequence[str], n: int, tokenize: Tokenize, lowest_order: int = 1) -> _Counts:
        vocabulary: dict[str, int] = {}
        tokenised = [tokenize(text) for text in texts]
        lengths = np.array([len(tokens) for tokens in tokenised], dtype=np.int64)
        token = np.array(
            [vocabulary.setdefault(t, len(vocabulary)) for tokens in tokenised for t in tokens],
            dtype=np.int64,
        )  # (M,)
        text = np.repeat(np.arange(len(texts)), lengths)  # (M,)
        end = np.repeat(np.cumsum(lengths), lengths)  # (M,)
        start = np.arange(len(token))  # (M,) first token of each n-gram of the current order
        ngram = np.zeros_like(token)  # (M,) its number among those of its order
        parts: list[list[Integers]] = []
        for order in range(1, n + 1):
            start = start[start + order <= end[start]]
            # Numbers stay below the count of tokens, so a pair fits in 63 bits.
            pair = ngram[start] * len(vocabulary) + token[start + order - 1]
            ngram[start] = np.unique(pair, return_inverse=True)[1]
            if order >= lowest_order:
                key = ngram[start] * len(texts) + text[start]
                entry, count = np.unique(key, return_counts=True)
                new = np.diff(entry // len(texts), prepend=-1) != 0
                parts.append([entry % len(texts), np.full_like(entry, order), count, new])
        rows, orders, counts, first = (np.concatenate(part) for part in zip(*parts, strict=True))
        present = np.ones(len(texts), dtype=np.bool_)
        return cls(lengths, present, rows, orders, counts, np.flatnonzero(first))

    def without(self, block: Integers) -> _Counts:
        """Return the counts of all texts but those of `block`."""
        present = self.present.copy()
        present[block] = False
        count = np.where(present[self.text], self.count, 0)
        return _Counts(self.lengths, present, self.text, self.order, count, self.starts)

    def entropy(self) -> float:
        if not len(self.count):
            return 0.0
        total = np.add.reduceat(self.count, self.starts)
        total = total[total > 0]
        frequency = total / total.sum()
        # + 0.0: no -0.0 for a single n-gram
        return float(-(frequency * np.log(frequency)).sum()) + 0.0

    def matches(self, n: int) -> Integers:
        """Return the n-grams of each text that match another text, by order, `(N, n)`.

        Each is clipped at its highest count in one other text: the highest of all, unless this text
        is the only one that has it.
        """
        if not len(self.count):
            return np.zeros((len(self.lengths), n), dtype=np.int64)
        size = np.diff(self.starts, append=len(self.count))
        highest = np.repeat(np.maximum.reduceat(self.count, self.starts), size)  # (E,)
        at_top = self.count == highest
        n_at_top = np.repeat(np.add.reduceat(at_top.astype(np.int64), self.starts), size)
        below = np.where(at_top, 0, self.count)
        second = np.repeat(np.maximum.reduceat(below, self.starts), size)
        elsewhere = np.where(at_top & (n_at_top == 1), second, highest)
        matched = np.minimum(self.count, elsewhere)
        cell = self.text * n + self.order - 1
        summed = np.bincount(cell, weights=matched, minlength=len(self.lengths) * n)
        return summed.astype(np.int64).reshape(-1, n)

    def closest_lengths(self) -> Integers:
        """Return the length among the other texts that is nearest to that of each text, `(N,)`."""
        lengths, inverse, n_texts = np.unique(
            self.lengths[self.present], return_inverse=True, return_counts=True
        )
        distance = np.abs(lengths[:, None] - lengths[None, :])  # (L, L)
        distance[np.diag_indices(len(lengths))] = np.where(n_texts > 1, 0, np.iinfo(np.int64).max)
        # Lengths ascend and argmin takes the first: the shorter one on a tie, as in sacrebleu.
        nearest = lengths[distance.argmin(axis=1)]
        closest = np.zeros_like(self.lengths)
        closest[self.present] = nearest[inverse]
        return closest


class _Bleu:
    """Sentence BLEU of each text that is present; results are kept by statistics."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, counts: _Counts) -> NDArray[np.float64]:
        statistics = np.column_stack(
            [counts.lengths, counts.closest_lengths(), counts.matches(self.n)]
        )[counts.present]
        return np.array([self._score(tuple(row)) for row in statistics.tolist()])

    def _score(self, row: tuple[int, ...]) -> float:
        if row not in self.known:
            length, closest, *correct = row
            total = [max(length - k, 0) for k in range(self.n)]
            self.known[row] = BLEU.compute_bleu(
                correct,
                total,
                length,
                closest,
                smooth_method="exp",
                effective_order=True,
                max_ngram_order=self.n,
            ).score
        return self.known[row]


def _blocks(n_texts: int) -> list[Integers]:
    """Return 0 ... N-1 in consecutive blocks whose sizes differ by at most one."""
    return np.array_split(np.arange(n_texts), min(_N_BLOCKS, n_texts))


def _jackknife(values: Sequence[float]) -> float:
    """Return the standard error from the values without each block; NaN without values."""
    if not values:
        return math.nan
    return math.sqrt((len(values) - 1) * float(np.var(values)))


def _list_of_texts(texts: Sequence[str], at_least: int) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, got a single string")
    texts = list(texts)
    if len(texts) < at_least:
        raise ValueError(f"needs at least {at_least} text{'s'[at_least == 1 :]}, got {len(texts)}")
    return texts


def _name_of(tokenize: Tokenize) -> str:
    return str(getattr(tokenize, "__qualname__", type(tokenize).__qualname__))
