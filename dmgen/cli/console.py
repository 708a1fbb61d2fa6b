"""What `dmgen demo` and `dmgen train` do, and what they show and keep of it."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import dmgen
from dmgen import report, storage
from dmgen.experiment import versions
from dmgen.experiment.config import SAMPLERS, RunConfig, from_anywhere
from dmgen.experiment.publish import load_target, save_target
from dmgen.report import figures
from dmgen.training import run_folder
from dmgen.training.trainer import Trainer

# Pairs of texts in samples.jsonl, and how many of them are shown.
_N_PAIRS, _N_SHOWN = 32, 4
WRITTEN = (
    "config.yaml", "target.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl",
    "checkpoints", "policy", "report.html",
)  # fmt: skip
# What accelerate can send metrics to; each needs its own package.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
# After so many steps, the time of the whole run is estimated.
_N_TIMED = 5
# The errors of λ that `plan` says the price of.
_PLANNED_STDERR = (0.1, 0.05, 0.02)
# What a resumed run may change: how it goes on, and never what it is.
_MAY_CHANGE = {"n_steps", "trainer", "evaluate", "device", "dtype"}


def run(config: RunConfig, out: Path, *, resume: bool = False, track: str | None = None) -> None:
    """The whole of a run, by the public names; the rest of it is what is shown and kept."""
    started = time.monotonic()
    if config.trainer.first_batches_from_fit and config.fit.n_samples < config.trainer.batch_size:
        raise ValueError(
            f"trainer.first_batches_from_fit needs a batch of {config.trainer.batch_size} texts "
            f"from the fit, and fit.n_samples is {config.fit.n_samples}"
        )
    print_asked(config, out)
    # Before the long work: a folder that cannot be made.
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} may not be written to: give another folder, or change its rights")
    base = load_model(config.base, config)
    policy = base.copy(**asdict(config.policy))
    target = load_target(out, config, base) if resume else fit_target(config, base)
    sampler = SAMPLERS[config.method](policy, target, config.trainer, **config.method_options)
    if resume:
        _go_on(sampler, config, out)
    else:
        save_target(out, target)
    versions.write_config(out, config.to_mapping())
    try:
        with _tracker(track, config, out) as log:
            _train(sampler, config, out, log)
        (out / "policy" / "README.md").unlink(missing_ok=True)  # of fewer steps
        policy.save_pretrained(out / "policy")
        scores = dmgen.evaluate(policy, target, **asdict(config.evaluate))
        typer.echo(f"\n{scores}\n")
        _compare_texts(base, policy, config, out)
        final = {"step": sampler.step, "final": True} | asdict(config.evaluate)
        storage.append_row(out / "evaluations.jsonl", final | scores.to_dict())
        report.write_model_card(out)
        if figures.available():
            report.write_report(out)
    except (KeyboardInterrupt, Exception):
        kept = "the metrics and the last checkpoint; to go on from it"
        if not run_folder.has_checkpoint(out):
            kept = "λ, but there was no checkpoint yet; to train again from the first step"
        typer.echo(
            f"\nStopped after step {sampler.step} of {config.n_steps}. {out} keeps {kept}:\n"
            f"  {_to_resume(out)}",
            err=True,
        )
        raise
    minutes = (time.monotonic() - started) / 60
    typer.echo(f"\nDone in {minutes:.1f} minutes.\n{_next_steps(out)}")


def fit_target(config: RunConfig, base: dmgen.CausalLM, *, show: bool = True) -> dmgen.EBM:
    """Fits λ, and shows how."""
    if show:
        typer.echo(f"Fitting λ on {config.fit.n_samples:,} texts of the base ...")
    target = dmgen.EBM.fit(base, config.build_constraints(base), **fit_draw(config))
    if show:
        typer.echo(f"\n{target}\n")
    return target


def plan(target: dmgen.EBM) -> list[dict[str, Any]]:
    """For each soft moment its hits, λ with its error, and the texts that smaller errors take."""
    fit = target.moment_fit
    if fit is None:
        return []
    return [
        {
            "feature": name,
            "n_samples": fit.n_samples,
            "hits": int(fit.hits[i]),
            "lambda": float(fit.lambdas[i]),
            "lambda_stderr": float(fit.lambdas_stderr[i]),
            "samples_for_stderr": {
                str(wanted): int(fit.n_samples_for(wanted)[i]) for wanted in _PLANNED_STDERR
            },
        }
        for i, name in enumerate(fit.names)
    ]


def _train(
    sampler: Trainer, config: RunConfig, out: Path, log: Callable[[dict[str, Any]], None]
) -> None:
    """Trains to the end, and says after a few steps how long that will take."""
    left = config.n_steps - sampler.step
    given = sampler.target.fit_samples
    # Steps on texts of the fit draw nothing, so they tell too little of the time of the others.
    n_given = len(given) // config.trainer.batch_size if given is not None else 0
    skipped = max(0, n_given - sampler.step) if config.trainer.first_batches_from_fit else 0
    first = min(left, skipped + _N_TIMED)
    if first < left:
        sampler.train(first, out, log=log)
        rows = sampler.history[-_N_TIMED - 1 :]
        seconds = (rows[-1]["seconds"] - rows[0]["seconds"]) / max(1, len(rows) - 1)
        minutes = seconds * (left - first) / 60
        typer.echo(
            f"Step {sampler.step} of {config.n_steps}: about {minutes:.1f} minutes more "
            f"({seconds:.1f} s a step).",
        )
    sampler.train(config.n_steps - sampler.step, out, log=log)


@contextmanager
def _tracker(
    name: str | None, config: RunConfig, out: Path
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes each row of metrics to a tracker; nothing where none is asked for."""
    if name is None:
        yield lambda row: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=name, project_dir=out, cpu=not torch.cuda.is_available())
    accelerator.init_trackers("dmgen", config={"config": storage.as_yaml(config.to_mapping())})
    try:
        yield lambda row: accelerator.log(row, step=row["step"])
    finally:
        accelerator.end_training()


