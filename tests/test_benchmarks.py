"""The tables of benchmarks/README.md are what its result files say."""

import sys
from pathlib import Path

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
