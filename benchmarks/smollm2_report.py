"""The figure and the tables of the runs on SmolLM2-135M.

    python benchmarks/smollm2_report.py         # the figure; write_readme.py writes the tables

Seconds are those of training alone: drawing, scoring, gradient steps, checkpoints.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import policy_runs
import tables
from grid_report import final, requested
from smollm2_runs import OWN_METHODS, TASKS, cells

from dmgen.report import figures

CAVEAT = "SmolLM2-135M-Instruct, dequantised from Q4_1"
KL = "kl_target_policy"
# The papers' run on a pointwise task, in texts; the weights of SmolLM2-135M.
PAPERS_TEXTS, N_WEIGHTS = 6_400_000, 134_515_008
Result = dict[str, Any]


def load() -> list[Result]:
    """Return the stored results, by task and then method."""
    order = list(OWN_METHODS)
    return sorted(policy_runs.load("smollm2"), key=lambda r: (r["task"], order.index(r["method"])))


def of_base(result: Result) -> dict[str, tuple[float, float]]:
    """Return the value and error of the base by metric, from the final evaluation."""
    rows = [row for row in result["final"] if row["model"] == "base"]
    return {row["metric"]: (row["value"], row.get("stderr", math.nan)) for row in rows}


def table() -> str:
    """Return a row a run: moments and KL(p‖π) from start to end, KL(π‖a), diversity, cost."""
    lines = [
        _made_by(),
        "",
        "| task | method | moment, base → policy (requested) | KL(p‖a) → KL(p‖π) | fell by "
        "| KL(π‖a) | Self-BLEU-5 | Distinct-1 | s a step | peak GiB |",
        "|---" * 10 + "|",
    ]
    for result in load():
        base, last = of_base(result), final(result)
        moments = [
            f"{_shown(*base[name])} → {_shown(*last[name])} ({target:g})"
            for name, target in requested(result).items()
        ]
        start, end = last["kl_target_base"], last[KL]
        cells = [
            result["task"],
            result["method"],
            "<br>".join(moments),
            f"{_shown(*start)} → {_shown(*end)}",
            _shown(*last["gain"]),
            _shown(*last["kl_policy_base"]),
            _shown(*last["self_bleu_5"]),
            f"{last['distinct_1'][0]:.4f} ± {last['distinct_1'][1]:.4f}",
            f"{result['seconds_a_step']:.1f}",
            f"{result['peak_bytes'] / 2**30:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost(throughput: Result) -> str:
    """Return seconds a step and peak memory over the expected ones, of runs of all weights."""
    head = "| task | method | seconds a step / expected | peak memory / expected |"
    lines = [head, "|---" * 4 + "|"]
    for result in load():
        if "LoRA" in result["method"]:
            continue
        own = result["seconds_a_step"] * throughput["texts"] / result["batch_size"]
        if "average_decay" in result:
            peak = throughput["improved_peak_bytes"]
        else:  # with the model that is drawn from once the proposal has moved
            peak = throughput["peak_bytes"][str(throughput["texts"])] + 4 * N_WEIGHTS
        shares = (own / expected_seconds(result, throughput), result["peak_bytes"] / peak)
        cells = (result["task"], result["method"], *(f"{share:.2f}" for share in shares))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def expected_seconds(result: Result, throughput: Result) -> float:
    """Return the seconds of a step in throughput.py, corrected for differences of this run.

    The median step of GDC and GDC++ is one before the proposal moves: texts are the base's, and
    log a is known. GDC scores those texts alone that have no gradient, since they miss a hard
    constraint. A classifier reads each text: a pass more.
    """
    middle = {
        variant: {phase: statistics.median(x) for phase, x in phases.items() if x}
        for variant, phases in throughput["seconds"].items()
    }
    one = middle["dmgen bf16"]
    features = one["score"] if "classifier" in str(result["constraints"]) else 0.0
    if "average_decay" in result:
        return features + middle["dmgen bf16 improved"]["step"]
    hard = result["method"] == "GDC" and 1.0 in requested(result).values()
    ((name, _),) = requested(result).items()
    missed = 1 - of_base(result)[name][0] if hard else 0.0
    return features + one["step"] - one["score"] - missed * (one["backward"] - one["score"])


def outlook() -> str:
    """Return the texts a day of this machine, and the cost of the papers' number of texts."""
    result = next(r for r in load() if r["method"] == "GDC++")
    a_day = 86_400 * result["batch_size"] / result["seconds_a_step"]
    # A token: 2 operations a weight to draw, 2 to score under the base, 6 forward and backward.
    operations = PAPERS_TEXTS * 40 * 10 * N_WEIGHTS
    return (
        f"A day of these two cores is {a_day:,.0f} texts of 40 tokens, at the speed of "
        f"{result['task']}. The papers draw {PAPERS_TEXTS:,} for a pointwise task: "
        f"{PAPERS_TEXTS / a_day:.0f} such days, or {operations:.1e} floating-point operations, "
        f"{operations / 1e14 / 3600:.1f} hours of a GPU that does 100 TFLOP/s of them in practice."
    )


