"""The page benchmarks/README.md shows the figures of the tables in benchmarks/results."""

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


def test_two_cells_of_the_grid_come_from_their_table():
    """Compute two cells from the table without the code that made the page."""
    scores = pd.read_csv(BENCHMARKS / "results" / "grid_scores.csv")
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines()]
    for task, method, metric, column in (
        ("08-female", "GDC++", "kl_target_policy", 4),
        ("01-album", "GDC", "kl_policy_base", 5),
    ):
        chosen = scores[
            (scores["task"] == task)
            & (scores["method"] == method)
            & (scores["metric"] == metric)
            & (scores["at"] == "end")
        ]
        value = chosen["value"].sum() / len(chosen)
        stderr = (chosen["stderr"] ** 2).sum() ** 0.5 / len(chosen)
        (row,) = [r for r in rows if r[:3] == [f"| {task}", method, str(len(chosen))]]
        assert row[column] == f"{value:.3f} ± {stderr:.3f}"


def test_a_raw_run_replaces_its_rows_in_the_tables(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import policy_runs
    import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "MADE_BY", tmp_path / "made_by.json")

    def result(seed, value):
        rows = [
            {"metric": "E[ab]", "model": "policy", "value": value, "stderr": 0.1, "n": 9,
             "target": 1.0, "verdict": "met", "signature": ""},
            {"metric": "kl_target_policy", "model": "", "value": 1 / 3, "stderr": None, "n": 9,
             "signature": "exact"},
        ]  # fmt: skip
        metrics = {name: [1.0, None, 2.0] for name in policy_runs.STEPS}
        return {
            "task": "one", "method": "GDC++", "seed": seed,
            "config": {
                "base": "tiny", "constraints": [{"pointwise": {"word": "ab"}}], "n_steps": 3,
                "trainer": {"batch_size": 8, "learning_rate": 0.1, "average_decay": None},
                "evaluate": {"n_samples": 9},
            },
            "metrics": metrics | {"seconds": [1.0, 3.0, 6.0]},
            "curve": [{"step": 2, "samples": 16, "E[ab]": [0.5, 0.1], "tv": [0.3, 0.1]}],
            "final": {"rows": rows},
            "texts": [["", " b"], ["a\n", "b, |"], ["more", "than kept"]],
            "training_seconds": 6.0, "command": "python x.py", "commit": "0",
            "hardware": {"cpu": "a"}, "versions": {"torch": "2"}, "threads": "1",
        }  # fmt: skip

    policy_runs.collect("runs", [result(0, 0.25), result(1, 0.5)], stepwise=["GDC++"])
    policy_runs.collect("runs", [result(1, 0.75)], stepwise=["GDC++"])
    runs = policy_runs.load("runs", stepwise=True)
    assert policy_runs.stored("runs") == {("one", "GDC++", 0), ("one", "GDC++", 1)}
    assert [run["final"][0]["value"] for run in runs] == [0.25, 0.75]
    assert "stderr" not in runs[0]["final"][1]
    assert runs[0]["final"][1]["model"] == ""
    assert np.isclose(runs[0]["final"][1]["value"], 1 / 3, rtol=1e-8)
    assert runs[0]["curve"] == [{"step": 2, "samples": 16, "seconds": 3.0, "E[ab]": [0.5, 0.1]}]
    assert runs[0]["texts"] == [["", " b"], ["a\n", "b, |"]]
    assert runs[0]["seconds_a_step"] == 2.5
    assert "average_decay" not in runs[0]
    assert runs[1]["steps"]["ess"].isna().tolist() == [False, True, False]
    assert tables.read_facts("runs")["signatures"] == {"kl_target_policy": "exact"}


def test_a_thinned_curve_reaches_each_level_at_the_same_point(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from beyond import first_below, thinned

    kl = np.random.default_rng(0).normal(size=200).cumsum() / 8 + 4
    curve = [[float(i), i / 2, float(x)] for i, x in enumerate(kl)]
    short = thinned(curve)
    assert len(short) < 60
    assert short[-1] == curve[-1]
    for level in np.linspace(kl.min() - 0.1, kl.max() + 0.1, 50):
        for column in (0, 1):
            assert first_below(short, level, column) == first_below(curve, level, column)


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
