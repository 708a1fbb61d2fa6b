"""Checks of settings: types, bounds and choices, refused in one line that says what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, *, least: int | None = None) -> int:
    """Return a whole number as `int`; numpy's integers are whole numbers, bools are not.

    Args:
        name: name of the setting, for the message.
        value: its value.
        least: smallest legal value; None for no bound.

    Raises:
        TypeError: the value is not a whole number.
        ValueError: the value is below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Return a finite number as `float`; numpy's numbers are numbers, bools are not.

    Args:
        name: name of the setting, for the message.
        value: its value.
        above: largest number that is too small; None for no bound.
        least: smallest legal number; None for no bound.
        below: smallest number that is too large; None for no bound.
        most: largest legal number; None for no bound.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value is not finite or out of bounds.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    bounds = (
        (above, "above", above is None or number > above),
        (least, "at least", least is None or number >= least),
        (below, "below", below is None or number < below),
        (most, "at most", most is None or number <= most),
    )
    if not math.isfinite(number) or not all(holds for _, _, holds in bounds):
        words = [f"{word} {bound:g}" for bound, word, _ in bounds if bound is not None]
        # Two bounds leave no infinity to refuse.
        n_sides = ((above, least) != (None, None)) + ((below, most) != (None, None))
        finite = ["finite"] if n_sides < 2 else []
        raise ValueError(f"{name} must be {' and '.join([*words, *finite])}, got {value!r}")
    return number


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise unless the value is one of `allowed`; the message suggests the nearest.

    Raises:
        ValueError: the value is none of them.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        listed = ", ".join(map(repr, allowed))
        raise ValueError(
            f"{name} must be one of {listed}; got {value!r}{did_you_mean(value, allowed)}"
        )


def check_known(
    key: Any, known: Sequence[str], what: str, *, place: str = "", elsewhere: Sequence[str] = ()
) -> None:
    """Raise unless the name is `known`; the message suggests the nearest.

    Args:
        key: the name to check.
        known: all legal names.
        what: kind of name, such as "option of FDPG".
        place: place of the name, such as "trainer"; "" leaves it out of the message.
        elsewhere: dotted names at other places, suggested where only the place is wrong.

    Raises:
        ValueError: there is no such name.
    """
    if key in known:
        return
    moved = [name for name in elsewhere if name.split(".")[-1] == key]
    hint = f"; did you mean {' or '.join(map(repr, moved))}?" if moved else did_you_mean(key, known)
    place = f" in {place}" if place else ""
    names = f"There are {', '.join(known)}" if known else "There are none"
    raise ValueError(f"unknown {what} {key!r}{place}{hint or '.'} {names}")


def did_you_mean(value: Any, allowed: Iterable[Any]) -> str:
    """Return "; did you mean 'x'?" for the nearest of `allowed`, "" if none is near."""
    # GDC++ on paper is GDCpp in Python; difflib alone would take it for GDC.
    spelt = str(value).replace("+", "p")
    close = get_close_matches(spelt, [str(a) for a in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
