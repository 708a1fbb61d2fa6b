"""A linear classifier on the hidden states of a frozen language model: fitted, stored, asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from dmgen.constraints.feature import Feature
from dmgen.estimates.score import Score
from dmgen.features.labels import Threshold, Wanted, label_name, wanted

__all__ = ["ClassifierHead", "Embed", "classifier", "fit_classifier"]

# Texts to one vector each, `(N, D)`. A row must depend on its own text alone, not on the padding
# that other texts of the batch bring, and the empty text must have one too.
Embed = Callable[[list[str]], Tensor]

_TENSORS = ("weight", "bias", "mean", "std")
_FACTS = ("labels", "base", "pooling", "test_accuracy")
# Largest entry of the gradient at which a fit counts as converged; its entries are at most of the
# order of a standardised hidden state, so of 1.
_MAX_GRADIENT = 1e-6


@dataclass(frozen=True, eq=False)
class ClassifierHead:
    """A linear classifier of texts by their mean hidden state h.

    `p(c | x) = softmax(W (h(x) − mean) / std + bias)_c`

    On disk it is a folder with `head.safetensors` (weight, bias and, if there are, mean and std)
    and `head.json` (the other fields).

    Args:
        weight: W, `(C, D)`.
        bias: `(C,)`.
        labels: the C names of the classes.
        mean, std: what h is standardised with, `(D,)`, std > 0; both or neither.
        base: the language model whose states these are: a folder, a hub id, or "tiny-bios".
        pooling: how the states of a text become one; only "mean", over its tokens.
        test_accuracy: share of right answers on texts that the fit has not seen, if measured.

    Raises:
        ValueError: the shapes disagree, a number is not finite, std is not positive, two labels
            are equal, there are fewer than two, or pooling is unknown.
    """

    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...]
    mean: Tensor | None = None
    std: Tensor | None = None
    base: str = ""
    pooling: str = "mean"
    test_accuracy: Score | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for name, tensor in self._tensors().items():
            object.__setattr__(self, name, tensor.detach().cpu().double())
        n_labels, width = len(self.labels), self.weight.shape[-1] if self.weight.ndim else 0
        for name, tensor in self._tensors().items():
            shape = {"weight": (n_labels, width), "bias": (n_labels,)}.get(name, (width,))
            if tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{name} of a head with {n_labels} labels must be {shape} finite numbers, got "
                    f"shape {tuple(tensor.shape)}"
                )
        if (self.mean is None) != (self.std is None):
            raise ValueError("a head has both mean and std, or neither")
        if self.std is not None and not bool((self.std > 0).all()):
            raise ValueError("std of a head must be positive")
        if n_labels < 2 or len(set(self.labels)) < n_labels:
            raise ValueError(f"a head needs two or more different labels, got {self.labels}")
        if self.pooling != "mean":
            raise ValueError(f'pooling of a head must be "mean", got {self.pooling!r}')

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal, number by number."""
        if not isinstance(other, ClassifierHead):
            return NotImplemented
        mine, theirs = self._tensors(), other._tensors()
        return (
            all(getattr(self, name) == getattr(other, name) for name in _FACTS)
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
        )

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probability of each class in nats, float64 `(N, C)`.

        Args:
            hidden: mean hidden states, `(N, D)`.

        Raises:
            ValueError: the states have another width than those of the fit.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"this head reads hidden states (N, {self.weight.shape[1]}) of "
                f"{self.base or 'its base'}, got {tuple(hidden.shape)}: embed with the model that "
                "it was fitted on"
            )
        h = hidden.detach().cpu().double()
        if self.mean is not None and self.std is not None:
            h = (h - self.mean) / self.std
        return torch.log_softmax(h @ self.weight.T + self.bias, dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `head.safetensors` and `head.json` into the folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / "head.safetensors")
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        facts["test_accuracy"] = self.test_accuracy and asdict(self.test_accuracy)
        text = json.dumps(facts, indent=2, ensure_ascii=False)
        (folder / "head.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClassifierHead:
        """The head that `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or is not one of a head.
        """
        folder = Path(folder)
        try:
            facts: dict[str, Any] = json.loads((folder / "head.json").read_text(encoding="utf-8"))
            tensors: dict[str, Any] = load_file(folder / "head.safetensors")
            if set(facts) != set(_FACTS) or not {"weight", "bias"} <= set(tensors) <= set(_TENSORS):
                raise ValueError(f"it has {sorted(facts)} and {sorted(tensors)}")
            score = facts.pop("test_accuracy")
            return cls(**facts, **tensors, test_accuracy=score and Score(**score))
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"there is no classifier head in {str(folder)!r}: {error}; it is a folder with "
                "head.json and head.safetensors, as fit_classifier(...).save_pretrained writes it"
            ) from error

    def _tensors(self) -> dict[str, Tensor]:
        pairs = ((name, getattr(self, name)) for name in _TENSORS)
        return {name: tensor for name, tensor in pairs if tensor is not None}


@dataclass(frozen=True)
class _Classifier:
    head: ClassifierHead
    embed: Embed
    wanted: Wanted
    batch_size: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        parts = _batches(self.embed, list(texts), self.batch_size)
        return torch.cat([self.wanted(self.head.log_prob(hidden).exp()) for hidden in parts])


