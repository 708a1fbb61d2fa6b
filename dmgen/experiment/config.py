"""`RunConfig`: what a run needs to know, read from YAML and checked before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmgen import features, storage
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.experiment import yaml_config as config_file
from dmgen.models.causal_lm import CausalLM
from dmgen.models.protocols import LanguageModel
from dmgen.target import factor
from dmgen.training.config import TrainerConfig
from dmgen.training.methods import METHODS, make_objective

SAMPLERS = METHODS
DTYPES = ("float32", "bfloat16", "float16")
_CONSTRAINT_KEYS = ("pointwise", "moment", "target", "given")
_CONSTRAINT_FORMS = (
    "{pointwise: {wordlist: sports}} or {moment: {gender: female}, target: 0.5, "
    "given: {wordlist: sports}} (given may be left out)"
)


@dataclass(frozen=True)
class FitConfig:
    """How λ is fitted: on `n_samples` texts of the base, drawn with `seed`."""

    n_samples: int = 10_240
    seed: int = 1

    def __post_init__(self) -> None:
        _at_least(1, n_samples=self.n_samples)


@dataclass(frozen=True)
class PolicyConfig:
    """What is trained: all weights, or with `adapter: lora` those of an adapter alone."""

    adapter: str | None = None
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        _one_of((None, "lora"), adapter=self.adapter)
        _at_least(1, rank=self.rank)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        defaults = (PolicyConfig.rank, PolicyConfig.alpha)
        if self.adapter is None and (self.rank, self.alpha) != defaults:
            raise ValueError("rank and alpha are of an adapter: say adapter: lora")


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluation at the end: `n_samples` texts of the policy and of the base, with `seed`."""

    n_samples: int = 2048
    seed: int = 2

    def __post_init__(self) -> None:
        _at_least(2, n_samples=self.n_samples)


