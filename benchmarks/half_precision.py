"""Errors of log-probabilities in bfloat16, by the precision of the hidden states.

    python benchmarks/half_precision.py models/smollm2      # some three minutes on two cores

Texts of the base are scored four ways: in float32; with states in bfloat16, as transformers does
with bfloat16 weights; by the base as dmgen computes it, bfloat16 weights and products but states in
float32; and by the base's trainable copy, which has float32 weights. The policy starts as that
copy, so its difference from the base exists before the first step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import record
import tables
import torch
from tqdm import tqdm

import dmgen
from dmgen.models.hf import scoring

N_TEXTS, LENGTH, SEED = 256, 40, 5
PROMPTS = ("He complained that", "This person")
PAIRS = (
    ("states in bfloat16", "float32"),
    ("base", "float32"),
    ("states in bfloat16", "copy"),
    ("base", "copy"),
)


def states_in_bfloat16(base: dmgen.CausalLM, samples: dmgen.Samples) -> torch.Tensor:
    """Return the log-probability of each token without autocast, `(N, T)`."""
    start = torch.tensor(base.tokenizer(samples.prompts[0])["input_ids"], device=base.device)
    with torch.no_grad():
        parts = [
            scoring.score(base.model, start, samples.tokens[i], samples.mask[i], chunked=True)
            for i in torch.split(torch.arange(len(samples)), 32)
        ]
    return torch.cat(parts)


def measure(name: str) -> list[dict[str, Any]]:
    """Return a row a prompt and pair: the difference of texts, and the largest of a token."""
    base = dmgen.CausalLM.from_pretrained(name, dtype="bfloat16", max_new_tokens=LENGTH)
    exact = dmgen.CausalLM.from_pretrained(name, max_new_tokens=LENGTH)
    policy, rows = base.copy(), []
    for prompt in tqdm(PROMPTS, unit="prompt"):
        samples = base.sample(N_TEXTS, prompt=prompt, seed=SEED)
        scored = {
            "float32": exact.token_log_prob(samples),
            "states in bfloat16": states_in_bfloat16(base, samples),
            "base": base.token_log_prob(samples),
            "copy": policy.token_log_prob(samples),
        }
        for one, other in PAIRS:
            gap = scored[one] - scored[other]
            of_texts = gap.sum(1, dtype=torch.float64)
            rows.append({
                "prompt": prompt, "one": one, "other": other, "mean": float(of_texts.mean()),
                "sd": float(of_texts.std()), "largest_token": float(gap.abs().max()),
            })  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"`{result['command']}`: {N_TEXTS} texts of {LENGTH} tokens a prompt, seed {SEED}, torch "
        f"{result['versions']['torch']}. Differences of log-probabilities, nats.",
        "",
        "| prompt | | mean of a text | standard deviation of a text | largest of a token |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['prompt']} | {row['one']} − {row['other']} | {row['mean']:.3f} "
        f"| {row['sd']:.3f} | {row['largest_token']:.2f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder with the model")
    args = parser.parse_args()
    facts = record.facts()
    rows = measure(str(args.model))
    print(table(facts | {"rows": rows}))
    tables.write("half_precision", pd.DataFrame(rows), facts)


if __name__ == "__main__":
    main()
