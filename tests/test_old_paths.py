"""Module paths of version 0.1 import until 0.4, with a warning that names the new path."""

import subprocess
import sys
from importlib import import_module

import pytest

from dmgen.old_paths import MOVED

# Pure functions and values whose old homes are pinned, as version 0.1 exported them.
PINNED = {
    "dmgen.log_weights": (
        "balance_heuristic", "check_log_weights", "ess", "log_mixture", "log_z", "mean",
        "pareto_k", "stderr_of_mean",
    ),
    "dmgen.divergences": (
        "FDivergence", "f_divergence", "js", "kl", "log_z_bounds", "reverse_kl", "tv",
    ),
    "dmgen.moments": ("MomentFit", "MomentsUnreachable", "fit_lambdas"),
    "dmgen.samplers.objectives": ("advantage",),
    "dmgen.samplers": ("GDCpp", "KLControl", "QuasiRejection", "TrainerConfig"),
    "dmgen.samplers.policy_gradient": ("DPG", "FDPG", "GDC", "GDCpp", "Reinforce", "VarGrad"),
    "dmgen.samplers.kl_control": ("KLControl",),
    "dmgen.score": ("Score",),
    "dmgen.ebm": ("EBM",),
    "dmgen.metrics.evaluate": ("Evaluation", "MomentRow", "evaluate"),
    "dmgen.models.base": ("LanguageModel", "Samples", "draw_tokens", "stream", "uniforms"),
    "dmgen.run_config": ("EvaluateConfig", "FitConfig", "PolicyConfig", "RunConfig"),
    "dmgen.target_file": ("load_published", "publish"),
}  # fmt: skip


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_and_holds_the_names_of_its_new_homes(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old][0]}"):
        module = import_module(old)
    for home in MOVED[old]:
        for name, value in vars(import_module(home)).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == home:
                assert getattr(module, name) is value


@pytest.mark.parametrize("old", PINNED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pinned_names_are_where_they_were(old):
    module = import_module(old)
    assert [name for name in PINNED[old] if not hasattr(module, name)] == []


def test_the_warning_points_at_the_importing_line(tmp_path):
    script = tmp_path / "old.py"
    script.write_text("import dmgen\nfrom dmgen.log_weights import ess\n")
    command = [sys.executable, "-W", "always::DeprecationWarning", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "old.py:2: DeprecationWarning: dmgen.log_weights is now" in done.stderr


def test_a_path_that_never_was_is_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"dmgen\.log_wheights"):
        import_module("dmgen.log_wheights")
