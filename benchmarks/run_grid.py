r"""The papers' comparison: ten tasks by several methods with equal numbers of texts.

    python benchmarks/run_grid.py                           # every cell without a result
    python benchmarks/run_grid.py --share 0/2               # every other one of them
    python benchmarks/run_grid.py --list                    # what there is and what is missing
    python benchmarks/run_grid.py --only 08-female/GDC++/0  # one cell, again if it is there
    python benchmarks/run_grid.py --base gpt2 n_steps=2000 trainer.total_steps=2000
    python benchmarks/run_grid.py --base models/smollm2 --keep runs/grid --curve 256 \
        --only 03-politics/GDC++/0 dtype=bfloat16 n_steps=60 trainer.total_steps=60

A cell is a task (`tasks/*.yaml`), a method and a seed; its result is a file in `raw/grid/`, written
when the cell is done, so the grid can be stopped at any time. `write_readme.py` puts these files
into the tables `results/grid*.csv`. Run two shares side by side with OMP_NUM_THREADS=1. Arguments
after the options override the tasks, as with `dmgen train`.

Every method draws the same number of texts in batches of one size, with one learning rate. All are
evaluated in the same way: on few texts at the start and after each quarter of the steps, and on
more texts at the end.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import policy_runs
import record
import tables
from tqdm import tqdm

import dmgen
from dmgen import storage
from dmgen.experiment.build import build_trainer, fit_target, load_model, load_target
from dmgen.experiment.config import RunConfig
from dmgen.training import run_folder

TASKS = sorted((Path(__file__).parent / "tasks").glob("*.yaml"))
# Every so many steps, the variance of the gradient: Figure 5.
DIAGNOSED = "trainer.diagnose_every=24"
# By the name in tables: the method and the settings that it adds to those of the task.
METHODS: dict[str, tuple[str, ...]] = {
    "GDC++": ("method=GDCpp", DIAGNOSED),
    "GDC": ("method=GDC", DIAGNOSED),
    "REINFORCE": ("method=Reinforce",),
    "KL-control": ("method=KLControl",),
    "GDC++ improved": (
        "method=GDCpp",
        "trainer.proposal_rule=policy",
        "trainer.base_share=0.25",
        "trainer.baseline=optimal",
        "trainer.average_decay=0.95",
    ),
}
# On all tasks; the methods below only on two.
EVERYWHERE = tuple(METHODS)
# Other batch sizes, at the same number of texts: Figure 4.
TWO_TASKS, BATCHES, TEXTS = ("01-album", "08-female"), (64, 1024), 24_576
for size, method in product(BATCHES, ("GDC++", "GDC")):
    METHODS[f"{method} batch {size}"] = (
        METHODS[method][0],
        f"trainer.batch_size={size}",
        f"n_steps={TEXTS // size}",
        f"trainer.total_steps={TEXTS // size}",
        f"trainer.warmup_steps={max(1, 8 * 256 // size)}",
    )
METHODS["REINFORCE P(x)"] = ("method=ReinforceP",)
SEEDS = {"GDC++": 2, "GDC": 2}
N_QUARTERS, N_PAIRS = 4, 6
# Columns of the metrics that a raw result keeps.
KEPT = (
    "samples", "seconds", "log_z", "log_z_stderr", "ess", "kl_target_policy", "advantage_mean",
    "advantage_abs_mean", "advantage_var", "grad_variance", "grad_norm", "proposal_updated",
)  # fmt: skip
Cell = tuple[str, str, int]


def cells() -> list[Cell]:
    """Return all cells in the order of their runs, the methods of the claims first."""
    every = product(METHODS, range(2), [path.stem for path in TASKS])
    return [
        (task, method, seed)
        for method, seed, task in every
        if seed < SEEDS.get(method, 1) and (method in EVERYWHERE or task in TWO_TASKS)
    ]


def path_of(base: str, cell: Cell) -> Path:
    """Return the raw result file of a cell."""
    task, method, seed = cell
    slug = method.replace("+", "p").replace(" ", "-").replace("(", "").replace(")", "")
    return tables.RAW / "grid" / f"{Path(base).name}-{task}-{slug}-{seed}.json"


def table_of(base: str) -> str:
    """Return the name of a base's table."""
    name = Path(base).name
    return "grid" if name == "tiny-bios-0.1" else f"grid-{name}"


def done(base: str) -> set[Cell]:
    """Return the cells that are in the table or have a raw result."""
    return policy_runs.stored(table_of(base)) | {c for c in cells() if path_of(base, c).exists()}


def collect() -> None:
    """Put the raw results into the tables."""
    every = tables.raw_results("grid")
    for base in dict.fromkeys(result["base"] for result in every):
        results = [result for result in every if result["base"] == base]
        policy_runs.collect(table_of(base), results, stepwise=("GDC++", "GDC"))


def config_of(base: str, cell: Cell, overrides: list[str]) -> RunConfig:
    """Return the configuration of the task with the settings of method and seed."""
    task, method, seed = cell
    path = Path(__file__).parent / "tasks" / f"{task}.yaml"
    own = [f"base={base}", *METHODS[method], f"trainer.seed={seed}"]
    return RunConfig.load(path, [*own, *overrides])


