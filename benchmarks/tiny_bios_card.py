"""Install a model trained by train_tiny_bios.py into the package, and write its model card.

    python benchmarks/tiny_bios_card.py --model tiny_bios [--package dmgen/models/tiny_bios]

Copies weights and tokenizer, lets the tokenizer start every prompt with the end-of-text token (the
model has never read a text that does not), and measures what the card says: base rates of every
ready-made feature with 99 % intervals, and samples, all from one seed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import dmgen
from dmgen.features import gender, gender_gdc, wordlist

EOS = "<|endoftext|>"
LEXICONS = sorted(p.stem for p in (Path(dmgen.features.__file__).parent / "lexicons").glob("*.txt"))
N_SHOWN = 12


def install(model: Path, package: Path) -> None:
    """Copy the model's files, its weights in bfloat16, half of their size."""
    package.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model / "tokenizer_config.json", package / "tokenizer_config.json")
    weights = load_file(model / "model.safetensors")
    narrow = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(narrow, package / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (package / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    tokenizer.save(str(package / "tokenizer.json"), pretty=False)


def rates(texts: list[str]) -> str:
    """Return a Markdown table of base rates with 99 % intervals."""
    features = [gender(kind) for kind in ("female", "male", "neither")]
    features += [gender_gdc(kind) for kind in ("female", "male")]
    features += [wordlist(name) for name in LEXICONS]
    rows = []
    for feature in features:
        values = feature(texts)
        score = dmgen.Score(
            float(values.mean()), float(values.std()) / len(texts) ** 0.5, len(texts)
        )
        low, high = score.interval(0.99)
        rows.append(f"| `{feature.name}` | {score.value:.4f} | [{max(0.0, low):.4f}, {high:.4f}] |")
    return "\n".join(["| feature | base rate | 99 % interval |", "| --- | --- | --- |", *rows])


def both_pronouns(texts: list[str]) -> str:
    """Return the fraction of texts with "she" or "her" that also say "he" or "his", with n."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    female = [w for w in words if w & {"she", "her"}]
    n_both = sum(bool(w & {"he", "his"}) for w in female)
    return f"{n_both / len(female):.0%} (n = {len(female):,})"


def card(model: Path, package: Path, n_samples: int, seed: int, note: str) -> str:
    """Return the model card as Markdown."""
    record = json.loads((model / "train.json").read_text())
    base = dmgen.CausalLM.from_pretrained(package)
    samples = base.sample(n_samples, seed=seed)
    lengths = samples.n_tokens.double()
    ended = (lengths < samples.tokens.shape[1]).double().mean()
    words = pd.Series([len(text.split()) for text in samples.texts]).mean()
    shown = "\n".join(f"- {' '.join(text.split())}" for text in samples.texts[:N_SHOWN])
    log = pd.DataFrame(record["log"])
    return f"""# tiny-bios

A GPT-2 of {record["n_parameters"]:,} parameters ({record["layers"]} layers, {record["width"]} wide,
vocabulary {record["vocab_size"]:,}) that writes sentences in the manner of Wikipedia biographies.
It exists so that `dmgen demo`, the tests and the benchmarks run in minutes on a CPU and without a
network. It is far too small to know anything: names, dates and deeds are invented.

**Data.** 687 featured biographies of the English Wikipedia as of 2013 (CC BY-SA 3.0), as collected
in https://github.com/sronen/pnlp-final-project; 41 more were held out for early stopping. See
NOTICE for what the licence means for these weights.

**Training.** `benchmarks/train_tiny_bios.py`, seed {record["seed"]}, {record["tokens"]:,} tokens
in rows of at most {record["window"]}, Muon and AdamW at {record["learning_rate"]:g} with a linear
decay over the last 30 %, {record["seconds"] / 60:.0f} minutes on one of
{record["hardware"]} (shared), torch {record["torch"]}. {note}Loss
{log["loss"].iloc[-1]:.3f} nats a token in training, **{record["valid_loss"]:.3f}** on the held-out
biographies.

**Pronouns.** Of the texts with "she" or "her", {both_pronouns(samples.texts)} also say "he" or
"his"; of real windows of 25 words, 17 %.

**Distribution.** A text starts after the end-of-text token, at a sentence boundary, and ends with
that token at the end of a paragraph ({ended:.1%} of texts within 40 tokens); a text of 40 tokens
has {words:.1f} words on average.

**Base rates** on {n_samples:,} texts of at most 40 tokens (seed {seed}):

{rates(samples.texts)}

**Samples**, the first {N_SHOWN} of that seed, not chosen:

{shown}

**Bias.** 11 % of the biographies are of women, and the model says "she" accordingly. It repeats
whatever else its sources assume. Do not use it for anything but trying dmgen out.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of train_tiny_bios.py")
    parser.add_argument(
        "--package", type=Path, default=Path(dmgen.__file__).parent / "models" / "tiny_bios"
    )
    parser.add_argument("--n-samples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence to add about the training")
    args = parser.parse_args()
    install(args.model, args.package)
    text = card(args.model, args.package, args.n_samples, args.seed, args.note)
    (args.package / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
