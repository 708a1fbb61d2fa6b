"""`dmgen.json` beside a published policy: its configuration and its target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dmgen import features, models, storage
from dmgen.experiment.build import bind_target, build_constraints
from dmgen.experiment.config import RunConfig, absolute_path, classifier_options
from dmgen.experiment.folder import with_base_of
from dmgen.experiment.versions import versions
from dmgen.models.protocols import LanguageModel
from dmgen.target.ebm import EBM
from dmgen.target.fit import TargetFit


def publish(folder: Path, config: RunConfig, target: TargetFit) -> None:
    """Write `dmgen.json`, from which `load_published` makes the target, on other machines too.

    The heads of classifiers are copied beside it, as `head-0` and so on; a device is left out.

    Args:
        folder: folder of the policy.
        config: configuration of its run.
        target: target of its run.
    """
    mapping = config.to_mapping() | {"device": None}
    for i, options in enumerate(classifier_options(mapping)):
        head = features.ClassifierHead.from_pretrained(options["head"])
        if absolute_path(head.base) == absolute_path(config.base):
            head = replace(head, base=config.base)
        options["head"] = f"head-{i}"
        head.save_pretrained(folder / options["head"])
    published = {"dmgen": versions()["dmgen"], "config": mapping, "target": target.to_dict()}
    storage.write_json(folder / "dmgen.json", published)


def load_published(folder: str | Path, base: LanguageModel | None = None) -> EBM:
    """Return the target of a published policy, from the `dmgen.json` beside its weights.

    Args:
        folder: the `policy/` of a run, or a copy of it.
        base: the model that the policy was trained from; None loads the one that the file names.

    Raises:
        ValueError: there is no `dmgen.json`, it contradicts itself, or the base cannot be loaded.
    """
    folder = Path(folder)
    path = folder / "dmgen.json"
    if not path.is_file():
        raise ValueError(f"there is no dmgen.json in {folder}: give the policy/ of a finished run")
    published = storage.read_json(path)
    for options in classifier_options(published["config"]):
        beside = folder / options["head"]
        options["head"] = str(beside) if beside.is_dir() else options["head"]
    config = RunConfig.from_mapping(published["config"] | {"device": None})
    config = with_base_of(config, published.get("dmgen", "0.1"))  # 0.1 did not write its version
    if base is None:
        base = models.CausalLM.from_pretrained(
            config.base, dtype=config.dtype, max_new_tokens=config.max_new_tokens
        )
    try:
        fit = TargetFit.from_dict(published["target"], build_constraints(config, base))
        return bind_target(fit, config, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
