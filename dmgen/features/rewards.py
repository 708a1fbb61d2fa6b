"""Features from reward functions of other libraries, and a target as a reward function for them.

The contract of each function is in its docstring; nothing is inferred from an object's attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any

from torch import Tensor

from dmgen.constraints.feature import Feature
from dmgen.validation import check_number


@dataclass(frozen=True)
class _Reward:
    reward: Callable[..., Any]
    columns: tuple[tuple[str, Any], ...]
    tokenize: Callable[[list[str]], list[list[int]]] | None
    conversational: bool

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> Any:
        columns = {key: [value] * len(texts) for key, value in self.columns}
        if self.tokenize is not None:
            columns["completion_ids"] = self.tokenize(list(texts))
        if not self.conversational:
            return self.reward(prompts=list(prompts), completions=list(texts), **columns)
        return self.reward(
            prompts=[[{"role": "user", "content": prompt}] for prompt in prompts],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            **columns,
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
    """Return the feature that a TRL reward function computes.

    The function is called as TRL's trainers call it, `reward(prompts=..., completions=...,
    **columns)`, with lists of equal length, and returns one number a completion. The feature reads
    the prompt, so a call of it needs the prompts.

    Args:
        reward: the function. A None among its rewards ("does not apply here") is an error: a
            feature has a value for every text.
        name: the feature's name; None for that of the function.
        binary: whether the rewards can only be 0 or 1; None: binary if they are bools.
        columns: further columns that it reads (`ground_truth`), the same value for every text.
        tokenize: texts to their token ids, if it reads `completion_ids`; None passes no ids.
        conversational: pass prompts and completions as lists of one message, `{"role": ...,
            "content": ...}`, which TRL's own reward functions expect.

    Raises:
        TypeError: reward is no function, or an async one.
        ValueError: it is a lambda and name is None, or columns has a key that the call sets itself.

    Source:
        TRL 1.16, `GRPOTrainer._calculate_rewards` and the documentation of `reward_funcs`. The
        trainer's own `trainer_state`, `log_extra`, `log_metric` are not passed.
    """
    if not callable(reward):
        raise TypeError(f"from_reward needs a function, got {reward!r}")
    if iscoroutinefunction(reward) or iscoroutinefunction(type(reward).__call__):
        raise TypeError(f"{reward!r} is async: wrap it in a function that waits for its rewards")
    reserved = {"prompts", "completions", "completion_ids"} & set(columns or {})
    if reserved:
        names = ", ".join(sorted(reserved))
        raise ValueError(f"columns cannot set {names}: the call itself passes them")
    if name is None:
        name = getattr(reward, "__name__", "<lambda>")
    if name == "<lambda>":
        raise ValueError(f"{reward!r} has no name of its own: pass from_reward(..., name=...)")
    fn = _Reward(reward, tuple((columns or {}).items()), tokenize, conversational)
    return Feature(fn, name, batched=True, with_prompt=True, binary=binary)


def reward_function(
    log_factors: Callable[[list[str], list[str]], Tensor], *, beta: float, floor: float
) -> Callable[..., list[float]]:
    """Return `r(x) = β · Σ_j max(log b_j(x), floor)` as a TRL reward function.

    `dmgen.EBM.as_reward` makes one from a target; its docstring states the optimum. The sum is over
    the target's factors. A hard one may be `-inf`, which no trainer accepts, hence the floor.

    Args:
        log_factors: texts and their prompts to the log of each factor, `(N, J)`, nats; a factor is
            cut at the floor only where it is `-inf`.
        beta: the trainer's KL coefficient, > 0.
        floor: log of a violated hard factor, nats, finite and < 0.

    Raises:
        ValueError: beta or floor is out of range.
    """
    check_number("beta, the trainer's KL coefficient,", beta, above=0)
    check_number("floor, the log of a violated constraint in nats,", floor, below=0)

    # TRL passes every column of its data set and its own state; only the texts are read.
    def dmgen_reward(
        prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        if not all(isinstance(text, str) for text in [*prompts, *completions]):
            raise TypeError(
                "this reward reads prompts and completions as strings (TRL's standard format); "
                "for a conversational data set wrap it in a function that extracts the contents"
            )
        parts = log_factors(list(completions), list(prompts))  # (N, J)
        parts = parts.masked_fill(parts == -math.inf, floor)
        return [float(value) for value in beta * parts.sum(dim=1)]

    return dmgen_reward
