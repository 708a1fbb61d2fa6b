"""`TrainerConfig`: every setting of the training loop, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from dmgen.training.baselines import BASELINES, Baseline
from dmgen.validation import check_choice, check_integer, check_number

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PROPOSAL_RULES = ("policy", "kl", "tv", "never", "guided")
CREDITS = ("text", "token")
ANCHORS = ("policy", "base", "value")
# Annotations of the settings, as written, and what they accept.
_TYPES = {
    "int": Integral,
    "float": Real,
    "str": str,
    "bool": bool,
    "None": type(None),
    "Baseline": Baseline,
}


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training run.

    Attributes:
        batch_size: texts drawn per step.
        micro_batch_size: texts in one forward and backward pass; None takes as many as fit into
            the free memory (`memory.micro_batch`), or the number of the run that is resumed on a
            CPU. It changes memory and speed, not the gradient.
        backward_size: texts per step in the backward pass, drawn with probability proportional to
            |advantage| and weighted by its inverse, which keeps the expected gradient; None uses
            all. Under a rare constraint most texts contribute little.
        learning_rate: peak step size; "auto" adapts it to the KL of the steps, see `step_kl`.
        step_kl: with learning_rate "auto", the KL(π before‖π after) of a step to reach, nats.
        warmup_steps: linear warmup from 0, which Adam needs, since its first steps have the size
            of the learning rate whatever the gradient is.
        schedule: "constant", "linear" or "cosine" decay to 0 at `total_steps`.
        total_steps: length of a decaying schedule; steps after it have no effect.
        optimizer: "adam", "adamw" or "sgd" (momentum 0.9).
        max_grad_norm: largest norm of the gradient, once per step; None does not clip.
        average_decay: decay per step of an exponential average of the weights, which is put into
            the policy when `train` or `resume` ends and has less gradient noise; None keeps the
            last weights.
        baseline: the factor κ of π/q that the advantage subtracts: a name (see
            `objectives.advantage`), a `Baseline` of the user's own, or None for the method's.
        credit: "text" gives every token of a text the weight of the text; "token" gives each token
            what a prefix value did not foresee, see `credit.TokenCredit`, which takes out
            variance that tells nothing. The value is fitted when the trainer is made.
        anchor: of credit "token": the distribution that every token is pulled to over the whole
            vocabulary, "value" for the guided base, "base", or "policy" for no such pull.
        gae_lambda: λ of credit "token", in [0, 1]: 1 is unbiased, 0 trusts the prefix value.
        reuse: gradient steps on each batch; those after the first are weighted by the policy at
            that step.
        base_share: fraction of each batch that is drawn from the base whatever the proposal is,
            which bounds the weights by 1/base_share times those of the base.
        proposal_every: steps between tests of the proposal.
        proposal_rule: "policy" draws from the policy itself; "kl" and "tv" from a frozen copy that
            is replaced when the policy is measurably closer to the target; "never" from the base,
            or the `proposal` of the trainer; "guided" from the base guided by the prefix value of
            credit "token"; None is the method's own rule.
        first_batches_from_fit: use the texts that λ was fitted on, which are drawn and scored
            already, as the first batches.
        checkpoint_every: steps between checkpoints; None: only when `train` ends.
        evaluate_every: steps between evaluations on fresh samples, of the averaged weights if
            there is an average; None: never.
        diagnose_every: steps between measurements of the gradient's variance
            (`diagnostics.gradient_variance`), one backward pass a text; None: never.
        seed: seed of all draws of the run.

    Raises:
        ValueError: a value is out of its range.
        TypeError: an unknown setting, or a value of the wrong type, such as 1e-4, which YAML reads
            as a string.
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
    baseline: str | Baseline | None = None
    credit: str = "text"
    anchor: str = "value"
    gae_lambda: float = 1.0
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
        for f in fields(self):
            value = _checked(f.name, str(f.type), getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            is_count = str(f.type).startswith("int") and f.name not in ("warmup_steps", "seed")
            if is_count and value is not None:
                check_integer(f.name, value, least=1)
        check_integer("warmup_steps", self.warmup_steps, least=0)
        if isinstance(self.learning_rate, str):
            if self.learning_rate != "auto":
                raise TypeError(
                    f'learning_rate must be float or "auto", got {self.learning_rate!r}'
                )
        else:
            check_number("learning_rate", self.learning_rate, above=0)
        check_number("step_kl", self.step_kl, above=0)
        check_number("base_share", self.base_share, least=0, below=1)
        if self.average_decay is not None:
            check_number("average_decay", self.average_decay, above=0, below=1)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, above=0)
        check_number("gae_lambda", self.gae_lambda, least=0, most=1)
        check_choice("credit", self.credit, CREDITS)
        check_choice("anchor", self.anchor, ANCHORS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("proposal_rule", self.proposal_rule, (None, *PROPOSAL_RULES))
        if not isinstance(self.baseline, Baseline):
            check_choice("baseline", self.baseline, (None, *BASELINES))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse settings that do not go with one another."""
        if self.proposal_rule == "guided" and self.credit == "text":
            raise ValueError(
                'proposal_rule "guided" draws with the prefix value of credit "token": set credit'
            )
        if self.base_share and not 0 < self.n_base < self.batch_size:
            raise ValueError(
                f"base_share {self.base_share} of a batch of {self.batch_size} is {self.n_base} "
                "texts: it must be at least one text, and not all"
            )
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(
                f"schedule {self.schedule!r} decays to 0 at total_steps: set total_steps"
            )
        baseline = BASELINES.get(self.baseline) if isinstance(self.baseline, str) else self.baseline
        if baseline is not None and baseline.needs_batch and self.batch_size < 2:
            raise ValueError(f"baseline {baseline.name!r} needs a batch of at least 2 texts")

    @property
    def n_base(self) -> int:
        """Number of texts of a batch that come from the base, see `base_share`."""
        return round(self.base_share * self.batch_size)

    def share_at(self, step: int) -> float:
        """Return the fraction of the peak learning rate for the step after `step` steps."""
        fraction = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant" or self.total_steps is None:
            return fraction
        left = max(0.0, 1 - step / self.total_steps)
        if self.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return fraction * left


def _checked(name: str, annotation: str, value: Any) -> Any:
    """Return a value of the annotated type, as a number of Python; an int may be a float."""
    kinds = tuple(_TYPES[part] for part in annotation.split(" | "))
    # bool is an int in Python, and batch_size=True is a mistake.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name} must be {annotation}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
