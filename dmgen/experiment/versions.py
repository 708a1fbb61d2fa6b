"""`config.yaml` of a run, with the versions that its numbers depend on in a comment."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dmgen.storage import as_yaml, write_text


def versions() -> dict[str, str]:
    """Return the versions of dmgen, its libraries and Python, and the machine, by name."""
    names = ("dmgen", "torch", "transformers", "numpy", "scipy", "sacrebleu")
    system = {"python": platform.python_version(), "machine": platform.machine()}
    return system | {name: _version(name) for name in names}


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml` into a run folder, with the present versions in a comment."""
    comment = "".join(f"# {name} {value}\n" for name, value in versions().items())
    write_text(folder / "config.yaml", comment + as_yaml(config))


def read_versions(path: Path) -> dict[str, str]:
    """Return the versions in the comment of a `config.yaml`, by name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line[1:].strip().partition(" ") for line in lines if line.startswith("#")]
    return {name: value for name, _, value in pairs if value}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
