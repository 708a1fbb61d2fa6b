"""Small worlds for the benchmarks of the samplers, in which every divergence is an exact sum."""

from __future__ import annotations

import dmgen

VOCAB, LENGTH = "abcd.", 5


def base(seed: int = 0) -> dmgen.TabularLM:
    """A random model over 1,365 texts: up to five letters of "abcd", ended by "."."""
    return dmgen.TabularLM.random(VOCAB, LENGTH, eos=".", scale=1.0, seed=seed)


def contains(what: str) -> dmgen.Feature:
    """Whether a text contains `what`."""
    return dmgen.feature(lambda text: what in text, name=what)


def pointwise(what: str, seed: int = 0) -> dmgen.EBM:
    """Every text contains `what`."""
    return dmgen.EBM(base(seed), [dmgen.Pointwise(contains(what))])


def distributional(what: str, share: float, seed: int = 0) -> dmgen.EBM:
    """That share of the texts contains `what`; λ is the exact one."""
    model = base(seed)
    feature = contains(what)
    every = model.enumerate()
    moments = [dmgen.Moment(feature, share)]
    found = dmgen.target.moments.fit_lambdas(
        feature(every.texts)[:, None], [share], every.log_prob, names=[what]
    )
    return dmgen.EBM(model, moments, found.lambdas)
