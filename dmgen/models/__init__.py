"""Language models that can be sampled from and scored exactly."""

from dmgen.models.base import LanguageModel, Samples
from dmgen.models.causal import CausalLM
from dmgen.models.tabular import TabularLM

__all__ = ["CausalLM", "LanguageModel", "Samples", "TabularLM"]
