"""Names of `dmgen.models` are imported when they are used, and transformers only when needed."""

import subprocess
import sys

import pytest

from dmgen import models


@pytest.mark.parametrize(
    ("statement", "imported"),
    [
        ("dmgen.TabularLM", False),
        ("dmgen.EBM", False),
        ("dmgen.features.gender", False),
        ("from dmgen.models import LanguageModel, Sampler, Samples, TabularLM", False),
        ("dmgen.CausalLM", True),
    ],
)
def test_what_imports_transformers(statement, imported):
    code = f"import sys, dmgen\n{statement}\nprint('transformers' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == str(imported)


def test_all_names_are_there_and_others_are_not():
    assert all(hasattr(models, name) for name in models.__all__)
    with pytest.raises(AttributeError, match=r"'dmgen\.models' has no attribute 'Tabular'"):
        models.Tabular  # noqa: B018
