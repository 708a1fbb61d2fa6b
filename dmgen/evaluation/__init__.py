"""Evaluation of texts and of trained policies, in numbers that carry their errors."""

from __future__ import annotations

from dmgen.evaluation.diversity import distinct_n, entropy, most_repeated, self_bleu

__all__ = ["distinct_n", "entropy", "most_repeated", "self_bleu"]
