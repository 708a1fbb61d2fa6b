"""Language models that can be sampled from and scored exactly."""

from dmgen.models.causal_lm import CausalLM
from dmgen.models.protocols import LanguageModel
from dmgen.models.samples import Samples
from dmgen.models.tabular import TabularLM

__all__ = ["CausalLM", "LanguageModel", "Samples", "TabularLM"]
