"""Module paths of version 0.1: they import until 0.4, with a `DeprecationWarning`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# A path of 0.1 and the modules that hold its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "dmgen.cli_run": ("dmgen.cli.console",),
    "dmgen.config_file": ("dmgen.experiment.yaml_config",),
    "dmgen.divergences": ("dmgen.estimates.divergences", "dmgen.estimates.f_divergence"),
    "dmgen.dual": ("dmgen.target.dual", "dmgen.target.newton", "dmgen.target.reachability"),
    "dmgen.ebm": ("dmgen.target.ebm",),
    "dmgen.exact": ("dmgen.target.exact",),
    "dmgen.factor": ("dmgen.target.factor", "dmgen.target.fit"),
    "dmgen.features.classifiers": (
        "dmgen.features.classifier",
        "dmgen.features.classifier_head",
        "dmgen.features.classifier_fit",
    ),
    "dmgen.features.interop": (
        "dmgen.features.rewards",
        "dmgen.features.pipeline",
        "dmgen.features.estimator",
    ),
    "dmgen.features.lengths": ("dmgen.features.length",),
    "dmgen.features.pronouns": ("dmgen.features.gender",),
    "dmgen.features.reading_ease": ("dmgen.features.readability",),
    "dmgen.features.tone": ("dmgen.features.sentiment",),
    "dmgen.features.words": ("dmgen.features.wordlist",),
    "dmgen.log_weights": ("dmgen.estimates.weights",),
    "dmgen.metrics": ("dmgen.evaluation",),
    "dmgen.metrics.diversity": ("dmgen.evaluation.diversity",),
    "dmgen.metrics.evaluate": ("dmgen.evaluation.evaluate", "dmgen.evaluation.result"),
    "dmgen.metrics.pool": ("dmgen.evaluation.pooled_samples",),
    "dmgen.metrics.verdicts": ("dmgen.evaluation.verdicts",),
    "dmgen.models.attention": ("dmgen.models.hf.fast_attention",),
    "dmgen.models.base": (
        "dmgen.models.samples",
        "dmgen.models.protocols",
        "dmgen.models.random_draws",
    ),
    "dmgen.models.causal": ("dmgen.models.causal_lm",),
    "dmgen.models.head": ("dmgen.models.hf.chunked_log_softmax",),
    "dmgen.models.hugging_face": (
        "dmgen.models.hf.loading",
        "dmgen.models.hf.kv_cache",
        "dmgen.models.hf.tokenization",
    ),
    "dmgen.models.layers": ("dmgen.models.hf.fast_layers",),
    "dmgen.models.lora": ("dmgen.models.hf.lora",),
    "dmgen.models.passes": (
        "dmgen.models.hf.batching",
        "dmgen.models.hf.decoding",
        "dmgen.models.hf.probes",
        "dmgen.models.hf.scoring",
    ),
    "dmgen.models.precision": ("dmgen.models.hf.precision",),
    "dmgen.moments": ("dmgen.target.moments", "dmgen.target.moment_fit"),
    "dmgen.run_config": ("dmgen.experiment.config",),
    "dmgen.runs": ("dmgen.storage", "dmgen.training.run_folder", "dmgen.experiment.versions"),
    "dmgen.samplers": ("dmgen.training", "dmgen.monte_carlo"),
    "dmgen.samplers.acceptance": ("dmgen.monte_carlo.acceptance",),
    "dmgen.samplers.config": ("dmgen.training.config",),
    "dmgen.samplers.kl_control": ("dmgen.training.methods", "dmgen.training.ppo"),
    "dmgen.samplers.monte_carlo": ("dmgen.monte_carlo",),
    "dmgen.samplers.objectives": ("dmgen.training.objectives",),
    "dmgen.samplers.policy_gradient": ("dmgen.training.methods",),
    "dmgen.samplers.ppo": ("dmgen.training.ppo",),
    "dmgen.samplers.trainer": ("dmgen.training.trainer",),
    "dmgen.score": ("dmgen.estimates.score",),
    "dmgen.target_file": ("dmgen.experiment.publish",),
}


class Finder:
    """Find the modules in `MOVED`; asked after all other finders, so a real file goes first."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Return a spec for a path of 0.1, None for any other."""
        if name not in MOVED:
            return None
        return ModuleSpec(name, _Loader(), is_package=name in ("dmgen.metrics", "dmgen.samplers"))


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        """Return None: Python makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with the public names of its new homes."""
        homes = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {' and '.join(homes)}; the old path goes with dmgen 0.4",
            DeprecationWarning,
            stacklevel=2,  # frames of importlib do not count
        )
        for home in homes:
            names = vars(import_module(home))
            vars(module).update({k: v for k, v in names.items() if not k.startswith("_")})
