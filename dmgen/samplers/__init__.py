"""Samplers: what turns a target into something to draw from."""

from dmgen.samplers.config import TrainerConfig
from dmgen.samplers.policy_gradient import DPG, FDPG, GDC, GDCpp, Reinforce, ReinforceP, VarGrad

__all__ = ["DPG", "FDPG", "GDC", "GDCpp", "Reinforce", "ReinforceP", "TrainerConfig", "VarGrad"]
