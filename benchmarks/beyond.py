"""Settings beyond the papers compared with GDC++: samples, time and KL of each.

    python benchmarks/beyond.py rare         # a rare pointwise target, exact; about 10 minutes
    python benchmarks/beyond.py bios         # female 0.5 on tiny-bios, two at a time; about an hour
    python benchmarks/beyond.py tables       # the tables as Markdown

`rare`: in a space of 1,365 texts, every text must contain a word that fewer than one in 1,000
texts of the base contain. All settings train on the same number of texts. KL(p‖π) is an exact sum
after every few steps; the table shows the number of texts after which a setting reaches the final
KL of GDC++.

`bios`: all settings train for the same number of seconds of one core (OMP_NUM_THREADS=1). KL(p‖π)
is estimated on one fixed set of texts that no setting trains on: of fresh texts of the base, all
that are about women and as many of the others, each with its weight under p. All settings share
the set, so their differences have smaller errors than the values. KL(π‖a) and the moment are those
of 1,024 fresh texts of the policy at the end. Each result is a file in `raw/beyond/`, which
`write_readme.py` puts into `results/beyond.csv` (a row a run) and `beyond_curves.csv` (each point
with the lowest KL so far, and the last). A run that has a result is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd
import record
import synthetic
import tables
import torch
from tqdm import tqdm

import dmgen
from dmgen import storage
from dmgen.estimates import weights as log_weights

Setting = tuple[Any, dict[str, Any], dict[str, Any]]  # class, its options, settings of the run

WORD = "acda"
RARE_SAMPLES, RARE_EVERY, RARE_BATCH = 131_072, 2_048, 512
ON = {"proposal_rule": "policy"}
RARE: dict[str, Setting] = {
    "GDC++": (dmgen.GDCpp, {}, {}),
    "GDC": (dmgen.GDC, {}, {}),
    "no baseline, on-policy (DPG)": (dmgen.DPG, {}, {}),
    "on-policy": (dmgen.GDCpp, {}, ON),
    "on-policy, leave-one-out": (dmgen.GDCpp, {}, {"baseline": "leave_one_out"} | ON),
    "on-policy, optimal": (dmgen.GDCpp, {}, {"baseline": "optimal"} | ON),
    "JS, on-policy": (dmgen.FDPG, {"divergence": "js"}, {}),
    "TV, on-policy": (dmgen.FDPG, {"divergence": "tv"}, {}),
    "mixture, 10 % base": (dmgen.GDCpp, {}, {"base_share": 0.1} | ON),
    "backward on 64": (dmgen.GDCpp, {}, {"backward_size": 64} | ON),
    "2 steps a batch": (dmgen.GDCpp, {}, {"reuse": 2} | ON),
    "4 steps a batch": (dmgen.GDCpp, {}, {"reuse": 4} | ON),
    "auto rate": (dmgen.GDCpp, {}, {"learning_rate": "auto", "step_kl": 0.003} | ON),
    "8 steps a batch": (dmgen.GDCpp, {}, {"reuse": 8} | ON),
    "4 steps a batch, 10 % base": (dmgen.GDCpp, {}, {"reuse": 4, "base_share": 0.1} | ON),
    "4 steps a batch, 50 % base, optimal": (
        dmgen.GDCpp,
        {},
        {"reuse": 4, "base_share": 0.5, "baseline": "optimal"} | ON,
    ),
    "8 steps a batch, 50 % base, optimal": (
        dmgen.GDCpp,
        {},
        {"reuse": 8, "base_share": 0.5, "baseline": "optimal"} | ON,
    ),
    "4 steps a batch, 75 % base, optimal": (
        dmgen.GDCpp,
        {},
        {"reuse": 4, "base_share": 0.75, "baseline": "optimal"} | ON,
    ),
    "batch 128": (dmgen.GDCpp, {}, {"batch_size": 128} | ON),
    "batch 128, averaged": (dmgen.GDCpp, {}, {"batch_size": 128, "average_decay": 0.95} | ON),
}
BIOS_SECONDS, BIOS_EVERY, BIOS_RATE = 120, 4, 1.5e-4
SUBSET = ON | {"backward_size": 160}
BIOS: dict[str, Setting] = {
    "GDC++": (dmgen.GDCpp, {}, {}),
    "GDC": (dmgen.GDC, {}, {}),
    "on-policy": (dmgen.GDCpp, {}, ON),
    "backward on 160": (dmgen.GDCpp, {}, SUBSET),
    "backward on 160, averaged": (dmgen.GDCpp, {}, SUBSET | {"average_decay": 0.95}),
    "batch 1,024, backward on 320, averaged": (
        dmgen.GDCpp,
        {},
        ON | {"batch_size": 1024, "backward_size": 320, "average_decay": 0.95},
    ),
    "2 steps a batch, averaged": (
        dmgen.GDCpp,
        {},
        SUBSET | {"average_decay": 0.95, "reuse": 2, "learning_rate": 1e-4},
    ),
    "auto rate": (dmgen.GDCpp, {}, SUBSET | {"learning_rate": "auto", "step_kl": 0.01}),
    "VarGrad": (dmgen.VarGrad, {}, SUBSET),
    "JS": (dmgen.FDPG, {"divergence": "js"}, SUBSET),
}


def run_rare(name: str, seed: int) -> dict[str, Any]:
    """Run on the rare target; return the exact KL(p‖π) after every RARE_EVERY texts."""
    target = synthetic.pointwise(WORD)
    exact = target.exact()
    kind, options, settings = RARE[name]
    config = dmgen.TrainerConfig(
        **({"batch_size": RARE_BATCH, "learning_rate": 0.05, "warmup_steps": 0, "seed": seed}
           | settings)
    )  # fmt: skip
    policy = target.base.copy()
    sampler = kind(policy, target, config, **options)
    curve = []
    for _ in range(RARE_SAMPLES // RARE_EVERY):
        step = sampler.train(RARE_EVERY // config.batch_size).iloc[-1]
        curve.append([int(step["samples"]), step["seconds"], exact.kl_target_policy(policy)])
    return {"curve": curve, "base_rate": math.exp(exact.log_z)}


def heldout(target: dmgen.EBM) -> tuple[dmgen.Samples, torch.Tensor, torch.Tensor, float]:
    """Return texts that represent p, log P of each, their weights (sum 1), and log Z."""
    texts = target.base.sample(8192, seed=987)
    log_score = target.log_score(texts, base_log_prob=texts.log_prob)
    female = target.values(texts)["female"] == 1
    rows = torch.cat([female.nonzero()[:, 0], (~female).nonzero()[: int(female.sum()), 0]])
    log_w = log_score - texts.log_prob
    log_z = log_weights.log_z(log_w)[0]
    # Each of the two classes keeps the mass that it has under p.
    share = torch.softmax(log_w, 0)[female].sum()
    k = int(female.sum())
    weights = torch.cat([torch.full((k,), share / k), torch.full((k,), (1 - share) / k)]).double()
    return texts[rows], log_score[rows], weights, log_z


def run_bios(name: str, seed: int) -> dict[str, Any]:
    """Run on tiny-bios for BIOS_SECONDS; return KL(p‖π) on held-out texts every few steps."""
    target = bios_target()
    judge, log_score, weights, log_z = heldout(target)
    kind, options, settings = BIOS[name]
    config = dmgen.TrainerConfig(
        **({"batch_size": 512, "learning_rate": BIOS_RATE, "warmup_steps": 3, "seed": seed}
           | settings)
    )  # fmt: skip
    policy = target.base.copy()
    sampler = kind(policy, target, config, **options)
    curve, seconds = [], 0.0
    while seconds < BIOS_SECONDS:
        # Seconds of a core: other work on the machine does not count.
        started = time.process_time()
        step = sampler.train(BIOS_EVERY).iloc[-1]
        seconds += time.process_time() - started
        kl = float(weights @ (log_score - policy.log_prob(judge))) - log_z
        curve.append([int(step["samples"]), seconds, kl])
    scores = dmgen.evaluate(policy, target, n_samples=1024, seed=seed + 1000)
    return {
        "base_rate": target.base_moments["female"].value,
        "curve": curve,
        "moment": scores.moments[0].policy.value,
        "kl_policy_base": scores.kl_policy_base.value,
        "kl_target_policy": scores.kl_target_policy.value,
    }


_TARGETS: list[dmgen.EBM] = []


def bios_target() -> dmgen.EBM:
    """Return the target "half of the biographies are about women", fitted once a process."""
    if not _TARGETS:
        base = dmgen.CausalLM.from_pretrained("tiny-bios-0.1")
        female = dmgen.features.gender("female")
        _TARGETS.append(dmgen.EBM.fit(base, [dmgen.Moment(female, 0.5)], seed=1))
    return _TARGETS[0]


KEY = ("part", "name", "seed")
COLUMNS = (*KEY, "base_rate", "moment", "kl_policy_base", "kl_target_policy", "wall", "command",
           "commit")  # fmt: skip
PARTS = {"rare": (RARE, run_rare, 7), "bios": (BIOS, run_bios, 3)}


def path_of(part: str, name: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in name.replace("+", "p").replace("%", "pc"))
    return tables.RAW / "beyond" / f"{part}-{slug}-{seed}.json"


def run_all(part: str, share: int, n_shares: int) -> None:
    """Run each cell that has no result; `share` of `n_shares` processes side by side."""
    settings, run, n_seeds = PARTS[part]
    cells = [(name, seed) for seed in range(n_seeds) for name in settings]
    frame = load(part)
    stored = set(zip(frame["name"], frame["seed"], strict=True))
    for name, seed in tqdm(cells[share::n_shares]):
        path = path_of(part, name, seed)
        if (name, seed) not in stored and not path.exists():
            started = time.time()
            result = {"part": part, "name": name, "seed": seed} | run(name, seed)
            storage.write_json(path, result | {"wall": time.time() - started} | record.facts())


def load(part: str) -> pd.DataFrame:
    """Return a row a run, with its `curve` of (samples, seconds, KL)."""
    runs, curves = tables.read("beyond"), tables.read("beyond_curves")
    points = {
        key: rows[["samples", "seconds", "kl_target_policy"]].to_numpy().tolist()
        for key, rows in tables.groups(curves, KEY)
    }
    runs["curve"] = [points[key] for key in runs[list(KEY)].itertuples(index=False, name=None)]
    return runs[runs["part"] == part]


def shared(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with the seeds that all settings have."""
    n_shared = frame.groupby("name")["seed"].nunique().min()
    return frame[frame["seed"] < n_shared]


