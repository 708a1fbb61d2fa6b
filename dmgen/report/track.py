"""The bar of a card: where base, policy and the allowed range lie beside each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmgen.evaluation.result import MomentRow


@dataclass(frozen=True)
class Mark:
    """A bar or dot.

    Attributes:
        kind: its CSS classes.
        style: its position, as CSS.
    """

    kind: str
    style: str


@dataclass(frozen=True)
class Track:
    """A horizontal axis with its marks.

    Attributes:
        left, right: the ends of the axis, as text.
        marks: bars and dots, the later above the earlier.
    """

    left: str
    right: str
    marks: list[Mark]

    @classmethod
    def of(cls, row: MomentRow, tolerance: float) -> Track:
        """Return the track of a constraint; its axis is 0 to 1 where all means lie in between."""
        goal = row.target if isinstance(row.target, tuple) else (row.target, row.target)
        allowed = (goal[0] - tolerance, goal[1] + tolerance)
        policy, base = row.policy.value, row.base.value
        points = [x for x in (*allowed, *row.interval, policy, base) if math.isfinite(x)]
        left, right = min(points), max(points)
        if min(policy, *goal, base) >= 0 and max(policy, *goal, base) <= 1:
            left, right = 0.0, 1.0
        else:
            left, right = left - 0.1 * (right - left), right + 0.1 * (right - left)

        def place(x: float) -> float:
            return min(max(100 * (x - left) / (right - left), 0.0), 100.0) if right > left else 50.0

        def bar(kind: str, a: float, b: float) -> Mark:
            width = max(place(b) - place(a), 0.6)
            return Mark(kind, f"left:{place(a):.2f}%;width:{width:.2f}%")

        marks = [bar("goal", *allowed), Mark("dot was", f"left:{place(base):.2f}%")]
        if all(math.isfinite(end) for end in row.interval):
            marks.append(bar("interval", *row.interval))
        marks.append(Mark("dot", f"left:{place(policy):.2f}%"))
        return cls(f"{left:.3g}", f"{right:.3g}", marks)