def texts(n: int = 2) -> str:
    """Return texts of GDC++ before and after, drawn with the same random numbers."""
    lines = ["| task | base | GDC++ |", "|---|---|---|"]
    for result in load():
        if result["method"] == "GDC++":
            for pair in result["texts"][:n]:
                shown = [" ".join(text.split()).replace("|", "\\|") for text in pair]
                lines.append(f"| {result['task']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw() -> Any:
    """Draw KL(p‖π) against texts and seconds, and the moments, a column a task."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(TASKS), figsize=(11, 8.5), layout="constrained")
    colours = figures.palette(OWN_METHODS)
    for column, task in zip(axes.T, TASKS, strict=True):
        for result in load():
            if result["task"] != task.stem:
                continue
            ((moment, target),) = requested(result).items()
            samples, seconds = (
                [point[key] for point in result["curve"]] for key in ("samples", "seconds")
            )
            colour, dashes = colours[result["method"]]
            for ax, x, metric in zip(
                column, (samples, seconds, samples), (KL, KL, moment), strict=True
            ):
                values, errors = np.array([point[metric] for point in result["curve"]]).T
                ax.errorbar(
                    x, values, yerr=1.96 * errors, color=colour, linestyle=dashes, marker="o",
                    markersize=4, capsize=2, label=result["method"],
                )  # fmt: skip
            column[2].axhline(target, color="#5b6673", linewidth=1, linestyle=":")
        for ax, title, xlabel in zip(
            column,
            ("KL(p‖π), nats", "KL(p‖π), nats", "moment (dotted: requested)"),
            ("texts drawn", "seconds of training, two cores", "texts drawn"),
            strict=True,
        ):
            ax.set_title(f"{title}\n{task.stem}", fontsize=10, loc="left")
            ax.set_xlabel(xlabel)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color="#e4e8ec", linewidth=0.7)
    named = {}
    for ax in axes.flat:
        handles, labels = ax.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _shown(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}"


def _made_by() -> str:
    results = load()
    one = results[0]
    commits = ", ".join(sorted({r["commit"] for r in results}))
    facts = tables.read_facts("smollm2")
    sizes = {r["task"]: _size(r) for r in results if "LoRA" not in r["method"]}
    return (
        f"`{one['command'].split(' --only')[0]}`: {CAVEAT}; {len(results)} of {len(cells())} runs, "
        "of texts of up to 40 tokens, in bfloat16 with float32 weights: "
        + "; ".join(f"{task} {size}" for task, size in sizes.items())
        + f" (LoRA: a rate of its own). {facts['hardware']['cpus']} cores of "
        f"{facts['hardware']['cpu']}, torch {facts['versions']['torch']}; commits {commits}. ± is "
        "one standard error."
    )


def _size(result: Result) -> str:
    """Return how long a run is, and on how many texts it is evaluated."""
    return (
        f"{result['n_steps']} steps of {result['batch_size']} texts, learning rate "
        f"{result['learning_rate']:g}, evaluated on {result['n_evaluated']:,}"
    )


def main() -> None:
    """Draw the figure."""
    path = tables.RESULTS / "smollm2.png"
    draw().savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