def fit_draw(config: RunConfig) -> dict[str, Any]:
    """What says which texts λ is fitted on."""
    return asdict(config.fit) | {"prompt": config.prompt, "max_new_tokens": config.max_new_tokens}


def _go_on(sampler: Trainer, config: RunConfig, out: Path) -> None:
    """Brings a new sampler to where the run in `out` stands, with the texts it still has to use."""
    if run_folder.has_checkpoint(out):
        sampler.resume(out)
    else:
        # Stopped before its first checkpoint: the same steps again, with the same λ.
        storage.write_rows(out / "metrics.jsonl", [])
    if sampler.step > config.n_steps:
        raise ValueError(
            f"the run in {out} is past step {config.n_steps} already: raise n_steps, as in "
            f"n_steps={2 * sampler.step}"
        )
    used = sampler.step * config.trainer.batch_size
    if config.trainer.first_batches_from_fit and used < config.fit.n_samples:
        draw = fit_draw(config)
        sampler.target.fit_samples = sampler.target.base.sample(draw.pop("n_samples"), **draw)
    typer.echo(f"Going on from step {sampler.step} of {config.n_steps}, with λ as it was fitted.")


def load_model(name: str | Path, config: RunConfig) -> dmgen.CausalLM:
    """The model in a folder or on the hub, on the device that the configuration asks for."""
    if (config.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"there is no device {config.device!r} here: torch sees no CUDA; try cpu")
    return dmgen.CausalLM.from_pretrained(
        name, device=config.device, dtype=config.dtype, max_new_tokens=config.max_new_tokens
    )


def refuse_tracker(name: str | None) -> None:
    """Raises if the metrics cannot be sent to this tracker, which accelerate would only warn of."""
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"--track must be one of {', '.join(TRACKERS)}, got {name!r}")
    from accelerate.tracking import get_available_trackers

    if name not in [tracker.value for tracker in get_available_trackers()]:
        raise ValueError(f"--track {name} needs its package: pip install {name}")


