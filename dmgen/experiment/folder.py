"""Run folders as a new run or one that goes on meets them: used, unfinished or finished."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from dmgen.experiment.config import RunConfig, with_absolute_paths
from dmgen.experiment.versions import read_versions
from dmgen.training import run_folder

# Files and folders of a run.
WRITTEN = (
    "config.yaml", "target.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl",
    "checkpoints", "policy", "report.html", "prefix_value.safetensors",
)  # fmt: skip
# Settings that may change when a run goes on; all others say which run it is.
_MAY_CHANGE = {"n_steps", "trainer", "evaluate", "device", "dtype"}


def is_finished(folder: Path) -> bool:
    """Return whether a run is finished: `dmgen.json` is the last file that it writes."""
    return (folder / "policy" / "dmgen.json").is_file()


def load_config(folder: Path) -> RunConfig:
    """Return the configuration of a run.

    Raises:
        ValueError: there is no run with a target in the folder.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "target.json").is_file():
        raise ValueError(f"there is no run in {folder}: it has no config.yaml with a target.json")
    config = RunConfig.load(folder / "config.yaml")
    return with_base_of(config, read_versions(folder / "config.yaml").get("dmgen", ""))


def with_base_of(config: RunConfig, version: str) -> RunConfig:
    """Return the configuration with the embedded model that it meant in a version of dmgen."""
    if config.base == "tiny-bios" and version.startswith("0.1"):
        return replace(config, base="tiny-bios-0.1")
    return config


def finished_config(folder: Path, device: str | None = None) -> RunConfig:
    """Return the configuration of a finished run, on `device` where one is given.

    Raises:
        ValueError: there is no run in the folder, or it is not finished.
    """
    config = load_config(folder)
    if not is_finished(folder):
        raise ValueError(
            f"the run in {folder} is not finished; go on with it:\n  {resume_command(folder)}"
        )
    return config if device is None else replace(config, device=device)


def resume_command(folder: Path) -> str:
    """Return the shell command that goes on with a run."""
    name = shlex.quote(str(folder))
    return f"dmgen train {name}/config.yaml --out {name} --resume"


def refuse_used(out: Path) -> None:
    """Raise if a new run in `out` would touch anything that is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run, --out runs/NAME")
    if re.match(r"\w\w+:/", str(out)):
        raise ValueError(f"--out must be a folder of this machine, got {out}")
    present = [name for name in WRITTEN if (out / name).exists()]
    if present:
        unfinished = "config.yaml" in present and not is_finished(out)
        hint = f", or go on with it:\n  {resume_command(out)}" if unfinished else ""
        raise ValueError(
            f"{out} already holds a run ({', '.join(present)}). Give another folder, such as "
            f"--out {shlex.quote(f'{out}-2')}{hint}"
        )


def refuse_other_run(out: Path, config: RunConfig) -> None:
    """Raise unless `out` holds a run of this configuration that is not finished."""
    begun = with_absolute_paths(load_config(out)).to_mapping()
    requested = config.to_mapping()
    changed = [k for k in requested if k not in _MAY_CHANGE and requested[k] != begun[k]]
    if changed:
        raise ValueError(
            f"the run in {out} was begun with another {', '.join(changed)} (see "
            f"{out}/config.yaml): a run that goes on keeps them. Give another folder, --out, for a "
            "new run"
        )
    for step, final, _ in run_folder.read_evaluations(out) if is_finished(out) else []:
        if final and step >= config.n_steps:
            raise ValueError(
                f"the run in {out} is finished: it took {step} steps. For more, raise n_steps:\n"
                f"  {resume_command(out)} n_steps={2 * step}"
            )
