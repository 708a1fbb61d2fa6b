"""Train `tiny-bios`, the language model that ships inside dmgen, from featured biographies.

    python benchmarks/train_tiny_bios.py --corpus biographies.jsonl.gz --out tiny_bios

The corpus is a gzipped JSON-lines file with `name`, `text` (a paragraph a line) and `split`
("train"/"valid"), one biography a line; the text is that of Wikipedia's featured biographies
(CC BY-SA 3.0), as collected in https://github.com/sronen/pnlp-final-project. The valid split is
used for early stopping only.

A training row is the end-of-text token, then a paragraph from one of its sentence starts on,
cut at `--window` tokens or closed by the end-of-text token where the paragraph ends. So the model
starts a text at a sentence boundary and may end it.

The run checkpoints every few minutes; the same command started again goes on where it stopped.
`train.json` beside the weights says what was done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
# A sentence ends at . ! or ?, before a blank and a capital or quote; not after an initial or title.
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\bNo)(?<!\bCo)"
    r"[.!?][\"')\]]*\s+(?=[A-Z\"'])"
)


def read_paragraphs(corpus: Path, split: str) -> list[str]:
    """Return the paragraphs of one split without headings and fragments (< 60 characters)."""
    paragraphs = []
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            biography = json.loads(line)
            if biography["split"] == split:
                paragraphs += [" ".join(p.split()) for p in biography["text"].split("\n")]
    return [p for p in paragraphs if len(p) >= 60 and p[-1] in ".!?\"')]"]


def train_tokenizer(paragraphs: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, clean_up_tokenization_spaces=False
    )


def make_rows(paragraphs: list[str], tokenizer: PreTrainedTokenizerFast, window: int) -> np.ndarray:
    """Return all training rows, `(n_rows, window + 1)` int16; -1 after the end of a text."""
    eos = tokenizer.eos_token_id
    starts, texts = [], []
    for paragraph in paragraphs:
        for start in [0] + [m.end() for m in SENTENCE_END.finditer(paragraph)]:
            # No token is shorter than a byte, and few windows reach 8 characters a token.
            texts.append(paragraph[start : start + 8 * window])
            starts.append(start + 8 * window >= len(paragraph))
    rows = np.full((len(texts), window + 1), -1, dtype=np.int16)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for row, ids, reaches_end in zip(rows, encoded, starts, strict=True):
        ids = [eos, *ids] + ([eos] if reaches_end else [])
        row[: len(ids)] = ids[: window + 1]
    return rows


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy in nats and the number of predicted tokens."""
    inputs, labels = rows[:, :-1].clamp(min=0), rows[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    logits = logits.float()
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum"
    )
    return total, (labels >= 0).sum()


@torch.no_grad()
def valid_loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    sums = [loss_of(model, chunk) for chunk in rows.split(128)]
    return float(sum(s for s, _ in sums) / sum(n for _, n in sums))


def learning_rate(step: int, n_steps: int, peak: float, warmup: int = 100) -> float:
    """Return a constant rate after the warm-up, and a linear decay to 0 over the last 30 %."""
    decay = (n_steps - step) / (0.3 * n_steps)
    return peak * max(0.0, min(1.0, (step + 1) / warmup, decay))


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        layers = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        matrices = {id(p) for p in layers}
        others = [p for p in model.parameters() if id(p) not in matrices]
        muon = torch.optim.Muon(layers, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.05)
        self.named: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw}

    def step(self, rate: float) -> None:
        for optimizer in self.named.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{i}.{key}": value.contiguous()
            for name, optimizer in self.named.items()
            for i, moments in optimizer.state_dict()["state"].items()
            for key, value in moments.items()
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, optimizer in self.named.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key in (k for k in tensors if k.startswith(name + ".")):
                _, i, moment = key.split(".")
                state.setdefault(int(i), {})[moment] = tensors[key]
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_checkpoint(
    folder: Path, model: GPT2LMHeadModel, optimizers: Optimizers, state: dict
) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    tensors.pop("model.lm_head.weight")  # tied to the embedding
    tensors |= optimizers.tensors()
    save_file(tensors, folder / "checkpoint.tmp", metadata={"state": json.dumps(state)})
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, model: GPT2LMHeadModel, optimizers: Optimizers) -> dict | None:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as f:
        state = json.loads(f.metadata()["state"])
    tensors = load_file(path)
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    optimizers.load(tensors)
    return state


