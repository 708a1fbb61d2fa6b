"""Plain values of a target for JSON, which has neither arrays nor infinities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from dmgen.estimates.score import Score


def plain(value: Any) -> Any:
    """Return scores, arrays and tuples as dicts and lists, and NaN and infinities as text."""
    if isinstance(value, Score):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, np.ndarray | Tensor | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_score(row: Mapping[str, Any]) -> Score:
    """Return the score that `plain` wrote."""
    return Score(float(row["value"]), float(row["stderr"]), row["n"], row.get("signature", ""))
