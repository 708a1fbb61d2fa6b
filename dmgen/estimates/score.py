"""`Score`: a number that carries its own error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Score:
    """A measured number with its standard error; `float(score)` gives the number.

    Attributes:
        value: the estimate, in the unit of the quantity.
        stderr: its standard error, same unit, >= 0; 0 for an exact number, NaN if it is not known.
        n: number of samples behind it, >= 0; 0 for an exact number.
        signature: how it was computed (tokeniser, order, size, seed); two scores compare only if
            their signatures are equal.

    Raises:
        ValueError: if `stderr` or `n` is negative.
    """

    value: float
    stderr: float
    n: int
    signature: str = ""

    def __post_init__(self) -> None:
        if self.stderr < 0:
            raise ValueError(f"Score.stderr must be >= 0 (or NaN if unknown), got {self.stderr}")
        if self.n < 0:
            raise ValueError(f"Score.n must be >= 0, got {self.n}")

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        """Return `value ± stderr`, rounded so that the error shows two significant digits."""
        exponent = _exponent(self.stderr)
        if exponent is None or not math.isfinite(self.value) or not -9 <= exponent <= 5:
            return f"{self.value:.6g} ± {self.stderr:.2g}"
        decimals = max(1 - exponent, 0)
        return f"{self.value:.{decimals}f} ± {self.stderr:.{decimals}f}"

    def interval(self, level: float = 0.99) -> tuple[float, float]:
        """Return the normal interval `value ± z·stderr`.

        Args:
            level: probability to cover the true value, in (0, 1).

        Returns:
            (low, high), in the unit of the value. It is asymptotic: not reliable for small `n` or
            heavy tails, and not cut at the limits of the quantity (a rate may be below 0).

        Raises:
            ValueError: if `level` is not strictly between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be strictly between 0 and 1, got {level}")
        half = NormalDist().inv_cdf(0.5 + level / 2) * self.stderr
        return self.value - half, self.value + half


def finite(x: float) -> float | None:
    """Return the number, or None for NaN and infinities, which JSON does not have."""
    return x if math.isfinite(x) else None


def _exponent(x: float) -> int | None:
    """Return the decimal exponent of `x` as printed with two digits; None for 0, NaN and inf."""
    if x == 0 or not math.isfinite(x):
        return None
    # After rounding: 0.0996 prints as 0.10, and its decimals must be those of 0.10.
    return int(f"{x:.1e}".split("e")[1])
