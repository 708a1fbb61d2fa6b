"""dmgen: make the output distribution of a text generator obey constraints.

The names in `__all__` and those of `dmgen.features` are public; everything else may change.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmgen import old_paths

if TYPE_CHECKING:
    from dmgen import experiment, features
    from dmgen.constraints.constraint import Moment, Pointwise
    from dmgen.constraints.feature import Feature, FeatureError, feature
    from dmgen.estimates.score import Score
    from dmgen.evaluation.diversity import distinct_n, self_bleu
    from dmgen.evaluation.evaluate import evaluate
    from dmgen.evaluation.result import Evaluation
    from dmgen.models.causal_lm import CausalLM
    from dmgen.models.guided import GuidedLM
    from dmgen.models.protocols import LanguageModel
    from dmgen.models.samples import Samples
    from dmgen.models.tabular import TabularLM
    from dmgen.monte_carlo.mcmc import MetropolisHastings
    from dmgen.monte_carlo.quasi_rejection import QuasiRejection
    from dmgen.monte_carlo.rejection import Rejection
    from dmgen.monte_carlo.resampling import ImportanceResampling
    from dmgen.target.ebm import EBM
    from dmgen.target.moments import MomentFit, MomentsUnreachable
    from dmgen.target.prefix_value import PrefixValue
    from dmgen.training.config import TrainerConfig
    from dmgen.training.methods import (
        DPG,
        FDPG,
        GDC,
        GDCpp,
        KLControl,
        Reinforce,
        ReinforceP,
        VarGrad,
    )

__version__ = "0.2.0"

# Imported when first asked for (PEP 562): `import dmgen` itself loads neither torch nor
# transformers.
_HOMES = {
    "dmgen.constraints.constraint": ("Moment", "Pointwise"),
    "dmgen.constraints.feature": ("Feature", "FeatureError", "feature"),
    "dmgen.estimates.score": ("Score",),
    "dmgen.evaluation.diversity": ("distinct_n", "self_bleu"),
    "dmgen.evaluation.evaluate": ("evaluate",),
    "dmgen.evaluation.result": ("Evaluation",),
    "dmgen.models.causal_lm": ("CausalLM",),
    "dmgen.models.guided": ("GuidedLM",),
    "dmgen.models.protocols": ("LanguageModel",),
    "dmgen.models.samples": ("Samples",),
    "dmgen.models.tabular": ("TabularLM",),
    "dmgen.monte_carlo.mcmc": ("MetropolisHastings",),
    "dmgen.monte_carlo.quasi_rejection": ("QuasiRejection",),
    "dmgen.monte_carlo.rejection": ("Rejection",),
    "dmgen.monte_carlo.resampling": ("ImportanceResampling",),
    "dmgen.target.ebm": ("EBM",),
    "dmgen.target.moments": ("MomentFit", "MomentsUnreachable"),
    "dmgen.target.prefix_value": ("PrefixValue",),
    "dmgen.training.config": ("TrainerConfig",),
    "dmgen.training.methods": (
        "DPG", "FDPG", "GDC", "GDCpp", "KLControl", "Reinforce", "ReinforceP", "VarGrad",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DPG",
    "EBM",
    "FDPG",
    "GDC",
    "CausalLM",
    "Evaluation",
    "Feature",
    "FeatureError",
    "GDCpp",
    "GuidedLM",
    "ImportanceResampling",
    "KLControl",
    "LanguageModel",
    "MetropolisHastings",
    "Moment",
    "MomentFit",
    "MomentsUnreachable",
    "Pointwise",
    "PrefixValue",
    "QuasiRejection",
    "Reinforce",
    "ReinforceP",
    "Rejection",
    "Samples",
    "Score",
    "TabularLM",
    "TrainerConfig",
    "VarGrad",
    "__version__",
    "distinct_n",
    "evaluate",
    "experiment",
    "feature",
    "features",
    "self_bleu",
]

sys.meta_path.append(old_paths.Finder())


def __getattr__(name: str) -> Any:
    if name in ("experiment", "features"):
        return import_module(f"dmgen.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dmgen' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