def classifier(
    head: ClassifierHead | str | Path,
    embed: Embed,
    label: str | Sequence[str],
    *,
    threshold: Threshold = "argmax",
    name: str | None = None,
    batch_size: int = 64,
) -> Feature:
    """Return the feature "a classifier gives the text this label".

    The classifier is linear in the mean hidden state of a frozen language model; by default the
    feature holds where the wanted label (or one of several) is the most probable, as in the papers.

    Args:
        head: the classifier, or the folder it was saved in; `fit_classifier` makes one.
        embed: texts to their mean hidden states `(N, D)`, of the model that the head was fitted on.
        label: a label of the head, or several of which one must be given.
        threshold: "argmax", or a number in (0, 1] that the labels' probability must reach, or None
            for this probability itself (a feature that is not binary).
        name: the feature's name; the label if not given.
        batch_size: texts embedded at once.

    Raises:
        TypeError: embed is no function, or threshold is of none of these kinds.
        ValueError: there is no head in the folder, it does not know the label, or knows no other;
            threshold or batch_size is out of range.

    Source: Khalifa, Elsahar, Dymetman (2021), arXiv:2012.11635, whose classifier constraints are
    heads of this kind. Differs from their code: states are averaged over the text's own tokens and
    never over padding (which made a value depend on the other texts of its batch).
    """
    if not callable(embed):
        raise TypeError(f"embed must be a function from texts to hidden states, got {embed!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    loaded = head if isinstance(head, ClassifierHead) else ClassifierHead.from_pretrained(head)
    decision = wanted(label, loaded.labels, threshold)
    return Feature(
        _Classifier(loaded, embed, decision, batch_size),
        label_name(label) if name is None else name,
        batched=True,
        binary=decision.binary,
    )


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
        texts, labels: N texts with the name of the class of each; two classes or more.
        base: what to call the embedding model in `head.json`, so that it can be loaded again.
        l2: weight of the penalty, > 0; scikit-learn's C is 1 / (N l2), for two classes 2 / (N l2).
        test: texts and labels to measure the accuracy on, none of them among `texts`; None holds a
            fifth of the different texts out of the fit.
        seed: which fifth that is.
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
    strange = {label for _, label in test_on} - set(classes)
    if len(classes) < 2 or strange or not test_on:
        raise ValueError(
            f"a classifier needs texts of two classes or more to fit, and some of the same classes "
            f"to test; the fit has {classes}, the {len(test_on)} test texts "
            f"{sorted({label for _, label in test_on})}"
        )
    hidden = torch.cat(list(_batches(embed, [text for text, _ in fit_on], batch_size)))
    mean, std = hidden.mean(0), hidden.std(0, correction=0)
    # What varies less than states are rounded to, in float32, would be scaled up to pure noise.
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
    """Texts with labels to fit and to test; no text is in both, however often it occurs."""
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
    parts = _batches(embed, [text for text, _ in test_on], batch_size)
    found = torch.cat([head.log_prob(hidden).argmax(1) for hidden in parts])
    truth = torch.tensor([head.labels.index(label) for _, label in test_on])
    n, share = len(test_on), (found == truth).double().mean().item()
    score = Score(share, math.sqrt(share * (1 - share) / n), n, f"accuracy|{which}")
    return ClassifierHead(
        head.weight, head.bias, head.labels, head.mean, head.std, head.base, test_accuracy=score
    )


def _batches(embed: Embed, texts: list[str], batch_size: int) -> Iterator[Tensor]:
    """The hidden states of all texts, float64 `(n, D)` a batch, on the CPU."""
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        hidden = embed(some)
        if not isinstance(hidden, Tensor) or hidden.ndim != 2 or len(hidden) != len(some):
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"embed must give ({len(some)}, D) for {len(some)} texts, got {got}")
        hidden = hidden.detach().cpu().double()
        bad = ~hidden.isfinite().all(dim=1)
        if bool(bad.any()):
            text = some[int(bad.nonzero()[0, 0])]
            raise ValueError(f"embed gave NaN or infinite states for the text {text!r}")
        yield hidden


def _logistic_regression(
    z: np.ndarray[Any, np.dtype[np.float64]],
    y: np.ndarray[Any, np.dtype[np.int64]],
    n_classes: int,
    l2: float,
) -> tuple[Tensor, Tensor]:
    """W `(C, D)` and b `(C,)`; b sums to 0, since only its differences matter."""
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

    # Its own tests of progress stop early; the gradient decides.
    options: Any = {"maxiter": 5000, "maxfun": 20_000, "ftol": 0.0, "gtol": _MAX_GRADIENT / 10}
    start = np.zeros(size + n_classes)
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    steepest = float(np.abs(found.jac).max())
    if not steepest <= _MAX_GRADIENT:
        raise ValueError(
            f"the fit did not converge: its gradient is still {steepest:.2g} after {found.nit} "
            f"steps; raise l2, which is {l2:g}"
        )
    theta = torch.from_numpy(found.x)
    return theta[:size].reshape(n_classes, width), theta[size:]
