"""Language models that can be sampled from and scored exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmgen.models.causal_lm import CausalLM
    from dmgen.models.protocols import LanguageModel, Sampler
    from dmgen.models.samples import Samples
    from dmgen.models.tabular import TabularLM

_HOMES = {
    "CausalLM": "causal_lm",
    "LanguageModel": "protocols",
    "Sampler": "protocols",
    "Samples": "samples",
    "TabularLM": "tabular",
}
__all__ = ["CausalLM", "LanguageModel", "Sampler", "Samples", "TabularLM"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used (PEP 562), so that a table needs no transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
