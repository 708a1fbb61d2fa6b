"""The versions that a run's figures depend on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dmgen.storage import as_yaml, write_text


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.yaml`, with the versions it ran under in a comment."""
    facts = "".join(f"# {name} {value}\n" for name, value in versions().items())
    write_text(folder / "config.yaml", facts + as_yaml(config))


def versions() -> dict[str, str]:
    """What a run's figures depend on beside its settings."""
    names = ("dmgen", "torch", "transformers", "numpy", "scipy", "sacrebleu")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    return found | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
