"""From a configuration to objects: base, policy, constraints, target and trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmgen import models
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.experiment.config import RunConfig, absolute_path
from dmgen.models.protocols import LanguageModel
from dmgen.target.ebm import EBM
from dmgen.target.fit import TargetFit
from dmgen.training.methods import METHODS
from dmgen.training.trainer import Trainer

if TYPE_CHECKING:
    from dmgen.models.causal_lm import CausalLM


def load_model(name: str | Path, config: RunConfig) -> CausalLM:
    """Return the model in a folder or on the hub, on the device of the configuration.

    Raises:
        ValueError: there is no such model, or no such device here.
    """
    if (config.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"there is no device {config.device!r} here: torch sees no CUDA; try cpu")
    return models.CausalLM.from_pretrained(
        name, device=config.device, dtype=config.dtype, max_new_tokens=config.max_new_tokens
    )


def load_finished_policy(folder: Path, config: RunConfig) -> CausalLM:
    """Return the policy of a finished run in the precision that it was trained in.

    An adapter over half precision computes in float32: it is part of the weights here, and rounded
    with them most of it would be lost.
    """
    # Float32 weights, as in training: loaded in half precision they would be rounded for good.
    policy = load_model(folder / "policy", replace(config, dtype=None))
    if config.dtype and not config.policy.adapter:
        policy.dtype = getattr(torch, config.dtype)
        # Autocast casts the weights once a pass if they may be trained, else at each use.
        policy.model.requires_grad_(True)
    return policy


def load_finished_base(config: RunConfig) -> CausalLM:
    """Return the base of a finished run in the precision of `load_finished_policy`."""
    base = load_model(config.base, config)
    if config.policy.adapter and config.dtype:
        # With the rounded weights that the adapter was added to.
        base = base.copy()
        base.dtype = torch.float32
    return base


def build_constraints(
    config: RunConfig, base: LanguageModel | None = None
) -> list[Pointwise | Moment]:
    """Return the constraints as objects, in order; a classifier loads its model when called.

    Args:
        config: the configuration.
        base: the model that `config.base` names, if it is loaded: classifiers on its hidden states
            then read them from it, not from a second copy.
    """

    def embed(name: str) -> Callable[[Sequence[str]], Tensor]:
        if isinstance(base, models.CausalLM) and absolute_path(name) == absolute_path(config.base):
            return base.embed
        return _embedder(config.device, config.dtype, name)

    return config.build_constraints(embed)


@cache
def _embedder(
    device: str | None, dtype: str | None, name: str
) -> Callable[[Sequence[str]], Tensor]:
    """Return the function from texts to hidden states of a model, in the precision of the run.

    In float32 it could cost more than a step in bfloat16.
    """
    return models.CausalLM.from_pretrained(name, device=device, dtype=dtype).embed


def fit_draw(config: RunConfig) -> dict[str, Any]:
    """Return the arguments that decide which texts λ is fitted on."""
    return asdict(config.fit) | {"prompt": config.prompt, "max_new_tokens": config.max_new_tokens}


def fit_target(config: RunConfig, base: LanguageModel) -> EBM:
    """Return the target, with λ fitted on texts of the base.

    Raises:
        MomentsUnreachable: as in `EBM.fit`.
    """
    return EBM.fit(base, build_constraints(config, base), **fit_draw(config))


def load_target(folder: Path, config: RunConfig, base: LanguageModel) -> EBM:
    """Return the target of a run with the λ that it was begun with; another fit is another target.

    Raises:
        ValueError: `target.json` is missing, or not that of `config`.
    """
    return bind_target(TargetFit.load(folder, build_constraints(config, base)), config, base)


def bind_target(fit: TargetFit, config: RunConfig, base: LanguageModel) -> EBM:
    """Return the target on its base.

    Raises:
        ValueError: the fit has another prompt or length than `config`.
    """
    if (fit.prompt, fit.max_new_tokens) != (config.prompt, config.max_new_tokens):
        raise ValueError(
            f"the target has prompt {fit.prompt!r} and max_new_tokens {fit.max_new_tokens}, its "
            f"configuration has {config.prompt!r} and {config.max_new_tokens}"
        )
    return EBM.from_fit(base, fit)


def build_policy(config: RunConfig, target: EBM) -> Any:
    """Return the trainable copy of the target's base that the configuration describes."""
    options = asdict(config.policy)
    by_value = options.pop("output_rows")
    if by_value:
        if target.prefix_value is None:
            raise ValueError("policy.output_rows needs trainer.credit: token, which finds them")
        options["output_rows"] = target.prefix_value.candidates
    base: Any = target.base
    return base.copy(**options)


def build_trainer(config: RunConfig, policy: Any, target: EBM) -> Trainer:
    """Return the trainer that fits `policy`, which it changes in place, to `target`."""
    make: type[Trainer] = METHODS[config.method]
    return make(policy, target, config.trainer, **config.method_options)
