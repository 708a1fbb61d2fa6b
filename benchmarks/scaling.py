"""Growth of the cost of a gradient step: the exponents, with a picture.

    python benchmarks/scaling.py            # about eight minutes on two cores

Random Llama models, one thread, float32. Each axis changes one thing and keeps the others:
the batch, the length of the texts, the vocabulary, the model's parameters without the two layers of
the vocabulary, the number of features, and the number of processes that share a batch
(`torch.distributed.run`, gloo). All points take turns, each call after one to warm up.

The exponent is the slope of log seconds against log size, by least squares: 1 means that twice as
much costs twice as much, -1 that two processes take half the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import record
import tables
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dmgen
from dmgen.models.causal_lm import CausalLM

MICRO_BATCH = 32
# The other sizes while one axis changes.
USUAL = {"texts": 64, "length": 40, "vocabulary": 4096, "width": 256, "features": 1}
AXES: dict[str, tuple[int, ...]] = {
    "texts": (32, 64, 128),
    "length": (10, 20, 40, 80),
    "vocabulary": (4096, 16_384, 65_536),
    "width": (128, 256, 512),
    "features": (1, 10, 100),
    "processes": (1, 2),
}
PHASES = ("sample", "score", "backward", "step")


def model_of(vocabulary: int, width: int, length: int) -> CausalLM:
    """Return a Llama of four layers whose words are w0, w1, ..."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=4, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0")
    return CausalLM(LlamaForCausalLM(config), tokenizer, max_new_tokens=length)


def target_of(base: CausalLM, n_features: int) -> dmgen.EBM:
    """Return a target whose features are word lists: regular expressions over the text."""
    moments = [
        dmgen.Moment(dmgen.features.wordlist([f"w{i}", f"w{i + 1000}"], name=f"list {i}"), 0.5)
        for i in range(n_features)
    ]
    return dmgen.EBM(base, moments, [0.1] * n_features, max_new_tokens=base.max_new_tokens)