def build_model(args: argparse.Namespace, eos: int) -> GPT2LMHeadModel:
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.window,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 32,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return GPT2LMHeadModel(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="biographies.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=6144)
    parser.add_argument("--window", type=int, default=64, help="tokens of context")
    parser.add_argument("--tokens", type=float, default=22e6, help="training budget in tokens")
    parser.add_argument("--batch-size", type=int, default=128, help="rows a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak; then linear to 0")
    parser.add_argument("--patience", type=int, default=5, help="valid checks without a gain")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    paragraphs = read_paragraphs(args.corpus, "train")
    tokenizer = train_tokenizer(paragraphs, args.vocab_size)
    tokenizer.save_pretrained(args.out)
    rows = torch.from_numpy(make_rows(paragraphs, tokenizer, args.window))
    valid = torch.from_numpy(
        make_rows(read_paragraphs(args.corpus, "valid"), tokenizer, args.window)
    )
    valid = valid[:: max(1, len(valid) // 1024)].long()
    model = build_model(args, tokenizer.eos_token_id)
    n_params = sum(p.numel() for p in model.parameters())
    tokens_a_row = float((rows[:, 1:] >= 0).float().mean()) * args.window
    n_steps = int(args.tokens / (tokens_a_row * args.batch_size))
    print(f"{len(rows):,} rows of {tokens_a_row:.1f} tokens, {n_params:,} parameters")
    print(f"{n_steps:,} steps")

    optimizers = Optimizers(model)
    state = load_checkpoint(args.out, model, optimizers) or {
        "step": 0, "tokens": 0, "seconds": 0.0, "best": float("inf"), "since_best": 0, "log": [],
    }  # fmt: skip
    forward = torch.compile(model) if args.compile else model
    started = last_saved = time.monotonic()
    seconds_before = state["seconds"]
    running: list[float] = []
    check_every = max(1, n_steps // 40)
    while state["step"] < n_steps and state["since_best"] < args.patience:
        step = state["step"]
        epoch, at = divmod(step * args.batch_size, len(rows) - args.batch_size)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(rows))
        batch = rows[order[at : at + args.batch_size]].long()
        total, n = loss_of(forward, batch)
        (total / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(step, n_steps, args.learning_rate))
        running.append(float(total.detach()) / int(n))
        state["step"] += 1
        state["tokens"] += int(n)
        state["seconds"] = seconds_before + time.monotonic() - started
        if state["step"] % check_every == 0 or state["step"] == n_steps:
            loss = valid_loss(model, valid)
            state["since_best"] = 0 if loss < state["best"] else state["since_best"] + 1
            row = {k: state[k] for k in ("step", "tokens", "seconds")}
            state["log"].append(row | {"loss": float(np.mean(running)), "valid_loss": loss})
            running.clear()
            print(json.dumps(state["log"][-1]), flush=True)
            if loss < state["best"]:
                state["best"] = loss
                model.save_pretrained(args.out)
        if time.monotonic() - last_saved > 60 * args.checkpoint_minutes:
            save_checkpoint(args.out, model, optimizers, state)
            last_saved = time.monotonic()

    record = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {
        "n_parameters": n_params,
        "valid_loss": state["best"],
        **{k: state[k] for k in ("tokens", "seconds", "log")},
        "torch": torch.__version__,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    (args.out / "train.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / "checkpoint.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
