"""Runs as self-contained HTML pages, their plots, and the model card of a policy."""

from dmgen.report.comparison import write_comparison
from dmgen.report.model_card import write_model_card
from dmgen.report.run_page import write_report

__all__ = ["write_comparison", "write_model_card", "write_report"]
