"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines of text with left-aligned columns, two spaces apart.

    Args:
        rows: cells of each row; a row may be shorter than the others.

    Returns:
        A line for each row, joined by newlines, without spaces at line ends.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    )
