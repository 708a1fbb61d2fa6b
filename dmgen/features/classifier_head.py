"""`ClassifierHead`: a linear classifier on the hidden states of a frozen language model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmgen import storage
from dmgen.estimates.score import Score

# Texts to one vector each, `(N, D)`. A row must depend on its own text alone, not on the padding
# that other texts of the batch bring, and the empty text must have one too.
Embed = Callable[[list[str]], Tensor]

_TENSORS = ("weight", "bias", "mean", "std")
_FACTS = ("labels", "base", "pooling", "test_accuracy")


@dataclass(frozen=True, eq=False)
class ClassifierHead:
    """A linear classifier of texts by their mean hidden state h.

    `p(c | x) = softmax(W (h(x) − mean) / std + bias)_c`

    Its folder on disk holds `head.safetensors` (weight, bias, and mean and std if the head has
    them) and `head.json` (the other fields).

    Args:
        weight: W, `(C, D)`.
        bias: `(C,)`.
        labels: the C names of the classes.
        mean, std: mean and standard deviation that standardise h, `(D,)`, std > 0; both or neither.
        base: the language model that gives the states: a folder, a hub id, or "tiny-bios".
        pooling: the reduction of the states of a text to one; only "mean", over its tokens.
        test_accuracy: fraction of right labels on texts outside the fit, if measured.

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
        """Return whether all fields are equal, number by number."""
        if not isinstance(other, ClassifierHead):
            return NotImplemented
        left, right = self._tensors(), other._tensors()
        return (
            all(getattr(self, name) == getattr(other, name) for name in _FACTS)
            and left.keys() == right.keys()
            and all(torch.equal(left[name], right[name]) for name in left)
        )

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Return the log-probability of each class in nats, float64 `(N, C)`.

        Args:
            hidden: mean hidden states, `(N, D)`.

        Raises:
            ValueError: the width of the states is not that of the fit.
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
        """Write `head.safetensors` and `head.json` into the folder, which is created if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / "head.safetensors")
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        facts["test_accuracy"] = self.test_accuracy and asdict(self.test_accuracy)
        storage.write_json(folder / "head.json", facts)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClassifierHead:
        """Return the head that `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or does not hold a head.
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


def embedded(embed: Embed, texts: list[str], batch_size: int) -> Iterator[Tensor]:
    """Yield the hidden states of all texts, float64 `(n, D)` a batch, on the CPU.

    Raises:
        ValueError: embed returns another shape, or NaN or infinite states.
    """
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
