"""dmgen: make the output distribution of a text generator obey constraints."""

from dmgen import features
from dmgen.constraints import Feature, FeatureError, Moment, Pointwise, feature
from dmgen.ebm import EBM
from dmgen.metrics.diversity import distinct_n, self_bleu
from dmgen.metrics.evaluate import Evaluation, evaluate
from dmgen.models.base import LanguageModel, Samples
from dmgen.models.causal import CausalLM
from dmgen.models.tabular import TabularLM
from dmgen.moments import MomentFit, MomentsUnreachable
from dmgen.samplers.config import TrainerConfig
from dmgen.samplers.kl_control import KLControl
from dmgen.samplers.monte_carlo import (
    ImportanceResampling,
    MetropolisHastings,
    QuasiRejection,
    Rejection,
)
from dmgen.samplers.policy_gradient import DPG, FDPG, GDC, GDCpp, Reinforce, ReinforceP, VarGrad
from dmgen.score import Score

__version__ = "0.1.0"

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
    "ImportanceResampling",
    "KLControl",
    "LanguageModel",
    "MetropolisHastings",
    "Moment",
    "MomentFit",
    "MomentsUnreachable",
    "Pointwise",
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
    "feature",
    "features",
    "self_bleu",
]
