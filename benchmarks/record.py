"""Facts that go with every result, and small statistics for the tables."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dmgen.experiment import versions


def facts() -> dict[str, Any]:
    """Return the command, commit, hardware and versions of this process."""
    script = Path(sys.argv[0])
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "unknown",
        "hardware": {"cpus": os.cpu_count(), "cpu": cpu_name()},
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "versions": versions.versions(),
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t over seeds)."""
    x = np.asarray(values, dtype=float)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
    return float(x.mean()), float(half)


def shown(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean with its interval, for a table."""
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
