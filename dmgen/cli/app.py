"""The commands. Results go to stdout, all else to stderr.

Nothing heavy is imported before a command runs: `dmgen --help` must not wait for torch.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import dmgen
from dmgen.validation import check_choice

# All settings of `dmgen demo`; those left out are defaults.
DEMO: dict[str, Any] = {
    "base": "tiny-bios",
    "constraints": [{"moment": {"gender": "female"}, "target": 0.5}],
    "max_new_tokens": 40,
    "method": "GDCpp",
    "n_steps": 60,
    "policy": {"adapter": "lora", "output_rows": True},
    "fit": {"n_samples": 10_240},
    "trainer": {
        "batch_size": 128,
        "learning_rate": 1.5e-3,
        "warmup_steps": 5,
        "schedule": "cosine",
        "total_steps": 60,
        "max_grad_norm": 1.0,
        "credit": "token",
        "gae_lambda": 0.9,
        "proposal_rule": "guided",
        "checkpoint_every": 10,
    },
    "evaluate": {"n_samples": 2048},
}
# Trackers of accelerate; each needs its own package.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
# An ImportError is an extra that is not installed, and says so.
_BAD_INPUT = (ValueError, TypeError, ImportError)
# Failures without a fault of dmgen's: full disks and memories, no device, no numbers.
_FAILURES = (ArithmeticError, OSError, RuntimeError, MemoryError)


class _Commands(TyperGroup):
    """Turn an error into a message and an exit code: 2 bad input, 1 a failure, 130 Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
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


class _Command(TyperCommand):
    """A command that refuses launchers and quiets transformers; its help does neither."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its arguments are parsed by now, so that `--help` came before."""
        from transformers.utils import logging

        from dmgen.training.distributed import n_launched

        if n_launched() > 1:
            raise ValueError(
                f"dmgen works in one process, and a launcher started it in {n_launched()} "
                "processes: to train in several, use dmgen's trainers in a script"
            )
        # A console without Greek letters shows "?" for them, and does not end the run.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        # The one place that quiets transformers: its bars and notes would tear ours apart.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return super().invoke(ctx)


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


_Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, made by `dmgen train` or `dmgen demo`."),
]
_Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The settings of a run, as YAML.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings put over those of the file: trainer.batch_size=256 constraints.0.target=0.4",
        show_default=False,
    ),
]
_Png = Annotated[bool, typer.Option("--png", help="Write each plot as a PNG beside the page.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:0. [default: the run's own]")
]


@main.command(cls=_Command)
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed gives other texts.")] = 0,
) -> None:
    """Debias a small embedded model: half of its texts on women.

    The model writes biographies, hardly any of them about women. It comes with dmgen: nothing is
    downloaded. The command fits the target, trains a policy, evaluates it on fresh texts, and
    leaves a run folder that the other commands read.
    """
    from dmgen.cli import console
    from dmgen.experiment.config import RunConfig

    settings = {"trainer": seed, "fit": seed + 1, "evaluate": seed + 2}
    seeds = {section: DEMO[section] | {"seed": value} for section, value in settings.items()}
    console.run(RunConfig.from_mapping(DEMO | seeds), out)


# \b keeps the lines of a paragraph as they are.
_TRAIN_HELP = """Fit a policy to constraints on a language model.

The smallest configuration names a model and constraints on its texts:

\b
    base: gpt2
    constraints:
      - pointwise: {wordlist: sports}
      - {moment: {gender: female}, target: 0.5}

--print-config shows every other setting with its default. After Ctrl-C, the run goes on with

\b
    dmgen train RUN/config.yaml --out RUN --resume
"""


@main.command(cls=_Command, help=_TRAIN_HELP)
def train(
    config: _Config,
    overrides: _Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder to make. Needed, but for --print-config.")
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            help=f"Send the metrics to {', '.join(TRACKERS)} too, if its package is installed."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show all settings as YAML, and do nothing else.")
    ] = False,
) -> None:
    """Fit a policy to constraints on a language model."""
    from dmgen.cli import console
    from dmgen.experiment.config import RunConfig

    settings = RunConfig.load(config, overrides or [])
    if print_config:
        typer.echo(settings.to_yaml(), nl=False)
        return
    if out is None:
        raise ValueError("give the run folder to make: --out runs/NAME")
    if track is not None:
        check_choice("--track", track, TRACKERS)
        console.check_tracker_package(track)
    console.run(settings, out, resume=resume, track=track)


