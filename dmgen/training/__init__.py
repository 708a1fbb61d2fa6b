"""Training: fit a policy to a target."""

from dmgen.training.config import TrainerConfig
from dmgen.training.kl_control import KLControl
from dmgen.training.methods import DPG, FDPG, GDC, GDCpp, Reinforce, ReinforceP, VarGrad

__all__ = [
    "DPG",
    "FDPG",
    "GDC",
    "GDCpp",
    "KLControl",
    "Reinforce",
    "ReinforceP",
    "TrainerConfig",
    "VarGrad",
]