def collect() -> None:
    """Put the raw results into the tables."""
    results = tables.raw_results("beyond")
    if not results:
        return
    runs = [{key: result.get(key) for key in COLUMNS} for result in results]
    points = [
        {key: result[key] for key in KEY}
        | dict(zip(("samples", "seconds", "kl_target_policy"), point, strict=True))
        for result in results
        for point in thinned(result["curve"])
    ]
    facts = {key: results[-1][key] for key in ("hardware", "versions", "threads")}
    tables.merge("beyond", pd.DataFrame(runs), KEY, facts)
    tables.merge("beyond_curves", pd.DataFrame(points), KEY)


def thinned(curve: list[list[float]]) -> list[list[float]]:
    """Return the points with a lower KL than all before them, to five digits, and the last."""
    least = [math.inf, *itertools.accumulate((point[2] for point in curve), min)]
    lowest = [p for p, low in zip(curve[:-1], least, strict=False) if p[2] < low]
    return [[float(f"{x:.5g}") for x in point] for point in lowest] + [curve[-1]]


def first_below(curve: list[list[float]], level: float, column: int) -> float:
    """Return the samples (column 0) or seconds (1) at the first KL <= `level`; inf if none."""
    return next((point[column] for point in curve if point[2] <= level), math.inf)


def table(part: str) -> str:
    """Return final KL(p‖π), and samples and seconds until that of GDC++ is reached."""
    settings, frame = PARTS[part][0], shared(load(part))
    finals = {n: [c[-1][2] for c in frame[frame["name"] == n]["curve"]] for n in settings}
    level = record.mean_interval(finals["GDC++"])[0]
    ends = [curve[-1] for curve in frame[frame["name"] == "GDC++"]["curve"]]
    reference = [statistics.median(end[column] for end in ends) for column in (0, 1)]
    head = ["setting", "final KL(p‖π)", "− GDC++", "samples", "seconds", "reached in"]
    head += ["moment", "KL(π‖a)", "KL(π‖a) − least KL for its moment"] if part == "bios" else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in settings:
        mine = frame[frame["name"] == name].sort_values("seed")
        if mine.empty:
            continue
        gaps = [a - b for a, b in zip(finals[name], finals["GDC++"], strict=False)]
        cells = [name, record.shown(finals[name], 3), record.shown(gaps, 3)]
        for column in (0, 1):
            reached = sorted(first_below(c, level, column) for c in mine["curve"])
            middle = reached[len(reached) // 2]
            cells.append("not" if math.isinf(middle) else f"{middle / reference[column]:.2f} x")
        within = sum(math.isfinite(first_below(c, level, 0)) for c in mine["curve"])
        cells.append(f"{within} of {len(mine)}")
        if part == "bios":
            cells += [record.shown(mine[k], 3) for k in ("moment", "kl_policy_base")]
            cells.append(record.shown([_beyond(row) for _, row in mine.iterrows()], 3))
        lines.append("| " + " | ".join(cells) + " |")
    one, made_by = frame.iloc[0], tables.read_facts("beyond")
    facts = (
        f"`{one['command'].split(' --share')[0]}`, seeds 0 to {int(frame['seed'].max())}, a core "
        f"of {made_by['hardware']['cpu']}, torch {made_by['versions']['torch']}. ± is the 95 % "
        "interval over seeds."
    )
    return "\n".join([facts, "", *lines])


def _beyond(row: pd.Series) -> float:
    """Return KL(π‖a) − KL(Bern(moment)‖Bern(base rate)), the excess over the least, nats."""
    m, rate = row["moment"], row["base_rate"]
    least = m * math.log(m / rate) + (1 - m) * math.log((1 - m) / (1 - rate)) if m else 0.0
    return float(row["kl_policy_base"] - least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=[*PARTS, "tables"])
    parser.add_argument("--share", default="0/1", help="I/N: every N-th run, from the I-th on")
    args = parser.parse_args()
    if args.part == "tables":
        for part in PARTS:
            print(f"{part}\n\n{table(part)}\n")
        return
    share, n_shares = map(int, args.share.split("/"))
    run_all(args.part, share, n_shares)


if __name__ == "__main__":
    main()
