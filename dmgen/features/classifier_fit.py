"""The fit of a classifier head: logistic regression on standardised hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.features.classifier_head import ClassifierHead, Embed, embedded

# Largest entry of the gradient at which a fit counts as converged; its entries are at most of the
# order of a standardised hidden state, so of 1.
MAX_GRADIENT = 1e-6


def fit_classifier(
    embed: Embed,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    base: str = "",
    l2: float = 0.01,
    test: tuple[Sequence[str], Sequence[str]] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> ClassifierHead:
    """Return the logistic regression of labels on standardised mean hidden states.

    `min_{W,b} mean_i −log softmax(W z_i + b)_{y_i} + l2/2 ‖W‖²`, z the standardised states: it is
    strictly convex in W, so the same texts give the same head.

    Args:
        embed: texts to their mean hidden states, `(N, D)`.
        texts: N texts.
        labels: the name of the class of each, `(N,)`; two classes or more.
        base: name of the embedding model for `head.json`, from which it can be loaded again.
        l2: weight of the penalty, > 0; scikit-learn's C is 1 / (N l2), for two classes 2 / (N l2).
        test: texts and labels to measure the accuracy on, none of them among `texts`; None holds a
            fifth of the different texts out of the fit.
        seed: seed of the choice of that fifth.
        batch_size: texts embedded at once.

    Returns:
        The head; its `test_accuracy` has the binomial standard error.

    Raises:
        ValueError: the numbers of texts and labels disagree, there are fewer than two classes to
            fit or no texts to test, test texts are among those of the fit, l2 is not positive, or
            the fit did not converge.
    """
    if not (math.isfinite(l2) and l2 > 0):
        raise ValueError(f"l2 must be positive, or separable classes have no fit; got {l2}")
    for some, names in ((texts, labels), test or ((), ())):
        if len(some) != len(names):
            raise ValueError(f"got {len(some)} texts but {len(names)} labels")
    fit_on, test_on = _split(list(texts), list(labels), test, seed)
    classes = sorted({label for _, label in fit_on})
    unknown = {label for _, label in test_on} - set(classes)
    if len(classes) < 2 or unknown or not test_on:
        raise ValueError(
            f"a classifier needs texts of two classes or more to fit, and some of the same classes "
            f"to test; the fit has {classes}, the {len(test_on)} test texts "
            f"{sorted({label for _, label in test_on})}"
        )
    hidden = torch.cat(list(embedded(embed, [text for text, _ in fit_on], batch_size)))
    mean, std = hidden.mean(0), hidden.std(0, correction=0)
    # A dimension that varies less than float32 rounding would be scaled up to pure noise.
    std = torch.where(std > 1e-7 * mean.abs(), std, 1.0)
    weight, bias = _logistic_regression(
        ((hidden - mean) / std).numpy(),
        np.array([classes.index(label) for _, label in fit_on]),
        len(classes),
        l2,
    )
    head = ClassifierHead(weight, bias, tuple(classes), mean, std, base)
    return _with_accuracy(head, embed, test_on, batch_size, "given" if test else f"fifth|{seed}")


def _split(
    texts: list[str],
    labels: list[str],
    test: tuple[Sequence[str], Sequence[str]] | None,
    seed: int,
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return texts with labels to fit and to test; no text is in both, however often it occurs."""
    pairs = list(zip(texts, labels, strict=True))
    if test is not None:
        both = set(texts) & set(test[0])
        if both:
            raise ValueError(f"a test text is among those of the fit: {min(both)!r}")
        return pairs, list(zip(*test, strict=True))
    different = list(dict.fromkeys(texts))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    held_out = {different[i] for i in order[: len(different) // 5].tolist()}
    return (
        [pair for pair in pairs if pair[0] not in held_out],
        [pair for pair in pairs if pair[0] in held_out],
    )


def _with_accuracy(
    head: ClassifierHead,
    embed: Embed,
    test_on: list[tuple[str, str]],
    batch_size: int,
    which: str,
) -> ClassifierHead:
    parts = embedded(embed, [text for text, _ in test_on], batch_size)
    predicted = torch.cat([head.log_prob(hidden).argmax(1) for hidden in parts])
    truth = torch.tensor([head.labels.index(label) for _, label in test_on])
    n, rate = len(test_on), (predicted == truth).double().mean().item()
    score = Score(rate, math.sqrt(rate * (1 - rate) / n), n, f"accuracy|{which}")
    return replace(head, test_accuracy=score)


def _logistic_regression(
    z: np.ndarray[Any, np.dtype[np.float64]],
    y: np.ndarray[Any, np.dtype[np.int64]],
    n_classes: int,
    l2: float,
) -> tuple[Tensor, Tensor]:
    """Return W `(C, D)` and b `(C,)`; b sums to 0, since only its differences matter."""
    n, width = z.shape
    rows, size = np.arange(n), n_classes * width

    def loss_and_gradient(theta: Any) -> tuple[float, Any]:
        weight, bias = theta[:size].reshape(n_classes, width), theta[size:]
        logits = z @ weight.T + bias  # (N, C)
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        error = np.exp(log_p)
        error[rows, y] -= 1
        error /= n
        loss = -log_p[rows, y].mean() + l2 / 2 * (weight**2).sum()
        return loss, np.concatenate([(error.T @ z + l2 * weight).ravel(), error.sum(0)])

    # ftol is 0 because its test of progress stops early; the gradient decides.
    options: Any = {"maxiter": 5000, "maxfun": 20_000, "ftol": 0.0, "gtol": MAX_GRADIENT / 10}
    start = np.zeros(size + n_classes)
    optimum = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    steepest = float(np.abs(optimum.jac).max())
    if not steepest <= MAX_GRADIENT:
        raise ValueError(
            f"the fit did not converge: its gradient is still {steepest:.2g} after {optimum.nit} "
            f"steps; raise l2, which is {l2:g}"
        )
    theta = torch.from_numpy(optimum.x)
    return theta[:size].reshape(n_classes, width), theta[size:]
