"""Samplers: what turns a target into something to draw from."""

from dmgen.samplers.config import TrainerConfig
from dmgen.samplers.policy_gradient import DPG, GDC, GDCpp

__all__ = ["DPG", "GDC", "GDCpp", "TrainerConfig"]
