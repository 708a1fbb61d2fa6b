"""`Batch`: the texts of one training step with their known quantities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dmgen.models.samples import Samples


@dataclass(frozen=True, eq=False)
class Batch:
    """N texts of all processes as float64 columns on the CPU; None where a column is unknown.

    Attributes:
        log_q: log-probability under the distribution that the texts were drawn from, `(N,)`, nats.
        samples: the texts of this process, a contiguous part of the N; all of them in one process.
        features: values by feature name, each `(N,)`.
        log_score: log P, unnormalised, `(N,)`, nats; `-inf` where a constraint is violated.
        log_base: log a, `(N,)`, nats.
        log_policy: log π, `(N,)`, nats, detached.
        log_z: log Z of each text's prompt, `(N,)`, nats.
        reward: reward of each text, `(N,)`, for objectives that maximise one.
        tokens: the objective's token columns `(N, T)` by name, 0 after the end of a text.
        sources: the models of the mixture that this process's texts were drawn from, each with its
            fraction.
        base: the target's base, for objectives that read its states.
        base_hidden: the base's states before each token of this process's texts, `(n, T, D)`.
        first: row of this process's first text.
        is_new: whether the weights have not been counted in the running Z yet.
        from_proposal: whether the texts were drawn from the current proposal.
    """

    log_q: Tensor
    samples: Samples | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    log_score: Tensor | None = None
    log_base: Tensor | None = None
    log_policy: Tensor | None = None
    log_z: Tensor | None = None
    reward: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    sources: tuple[tuple[Any, float], ...] = ()
    base: Any = None
    base_hidden: Tensor | None = None
    first: int = 0
    is_new: bool = True
    from_proposal: bool = True

    def __len__(self) -> int:
        return len(self.log_q)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Batch:
        """Return the chosen rows; they must be rows of this process where there are samples."""
        rows = torch.arange(len(self))[index]
        columns: dict[str, Any] = {"first": 0}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Samples) or (name == "base_hidden" and value is not None):
                columns[name] = value[rows - self.first]
            elif isinstance(value, Tensor):
                columns[name] = value[rows]
            elif isinstance(value, Mapping):
                columns[name] = {key: column[rows] for key, column in value.items()}
        return replace(self, **columns)

    @property
    def texts(self) -> Samples:
        """The texts of this process; raise ValueError where the batch has columns alone."""
        if self.samples is None:
            raise ValueError("this batch has columns but no texts")
        return self.samples

    @property
    def own(self) -> slice:
        """The rows of this process."""
        return slice(self.first, self.first + len(self.texts))

    def column(self, name: str) -> Tensor:
        """Return a column that must be known, `(N,)`; raise ValueError if it is unknown."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise ValueError(f"this batch does not know {name}: its source must give it")
        return value

    @property
    def log_w(self) -> Tensor:
        """Log-weights log P − log q, `(N,)`, nats."""
        return self.column("log_score") - self.log_q