@dataclass(frozen=True)
class RunConfig:
    """What a run is: a base, the constraints on it, and how a policy is fitted to them.

    The three seeds differ by default: with a seed in common, the first batches would be the very
    texts that λ was fitted on.

    Attributes:
        base: "tiny-bios", a model folder, or a hub id.
        constraints: mappings `{pointwise: FEATURE}` or `{moment: FEATURE, target: T}`, the latter
            with `given: FEATURE` if it is conditional; T is a number or `[low, high]`, FEATURE what
            `features.from_config` reads: `{wordlist: sports}`.
        prompt: the text before every text.
        max_new_tokens: the longest text, in tokens.
        method: a name in `SAMPLERS`.
        method_options: what the method takes beside the trainer's settings, such as
            `{divergence: js}` for FDPG or `{kl_coefficient: 0.1}` for KLControl.
        n_steps: gradient steps in all.
        policy: what is trained.
        fit, trainer, evaluate: settings of the three stages. A run writes a checkpoint every 25
            steps unless `trainer.checkpoint_every` says otherwise.
        device: as torch names it ("cpu", "cuda:1"); None: CUDA where there is a device.
        dtype: precision of computing, a name in `DTYPES`; None: float32.

    Raises:
        ValueError: a value is out of its range, or a constraint or feature is not a known one.
        TypeError: a constraint is no mapping, or its target no number.
    """

    base: str
    constraints: Sequence[Mapping[str, Any]]
    prompt: str = ""
    max_new_tokens: int = 40
    method: str = "GDCpp"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    n_steps: int = 300
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(checkpoint_every=25))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        # Lists, as YAML has them, so that what is written and read again is equal.
        object.__setattr__(self, "constraints", _with_targets(_plain(self.constraints)))
        if not self.base:
            raise ValueError('base must name a model: "tiny-bios", a folder, or a hub id')
        _at_least(1, max_new_tokens=self.max_new_tokens, n_steps=self.n_steps)
        object.__setattr__(self, "method_options", _numbered(_plain(self.method_options)))
        _one_of(tuple(SAMPLERS), method=self.method)
        objective = make_objective(self.method, self.method_options)
        objective.check(self.trainer)
        _one_of((None, *DTYPES), dtype=self.dtype)
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(
                    f"device must be like 'cpu', 'cuda' or 'cuda:1', got {self.device!r}"
                ) from error
        hard = [c.name for c in self.build_constraints() if _is_hard(c)]
        if hard and objective.needs_support:
            divergence = objective.identity().get("divergence")
            given = f" with divergence {divergence!r}" if divergence else ""
            raise ValueError(
                f"what {self.method}{given} minimises is infinite where a text may break a hard "
                f"constraint ({', '.join(hard)}): take GDCpp, or moments between 0 and 1 instead"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> RunConfig:
        """The configuration that a mapping of plain values describes; what is left out is default.

        Raises:
            ValueError: a key is unknown (the nearest known one is named) or missing, or a value is
                out of its range.
            TypeError: a value has the wrong type.
        """
        return config_file.from_mapping(cls, mapping)  # type: ignore[no-any-return]

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
        """The configuration in a YAML file, with `overrides` put on top.

        Args:
            path: the file.
            overrides: `key=value` or `section.key=value`, the value as in YAML
                ("trainer.batch_size=256"); entries of a list by position
                ("constraints.0.target=0.4"). Nothing after the `=` is the empty text.

        Raises:
            ValueError, TypeError: as `from_mapping`, or there is no such file or it is not YAML;
                the message begins with the path and the overrides.
        """
        return config_file.load(cls, path, overrides)  # type: ignore[no-any-return]

    def to_mapping(self) -> dict[str, Any]:
        """The whole configuration in plain values; `from_mapping` gives it back."""
        return asdict(self)

    def to_yaml(self) -> str:
        """`to_mapping` as YAML text, which `load` reads."""
        return storage.as_yaml(self.to_mapping())

    def build_constraints(self, base: LanguageModel | None = None) -> list[Pointwise | Moment]:
        """The constraints as objects, in order.

        Args:
            base: the model that `self.base` names, if it is loaded: heads on its states then read
                them from it, not from a second copy.
        """
        if not isinstance(self.constraints, list) or not self.constraints:
            raise ValueError(
                f"constraints must be a list of at least one like {_CONSTRAINT_FORMS}, "
                f"got {self.constraints!r}"
            )

        def embed(name: str) -> Callable[[Sequence[str]], Tensor]:
            if isinstance(base, CausalLM) and whole_path(name) == whole_path(self.base):
                return base.embed
            return _embedder(self.device, self.dtype, name)

        built = [_constraint(c, f"constraints.{i}", embed) for i, c in enumerate(self.constraints)]
        by_name: dict[str, Feature] = {}
        for feature in (feature for constraint in built for feature in constraint.features):
            if by_name.setdefault(feature.name, feature) != feature:
                raise ValueError(
                    f"constraints: two different features are called {feature.name!r}; "
                    "give one another name, such as {wordlist: {words: [...], name: mine}}"
                )
        return built


def from_anywhere(config: RunConfig) -> RunConfig:
    """The configuration with whole paths, so that its run is found from any working directory."""
    mapping = config.to_mapping()
    if config.base != "tiny-bios":
        mapping["base"] = whole_path(config.base)
    for classifier in classifiers(mapping):
        classifier["head"] = whole_path(classifier["head"])
    return RunConfig.from_mapping(mapping)


def classifiers(mapping: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of each classifier in a configuration."""
    for constraint in mapping["constraints"]:
        for feature in constraint.values():
            options = feature.get("classifier") if isinstance(feature, dict) else None
            if isinstance(options, dict):
                yield options


def whole_path(path: str) -> str:
    """The whole path of a folder here; any other name as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _with_targets(constraints: Any) -> Any:
    """The constraints with their targets as numbers."""
    for constraint in constraints if isinstance(constraints, list) else ():
        if isinstance(constraint, dict) and "target" in constraint:
            constraint["target"] = _numbered(constraint["target"])
    return constraints


def _numbered(value: Any) -> Any:
    """The value with what PyYAML takes for text, such as 1e-1, as numbers."""
    if isinstance(value, dict):
        return {key: _numbered(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_numbered(x) for x in value]
    return config_file.number(value)


@cache
def _embedder(
    device: str | None, dtype: str | None, name: str
) -> Callable[[Sequence[str]], Tensor]:
    """What turns texts into the hidden states that a classifier's head reads; loaded when asked.

    It computes in the precision of the run: in float32 it could cost more than a bfloat16 step.
    """
    return CausalLM.from_pretrained(name, device=device, dtype=dtype).embed


def _constraint(
    entry: Any, where: str, embed: Callable[[str], Callable[[Sequence[str]], Tensor]]
) -> Pointwise | Moment:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where}: a constraint is {_CONSTRAINT_FORMS}, got {entry!r}")
    for key in entry:
        config_file.refuse_unknown(key, _CONSTRAINT_KEYS, where, config_file.all_keys(RunConfig))
    if ("pointwise" in entry) == ("moment" in entry):
        raise ValueError(f"{where}: a constraint is {_CONSTRAINT_FORMS}, got {entry!r}")
    try:
        if "pointwise" in entry:
            if len(entry) > 1:
                extra = ", ".join(key for key in entry if key != "pointwise")
                raise ValueError(f"pointwise holds for every text and takes no {extra}")
            return Pointwise(features.from_config(entry["pointwise"], embed=embed))
        if "target" not in entry:
            raise ValueError("a moment needs its target: a number, or an interval [low, high]")
        given = entry.get("given")
        return Moment(
            features.from_config(entry["moment"], embed=embed),
            entry["target"],
            given=None if given is None else features.from_config(given, embed=embed),
        )
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error


def _is_hard(constraint: Pointwise | Moment) -> bool:
    """Whether a text that breaks the constraint has P = 0."""
    if isinstance(constraint, Pointwise):
        return True
    return constraint.feature.binary is True and factor.hard_edge(constraint) is not None


def _plain(value: Any) -> Any:
    """A copy of mappings and sequences as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _one_of(allowed: tuple[str | None, ...], **values: str | None) -> None:
    for name, value in values.items():
        if value not in allowed:
            # The method is GDC++ on paper and GDCpp in Python, which difflib takes for GDC.
            spelt = str(value).replace("+", "p")
            close = get_close_matches(spelt, [str(a) for a in allowed], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint}")
