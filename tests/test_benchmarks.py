"""The tables of benchmarks/README.md are what its result files say."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_page_is_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import write_readme

    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert write_readme.rebuilt(page) == page
    # A figure that was changed by hand is put right again.
    forged = page.replace("| dmgen |", "| another |", 1)
    assert forged != page
    assert write_readme.rebuilt(forged) == page
    sys.modules.pop("write_readme")


def test_two_cells_of_the_grid_come_from_their_files(monkeypatch):
    """By hand from the files, with none of the code that made the page."""
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines()]
    for task, method, metric, column in (
        ("08-female", "GDC++", "kl_target_policy", 4),
        ("01-album", "GDC", "kl_policy_base", 5),
    ):
        values = []
        for path in (BENCHMARKS / "results" / "grid").glob("tiny-bios-*.json"):
            result = json.loads(path.read_text(encoding="utf-8"))
            if (result["task"], result["method"]) == (task, method):
                values += [r for r in result["final"]["rows"] if r["metric"] == metric]
        value = sum(r["value"] for r in values) / len(values)
        stderr = sum(r["stderr"] ** 2 for r in values) ** 0.5 / len(values)
        (row,) = [r for r in rows if r[:3] == [f"| {task}", method, str(len(values))]]
        assert row[column] == f"{value:.3f} ± {stderr:.3f}"


def test_a_claim_needs_clear_differences(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from grid_claims import _count

    def frame(differences):
        rows = [
            {"task": str(i), "method": method, "kl": 1.0 + d * sign, "kl_stderr": 0.1}
            for i, d in enumerate(differences)
            for method, sign in (("one", 0.5), ("other", -0.5))
        ]
        return pd.DataFrame(rows).set_index(["task", "method"])

    # Two joint standard errors are 0.28.
    for differences, wanted, said in (
        ([-1.0] * 10, 1.0, "holds"),
        ([-1.0] * 7 + [1.0] * 3, 0.7, "holds"),
        ([-1.0] * 7 + [1.0] * 3, 1.0, "does not"),
        ([-1.0] * 7 + [0.1] * 3, 1.0, "undecided"),
        ([-0.2] * 10, 1.0, "undecided"),
    ):
        assert _count(frame(differences), "kl", "one", "other", wanted)[1] == said


def test_exponents_of_power_laws(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from scaling import exponents

    rows = [
        {"axis": axis, "x": x, "phase": "step", "seconds": [0.1, 3 * x**power, 99.0]}
        for axis, power in (("texts", 1.0), ("processes", -0.5))
        for x in (1, 2, 5)
    ]
    found = exponents(rows)
    for axis, power in (("texts", 1.0), ("processes", -0.5)):
        assert np.allclose(found[axis, "step"], (power, power))
    # A step that gets dearer at the end: the last slope says so, the fit lies between.
    bent = [{"axis": "length", "x": x, "phase": "score", "seconds": [s]}
            for x, s in ((1, 1.0), (10, 10.0), (100, 1000.0))]  # fmt: skip
    whole, last = exponents(bent)["length", "score"]
    assert np.isclose(last, 2)
    assert np.isclose(whole, 1.5)
