"""The command line; the only file that prints. Results go to stdout, all else to stderr."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import dmgen
from dmgen import runs
from dmgen.run_config import (
    SAMPLERS,
    EvaluateConfig,
    FitConfig,
    RunConfig,
    load_target,
    save_target,
)
from dmgen.samplers.trainer import Trainer

# Everything that `dmgen demo` sets, and what its config.yaml will say.
DEMO = RunConfig(
    base="tiny-bios",
    constraints=[{"moment": {"gender": "female"}, "target": 0.5}],
    max_new_tokens=40,
    method="GDCpp",
    n_steps=75,
    fit=FitConfig(n_samples=10_240),
    trainer=dmgen.TrainerConfig(
        batch_size=1024,
        backward_size=320,
        learning_rate=1.7e-4,
        warmup_steps=3,
        average_decay=0.95,
        proposal_rule="policy",
        first_batches_from_fit=True,
        checkpoint_every=10,
    ),
    evaluate=EvaluateConfig(n_samples=2048),
)
# Pairs of texts in samples.jsonl, and how many of them are shown.
_N_PAIRS, _N_SHOWN = 32, 4
_WRITTEN = (
    "config.yaml", "target.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl",
    "checkpoints", "policy",
)  # fmt: skip
# What a resumed run may change: how it goes on, and never what it is.
_MAY_CHANGE = {"n_steps", "trainer", "evaluate", "device", "dtype"}

_BAD_INPUT = (ValueError, TypeError)
# What a run can meet without a fault of dmgen's: full disks and memories, no device, no numbers.
_FAILURES = (ArithmeticError, OSError, RuntimeError, MemoryError)


class _Commands(TyperGroup):
    """Makes an error one message and an exit code: 2 bad input, 1 a failure, 130 Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except _BAD_INPUT + _FAILURES as error:
            if ctx.params.get("traceback"):
                raise
            typer.secho(
                f"Error: {str(error) or type(error).__name__}", err=True, fg=typer.colors.RED
            )
            raise typer.Exit(2 if isinstance(error, _BAD_INPUT) else 1) from None


main = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmgen {dmgen.__version__}")
        raise typer.Exit


@main.callback()
def _begin(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="On an error, show where in the code it arose.")
    ] = False,
) -> None:
    """Make the output distribution of a text generator obey constraints.

    Start with `dmgen demo`: it debiases a small embedded model in a few minutes, offline.
    """
    # A console without Greek letters shows "?" for them, and does not end the run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # The one place that quiets transformers: its bars and notes would tear ours apart.
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


_Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, made by `dmgen train` or `dmgen demo`."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:0. [default: the run's own]")
]


@main.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed gives other texts.")] = 0,
) -> None:
    """Debias a small embedded model: half of its texts on women.

    The model writes biographies, nearly all of them about men. It comes with dmgen: nothing is
    downloaded. The command fits the target, trains a policy, evaluates it on fresh texts, and
    leaves a run folder that the other commands read.
    """
    config = replace(
        DEMO,
        trainer=replace(DEMO.trainer, seed=seed),
        fit=replace(DEMO.fit, seed=seed + 1),
        evaluate=replace(DEMO.evaluate, seed=seed + 2),
    )
    _refuse_used(out)
    _run(config, out)


@main.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What to do, as YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings put over those of the file: trainer.batch_size=256 "
            "constraints.0.target=0.4",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder to make. Needed, but for --print-config.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show all settings as YAML, and do nothing else.")
    ] = False,
) -> None:
    """Fit a policy to constraints on a language model.

    The smallest configuration names a model and what its texts must be like:

    \b
        base: gpt2
        constraints:
          - pointwise: {wordlist: sports}
          - {moment: {gender: female}, target: 0.5}

    --print-config shows every other setting with its default. After Ctrl-C, the run goes on with

    \b
        dmgen train RUN/config.yaml --out RUN --resume
    """
    settings = RunConfig.load(config, overrides or [])
    if print_config:
        typer.echo(settings.to_yaml(), nl=False)
        return
    if out is None:
        raise ValueError("give the run folder to make: --out runs/NAME")
    if Path(settings.base).is_dir() and settings.base != "tiny-bios":
        # The run folder must find its base from any working directory.
        settings = replace(settings, base=str(Path(settings.base).resolve()))
    if resume:
        _refuse_other_run(out, settings)
    else:
        _refuse_used(out)
    _run(settings, out, resume=resume)


