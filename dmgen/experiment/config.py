"""`RunConfig`: the settings of a run, read from YAML and checked without building anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmgen import features, storage
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.experiment import yaml_config
from dmgen.features.classifier_head import Embed
from dmgen.features.config import CONSTRAINT_FORMS, CONSTRAINT_KEYS
from dmgen.models.embedded import EMBEDDED
from dmgen.target import factor
from dmgen.training.config import TrainerConfig
from dmgen.training.methods import METHODS, make_objective
from dmgen.validation import check_choice, check_integer, check_known, check_number

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class FitConfig:
    """Settings of the fit of λ.

    Attributes:
        n_samples: texts that are drawn from the base, at least 1.
        seed: seed of the draw.

    Raises:
        ValueError: a value is out of its range.
    """

    n_samples: int = 10_240
    seed: int = 1

    def __post_init__(self) -> None:
        check_integer("n_samples", self.n_samples, least=1)


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the policy: which weights are trained.

    Attributes:
        adapter: None for all weights, "lora" for those of a low-rank adapter alone.
        rank: rank of the adapter, at least 1.
        alpha: scale of the adapter times its rank, positive.
        last_layers: train this many of the last layers and the output layer alone; None for all.
        output_rows: of the output layer, train the rows of those tokens alone that the constraints
            depend on, as the prefix value of `trainer.credit: token` finds them.

    Raises:
        ValueError: a value is out of its range, or belongs to an adapter where there is none.
    """

    adapter: str | None = None
    rank: int = 8
    alpha: float = 16.0
    last_layers: int | None = None
    output_rows: bool = False

    def __post_init__(self) -> None:
        if self.last_layers is not None:
            check_integer("last_layers", self.last_layers, least=0)
            if self.adapter is not None:
                raise ValueError("give adapter or last_layers, not both")
        if not isinstance(self.output_rows, bool):
            raise TypeError(f"output_rows must be true or false, got {self.output_rows!r}")
        check_choice("adapter", self.adapter, (None, "lora"))
        check_integer("rank", self.rank, least=1)
        check_number("alpha", self.alpha, above=0)
        defaults = (PolicyConfig.rank, PolicyConfig.alpha)
        if self.adapter is None and (self.rank, self.alpha) != defaults:
            raise ValueError("rank and alpha are settings of an adapter: set adapter: lora")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluation at the end.

    Attributes:
        n_samples: texts that are drawn from the policy, and from the base; at least 2.
        seed: seed of the draws.

    Raises:
        ValueError: a value is out of its range.
    """

    n_samples: int = 2048
    seed: int = 2

    def __post_init__(self) -> None:
        check_integer("n_samples", self.n_samples, least=2)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run: a base, the constraints on it, and how a policy is fitted to them.

    A value: making one loads no model, builds no trainer and reads no file. The three seeds differ
    by default: with a common seed, the first batches would be the texts that λ was fitted on.

    Attributes:
        base: "tiny-bios", a model folder, or a hub id.
        constraints: mappings `{pointwise: FEATURE}` or `{moment: FEATURE, target: T}`, the latter
            with `given: FEATURE` if it is conditional; T is a number or `[low, high]`, FEATURE a
            mapping that `features.from_config` reads: `{wordlist: sports}`.
        prompt: the prompt of every text.
        max_new_tokens: length of the longest text, in tokens.
        method: a name in `training.methods.METHODS`.
        method_options: options of the method, such as `{divergence: js}` for FDPG or
            `{kl_coefficient: 0.1}` for KLControl.
        n_steps: gradient steps in all.
        policy: which weights are trained.
        fit: settings of the fit of λ.
        trainer: settings of the training. A run writes a checkpoint every 25 steps unless
            `trainer.checkpoint_every` is given.
        evaluate: settings of the evaluation at the end.
        device: name of a torch device ("cpu", "cuda:1"); None: CUDA where there is a device.
        dtype: precision of the computations, a name in `DTYPES`; None: float32.

    Raises:
        ValueError: a value is out of its range, a constraint or feature is not a known one, or
            settings do not go together.
        TypeError: a constraint is not a mapping, or its target not a number.
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
        # Lists, as YAML has them, so that a configuration equals the one read from its YAML.
        object.__setattr__(self, "constraints", _with_number_targets(_plain(self.constraints)))
        object.__setattr__(self, "method_options", _to_numbers(_plain(self.method_options)))
        if not self.base:
            raise ValueError('base must name a model: "tiny-bios", a folder, or a hub id')
        check_integer("max_new_tokens", self.max_new_tokens, least=1)
        check_integer("n_steps", self.n_steps, least=1)
        check_choice("dtype", self.dtype, (None, *DTYPES))
        _check_device(self.device)
        check_choice("method", self.method, METHODS)
        _check_method(self)
        if self.trainer.first_batches_from_fit and self.fit.n_samples < self.trainer.batch_size:
            raise ValueError(
                f"trainer.first_batches_from_fit needs a batch of {self.trainer.batch_size} texts "
                f"from the fit, and fit.n_samples is {self.fit.n_samples}"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> RunConfig:
        """Return the configuration that plain values describe; keys left out take their defaults.

        Raises:
            ValueError: a key is unknown (the nearest known one is named) or missing, or a value is
                out of its range.
            TypeError: a value has the wrong type.
        """
        return yaml_config.from_mapping(cls, mapping)  # type: ignore[no-any-return]

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
        """Return the configuration in a YAML file, with `overrides` on top; read no other file.

        Args:
            path: the file.
            overrides: `key=value` or `section.key=value`, the value as in YAML
                ("trainer.batch_size=256"); entries of a list by position
                ("constraints.0.target=0.4"). Nothing after the `=` is the empty text.

        Raises:
            ValueError: as `from_mapping`, or there is no such file or it is not YAML; the message
                begins with the path and the overrides.
            TypeError: as `from_mapping`.
        """
        return yaml_config.load(cls, path, overrides)  # type: ignore[no-any-return]

    def to_mapping(self) -> dict[str, Any]:
        """Return all settings as plain values; `from_mapping` reads them."""
        return asdict(self)

    def to_yaml(self) -> str:
        """Return `to_mapping` as YAML text, which `load` reads."""
        return storage.as_yaml(self.to_mapping())

    def build_constraints(
        self, embed: Callable[[str], Embed] | None = None
    ) -> list[Pointwise | Moment]:
        """Return the constraints as objects, in order; a classifier reads its head when called.

        Args:
            embed: as in `features.from_config`; None: classifiers can be declared, not called.

        Raises:
            ValueError: there is no constraint, one of them is not a legal one, or two different
                features share a name.
            TypeError: a constraint is not a mapping, or its target not a number.
        """
        if not isinstance(self.constraints, list) or not self.constraints:
            raise ValueError(
                f"constraints must be a list of at least one like {CONSTRAINT_FORMS}, "
                f"got {self.constraints!r}"
            )
        keys = yaml_config.all_keys(RunConfig)
        constraints = []
        for i, mapping in enumerate(self.constraints):
            for key in mapping if isinstance(mapping, dict) else ():
                check_known(key, CONSTRAINT_KEYS, "key", place=f"constraints.{i}", elsewhere=keys)
            constraints.append(
                features.constraint_from_config(mapping, where=f"constraints.{i}", embed=embed)
            )
        by_name: dict[str, Feature] = {}
        for feature in (feature for constraint in constraints for feature in constraint.features):
            if by_name.setdefault(feature.name, feature) != feature:
                raise ValueError(
                    f"constraints: two different features are called {feature.name!r}; "
                    "give one another name, such as {wordlist: {words: [...], name: mine}}"
                )
        return constraints


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths: it holds in any working directory."""
    mapping = config.to_mapping()
    if config.base not in EMBEDDED:
        mapping["base"] = absolute_path(config.base)
    for options in classifier_options(mapping):
        options["head"] = absolute_path(options["head"])
    return RunConfig.from_mapping(mapping)