def phases_of(size: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """Return the phases of a step at one point."""
    n = size["texts"]
    base = model_of(size["vocabulary"], size["width"], size["length"])
    policy, target = base.copy(), target_of(base, size["features"])
    samples = base.sample(n, seed=0)
    config = dmgen.TrainerConfig(
        batch_size=n, micro_batch_size=MICRO_BATCH, proposal_rule="policy", learning_rate=1e-7
    )
    sampler = dmgen.GDCpp(policy, target, config)

    def backward() -> None:
        for part in torch.split(torch.arange(n), MICRO_BATCH):
            policy.log_prob(samples[part], grad=True).sum().backward()

    return {
        "sample": lambda: policy.sample(n, seed=1),
        "score": lambda: base.log_prob(samples),
        "backward": backward,
        "step": lambda: sampler.train(1),
    }


def parameters(size: dict[str, int]) -> int:
    """Return the number of weights outside the layers of the vocabulary."""
    model = model_of(size["vocabulary"], size["width"], size["length"])
    return sum(p.numel() for p in model.model.model.layers.parameters())


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def shared_step(n_processes: int, rounds: int) -> list[float]:
    """Launch processes that share a batch; return the seconds of a step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
              str(n_processes), __file__, "--worker", "--rounds", str(rounds)]  # fmt: skip
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(launch)} failed:\n{done.stderr[-2000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def worker(rounds: int) -> None:
    """Measure the largest batch of the axis of texts, in each of the processes."""
    step = phases_of(USUAL | {"texts": AXES["texts"][-1]})["step"]
    seconds = [seconds_of(step) for _ in range(rounds + 1)][1:]
    if os.environ["RANK"] == "0":
        print(json.dumps(seconds))


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return a row for each axis, size and phase, with the seconds of each round."""
    points = [(axis, x) for axis, xs in AXES.items() if axis != "processes" for x in xs]
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    for axis, x in points:
        size = USUAL | {axis: x}
        for phase in ("step",) if axis == "features" else PHASES:
            shown = parameters(size) if axis == "width" else x
            rows[axis, x, phase] = {"axis": axis, "x": shown, "phase": phase, "seconds": []}
    for axis, x in tqdm(points * rounds, unit="point"):
        for phase, call in phases_of(USUAL | {axis: x}).items():
            if (axis, x, phase) in rows:
                call()
                rows[axis, x, phase]["seconds"].append(seconds_of(call))
    shared = [
        {"axis": "processes", "x": n, "phase": "step", "seconds": shared_step(n, rounds)}
        for n in AXES["processes"]
    ]
    return [*rows.values(), *shared]


def write(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the table, a row a round."""
    frame = pd.DataFrame(rows).explode("seconds").astype({"seconds": float})
    tables.write("scaling", frame, facts)


def load() -> dict[str, Any]:
    """Return the facts and rows of the table."""
    grouped = tables.groups(tables.read("scaling"), ["axis", "x", "phase"])
    rows = [
        {"axis": axis, "x": x, "phase": phase, "seconds": part["seconds"].tolist()}
        for (axis, x, phase), part in grouped
    ]
    return tables.read_facts("scaling") | {"rows": rows}


def exponents(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return by axis and phase the slope over all sizes, and between the two largest."""
    slopes = {}
    for axis, phase in dict.fromkeys((row["axis"], row["phase"]) for row in rows):
        own = [row for row in rows if (row["axis"], row["phase"]) == (axis, phase)]
        log_x = np.log([row["x"] for row in own])
        log_y = np.log([statistics.median(row["seconds"]) for row in own])
        last = (log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])
        slopes[axis, phase] = (float(np.polyfit(log_x, log_y, 1)[0]), float(last))
    return slopes


def table(result: dict[str, Any]) -> str:
    """Return the exponents as Markdown, with the range of each axis."""
    slopes = exponents(result["rows"])
    lines = [
        f"`{result['command']}`: one thread of {result['hardware']['cpu']}, torch "
        f"{result['versions']['torch']}, {result['rounds']} rounds; unless an axis says otherwise "
        + ", ".join(f"{key} {value:,}" for key, value in result["usual"].items())
        + ". The exponent over all sizes, and between the two largest in brackets.",
        "",
        "| axis | from | to | " + " | ".join(PHASES) + " |",
        "|---" * (3 + len(PHASES)) + "|",
    ]
    for axis in AXES:
        sizes = [row["x"] for row in result["rows"] if row["axis"] == axis]
        cells = [
            "{:.2f} ({:.2f})".format(*slopes[axis, phase]) if (axis, phase) in slopes else ""
            for phase in PHASES
        ]
        name = "parameters" if axis == "width" else axis
        lines.append(f"| {name} | {min(sizes):,} | {max(sizes):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    """Draw seconds against size, an axis a panel, both logarithmic."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 6.5), sharey=True, layout="constrained")
    for panel, axis in zip(panels.flat, AXES, strict=True):
        for phase in PHASES:
            own = [r for r in result["rows"] if (r["axis"], r["phase"]) == (axis, phase)]
            if own:
                middle = [statistics.median(row["seconds"]) for row in own]
                panel.plot([row["x"] for row in own], middle, marker="o", label=phase,
                           color=f"C{PHASES.index(phase)}")  # fmt: skip
        sizes = sorted({row["x"] for row in result["rows"] if row["axis"] == axis})
        panel.set(xscale="log", yscale="log", title="parameters" if axis == "width" else axis)
        panel.set_xticks(sizes, [f"{x:,}" for x in sizes])
        panel.minorticks_off()
    for row in panels:
        row[0].set_ylabel("seconds")
    panels[0, 0].legend()
    figure.savefig(tables.RESULTS / "scaling.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print the exponents, and write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help="one of the processes of a launch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        worker(args.rounds)
        return
    facts = record.facts() | {"rounds": args.rounds, "usual": USUAL}
    result = facts | {"rows": measure(args.rounds)}
    print(table(result))
    write(result["rows"], facts)
    plot(result)


if __name__ == "__main__":
    main()
