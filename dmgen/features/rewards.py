"""Features from what other libraries made, and a target as a reward for theirs.

Each function says which contract it speaks; nothing is guessed from how an object looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any

from torch import Tensor

from dmgen.constraints.feature import Feature


@dataclass(frozen=True)
class _Reward:
    reward: Callable[..., Any]
    columns: tuple[tuple[str, Any], ...]
    tokenize: Callable[[list[str]], list[list[int]]] | None
    conversational: bool

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        given = {key: [value] * len(texts) for key, value in self.columns}
        if self.tokenize is not None:
            given["completion_ids"] = self.tokenize(list(texts))
        if not self.conversational:
            return self.reward(prompts=list(prompts), completions=list(texts), **given)
        return self.reward(
            prompts=[[{"role": "user", "content": prompt}] for prompt in prompts],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            **given,
        )


def from_reward(
    reward: Callable[..., Any],
    *,
    name: str | None = None,
    binary: bool | None = None,
    columns: Mapping[str, Any] | None = None,
    tokenize: Callable[[list[str]], list[list[int]]] | None = None,
    conversational: bool = False,
) -> Feature:
    """Return the feature that a reward function of TRL's kind computes.

    It is called as TRL's trainers call it, `reward(prompts=..., completions=..., **columns)`, with
    lists of equal length, and answers one number a completion. (It reads the prompt, so a call of
    the feature itself needs the prompts.)

    Args:
        reward: the function. A None among its rewards ("does not apply here") is an error: a
            feature has a value for every text.
        name: the feature's name; the function's if not given.
        binary: whether the rewards can only be 0 or 1; None: binary if they are bools.
        columns: further columns that it reads (`ground_truth`), the same value for every text.
        tokenize: texts to their token ids, if it reads `completion_ids`; else they are not passed.
        conversational: pass prompts and completions as lists of one message, `{"role": ...,
            "content": ...}`, which TRL's own reward functions expect.

    Raises:
        TypeError: reward is no function, or an async one.
        ValueError: it has no name of its own and none is given, or columns has a key that the call
            sets itself.

    Source: TRL 1.16, `GRPOTrainer._calculate_rewards` and the documentation of `reward_funcs`.
    Differs from it: the trainer's own `trainer_state`, `log_extra`, `log_metric` are not passed.
    """
    if not callable(reward):
        raise TypeError(f"from_reward needs a function, got {reward!r}")
    if iscoroutinefunction(reward) or iscoroutinefunction(type(reward).__call__):
        raise TypeError(f"{reward!r} is async: wrap it in a function that waits for its rewards")
    taken = {"prompts", "completions", "completion_ids"} & set(columns or {})
    if taken:
        raise ValueError(f"columns cannot set {', '.join(sorted(taken))}: they are those of a text")
    if name is None:
        name = getattr(reward, "__name__", "<lambda>")
    if name == "<lambda>":
        raise ValueError(f"{reward!r} has no name of its own: pass from_reward(..., name=...)")
    fn = _Reward(reward, tuple((columns or {}).items()), tokenize, conversational)
    return Feature(fn, name, batched=True, with_prompt=True, binary=binary)


def reward_function(
    log_factors: Callable[[list[str], list[str]], Tensor], *, beta: float, floor: float
) -> Callable[..., list[float]]:
    """Return `r(x) = β · Σ_j max(log b_j(x), floor)`, called as TRL calls a reward function.

    `dmgen.EBM.as_reward` makes one of a target and says what it is good for. The sum runs over the
    target's factors, where a hard one may be `-inf`, which no trainer takes: see there.

    Args:
        log_factors: texts and their prompts to the log of each factor, `(N, J)`, nats; a factor is
            cut at the floor only where it is `-inf`.
        beta: the trainer's KL coefficient, > 0.
        floor: what a violated hard factor counts, nats, finite and < 0.

    Raises:
        ValueError: beta or floor is out of range.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is the trainer's KL coefficient, a positive number, got {beta!r}")
    if not (math.isfinite(floor) and floor < 0):
        raise ValueError(
            f"floor is what a violated constraint counts in nats, finite and < 0, got {floor!r}"
        )

    # TRL passes every column of its data set, and state of its own: all but the texts is ignored.
    def dmgen_reward(
        prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        if not all(isinstance(text, str) for text in [*prompts, *completions]):
            raise TypeError(
                "this reward reads prompts and completions as strings (TRL's standard format); "
                "with a conversational data set wrap it in a function that takes the contents out"
            )
        parts = log_factors(list(completions), list(prompts))  # (N, J)
        parts = parts.masked_fill(parts == -math.inf, floor)
        return [float(value) for value in beta * parts.sum(dim=1)]

    return dmgen_reward