@main.command(cls=_Command)
def fit(
    config: _Config,
    overrides: _Overrides = None,
    as_json: _Json = False,
) -> None:
    """Find λ and show the cost of the constraints, before any training.

    Prints the mean of each constraint under the base, λ with its error, KL(p‖a), which is the least
    KL(π‖a) of a policy that meets the constraints, and the number of texts that a smaller error of
    λ takes (fit.n_samples).
    """
    from dmgen.cli import console
    from dmgen.experiment import build
    from dmgen.experiment.config import RunConfig

    settings = RunConfig.load(config, overrides or [])
    base = build.load_model(settings.base, settings)
    if not as_json:
        console.show_fit_began(settings.fit.n_samples)
    target = build.fit_target(settings, base)
    rows = console.plan(target)
    if as_json:
        typer.echo(json.dumps({"target": target.to_dict(), "plan": rows}, ensure_ascii=False))
        return
    typer.echo(f"\n{target}\n")
    for row in rows:
        needs = ", ".join(f"± {k}: {v:,}" for k, v in row["samples_for_stderr"].items())
        typer.echo(
            f"{row['feature']}: seen in {row['hits']:,} of {row['n_samples']:,} texts.\n"
            f"Texts for an error of λ of {needs}"
        )


@main.command(cls=_Command)
def report(
    run: _Run,
    out: Annotated[
        Path | None, typer.Option(help="The page. [default: report.html in the run folder]")
    ] = None,
    png: _Png = False,
) -> None:
    """Write a run as one HTML page that needs no network.

    The model card of a finished run is written too where it is missing.
    """
    from dmgen.experiment.folder import is_finished
    from dmgen.report import write_model_card, write_report

    if is_finished(run) and not (run / "policy" / "README.md").is_file():
        typer.echo(write_model_card(run))
    for path in write_report(run, out, png=png):
        typer.echo(path)


@main.command(cls=_Command)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Two run folders or more.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
    png: _Png = False,
) -> None:
    """Write several runs on one page: methods as colours, seeds as bands."""
    from dmgen.report import write_comparison

    for path in write_comparison(runs, out, png=png):
        typer.echo(path)


@main.command(cls=_Command)
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

    Prints moments with their 99 % intervals and verdicts, KL divergences, and diversity. Without
    options, the numbers are those at the end of the run, except for a policy whose adapter was
    trained in half precision: it is measured in float32, as is its base.
    """
    from dmgen.experiment import build
    from dmgen.experiment.folder import finished_config

    config = finished_config(run, device)
    policy = build.load_finished_policy(run, config)
    target = build.load_target(run, config, build.load_finished_base(config))
    evaluation = dmgen.evaluate(
        policy,
        target,
        n_samples=config.evaluate.n_samples if n is None else n,
        seed=config.evaluate.seed if seed is None else seed,
    )
    typer.echo(evaluation.to_json() if as_json else evaluation)


@main.command(cls=_Command)
def sample(
    run: _Run,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of texts.")] = 20,
    seed: Annotated[
        int | None, typer.Option(help="The same seed, the same texts. [default: new ones]")
    ] = None,
    certain: Annotated[
        bool,
        typer.Option(
            "--certain",
            help="Draw from the target itself, by quasi-rejection to a TV distance of 0.01.",
        ),
    ] = False,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Print texts of the policy of a run, or of its target with --certain."""
    from dmgen.experiment import build
    from dmgen.experiment.certain import draw_certain
    from dmgen.experiment.folder import finished_config

    config = finished_config(run, device)
    if certain:
        drawn = draw_certain(run, config, n, seed)
        texts = drawn.samples
        typer.echo(str(drawn), err=True)
    else:
        texts = build.load_finished_policy(run, config).sample(n, prompt=config.prompt, seed=seed)
    if not as_json:
        for i, text in enumerate(texts.texts, 1):
            typer.echo(f"{i:>{len(str(n))}}  {' '.join(text.split())}")
        return
    features = {f.name: f for c in build.build_constraints(config) for f in c.features}
    values = {name: f(texts.texts, texts.prompts).tolist() for name, f in features.items()}
    for i, (text, log_prob) in enumerate(zip(texts.texts, texts.log_prob.tolist(), strict=True)):
        row = {
            "prompt": config.prompt,
            "text": text,
            "log_prob": log_prob,
            "features": {name: column[i] for name, column in values.items()},
        }
        typer.echo(json.dumps(row, ensure_ascii=False))
