"""Small models for the benchmarks, whose divergences are exact sums."""

from __future__ import annotations

import dmgen
from dmgen.target.moments import fit_lambdas

VOCAB, LENGTH = "abcd.", 5


def base(seed: int = 0) -> dmgen.TabularLM:
    """Return a random model of 1,365 texts: up to five letters of "abcd", ended by "."."""
    return dmgen.TabularLM.random(VOCAB, LENGTH, eos=".", scale=1.0, seed=seed)


def contains(what: str) -> dmgen.Feature:
    """Return the feature that a text contains `what`."""
    return dmgen.feature(lambda text: what in text, name=what)


def pointwise(what: str, seed: int = 0) -> dmgen.EBM:
    """Return the target where every text contains `what`."""
    return dmgen.EBM(base(seed), [dmgen.Pointwise(contains(what))])


def distributional(what: str, fraction: float, seed: int = 0) -> dmgen.EBM:
    """Return the target where that fraction of texts contains `what`, with the exact λ."""
    model = base(seed)
    feature = contains(what)
    every = model.enumerate()
    moments = [dmgen.Moment(feature, fraction)]
    fit = fit_lambdas(feature(every.texts)[:, None], [fraction], every.log_prob, names=[what])
    return dmgen.EBM(model, moments, fit.lambdas)
