"""Linear heads on a base's mean hidden state, fitted on real labels: sentiment and clickbait.

    python benchmarks/classifier_heads.py DATA                     # tiny-bios
    python benchmarks/classifier_heads.py DATA --base gpt2
    python benchmarks/classifier_heads.py DATA --base models/smollm2 --only sst2

DATA is a folder with `sst2/{train,dev,test}.tsv` (Stanford Sentiment Treebank, Socher et al. 2013;
columns text, 0/1) and `clickbait/{clickbait,non_clickbait}.txt.gz` (Chakraborty et al. 2016, MIT),
a headline a line. The heads go to `benchmarks/heads/`, with their accuracy on texts held out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import record

import dmgen
from dmgen import storage
from dmgen.features import fit_classifier

HEADS = Path(__file__).parent / "heads"
# Headlines of each class that the clickbait head is fitted and tested on.
N_HEADLINES = 4_000
Labelled = tuple[list[str], list[str]]


def sst2(data: Path, split: str) -> Labelled:
    """Return the sentences of one split, labelled "positive" or "negative"."""
    with (data / "sst2" / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    rows = [row for row in rows if row[-1] in ("0", "1")]
    return [row[0] for row in rows], ["positive" if row[-1] == "1" else "negative" for row in rows]


def clickbait(data: Path) -> Labelled:
    """Return equally many headlines of each class, without duplicates."""
    texts: list[str] = []
    labels: list[str] = []
    for label, name in (("clickbait", "clickbait"), ("news", "non_clickbait")):
        with gzip.open(data / "clickbait" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            lines = dict.fromkeys(line.strip() for line in file if line.strip())
        chosen = [line for line in lines if line not in texts][:N_HEADLINES]
        texts += chosen
        labels += [label] * len(chosen)
    return texts, labels


def main() -> None:
    """Fit both heads and write them with command, commit and hardware."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", default="tiny-bios-0.1", help="a folder, a hub id, or tiny-bios")
    parser.add_argument("--only", choices=("sst2", "clickbait"), help="one head; both if not given")
    args = parser.parse_args()
    embed = dmgen.CausalLM.from_pretrained(args.base).embed
    train, test = sst2(args.data, "train"), sst2(args.data, "test")
    # A few sentences are in two splits.
    seen = set(test[0])
    kept = [pair for pair in zip(*train, strict=True) if pair[0] not in seen]
    fits = {
        "sst2": ([text for text, _ in kept], [label for _, label in kept], test),
        "clickbait": (*clickbait(args.data), None),
    }
    for name, (texts, labels, held_out) in fits.items():
        if args.only not in (None, name):
            continue
        head = fit_classifier(embed, texts, labels, base=args.base, test=held_out)
        folder = HEADS / f"{name}-{Path(args.base).name}"
        head.save_pretrained(folder)
        # Where a reader's data lies is not where ours did.
        facts = record.facts()
        facts["command"] = facts["command"].replace(str(args.data), "DATA")
        facts["n_texts"] = len(texts)
        storage.write_json(folder / "made_by.json", facts)
        print(f"{folder}: accuracy {head.test_accuracy} on {head.test_accuracy.n:,} texts held out")


if __name__ == "__main__":
    main()
