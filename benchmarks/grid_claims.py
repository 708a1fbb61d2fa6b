"""The claims of the GDC++ paper, checked on the grid, as tables for benchmarks/README.md.

    python benchmarks/grid_claims.py

A comparison of two methods on a task is *clear* if their means over seeds differ by more than two
joint standard errors of the evaluation. A claim about k of n tasks holds if it is clearly true in
k of them, does not hold if it is clearly false in more than n - k, and is undecided otherwise.
There is no verdict before all tasks have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd
import tables
from grid_report import POINTWISE, batches, finals, load, requested, steps
from run_grid import BATCHES, TASKS, TWO_TASKS, cells

COLUMNS = {
    "kl_target_policy": "KL(p‖π)",
    "kl_policy_base": "KL(π‖a)",
    "self_bleu_5": "Self-BLEU-5",
    "distinct_1": "Distinct-1",
}
Row = tuple[str, str, str]
# The verdict while results are missing.
_OPEN = "open: not all run"


def table() -> str:
    """Return a row a task and method: moments with verdicts, KLs, diversity; means over seeds."""
    frame = finals()
    seeds = pd.Series([(r["task"], r["method"]) for r in load()]).value_counts()
    verdicts = {}
    for result in load():
        said = [row["verdict"] for row in result["final"] if row.get("verdict")]
        verdicts.setdefault((result["task"], result["method"]), []).append(said)
    names = {result["task"]: requested(result) for result in load()}
    lines = [
        "| task | method | seeds | moments (requested) | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (4 + len(COLUMNS)) + "|",
    ]
    for row in frame.to_dict("records"):
        key = (row["task"], row["method"])
        moments = []
        for i, (name, target) in enumerate(names[row["task"]].items()):
            said = "/".join(dict.fromkeys(v[i] for v in verdicts[key]))
            shown = _score(row, name)
            moments.append(f"{name[2:-1]} {shown} ({target:g}; {said})")
        cells = [_score(row, metric) for metric in COLUMNS]
        lines.append(
            f"| {key[0]} | {key[1]} | {seeds[key]} | {'<br>'.join(moments)} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    return "\n".join([_made_by(), "", *lines])


def claims() -> str:
    """Return each claim of the paper with the measurement here and a verdict."""
    lines = ["| claim | measured here | verdict |", "|---|---|---|"]
    return "\n".join(lines + [f"| {a} | {b} | {c} |" for a, b, c in _claims()])


def texts(n: int = 2) -> str:
    """Return texts of the base and GDC++ (first seed), drawn with the same random numbers."""
    lines = ["| task | base | GDC++ |", "|---|---|---|"]
    for result in load():
        if result["method"] == "GDC++" and result["seed"] == 0:
            for before, after in result["texts"][:n]:
                lines.append(f"| {result['task']} | {_cell(before)} | {_cell(after)} |")
    return "\n".join(lines)


def _claims() -> Iterator[Row]:
    frame = finals().set_index(["task", "method"])
    for metric, name, wanted in (
        ("off", "GDC++ satisfies the constraints better than GDC in 7 of 10 tasks", 0.7),
        ("kl_target_policy", "GDC++ has the smaller KL(p‖π) in 10 of 10 tasks", 1.0),
        ("kl_policy_base", "GDC++ has the smaller KL(π‖a) in 10 of 10 tasks", 1.0),
    ):
        yield name, *_count(frame, metric, "GDC++", "GDC", wanted)
    yield from _batch_claims()
    yield from _noise_claims()
    hard = frame[frame.index.get_level_values("task").isin(POINTWISE)]
    reached = hard.xs("REINFORCE", level="method")["off"] if _has(hard, "REINFORCE") else []
    if len(reached):
        n_reached = int((reached < 0.05).sum())
        yield (
            "REINFORCE reaches E φ near 1",
            f"within 0.05 in {n_reached} of {len(reached)} pointwise tasks",
            "holds" if n_reached == len(reached) else "does not",
        )
    for metric, word, sign in (
        ("kl_policy_base", "the largest KL(π‖a)", 1),
        ("self_bleu_5", "the highest Self-BLEU-5", 1),
        ("distinct_1", "the lowest Distinct-1", -1),
    ):
        others = ["GDC++", "GDC", "KL-control"]
        yield f"REINFORCE has {word}", *_extreme(frame, metric, "REINFORCE", others, sign)
    yield "KL-control lies between REINFORCE and GDC++ in KL(π‖a)", *_between(frame)
    for metric, word in (
        ("off", "satisfies the constraints better than"),
        ("kl_target_policy", "has a smaller KL(p‖π) than"),
        ("kl_policy_base", "has a smaller KL(π‖a) than"),
    ):
        yield (
            f"(dmgen's own) GDC++ improved {word} GDC++",
            *_count(frame, metric, "GDC++ improved", "GDC++", 0.7),
        )


def _has(frame: pd.DataFrame, method: str) -> bool:
    return method in frame.index.get_level_values("method")


def _count(
    frame: pd.DataFrame, metric: str, one: str, other: str, wanted: float
) -> tuple[str, str]:
    """Count the tasks where `one` is below `other`; judge "in a fraction `wanted` of them"."""
    lower = clear_lower = clear_higher = n = 0
    for task in frame.index.get_level_values("task").unique():
        if (task, one) not in frame.index or (task, other) not in frame.index:
            continue
        a, b = frame.loc[(task, one)], frame.loc[(task, other)]
        difference = a[metric] - b[metric]
        stderr = math.hypot(a[f"{metric}_stderr"], b[f"{metric}_stderr"])
        if math.isnan(difference):
            continue
        n += 1
        lower += difference < 0
        clear_lower += difference < -2 * stderr
        clear_higher += difference > 2 * stderr
    if n < len(TASKS):
        return f"{lower} of {n}", _OPEN
    said = f"{lower} of {n} ({clear_lower} clearly; clearly the other way {clear_higher})"
    if clear_lower >= wanted * n:
        return said, "holds"
    if n - clear_higher < wanted * n:
        return said, "does not"
    return said, "undecided"


def _batch_claims() -> Iterator[Row]:
    for task in TWO_TASKS:
        ours, theirs = batches(task, "GDC++"), batches(task, "GDC")
        gaps = {
            size: (theirs[size][0] - ours[size][0], math.hypot(theirs[size][1], ours[size][1]))
            for size in ours
            if size in theirs
        }
        if not gaps:
            continue
        said = ", ".join(f"{size}: {gap:+.3f} ± {err:.3f}" for size, (gap, err) in gaps.items())
        clear = [gap > 2 * err for gap, err in gaps.values()]
        wrong = [gap < -2 * err for gap, err in gaps.values()]
        verdict = "holds" if all(clear) else "does not" if any(wrong) else "undecided"
        if len(gaps) <= len(BATCHES):
            verdict = _OPEN
        yield f"GDC++ is ahead of GDC at every batch size, {task} (KL(p‖π) less)", said, verdict


def _noise_claims() -> Iterator[Row]:
    frame = steps()
    for metric, word in (("grad_variance", "gradient"), ("advantage_var", "advantage")):
        # From the second half on: at first both have the same policy and proposal.
        late = frame[frame["samples"] > frame["samples"].max() / 2]
        mean = late.groupby(["task", "method"])[metric].mean().unstack()
        if "GDC" not in mean or "GDC++" not in mean:
            continue
        mean = mean.dropna()
        n, lower = len(mean), int((mean["GDC++"] < mean["GDC"]).sum())
        ratio = (mean["GDC++"] / mean["GDC"]).median()
        said = f"lower in {lower} of {n} tasks, in the median task {ratio:.2f} times that of GDC"
        verdict = "holds" if lower == n else "undecided" if lower > n / 2 else "does not"
        name = f"GDC++ lowers the variance of the {word}"
        yield name, said, verdict if n == len(TASKS) else _OPEN


def _extreme(
    frame: pd.DataFrame, metric: str, one: str, others: list[str], sign: int
) -> tuple[str, str]:
    tasks = [
        task
        for task in frame.index.get_level_values("task").unique()
        if all((task, method) in frame.index for method in [one, *others])
    ]
    so = [
        all(sign * (frame.loc[(t, one)][metric] - frame.loc[(t, m)][metric]) > 0 for m in others)
        for t in tasks
    ]
    return _share(sum(so), len(tasks))


def _between(frame: pd.DataFrame) -> tuple[str, str]:
    n = so = 0
    for task in frame.index.get_level_values("task").unique():
        if all((task, m) in frame.index for m in ("GDC++", "KL-control", "REINFORCE")):
            low, mid, high = (
                frame.loc[(task, m)]["kl_policy_base"] for m in ("GDC++", "KL-control", "REINFORCE")
            )
            n, so = n + 1, so + (low < mid < high)
    return _share(so, n)


def _share(so: int, n: int) -> tuple[str, str]:
    if n < len(TASKS):
        return f"in {so} of {n} tasks", _OPEN
    verdict = "holds" if so == n else "does not" if so <= n / 2 else "in most tasks"
    return f"in {so} of {n} tasks", verdict


def _score(row: dict[str, float], metric: str) -> str:
    value = row.get(metric, math.nan)
    digits = 4 if metric == "distinct_1" else 3
    return (
        "-" if math.isnan(value) else f"{value:.{digits}f} ± {row[f'{metric}_stderr']:.{digits}f}"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _made_by() -> str:
    results = load()
    one = results[0]
    seconds = [r["core_seconds"] for r in results]
    commits = ", ".join(sorted({r["commit"] for r in results}))
    facts = tables.read_facts("grid")
    return (
        f"`python benchmarks/run_grid.py`, base {one['base']}, {len(results)} of {len(cells())} "
        f"runs, of {one['n_steps']} steps of {one['batch_size']} texts (the other batches: as many "
        f"texts), learning rate {one['learning_rate']:g}, evaluated on "
        f"{one['n_evaluated']:,} texts; a core of {facts['hardware']['cpu']}, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s a run; torch {facts['versions']['torch']}; "
        f"commits {commits}. ± is one standard error of the evaluation."
    )


if __name__ == "__main__":
    print(table(), claims(), texts(), sep="\n\n")
