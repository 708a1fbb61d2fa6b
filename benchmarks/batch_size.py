"""GDC++, GDC and a frozen proposal at equal numbers of samples, over batch sizes: exact KL(p‖π).

    python benchmarks/batch_size.py            # about 15 minutes on one core
    python benchmarks/batch_size.py --quick

Two targets on a world of 1,365 texts, a pointwise one and a distributional one, as in the GDC++
paper's Figure 4 (tasks 1 and 8). All methods see the same number of texts at the same constant
learning rate; batches of 32 take 32 times as many steps as those of 1,024. KL is an exact sum over
all texts; the seeds differ in the texts drawn, and a pair of methods is compared seed by seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
import record
import synthetic
import tables
from tqdm import tqdm

import dmgen

TASKS = {
    "pointwise": synthetic.pointwise("acb"),
    "distributional": synthetic.distributional("dd", 0.5),
}
METHODS = {
    "GDC++": (dmgen.GDCpp, {}),
    "GDC": (dmgen.GDC, {}),
    "frozen": (dmgen.DPG, {"proposal_rule": "never"}),
}
SIZES = (32, 64, 128, 256, 512, 1024)
N_SAMPLES, LEARNING_RATE, WARMUP = 32_768, 0.05, 0
# The paired comparisons that the table shows: the second minus the first.
PAIRS = (("GDC++", "GDC"), ("GDC", "frozen"))


def run(task: str, method: str, size: int, seed: int, n_samples: int) -> dict[str, Any]:
    """Run one training; return its final divergences, exact."""
    target = TASKS[task]
    kind, settings = METHODS[method]
    config = dmgen.TrainerConfig(
        batch_size=size, learning_rate=LEARNING_RATE, warmup_steps=WARMUP, seed=seed, **settings
    )
    policy = target.base.copy()
    kind(policy, target, config).train(n_samples // size)
    exact = target.exact()
    return {
        "task": task,
        "method": method,
        "batch_size": size,
        "seed": seed,
        "kl_target_policy": exact.kl_target_policy(policy),
        "kl_policy_base": exact.kl_policy_base(policy),
    }


def finals(rows: list[dict[str, Any]], task: str, method: str, size: int) -> list[float]:
    """Return KL(p‖π) of each seed, in the order of seeds."""
    kl_by_seed = [
        (row["seed"], row["kl_target_policy"])
        for row in rows
        if (row["task"], row["method"], row["batch_size"]) == (task, method, size)
    ]
    return [kl for _, kl in sorted(kl_by_seed)]


def table(result: dict[str, Any]) -> str:
    """Return the mean final KL(p‖π) by method, and paired differences, with 95 % intervals."""
    rows = result["rows"]
    hardware, versions = result["hardware"], result["versions"]
    facts = (
        f"`{result['command']}`, {result['n_samples']:,} texts a run, learning rate "
        f"{result['learning_rate']}, seeds 0 to {result['seeds'] - 1}, a core of "
        f"{hardware['cpu']}, torch {versions['torch']}. ± is the 95 % interval over seeds."
    )
    head = ["task", "batch", *METHODS, *(f"{b} − {a}" for a, b in PAIRS)]
    lines = [facts, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task in TASKS:
        for size in sorted({row["batch_size"] for row in rows}):
            by_method = {m: finals(rows, task, m, size) for m in METHODS}
            cells = [record.shown(values) for values in by_method.values()]
            for a, b in PAIRS:
                gaps = [y - x for x, y in zip(by_method[a], by_method[b], strict=True)]
                cells.append(record.shown(gaps))
            lines.append(f"| {task} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load() -> dict[str, Any]:
    """Return the facts and rows of the table."""
    rows = tables.read("batch_size").to_dict("records")
    return tables.read_facts("batch_size") | {"rows": rows}


def plot(result: dict[str, Any]) -> None:
    """Draw KL(p‖π) against the batch size, one panel a task."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 4), layout="constrained")
    sizes = sorted({row["batch_size"] for row in result["rows"]})
    for axis, task in zip(axes, TASKS, strict=True):
        for method in METHODS:
            means, halves = zip(
                *(record.mean_interval(finals(result["rows"], task, method, n)) for n in sizes),
                strict=True,
            )
            axis.errorbar(sizes, means, yerr=halves, label=method, marker="o", capsize=3)
        axis.set(xscale="log", yscale="log", title=task, xlabel="texts a step")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axes[0].set_ylabel("exact KL(p‖π) at the end, nats")
    axes[0].legend()
    figure.savefig(tables.RESULTS / "batch_size.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two seeds, two batch sizes, no file")
    parser.add_argument("--plot", action="store_true", help="only draw the picture again")
    args = parser.parse_args()
    if args.plot:
        plot(load())
        return
    n_seeds, sizes = (2, (128, 1024)) if args.quick else (args.seeds, SIZES)
    cells = [(t, m, n, s) for s in range(n_seeds) for t in TASKS for n in sizes for m in METHODS]
    facts = record.facts() | {
        "n_samples": N_SAMPLES,
        "learning_rate": LEARNING_RATE,
        "seeds": n_seeds,
        "n_texts": len(synthetic.base().enumerate()),
    }
    result = facts | {"rows": [run(*cell, N_SAMPLES) for cell in tqdm(cells)]}
    print(table(result))
    if not args.quick:
        tables.write("batch_size", pd.DataFrame(result["rows"]), facts)
        plot(result)


if __name__ == "__main__":
    main()
