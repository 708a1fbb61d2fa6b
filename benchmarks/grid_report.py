"""Figures of the grid, from its tables.

    python benchmarks/grid_report.py            # the figures; write_readme.py writes the tables

The error of a mean over seeds is that of the evaluations alone; the bands in the figures show the
spread of seeds.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import policy_runs
import tables
from run_grid import EVERYWHERE, METHODS, TASKS, TWO_TASKS, table_of

from dmgen.report import figures

POINTWISE = [path.stem for path in TASKS[:6]]
# The panels of a figure: column and title.
PANELS = (
    ("kl_target_policy", "KL(p‖π), nats"),
    ("off", "mean |E φ − requested|"),
    ("kl_policy_base", "KL(π‖a), nats"),
    ("self_bleu_5", "Self-BLEU-5"),
    ("distinct_1", "Distinct-1"),
)
NOISE = (
    ("reward_var", "variance of the reward P/(Zq)"),
    ("advantage_abs_mean", "mean |advantage|"),
    ("advantage_var", "variance of the advantage"),
    ("grad_variance", "variance of the gradient"),
)


@cache
def load(base: str = "tiny-bios-0.1") -> list[dict[str, Any]]:
    """Return all runs of a base, in the order of the tables."""
    order = list(METHODS)
    results = policy_runs.load(table_of(base), stepwise=True)
    return sorted(results, key=lambda r: (r["task"], order.index(r["method"]), r["seed"]))


def requested(result: dict[str, Any]) -> dict[str, float]:
    """Return the requested mean of each constraint of a task; 1 for a pointwise one."""
    return {row["metric"]: float(row["target"]) for row in result["final"] if "target" in row}


def off(point: dict[str, Any], targets: dict[str, float]) -> tuple[float, float]:
    """Return the mean distance of the moments from the requested ones, and its error."""
    errors = [point[name][1] for name in targets]
    distance = np.mean([abs(point[name][0] - target) for name, target in targets.items()])
    return float(distance), math.hypot(*errors) / len(errors)


def final(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the final value and error of the policy by metric."""
    rows = {
        row["metric"]: (row["value"], row.get("stderr", math.nan))
        for row in result["final"]
        if row["model"] in ("policy", "") and "value" in row
    }
    return rows | {"off": off(rows, requested(result))}


def finals(base: str = "tiny-bios-0.1") -> pd.DataFrame:
    """Return means over seeds: a row a task and method, columns `metric`, `metric_stderr`."""
    rows = []
    for result in load(base):
        row: dict[str, Any] = {"task": result["task"], "method": result["method"]}
        for metric, (value, stderr) in final(result).items():
            row |= {metric: value, f"{metric}_stderr": stderr}
        rows.append(row)
    groups = pd.DataFrame(rows).groupby(["task", "method"], sort=False)
    mean = groups.mean()
    for column in mean:
        if column.endswith("_stderr"):
            mean[column] = groups[column].agg(lambda x: np.sqrt((x**2).sum()) / len(x))
    return mean.reset_index()


def curves(base: str = "tiny-bios-0.1") -> pd.DataFrame:
    """Return a row a small evaluation during training; `seed` is the task with its seed."""
    rows = []
    for result in load(base):
        for point in result["curve"]:
            row = {key: value[0] for key, value in point.items() if isinstance(value, list)}
            own = {
                "task": result["task"], "method": result["method"],
                "seed": f"{result['task']} {result['seed']}", "samples": point["samples"],
            }  # fmt: skip
            rows.append(row | own | {"off": off(point, requested(result))[0]})
    return pd.DataFrame(rows)


def steps(base: str = "tiny-bios-0.1") -> pd.DataFrame:
    """Return the metrics of every step of GDC++ and GDC."""
    frames = []
    for result in load(base):
        if result["method"] in ("GDC++", "GDC"):
            own = {key: result[key] for key in ("task", "method")} | {"seed": str(result["seed"])}
            frames.append(result["steps"].drop(columns=["seed"]).assign(**own))
            # The weights' mean is 1, so that ESS = N / (1 + variance).
            ess = frames[-1]["ess"]
            frames[-1]["reward_var"] = result["batch_size"] / ess.where(ess > 0) - 1
    return pd.concat(frames)


