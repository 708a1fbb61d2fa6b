"""Rebuild the tables of benchmarks/README.md from those in `results/`.

    python benchmarks/write_readme.py                     # raw runs into the tables, then the page
    python benchmarks/write_readme.py --figures           # and the pictures, from the same files
    python benchmarks/write_readme.py --demo runs/demo    # take over a run of `dmgen demo` first

No number in its tables is typed by hand: each stands between two comments, and is replaced.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import batch_size
import beyond
import grid_claims
import grid_report
import half_precision
import lambda_fit
import pandas as pd
import record
import run_grid
import scaling
import smollm2_prompts
import smollm2_report
import smollm2_runs
import tables
import throughput

from dmgen import storage
from dmgen.experiment import versions

HERE = Path(__file__).parent


def take_demo(run: Path) -> None:
    """Put the evaluation of a finished run of the demo into results/demo.csv."""
    final = [row for row in storage.read_rows(run / "evaluations.jsonl") if row.get("final")][-1]
    steps = storage.read_rows(run / "metrics.jsonl")
    facts = {
        "command": "dmgen demo",
        "seeds": {"trainer": 0, "fit": 1, "evaluate": final["seed"]},
        "hardware": {"cpus": os.cpu_count(), "cpu": record.cpu_name()},
        "versions": versions.versions(),
        "n_samples": final["n_samples"],
        "n_steps": len(steps),
        "samples": steps[-1]["samples"],
        "training_seconds": steps[-1]["seconds"],
    }
    tables.write("demo", pd.DataFrame(final["rows"]), facts, digits=10)


def demo_table(result: dict[str, Any]) -> str:
    """Return the evaluation of the demo as Markdown."""
    lines = [
        f"`{result['command']}`, seeds {result['seeds']}, {result['hardware']['cpus']} cores "
        f"({result['hardware']['cpu']}), torch {result['versions']['torch']}: {result['n_steps']} "
        f"steps, {result['samples']:,} texts, {result['training_seconds']:.0f} s of training; "
        f"evaluated on {result['n_samples']:,} fresh texts of each model.",
        "",
        "| metric | model | value | stderr | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        value, stderr = (
            "" if pd.isna(row[key]) else f"{row[key]:.4f}" for key in ("value", "stderr")
        )
        model, verdict = ("" if pd.isna(row[key]) else row[key] for key in ("model", "verdict"))
        lines.append(f"| {row['metric']} | {model} | {value} | {stderr} | {verdict} |")
    return "\n".join(lines)


def lambda_fit_table(result: dict[str, Any]) -> str:
    """Return the λ-fit benchmark as Markdown."""
    hardware = result["hardware"]
    return (
        f"`{result['command']}`, seed {result['seed']}, {hardware['cpus']} cores "
        f"({hardware['cpu']}), threads {result['threads']}, numpy {result['versions']['numpy']}, "
        f"scipy {result['versions']['scipy']}. Time, steps, largest error in standard "
        f"deviations.\n\n{lambda_fit.table(lambda_fit.load())}"
    )


def read(name: str) -> dict[str, Any]:
    """Return the facts of a table and its rows."""
    return tables.read_facts(name) | {"rows": tables.read(name).to_dict("records")}


TABLES = {
    "demo": lambda: demo_table(read("demo")),
    "lambda_fit": lambda: lambda_fit_table(tables.read_facts("lambda_fit")),
    "batch_size": lambda: batch_size.table(batch_size.load()),
    "beyond_rare": lambda: beyond.table("rare"),
    "beyond_bios": lambda: beyond.table("bios"),
    "grid": grid_claims.table,
    "grid_claims": grid_claims.claims,
    "grid_texts": grid_claims.texts,
    "scaling": lambda: scaling.table(scaling.load()),
    "half_precision": lambda: half_precision.table(read("half_precision")),
    "smollm2": smollm2_report.table,
    "smollm2_cost": lambda: smollm2_report.cost(throughput.load("smollm2")),
    "smollm2_outlook": smollm2_report.outlook,
    "smollm2_texts": smollm2_report.texts,
    "smollm2_prompts": lambda: smollm2_prompts.table(read("smollm2_prompts")),
    "throughput_smollm2": lambda: throughput.table(throughput.load("smollm2")),
    "throughput_tiny_bios": lambda: throughput.table(throughput.load("tiny_bios")),
}


def rebuilt(page: str) -> str:
    """Return the page with every table made anew from `results/`."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"benchmarks/README.md needs one {begin.strip()} ... {end.strip()}")
        before, rest = page.split(begin)
        page = before + begin + make() + end + rest.split(end)[1]
    return page


def draw_figures() -> None:
    """Draw every picture of the page."""
    batch_size.plot(batch_size.load())
    grid_report.main()
    scaling.plot(scaling.load())
    smollm2_report.main()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="a run folder of `dmgen demo` to take over")
    parser.add_argument("--figures", action="store_true", help="draw the pictures again too")
    args = parser.parse_args()
    if args.demo is not None:
        take_demo(args.demo)
    for part in (beyond, run_grid, smollm2_runs):
        part.collect()
    page = HERE / "README.md"
    if args.figures:
        draw_figures()
    page.write_text(rebuilt(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
