"""`TrainerConfig`: every setting of the training loop, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PROPOSAL_RULES = ("policy", "kl", "tv", "never")
BASELINES = ("none", "z", "leave_one_out", "optimal")
# Annotations of the settings, as written, and what they accept.
_TYPES = {"int": Integral, "float": Real, "str": str, "bool": bool, "None": type(None)}


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training run.

    Attributes:
        batch_size: texts drawn a step.
        micro_batch_size: texts in one forward and backward pass; None takes what fits into the
            free memory of the device (`memory.micro_batch`), or what the run had that is resumed on
            a CPU. It changes memory and speed, not the gradient.
        backward_size: run the backward pass on this many texts a step, drawn with probability
            proportional to |advantage| and weighted by its inverse, which leaves the expected
            gradient as it is; None uses all. Most texts carry little of the gradient when a
            constraint is rare.
        learning_rate: peak step size; "auto" follows the KL divergence that each step is measured
            to make, see `step_kl`.
        step_kl: with learning_rate "auto", the KL(π before‖π after) that a step may make, nats.
        warmup_steps: linear warmup from 0. Adam's first steps have the size of the learning rate
            whatever the gradient is, so they need one.
        schedule: "constant", "linear" or "cosine" decay to 0 at `total_steps`.
        total_steps: length of a decaying schedule; steps after it have no effect.
        optimizer: "adam", "adamw" or "sgd" (momentum 0.9).
        max_grad_norm: clip the norm of the gradient, once a step; None does not clip.
        average_decay: keep an exponential average of the weights with this decay a step, and put
            it into the policy when `train` or `resume` ends; None keeps the last weights. An
            average spends less of the KL budget on gradient noise.
        baseline: what the advantage subtracts, times π/q: None is the method's own, and
            `objectives.advantage` lists the others.
        reuse: gradient steps on each batch; the weights of those after the first are corrected for
            the policy that has moved.
        base_share: share of each batch that is drawn from the base whatever the proposal is. The
            weights of the mixture are bounded by 1/base_share times those of the base.
        proposal_every: steps between tests of the proposal.
        proposal_rule: None is the method's own. "policy" draws from the policy itself; "kl" and
            "tv" from a frozen copy that is replaced when the policy is measurably closer to the
            target; "never" from the base, or the `proposal` that the trainer is given.
        first_batches_from_fit: use the texts that λ was fitted on as the first batches: they are
            drawn, scored and looked at already.
        checkpoint_every: steps between checkpoints; None: only where `train` ends.
        evaluate_every: steps between evaluations on fresh samples, of the averaged weights where
            an average is kept; None: never.
        diagnose_every: steps between measurements of the gradient's variance
            (`diagnostics.gradient_variance`), one backward pass a text; None: never.
        seed: of every draw of the run.

    Raises:
        ValueError: a value is out of its range.
        TypeError: an unknown setting, or a value of the wrong type, such as the string that YAML
            makes of 1e-4.
    """

    batch_size: int = 512
    micro_batch_size: int | None = None
    backward_size: int | None = None
    learning_rate: float | str = 1.41e-5
    step_kl: float = 0.01
    warmup_steps: int = 100
    schedule: str = "constant"
    total_steps: int | None = None
    optimizer: str = "adam"
    max_grad_norm: float | None = None
    average_decay: float | None = None
    baseline: str | None = None
    reuse: int = 1
    base_share: float = 0.0
    proposal_every: int = 10
    proposal_rule: str | None = None
    first_batches_from_fit: bool = False
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    diagnose_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _checked(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name in (
            "batch_size",
            "micro_batch_size",
            "backward_size",
            "total_steps",
            "reuse",
            "proposal_every",
            "checkpoint_every",
            "evaluate_every",
            "diagnose_every",
        ):
            value = getattr(self, name)
            _need(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _need(self.warmup_steps >= 0, f"warmup_steps must be at least 0, got {self.warmup_steps}")
        rate = self.learning_rate
        if isinstance(rate, str) and rate != "auto":
            raise TypeError(f'learning_rate must be float or "auto", got {rate!r}')
        _need(
            isinstance(rate, str) or (rate > 0 and math.isfinite(rate)),
            f"learning_rate must be positive and finite, got {rate}",
        )
        _need(
            self.step_kl > 0 and math.isfinite(self.step_kl),
            f"step_kl must be positive and finite, got {self.step_kl}",
        )
        _need(0 <= self.base_share < 1, f"base_share must lie in [0, 1), got {self.base_share}")
        _need(
            not self.base_share or 0 < self.n_base < self.batch_size,
            f"base_share {self.base_share} of a batch of {self.batch_size} is {self.n_base} texts: "
            "it must be some of them, and not all",
        )
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("proposal_rule", (None, *PROPOSAL_RULES)),
            ("baseline", (None, *BASELINES)),
        ):
            value = getattr(self, name)
            _need(value in allowed, f"{name} must be one of {allowed}, got {value!r}")
        _need(
            self.schedule == "constant" or self.total_steps is not None,
            f"schedule {self.schedule!r} decays to 0 at total_steps: set total_steps",
        )
        _need(
            self.baseline not in ("leave_one_out", "optimal") or self.batch_size > 1,
            f"baseline {self.baseline!r} needs a batch of at least 2 texts",
        )
        _need(
            self.average_decay is None or 0 < self.average_decay < 1,
            f"average_decay must be None or between 0 and 1, got {self.average_decay}",
        )
        _need(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"max_grad_norm must be None or positive, got {self.max_grad_norm}",
        )

    @property
    def n_base(self) -> int:
        """Texts of a batch that `base_share` takes from the base."""
        return round(self.base_share * self.batch_size)

    def share_at(self, step: int) -> float:
        """The share of the peak learning rate that the step after `step` steps takes."""
        share = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant" or self.total_steps is None:
            return share
        left = max(0.0, 1 - step / self.total_steps)
        return share * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def _checked(name: str, wanted: str, value: Any) -> Any:
    """A value of the type that its annotation names; an int serves as a float.

    Numbers of numpy become Python's own, which JSON can hold.
    """
    kinds = tuple(_TYPES[part] for part in wanted.split(" | "))
    # bool is an int in Python, and batch_size=True is a slip.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
