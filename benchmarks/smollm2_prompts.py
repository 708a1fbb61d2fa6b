"""Base rates of the tasks' features by prompt, to choose the prompts.

    python benchmarks/smollm2_prompts.py models/smollm2     # about two minutes on two cores

A constraint suits the benchmark if the base satisfies it rarely, but often enough that some texts
of a batch do. A prompt about a person is neutral if it names no gender but the text after it does.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import record
import tables
from tqdm import tqdm

import dmgen
from dmgen import features

PROMPTS = (
    "It was",
    "This person",
    "The author was born in",
    "Biography of a famous scientist:",
    "About the artist:",
    "The doctor said that",
    "My neighbour is a teacher.",
    "News of today:",
    "He complained that",
    "The review of the film says:",
)
FEATURES = (
    features.gender("female"),
    features.gender("male"),
    features.wordlist("politics"),
    features.wordlist("science"),
    features.wordlist("sports"),
)
HEADS = Path(__file__).parent / "heads"


def table(result: dict[str, Any]) -> str:
    """Return the fractions with their errors as Markdown."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["feature"] for row in rows))
    scores = {(row["prompt"], row["feature"]): (row["fraction"], row["stderr"]) for row in rows}
    lines = [
        f"`{result['command']}`: {result['n_texts']} texts of 40 tokens a prompt, torch "
        f"{result['versions']['torch']}. Fraction of texts, ± one standard error.",
        "",
        "| prompt | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        cells = ["{:.3f} ± {:.3f}".format(*scores[prompt, name]) for name in names]
        lines.append(f"| {prompt} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Draw texts after each prompt, and write the fraction of each feature with its error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a folder, a hub id, or tiny-bios")
    parser.add_argument("--texts", type=int, default=256, help="texts of 40 tokens a prompt")
    args = parser.parse_args()
    base = dmgen.CausalLM.from_pretrained(args.base, dtype="bfloat16")
    head = HEADS / f"sst2-{Path(args.base).name}"
    every = (*FEATURES, features.classifier(head, base.embed, "positive"))
    rows = []
    for prompt in tqdm(PROMPTS, unit="prompt"):
        texts = base.sample(args.texts, prompt=prompt, seed=0).texts
        for feature in every:
            values = feature(texts)
            stderr = float(values.std(correction=0)) / math.sqrt(len(texts))
            score = {"fraction": round(float(values.mean()), 4), "stderr": round(stderr, 4)}
            rows.append({"prompt": prompt, "feature": feature.name} | score)
    facts = record.facts() | {"base": Path(args.base).name, "n_texts": args.texts}
    tables.write("smollm2_prompts", pd.DataFrame(rows), facts)
    print(table(facts | {"rows": rows}))


if __name__ == "__main__":
    main()