@cache
def target_of(base: str, task: str, overrides: tuple[str, ...]) -> dmgen.EBM:
    """Return the target of a task, which the methods and seeds of a process share."""
    config = config_of(base, (task, "GDC++", 0), list(overrides))
    return fit_target(config, load_model(base, config))


def run(config: RunConfig, target: dmgen.EBM, n_curve: int, folder: Path | None) -> dict[str, Any]:
    """Train one policy; return its metrics, evaluations during training, final scores, texts.

    `folder` is a run folder for its checkpoints: a run that was stopped resumes from there, with
    its target.
    """
    begun = folder is not None and run_folder.has_checkpoint(folder)
    if folder is not None and begun:
        target = load_target(folder, config, target.base)
    policy = target.base.copy(**asdict(config.policy))
    sampler = build_trainer(config, policy, target)
    curve: list[dict[str, Any]] = []
    if folder is not None and begun:
        sampler.resume(folder)
        curve = [r for r in storage.read_rows(folder / "curve.jsonl") if r["step"] <= sampler.step]
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        target.save(folder)
        storage.write_rows(folder / "curve.jsonl", [])
    for until in (round(config.n_steps * i / N_QUARTERS) for i in range(N_QUARTERS + 1)):
        if until > sampler.step:
            sampler.train(until - sampler.step, folder)
        if until == sampler.step and until not in [row["step"] for row in curve]:
            curve.append(point(sampler, n_curve))
            if folder is not None:
                storage.append_row(folder / "curve.jsonl", curve[-1])
    final = config.evaluate
    scores = dmgen.evaluate(policy, target, n_samples=final.n_samples, seed=final.seed)
    before, after = (
        model.sample(N_PAIRS, prompt=config.prompt, seed=final.seed).texts
        for model in (target.base, policy)
    )
    history = pd.DataFrame(sampler.history)
    absent = [None] * len(history)
    return {
        "config": config.to_mapping() | {"base": Path(config.base).name},
        "constraints": target.to_dict()["constraints"],
        "metrics": {key: [short(x) for x in history.get(key, absent)] for key in KEPT},
        "curve": curve,
        "final": scores.to_dict(),
        "texts": [list(pair) for pair in zip(before, after, strict=True)],
        "training_seconds": round(history["seconds"].iloc[-1], 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def short(x: Any) -> float | None:
    """Return a number with four digits, None for None or a number that is not finite."""
    return float(f"{x:.4g}") if x is not None and math.isfinite(x) else None


def point(sampler: Any, n_samples: int) -> dict[str, Any]:
    """Return one point of the curves: a small evaluation of the current policy."""
    scores = dmgen.evaluate(sampler.policy, sampler.target, n_samples=n_samples, seed=1000)
    metrics = {
        row["metric"]: [short(row["value"]), short(row["stderr"])]
        for row in scores.to_dict()["rows"]
        if row["model"] in ("policy", "")
    }
    samples = pd.DataFrame(sampler.history)["samples"].max() if sampler.step else 0
    return {"step": sampler.step, "samples": int(samples)} | metrics


def main() -> None:
    """Run the missing cells, or list them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as with dmgen train")
    parser.add_argument("--base", default="tiny-bios-0.1", help="tiny-bios, a folder, or a hub id")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th cell, from the I-th on")
    parser.add_argument("--only", help="TASK/METHOD/SEED: this cell, again if it is there")
    parser.add_argument("--curve", type=int, default=512, help="texts of an evaluation on the way")
    parser.add_argument(
        "--keep", type=Path, help="a folder for checkpoints: a cell that was stopped goes on"
    )
    parser.add_argument("--list", action="store_true", help="show what is there; run nothing")
    args = parser.parse_args()
    if args.list:
        print(state(args.base))
        return
    if args.only:
        task, method, seed = args.only.split("/")
        chosen = [(task, method, int(seed))]
        if chosen[0] not in cells():
            parser.error(f"there is no cell {args.only}; the cells are\n{state(args.base)}")
    else:
        share, n_shares = map(int, args.share.split("/"))
        finished = done(args.base)
        chosen = [cell for cell in cells()[share::n_shares] if cell not in finished]
    for cell in tqdm(chosen, unit="cell"):
        started, started_core = time.time(), time.process_time()
        facts = record.facts()  # the commit that it began with
        path = path_of(args.base, cell)
        config = config_of(args.base, cell, args.overrides)
        target = target_of(args.base, cell[0], tuple(args.overrides))
        result = run(config, target, args.curve, args.keep and args.keep / path.stem)
        names = dict(zip(("task", "method", "seed"), cell, strict=True))
        result |= {"base": Path(args.base).name, **names}
        result["core_seconds"] = round(time.process_time() - started_core, 1)
        result["wall_seconds"] = round(time.time() - started, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, result | facts)


def state(base: str) -> str:
    """Return a table of methods by tasks: the number of seeds with results."""
    rows, finished = [], done(base)
    for task, method in dict.fromkeys(cell[:2] for cell in cells()):
        own = [cell for cell in cells() if cell[:2] == (task, method)]
        n_done = sum(cell in finished for cell in own)
        rows.append({"task": task, "method": method, "seeds": f"{n_done}/{len(own)}"})
    table = pd.DataFrame(rows).pivot(index="method", columns="task", values="seeds")
    return str(table.reindex(METHODS).fillna("").to_string())


if __name__ == "__main__":
    main()