def draw_training() -> Any:
    """Draw the paper's Figure 3: pointwise tasks above, others below; mean and range of tasks."""
    frame = curves()
    frame = frame[frame["method"].isin(EVERYWHERE)]
    groups = {
        "pointwise": frame[frame["task"].isin(POINTWISE)],
        "distributional and hybrid": frame[~frame["task"].isin(POINTWISE)],
    }
    figure, axes = _figure(2, len(PANELS))
    colours = figures.palette(EVERYWHERE)
    for row, (name, part) in zip(axes, groups.items(), strict=True):
        for ax, (value, title) in zip(row, PANELS, strict=True):
            figures.draw_curves(ax, part, value, colours=colours)
            ax.set_title(f"{title}\n{name}", fontsize=10, loc="left")
            if value.startswith("kl_"):
                # Reward maximisation is tens of nats away, the others are about one.
                ax.set_yscale("symlog", linthresh=1)
                ax.set_ylim(bottom=0)
                ax.yaxis.set_major_formatter("{x:g}")
    _legend(figure, axes)
    return figure


def draw_noise() -> Any:
    """Draw the paper's Figures 2 and 5: size and variance of the advantages and the gradient."""
    frame = steps()
    figure, axes = _figure(2, len(NOISE))
    for row, task in zip(axes, ("01-album", "07-topics"), strict=True):
        for ax, (value, title) in zip(row, NOISE, strict=True):
            own = frame[(frame["task"] == task) & frame[value].notna()]
            window = 10 if len(own) > 50 else 1
            figures.draw_curves(ax, own, value, window=window, colours=figures.palette(EVERYWHERE))
            ax.set_title(f"{title}\n{task}", fontsize=10, loc="left")
            ax.set_yscale("log")
    _legend(figure, axes)
    return figure


def draw_batches() -> Any:
    """Draw the paper's Figure 4: final KL(p‖π) by batch size, with 95 % intervals."""
    figure, axes = _figure(1, len(TWO_TASKS))
    for ax, task in zip(axes[0], TWO_TASKS, strict=True):
        for method, (colour, _) in figures.palette(["GDC++", "GDC"]).items():
            points = batches(task, method)
            sizes = list(points)
            values, errors = zip(*points.values(), strict=True) if points else ((), ())
            ax.errorbar(
                sizes, values, yerr=1.96 * np.array(errors), color=colour, marker="o",
                capsize=3, label=method,
            )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.set_title(f"KL(p‖π) at the end, nats\n{task}", fontsize=10, loc="left")
        ax.set_xlabel("texts a step")
    _legend(figure, axes)
    return figure


def batches(task: str, method: str) -> dict[int, tuple[float, float]]:
    """Return the final KL(p‖π) with its error, by batch size."""
    frame = finals().set_index(["task", "method"])
    points = {}
    for name in METHODS:
        if name.split(" batch")[0] == method and (task, name) in frame.index:
            size = int(name.split()[-1]) if "batch" in name else 256
            row = frame.loc[(task, name)]
            points[size] = (row["kl_target_policy"], row["kl_target_policy_stderr"])
    return dict(sorted(points.items()))


def _figure(n_rows: int, n_columns: int) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(3.3 * n_columns, 2.9 * n_rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax in axes[-1]:
        ax.set_xlabel("texts drawn")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e4e8ec", linewidth=0.7)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def main() -> None:
    """Draws every figure."""
    for name, draw in (
        ("training", draw_training), ("noise", draw_noise), ("batches", draw_batches),
    ):  # fmt: skip
        path = tables.RESULTS / f"grid_{name}.png"
        draw().savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
