"""Training: fit a policy to a target."""

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
from dmgen.training.objective import Objective
from dmgen.training.trainer import Trainer

__all__ = [
    "DPG",
    "FDPG",
    "GDC",
    "GDCpp",
    "KLControl",
    "Objective",
    "Reinforce",
    "ReinforceP",
    "Trainer",
    "TrainerConfig",
    "VarGrad",
]