@main.command()
def evaluate(
    run: _Run,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Texts of the policy and of the base. [default: the run's own]"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Another seed, other texts. [default: the run's own]")
    ] = None,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Measure the policy of a run on fresh texts.

    Moments with their 99 % intervals and verdicts, what the policy forgot (KL), diversity. Without
    options, it gives the figures that the run ended with.
    """
    config, policy = _finished(run, device)
    target = load_target(run, config, _model(config.base, config))
    scores = dmgen.evaluate(
        policy,
        target,
        n_samples=config.evaluate.n_samples if n is None else n,
        seed=config.evaluate.seed if seed is None else seed,
    )
    typer.echo(scores.to_json() if as_json else scores)


@main.command()
def sample(
    run: _Run,
    n: Annotated[int, typer.Option("-n", min=1, help="How many texts.")] = 20,
    seed: Annotated[
        int | None, typer.Option(help="The same seed, the same texts. [default: new ones]")
    ] = None,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Print texts of the policy of a run."""
    config, policy = _finished(run, device)
    drawn = policy.sample(n, prompt=config.prompt, seed=seed)
    if not as_json:
        for i, text in enumerate(drawn.texts, 1):
            typer.echo(f"{i:>{len(str(n))}}  {' '.join(text.split())}")
        return
    read = {f.name: f for c in config.build_constraints() for f in c.features}
    values = {name: f(drawn.texts, drawn.prompts).tolist() for name, f in read.items()}
    for i, (text, log_prob) in enumerate(zip(drawn.texts, drawn.log_prob.tolist(), strict=True)):
        features = {name: column[i] for name, column in values.items()}
        row = {"prompt": config.prompt, "text": text, "log_prob": log_prob, "features": features}
        typer.echo(json.dumps(row, ensure_ascii=False))


def _run(config: RunConfig, out: Path, *, resume: bool = False) -> None:
    """The whole of a run, by the public names; the rest of it is what is shown and kept."""
    started = time.monotonic()
    _print_asked(config, out)
    # Before the long work: a folder that cannot be made.
    out.mkdir(parents=True, exist_ok=True)
    base = _model(config.base, config)
    if resume:
        target = load_target(out, config, base)
    else:
        typer.echo(f"Fitting λ on {config.fit.n_samples:,} texts of the base ...")
        target = dmgen.EBM.fit(base, config.build_constraints(), **_fit_draw(config))
        typer.echo(f"\n{target}\n")
        save_target(out, target)
    policy = base.copy()
    sampler = SAMPLERS[config.method](policy, target, config.trainer)
    if resume:
        _go_on(sampler, config, out)
    runs.write_config(out, config.to_mapping())
    try:
        sampler.train(config.n_steps - sampler.step, out)
        policy.save_pretrained(out / "policy")
        scores = dmgen.evaluate(policy, target, **asdict(config.evaluate))
    except (KeyboardInterrupt, Exception):
        typer.echo(
            f"\nStopped after step {sampler.step} of {config.n_steps}. {out} keeps the metrics and "
            f"the last checkpoint; to go on from it:\n  {_to_resume(out)}",
            err=True,
        )
        raise
    final = {"step": sampler.step, "final": True} | asdict(config.evaluate)
    runs.append_row(out / "evaluations.jsonl", final | scores.to_dict())
    typer.echo(f"\n{scores}\n")
    _compare_texts(base, policy, config, out)
    minutes = (time.monotonic() - started) / 60
    typer.echo(f"\nDone in {minutes:.1f} minutes.\n{_next_steps(out)}")


def _fit_draw(config: RunConfig) -> dict[str, Any]:
    """What says which texts λ is fitted on."""
    return asdict(config.fit) | {"prompt": config.prompt, "max_new_tokens": config.max_new_tokens}


