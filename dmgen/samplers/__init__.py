"""Samplers: what turns a target into something to draw from."""

from dmgen.samplers.config import TrainerConfig
from dmgen.samplers.kl_control import KLControl
from dmgen.samplers.monte_carlo import (
    ImportanceResampling,
    MetropolisHastings,
    QuasiRejection,
    Rejection,
)
from dmgen.samplers.policy_gradient import DPG, FDPG, GDC, GDCpp, Reinforce, ReinforceP, VarGrad

__all__ = [
    "DPG",
    "FDPG",
    "GDC",
    "GDCpp",
    "ImportanceResampling",
    "KLControl",
    "MetropolisHastings",
    "QuasiRejection",
    "Reinforce",
    "ReinforceP",
    "Rejection",
    "TrainerConfig",
    "VarGrad",
]
