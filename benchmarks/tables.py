"""Read and write the tables in `results/`: a few CSV files a benchmark, and their facts.

`results/made_by.json` holds, for each table, the command, commit, hardware, versions and settings.
A run of a benchmark that takes hours is first a JSON file in `raw/`, which git ignores;
`write_readme.py` puts those files into the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dmgen import storage

RESULTS = Path(__file__).parent / "results"
RAW = Path(__file__).parent / "raw"
MADE_BY = RESULTS / "made_by.json"


def read(name: str) -> pd.DataFrame:
    """Return a table; a cell that is empty in the file is NaN."""
    return pd.read_csv(RESULTS / f"{name}.csv", keep_default_na=False, na_values=[""])


def read_facts(name: str) -> dict[str, Any]:
    """Return the facts of a table: command, commit, hardware, versions, settings."""
    facts: dict[str, Any] = json.loads(MADE_BY.read_text(encoding="utf-8"))[name]
    return facts


def write(
    name: str, rows: pd.DataFrame, facts: Mapping[str, Any] | None = None, digits: int = 9
) -> None:
    """Replace a table, and its facts if new ones are given."""
    text = rows.convert_dtypes().to_csv(index=False, float_format=f"%.{digits}g")
    storage.write_text(RESULTS / f"{name}.csv", text)
    if facts is not None:
        every = json.loads(MADE_BY.read_text(encoding="utf-8")) if MADE_BY.exists() else {}
        storage.write_json(MADE_BY, dict(sorted((every | {name: dict(facts)}).items())))


def merge(
    name: str, rows: pd.DataFrame, key: Sequence[str], facts: Mapping[str, Any] | None = None
) -> None:
    """Write rows into a table, where they replace all rows of the runs that `key` names."""
    if (RESULTS / f"{name}.csv").exists():
        stored = read(name)
        replaced = pd.MultiIndex.from_frame(rows[list(key)])
        kept = stored[~pd.MultiIndex.from_frame(stored[list(key)]).isin(replaced)]
        rows = pd.concat([kept, rows]) if len(kept) else rows
    write(name, rows.sort_values(list(key), kind="stable"), facts)


def groups(rows: pd.DataFrame, key: Sequence[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield the rows of each run, in the order of the table."""
    yield from rows.groupby(list(key), sort=False)


def raw_results(folder: str, pattern: str = "*.json") -> list[dict[str, Any]]:
    """Return the runs in a folder of `raw/`; none where there is no such folder."""
    paths = sorted((RAW / folder).glob(pattern))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