def _go_on(sampler: Trainer, config: RunConfig, out: Path) -> None:
    """Brings a new sampler to where the run in `out` stands, with the texts it still has to use."""
    if any((out / "checkpoints").glob("step-*")):
        sampler.resume(out)
    else:
        # Stopped before its first checkpoint: the same steps again, with the same λ.
        runs.write_rows(out / "metrics.jsonl", [])
    if sampler.step > config.n_steps:
        raise ValueError(
            f"the run in {out} is past step {config.n_steps} already: raise n_steps, as in "
            f"n_steps={2 * sampler.step}"
        )
    if config.trainer.first_batches_from_fit:
        draw = _fit_draw(config)
        sampler.target.fit_samples = sampler.target.base.sample(draw.pop("n_samples"), **draw)
    typer.echo(f"Going on from step {sampler.step} of {config.n_steps}, with λ as it was fitted.")


def _model(name: str | Path, config: RunConfig) -> dmgen.CausalLM:
    if (config.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"there is no device {config.device!r} here: torch sees no CUDA; try cpu")
    return dmgen.CausalLM.from_pretrained(
        name, device=config.device, dtype=config.dtype, max_new_tokens=config.max_new_tokens
    )


def _refuse_used(out: Path) -> None:
    """Raises if a new run in `out` would touch anything that is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run, --out runs/NAME")
    found = [name for name in _WRITTEN if (out / name).exists()]
    if found:
        begun = "config.yaml" in found and "policy" not in found
        raise ValueError(
            f"{out} already holds a run ({', '.join(found)}). Give another folder, such as "
            f"--out {out}-2" + (f", or go on with it:\n  {_to_resume(out)}" if begun else "")
        )


def _refuse_other_run(out: Path, config: RunConfig) -> None:
    """Raises unless `out` holds a run of this configuration that is not finished."""
    begun = _config_of(out).to_mapping()
    wanted = config.to_mapping()
    other = [key for key in wanted if key not in _MAY_CHANGE and wanted[key] != begun[key]]
    if other:
        raise ValueError(
            f"the run in {out} was begun with another {', '.join(other)} (see {out}/config.yaml): "
            "a run that goes on keeps them. Give another folder, --out, for a new run"
        )
    evaluations = out / "evaluations.jsonl"
    for row in runs.read_rows(evaluations) if evaluations.exists() else []:
        if row.get("final") and row["step"] >= config.n_steps:
            raise ValueError(
                f"the run in {out} is finished: it took {row['step']} steps. For more, raise "
                f"n_steps:\n  {_to_resume(out)} n_steps={2 * row['step']}"
            )


def _config_of(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file() or not (run / "target.json").is_file():
        raise ValueError(f"there is no run in {run}: it has no config.yaml with a target.json")
    return RunConfig.load(run / "config.yaml")


def _finished(run: Path, device: str | None) -> tuple[RunConfig, dmgen.CausalLM]:
    """The configuration of a run and its policy."""
    config = _config_of(run)
    if device is not None:
        config = replace(config, device=device)
    if not (run / "policy").is_dir():
        raise ValueError(f"the run in {run} is not finished; go on with it:\n  {_to_resume(run)}")
    return config, _model(run / "policy", config)


def _print_asked(config: RunConfig, out: Path) -> None:
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
    before, after = (
        model.sample(_N_PAIRS, prompt=config.prompt, seed=config.evaluate.seed).texts
        for model in (base, policy)
    )
    pairs = list(zip(before, after, strict=True))
    rows = [{"prompt": config.prompt, "base": b, "policy": p} for b, p in pairs]
    runs.write_rows(out / "samples.jsonl", rows)
    table = Table("base", "policy", title="The same random numbers, before and after")
    for pair in pairs[:_N_SHOWN]:
        # As Text: a bracket in a text is no markup.
        table.add_row(*(Text(" ".join(text.split())) for text in pair), end_section=True)
    Console(highlight=False).print(table)


def _next_steps(out: Path) -> str:
    run = shlex.quote(str(out))
    return (
        f"The run is in {out}; {out}/policy is a Hugging Face folder, which\n"
        "AutoModelForCausalLM.from_pretrained loads. Next:\n"
        f"  dmgen sample {run} -n 20                 more texts of the policy\n"
        f"  dmgen evaluate {run} --seed 7            the table again, on other texts\n"
        f"  dmgen train {run}/config.yaml --out {run}-2 trainer.seed=8\n"
        "                                           the same with a setting changed"
    )


def _to_resume(out: Path) -> str:
    run = shlex.quote(str(out))
    return f"dmgen train {run}/config.yaml --out {run} --resume"