def classifier_options(mapping: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the options of each classifier in a configuration; a caller may change them."""
    for constraint in mapping["constraints"]:
        for feature in constraint.values():
            options = feature.get("classifier") if isinstance(feature, dict) else None
            if isinstance(options, dict):
                yield options


def absolute_path(path: str) -> str:
    """Return the absolute path of a folder that exists; any other name as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _check_device(device: str | None) -> None:
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be like 'cpu', 'cuda' or 'cuda:1', got {device!r}"
        ) from error


def _check_method(config: RunConfig) -> None:
    """Raise if the method refuses its options, the trainer's settings or the constraints."""
    options = config.method_options
    yaml_config.need_mapping(options, "method_options")
    objective = make_objective(config.method, options)
    objective.check(config.trainer)
    hard = [c.name for c in config.build_constraints() if _is_hard(c)]
    if hard and objective.needs_support:
        divergence = options.get("divergence")
        suffix = "" if divergence is None else f" with divergence {divergence!r}"
        raise ValueError(
            f"{config.method}{suffix} minimises a loss that is infinite where a text may break a "
            f"hard constraint ({', '.join(hard)}): take GDCpp, or moments between 0 and 1 instead"
        )


def _is_hard(constraint: Pointwise | Moment) -> bool:
    """Return whether a text that breaks the constraint has P = 0."""
    if isinstance(constraint, Pointwise):
        return True
    return constraint.feature.binary is True and factor.hard_edge(constraint) is not None


def _with_number_targets(constraints: Any) -> Any:
    """Return the constraints with their targets as numbers."""
    for constraint in constraints if isinstance(constraints, list) else ():
        if isinstance(constraint, dict) and "target" in constraint:
            constraint["target"] = _to_numbers(constraint["target"])
    return constraints


def _to_numbers(value: Any) -> Any:
    """Return the value with texts such as 1e-1, which PyYAML does not read as numbers, as such."""
    if isinstance(value, dict):
        return {key: _to_numbers(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_to_numbers(x) for x in value]
    return yaml_config.to_number(value)


def _plain(value: Any) -> Any:
    """Return a copy of mappings and sequences as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
