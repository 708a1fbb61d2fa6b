"""How often a base says what the tasks ask for, by prompt: which prompt to choose.

    python benchmarks/smollm2_prompts.py models/smollm2     # about two minutes on two cores

A constraint is worth training for where the base meets it rarely, but often enough to be seen in a
batch; a prompt about a person is neutral where it names no gender and the text still tells one.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import record
from tqdm import tqdm

import dmgen
from dmgen import features, storage

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
    """The shares with their errors as Markdown."""
    names = [name for name in result["rows"][0] if name != "prompt"]
    lines = [
        f"`{result['command']}`: {result['n_texts']} texts of 40 tokens a prompt, torch "
        f"{result['versions']['torch']}. Share of texts, ± one standard error.",
        "",
        "| prompt | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for row in result["rows"]:
        cells = ["{:.3f} ± {:.3f}".format(*row[name]) for name in names]
        lines.append(f"| {row['prompt']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Draws texts after each prompt, and writes the share of each feature with its error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a folder, a hub id, or tiny-bios")
    parser.add_argument("--texts", type=int, default=256, help="texts of 40 tokens a prompt")
    args = parser.parse_args()
    base = dmgen.CausalLM.from_pretrained(args.base, dtype="bfloat16")
    head = HEADS / f"sst2-{Path(args.base).name}"
    asked = (*FEATURES, features.classifier(head, base.embed, "positive"))
    rows = []
    for prompt in tqdm(PROMPTS, unit="prompt"):
        texts = base.sample(args.texts, prompt=prompt, seed=0).texts
        row: dict[str, object] = {"prompt": prompt}
        for feature in asked:
            values = feature(texts)
            stderr = float(values.std(correction=0)) / math.sqrt(len(texts))
            row[feature.name] = [round(float(values.mean()), 4), round(stderr, 4)]
        rows.append(row)
    found = {"base": Path(args.base).name, "n_texts": args.texts, "rows": rows}
    storage.write_json(record.RESULTS / "smollm2_prompts.json", found | record.facts())
    print(pd.DataFrame(rows).to_string())


if __name__ == "__main__":
    main()
