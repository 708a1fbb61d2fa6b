"""Tables of trained policies: the grid and the runs on SmolLM2 share their form.

`NAME.csv` has a row a run, `NAME_scores.csv` a row a metric (`at` is the step of a small evaluation
on the way, or "end"), `NAME_steps.csv` the metrics of each step of the methods that a figure shows
step by step, and `NAME_texts.csv` the first texts before and after.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import tables

KEY = ("task", "method", "seed")
Result = dict[str, Any]
# Metrics of the small evaluations that a figure shows, beside the moments.
CURVES = ("kl_target_policy", "kl_policy_base", "self_bleu_5", "distinct_1")
STEPS = ("samples", "ess", "advantage_abs_mean", "advantage_var", "grad_variance")
# Texts before and after are kept of this method.
SHOWN, N_TEXTS = "GDC++", 2


def collect(name: str, results: Sequence[Result], *, stepwise: Sequence[str] = ()) -> None:
    """Put runs into the tables of `name`; `stepwise` are the methods kept step by step."""
    if not results:
        return
    facts = {key: results[-1][key] for key in ("hardware", "versions", "threads")}
    facts["signatures"] = _signatures(results)
    tables.merge(name, pd.DataFrame([_run(result) for result in results]), KEY, facts)
    parts = {
        "scores": [row for result in results for row in _scores(result)],
        "texts": [row for result in results for row in _texts(result)],
        "steps": [row for r in results if r["method"] in stepwise for row in _steps(r)],
    }
    for part, rows in parts.items():
        if rows:
            tables.merge(f"{name}_{part}", pd.DataFrame(rows), KEY)


def load(name: str, *, stepwise: bool = False) -> list[Result]:
    """Return the runs of a table as dictionaries.

    Beside the columns of the table, each has `final` (a row a metric and model), `curve` (a point a
    small evaluation: `step`, `samples`, and value and stderr of each metric), `texts` (pairs) and,
    if `stepwise`, `steps` (a data frame, None where the run has none).
    """
    scores = dict(tables.groups(tables.read(f"{name}_scores"), KEY))
    texts = dict(tables.groups(tables.read(f"{name}_texts").fillna(""), KEY))
    steps = dict(tables.groups(tables.read(f"{name}_steps"), KEY)) if stepwise else {}
    results = []
    for row in tables.read(name).to_dict("records"):
        key = tuple(row[column] for column in KEY)
        rows = scores[key]
        final = rows[rows["at"] == "end"].drop(columns=[*KEY, "at", "samples"])
        pairs = texts[key][["base", "policy"]] if key in texts else pd.DataFrame()
        results.append(
            {k: v for k, v in row.items() if not pd.isna(v)}
            | {
                "constraints": json.loads(row["constraints"]),
                "final": [_known(r) for r in final.to_dict("records")],
                "curve": _curve(rows[rows["at"] != "end"]),
                "texts": pairs.to_numpy().tolist(),
                "steps": steps.get(key),
            }
        )
    return results


def stored(name: str) -> set[tuple[Any, ...]]:
    """Return the keys of the runs that are in a table; none where there is no table."""
    if not (tables.RESULTS / f"{name}.csv").exists():
        return set()
    return set(tables.read(name)[list(KEY)].itertuples(index=False, name=None))


def _key(result: Result) -> dict[str, Any]:
    return {column: result[column] for column in KEY}


def _run(result: Result) -> dict[str, Any]:
    config, trainer = result["config"], result["config"]["trainer"]
    seconds = result["metrics"]["seconds"]
    return _key(result) | {
        "base": config["base"],
        "constraints": json.dumps(config["constraints"]),
        "n_steps": config["n_steps"],
        "batch_size": trainer["batch_size"],
        "learning_rate": trainer["learning_rate"],
        "average_decay": trainer["average_decay"],
        "n_evaluated": config["evaluate"]["n_samples"],
        # The median: the first step warms up.
        "seconds_a_step": statistics.median(np.diff(seconds)),
        "training_seconds": result["training_seconds"],
        "core_seconds": result.get("core_seconds"),
        "wall_seconds": result.get("wall_seconds"),
        "peak_bytes": result.get("peak_bytes"),
        "command": result["command"],
        "commit": result["commit"],
    }


def _scores(result: Result) -> list[dict[str, Any]]:
    spent = [0.0, *result["metrics"]["seconds"]]
    rows = []
    for point in result["curve"]:
        for metric, score in point.items():
            if isinstance(score, list) and (metric in CURVES or metric.startswith("E[")):
                rows.append({"at": str(point["step"]), "samples": point["samples"],
                             "seconds": spent[point["step"]], "metric": metric,
                             "value": score[0], "stderr": score[1]})  # fmt: skip
    rows += [{"at": "end"} | row for row in result["final"]["rows"]]
    order = ("at", "samples", "seconds", "metric", "model", "value", "stderr", "n", "target",
             "verdict")  # fmt: skip
    return [_key(result) | {k: row.get(k) for k in order} for row in rows]


def _steps(result: Result) -> list[dict[str, Any]]:
    columns = [result["metrics"][name] for name in STEPS]
    return [_key(result) | dict(zip(STEPS, row, strict=True)) for row in zip(*columns, strict=True)]


def _texts(result: Result) -> list[dict[str, Any]]:
    pairs = result["texts"][:N_TEXTS] if result["method"] == SHOWN else []
    return [_key(result) | {"base": before, "policy": after} for before, after in pairs]


def _signatures(results: Sequence[Result]) -> dict[str, str]:
    rows = [row for result in results for row in result["final"]["rows"]]
    return {row["metric"]: row["signature"] for row in rows if row["signature"]}


def _curve(rows: pd.DataFrame) -> list[dict[str, Any]]:
    points = []
    for at, part in rows.groupby("at", sort=False):
        first = part.iloc[0]
        point = {"step": int(at), "samples": int(first["samples"]), "seconds": first["seconds"]}
        scores = zip(part["metric"], part["value"], part["stderr"], strict=True)
        points.append(point | {metric: [value, stderr] for metric, value, stderr in scores})
    return points


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its empty cells; `model` is "" where a metric is of no one model."""
    return {k: v for k, v in row.items() if not pd.isna(v)} | (
        {"model": ""} if pd.isna(row["model"]) else {}
    )
