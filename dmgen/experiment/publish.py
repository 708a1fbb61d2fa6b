"""A target on disk: `target.json` of a run, and `dmgen.json` of a published policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmgen import features, storage
from dmgen.experiment.config import RunConfig, classifiers, whole_path
from dmgen.models.causal_lm import CausalLM
from dmgen.models.protocols import LanguageModel
from dmgen.target.ebm import EBM
from dmgen.target.fit import TargetFit


def save_target(folder: Path, target: EBM) -> None:
    """Writes `target.json`: the constraints with their λ, and how λ was found."""
    target.save(folder)


def load_target(folder: Path, config: RunConfig, base: LanguageModel) -> EBM:
    """The target of a run with the λ that it began with: another fit would be another target.

    Raises:
        ValueError: `target.json` is missing, or not that of `config`.
    """
    path = folder / "target.json"
    if not path.is_file():
        raise ValueError(f"there is no target in {folder}: {path} is missing")
    return _target(storage.read_json(path), config, base, str(path))


def publish(folder: Path, config: RunConfig, target: Mapping[str, Any]) -> None:
    """Writes `dmgen.json`, from which `load_published` makes the target again, elsewhere too.

    The heads of classifiers are put beside it, as `head-0` and so on; a device is no part of it.

    Args:
        folder: the policy's.
        config: of its run.
        target: what `save_target` wrote.
    """
    mapping = config.to_mapping() | {"device": None}
    for i, classifier in enumerate(classifiers(mapping)):
        head = features.ClassifierHead.from_pretrained(classifier["head"])
        if whole_path(head.base) == whole_path(config.base):
            head = replace(head, base=config.base)
        classifier["head"] = f"head-{i}"
        head.save_pretrained(folder / classifier["head"])
    storage.write_json(folder / "dmgen.json", {"config": mapping, "target": dict(target)})


def load_published(folder: str | Path, base: LanguageModel | None = None) -> EBM:
    """The target of a published policy, from the `dmgen.json` beside its weights.

    Args:
        folder: a `policy/` that a run has left, or a copy of it.
        base: the model that it was trained from; None loads the one that the file names.

    Raises:
        ValueError: there is no `dmgen.json`, or it contradicts itself; the base cannot be loaded.
    """
    path = Path(folder) / "dmgen.json"
    if not path.is_file():
        raise ValueError(f"there is no dmgen.json in {folder}: give the policy/ of a finished run")
    facts = storage.read_json(path)
    for classifier in classifiers(facts["config"]):
        beside = Path(folder) / classifier["head"]
        classifier["head"] = str(beside) if beside.is_dir() else classifier["head"]
    config = RunConfig.from_mapping(facts["config"] | {"device": None})
    if base is None:
        base = CausalLM.from_pretrained(
            config.base, dtype=config.dtype, max_new_tokens=config.max_new_tokens
        )
    return _target(facts["target"], config, base, str(path))


def _target(facts: Mapping[str, Any], config: RunConfig, base: LanguageModel, path: str) -> EBM:
    """The target that `facts` describe, as `save_target` wrote them."""
    try:
        fit = TargetFit.from_dict(facts, config.build_constraints(base))
    except ValueError as error:
        raise ValueError(f"{path} is not the target of its configuration: {error}") from error
    if (fit.prompt, fit.max_new_tokens) != (config.prompt, config.max_new_tokens):
        raise ValueError(f"{path} holds another target than its configuration asks for")
    return EBM.from_fit(base, fit)