def refuse_used(out: Path) -> None:
    """Raises if a new run in `out` would touch anything that is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run, --out runs/NAME")
    if re.match(r"\w\w+:/", str(out)):
        raise ValueError(f"--out must be a folder of this machine, got {out}")
    found = [name for name in WRITTEN if (out / name).exists()]
    if found:
        begun = "config.yaml" in found and not _has_card(out)
        go_on = f", or go on with it:\n  {_to_resume(out)}" if begun else ""
        raise ValueError(
            f"{out} already holds a run ({', '.join(found)}). Give another folder, such as "
            f"--out {shlex.quote(f'{out}-2')}{go_on}"
        )


def refuse_other_run(out: Path, config: RunConfig) -> None:
    """Raises unless `out` holds a run of this configuration that is not finished."""
    begun = from_anywhere(config_of(out)).to_mapping()
    wanted = config.to_mapping()
    other = [key for key in wanted if key not in _MAY_CHANGE and wanted[key] != begun[key]]
    if other:
        raise ValueError(
            f"the run in {out} was begun with another {', '.join(other)} (see {out}/config.yaml): "
            "a run that goes on keeps them. Give another folder, --out, for a new run"
        )
    evaluations = out / "evaluations.jsonl"
    for row in storage.read_rows(evaluations) if _has_card(out) and evaluations.exists() else []:
        if row.get("final") and row["step"] >= config.n_steps:
            raise ValueError(
                f"the run in {out} is finished: it took {row['step']} steps. For more, raise "
                f"n_steps:\n  {_to_resume(out)} n_steps={2 * row['step']}"
            )


def _has_card(run: Path) -> bool:
    """Whether the run is finished: the card of its policy is what every run writes last."""
    return (run / "policy" / "README.md").is_file()


def config_of(run: Path) -> RunConfig:
    """The configuration of a run."""
    if not (run / "config.yaml").is_file() or not (run / "target.json").is_file():
        raise ValueError(f"there is no run in {run}: it has no config.yaml with a target.json")
    return RunConfig.load(run / "config.yaml")


def finished(run: Path, device: str | None) -> tuple[RunConfig, dmgen.CausalLM]:
    """The configuration of a run and its policy, computing as it did when it was trained.

    In float32 if it was an adapter over half precision: it is part of the weights here, and rounded
    with them most of it would be lost.
    """
    config = config_of(run)
    if device is not None:
        config = replace(config, device=device)
    if not _has_card(run):
        raise ValueError(f"the run in {run} is not finished; go on with it:\n  {_to_resume(run)}")
    # Float32 weights, as in training: loaded in half precision they would be rounded for good.
    policy = load_model(run / "policy", replace(config, dtype=None))
    if config.dtype and not config.policy.adapter:
        policy.dtype = getattr(torch, config.dtype)
        # Autocast casts the weights once a pass if they may be trained, else at each use.
        policy.model.requires_grad_(True)
    return config, policy


def base_of(config: RunConfig) -> dmgen.CausalLM:
    """The base of a finished run, computing as the policy does that `finished` gives."""
    base = load_model(config.base, config)
    if config.policy.adapter and config.dtype:
        # With the rounded weights that the adapter was added to.
        base = base.copy()
        base.dtype = torch.float32
    return base


def print_asked(config: RunConfig, out: Path) -> None:
    """What is about to happen, in words."""
    typer.echo(f"Base        {config.base}")
    for constraint in config.build_constraints():
        wish = "every text"
        if isinstance(constraint, dmgen.Moment):
            wish = f"mean {constraint.target}"
        typer.echo(f"Asked       {constraint.name}: {wish}")
    typer.echo(
        f"Method      {config.method}, {config.n_steps:,} steps of {config.trainer.batch_size:,} "
        f"texts of at most {config.max_new_tokens} tokens\nRun folder  {out}\n"
    )


def _compare_texts(
    base: dmgen.CausalLM, policy: dmgen.CausalLM, config: RunConfig, out: Path
) -> None:
    """Keeps pairs of texts from the same random numbers, and shows the first few."""
    drawn = {
        name: model.sample(_N_PAIRS, prompt=config.prompt, seed=config.evaluate.seed)
        for name, model in (("base", base), ("policy", policy))
    }
    read = {f.name: f for c in config.build_constraints(base) for f in c.features}
    values = {
        name: {key: f(samples.texts, samples.prompts).tolist() for key, f in read.items()}
        for name, samples in drawn.items()
    }
    pairs = list(zip(drawn["base"].texts, drawn["policy"].texts, strict=True))
    rows = [
        {
            "prompt": config.prompt,
            "base": before,
            "policy": after,
            "features": {
                name: {key: column[i] for key, column in columns.items()}
                for name, columns in values.items()
            },
        }
        for i, (before, after) in enumerate(pairs)
    ]
    storage.write_rows(out / "samples.jsonl", rows)
    table = Table("base", "policy", title="The same random numbers, before and after")
    for pair in pairs[:_N_SHOWN]:
        # As Text: a bracket in a text is no markup.
        table.add_row(*(Text(" ".join(text.split())) for text in pair), end_section=True)
    Console(highlight=False).print(table)


def _next_steps(out: Path) -> str:
    run = shlex.quote(str(out))
    page = f"{out}/report.html shows all of it. " if figures.available() else ""
    return (
        f"{page}{out}/policy is a Hugging Face folder, which\n"
        "AutoModelForCausalLM.from_pretrained loads. Next:\n"
        f"  dmgen sample {run} -n 20                 more texts of the policy\n"
        f"  dmgen evaluate {run} --seed 7            the table again, on other texts\n"
        f"  dmgen train {run}/config.yaml --out {run}-2 trainer.seed=8\n"
        "                                           the same with a setting changed"
    )


def _to_resume(out: Path) -> str:
    run = shlex.quote(str(out))
    return f"dmgen train {run}/config.yaml --out {run} --resume"
