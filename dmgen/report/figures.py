"""Plots of runs, from DataFrames by matplotlib, which only this file needs (`dmgen[plots]`).

A frame has the columns `method` (a colour), `seed` (a run of that method), an x such as `samples`
(texts drawn so far) and any number of value columns. Where a value has the columns `<value>_low`
and `<value>_high` too, they are the ends of its interval. Every `draw_*` draws into the axes it is
given, so that figures of many panels are made of the same pieces as the pages of `dmgen report`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_DASHES = ("-", "--", "-.", ":")
_QUIET = "#5b6673"
# More points on a line make the page larger without a visible difference.
_MOST_POINTS = 1000

Colours = Mapping[str, tuple[str, str]]


def available() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def need_matplotlib() -> None:
    """Raise ImportError, with the command to install it, if matplotlib is not installed."""
    if not available():
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install 'dmgen[plots]'"
        )


def palette(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return (colour, line style) by method, for all figures that show the same methods."""
    unique = list(dict.fromkeys(methods))
    return {
        method: (_COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])
        for i, method in enumerate(unique)
    }


def panel(
    title: str, *, xlabel: str = "texts drawn for training", log: bool = False, rows: int = 0
) -> tuple[Figure, Axes]:
    """Return a small figure with one plot, for a telephone or beside others on a wide screen.

    Args:
        title: what the y axis shows, with its unit.
        xlabel: what the x axis shows.
        log: logarithmic y axis.
        rows: height for so many rows of `draw_intervals`; 0 for the usual height.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    height = 0.9 + 0.33 * rows if rows else 2.9
    figure = Figure(figsize=(4.5, height), layout="constrained")
    ax = figure.subplots()
    ax.set_title(_literal(title), fontsize=10.5, loc="left")
    ax.set_xlabel(xlabel, fontsize=9.5)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e4e8ec", linewidth=0.7)
    ax.set_axisbelow(True)
    if log:
        ax.set_yscale("log")
    return figure, ax


def draw_curves(
    ax: Axes,
    frame: pd.DataFrame,
    value: str,
    *,
    x: str = "samples",
    window: int = 1,
    colours: Colours | None = None,
    label: str | None = None,
) -> None:
    """Draw a value over x: for each method the mean of its seeds, in a band from least to most.

    Where some seeds have no value at an x, the mean would jump: the line ends where the shortest
    seed ends. A method with one seed is drawn with its unsmoothed values, faint, behind the line.

    Args:
        ax: axes to draw into.
        frame: columns method, seed, x and the value; nothing is drawn where it has no value.
        value: the column.
        x: the column of the x axis.
        window: smooth each seed by the mean of so many rows.
        colours: as `palette` gives them; None makes one for the methods of the frame.
        label: of the line; None is the name of the method.

    Raises:
        ValueError: a seed of a method has two values at an x.
    """
    for method, rows, (colour, dashes) in _by_method(frame, value, colours):
        if rows.duplicated([x, "seed"]).any():
            raise ValueError(f"{method!r} has two rows of {value!r} with the same {x} and seed")
        raw = rows.pivot(index=x, columns="seed", values=value).sort_index()
        smooth = raw.rolling(window, min_periods=1).mean()
        whole = smooth.dropna()
        if whole.empty:  # no x that all seeds have
            whole = smooth.mean(axis=1).to_frame()
        whole, raw = _thin(whole), _thin(raw)
        ax.plot(
            whole.index, whole.mean(axis=1), dashes, color=colour, linewidth=1.7,
            label=method if label is None else label,
        )  # fmt: skip
        if whole.shape[1] > 1:
            ax.fill_between(
                whole.index, whole.min(axis=1), whole.max(axis=1),
                color=colour, alpha=0.18, linewidth=0,
            )  # fmt: skip
        elif window > 1:
            ax.plot(raw.index, raw.iloc[:, 0], color=colour, alpha=0.3, linewidth=0.8)


def draw_points(
    ax: Axes,
    frame: pd.DataFrame,
    value: str,
    *,
    x: str = "samples",
    colours: Colours | None = None,
    label: str | None = None,
) -> None:
    """Draw measured values as points, each with its interval where the frame has one.

    Args:
        ax: axes to draw into.
        frame: as in `draw_curves`.
        value: the column.
        x: the column of the x axis.
        colours: as in `draw_curves`.
        label: of the points; None is the name of the method.
    """
    for method, rows, (colour, _) in _by_method(frame, value, colours):
        ax.errorbar(
            rows[x], rows[value], yerr=_errors(rows, value), fmt="o", color=colour, markersize=4.5,
            markeredgecolor="white", markeredgewidth=0.7, elinewidth=1.3, capsize=2, zorder=3,
            label=method if label is None else label,
        )  # fmt: skip


def draw_intervals(
    ax: Axes, frame: pd.DataFrame, value: str, *, colours: Colours | None = None
) -> None:
    """Draw a value along x: a row for each method, a point with its interval for each seed.

    Args:
        ax: axes to draw into; `panel(rows=...)` gives axes of the right height.
        frame: as in `draw_curves`.
        value: the column.
        colours: as in `draw_curves`.
    """
    methods = list(dict.fromkeys(frame["method"]))
    for method, rows, (colour, _) in _by_method(frame, value, colours):
        # Seeds side by side within the row of their method.
        shift = np.linspace(-0.25, 0.25, len(rows)) if len(rows) > 1 else np.zeros(1)
        ax.errorbar(
            rows[value], methods.index(method) + shift, xerr=_errors(rows, value), fmt="o",
            color=colour, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7,
            elinewidth=1.4, zorder=3,
        )  # fmt: skip
    ax.set_yticks(range(len(methods)), [_literal(_wrapped(method)) for method in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")


def draw_target(
    ax: Axes,
    target: float | Sequence[float],
    *,
    tolerance: float = 0.0,
    vertical: bool = False,
    label: str = "requested",
) -> None:
    """Draw the requested value: a dashed line, two for an interval, and the tolerance as a band.

    Args:
        ax: axes to draw into.
        target: a number, or (low, high).
        tolerance: distance from the target that a verdict allows.
        vertical: the value is on the x axis.
        label: for the legend.
    """
    edges = [target, target] if isinstance(target, int | float) else list(target)
    line, band = (ax.axvline, ax.axvspan) if vertical else (ax.axhline, ax.axhspan)
    if edges[0] - tolerance < edges[1] + tolerance:
        band(edges[0] - tolerance, edges[1] + tolerance, color="#b9dcc6", alpha=0.45, linewidth=0)
    for i, edge in enumerate(dict.fromkeys(edges)):
        line(edge, color="#2c7a4b", linestyle="--", linewidth=1.2, label="" if i else label)


def draw_level(ax: Axes, y: float, label: str, *, vertical: bool = False) -> None:
    """Draw a dotted line at a constant value, such as that of the base."""
    line = ax.axvline if vertical else ax.axhline
    line(y, color=_QUIET, linestyle=":", linewidth=1.3, label=label)


def finish(ax: Axes) -> None:
    """Add a legend for more than one label, and short numbers on the axis of texts."""
    from matplotlib.ticker import EngFormatter

    if ax.get_xscale() == "linear" and ax.get_xlabel().startswith("texts"):
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if len(unique) > 1:
        names = [_literal(name) for name in unique]
        ax.legend(unique.values(), names, fontsize=8.5, framealpha=0.75, borderpad=0.3)


def to_data_uri(figure: Figure) -> str:
    """Return the figure as a data URI of an SVG; equal figures give equal bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dmgen"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def to_png(figure: Figure, *, dpi: int = 200) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _by_method(
    frame: pd.DataFrame, value: str, colours: Colours | None
) -> Iterable[tuple[str, pd.DataFrame, tuple[str, str]]]:
    """Yield the finite rows of each method that has any, with its colour and line style."""
    if value not in frame:
        return
    known = palette(frame["method"]) if colours is None else colours
    finite = frame[np.isfinite(frame[value].astype(float))]
    for method in dict.fromkeys(finite["method"]):
        yield str(method), finite[finite["method"] == method], known[method]


def _errors(frame: pd.DataFrame, value: str) -> Any:
    """Return distances to the ends of the intervals, (2, N); None without intervals."""
    if f"{value}_low" not in frame:
        return None
    ends = [frame[value] - frame[f"{value}_low"], frame[f"{value}_high"] - frame[value]]
    return np.nan_to_num(np.array(ends, dtype=float)).clip(min=0)


def _thin(table: pd.DataFrame) -> pd.DataFrame:
    """Return at most about a thousand rows, evenly spaced, the last one among them."""
    step = -(-len(table) // _MOST_POINTS)
    return table.iloc[::-1].iloc[:: max(step, 1)].iloc[::-1]


def _literal(text: str) -> str:
    """Return text that matplotlib shows as it is; it reads ^a$|^b$ as mathtext."""
    return text.replace("$", r"\$")


def _wrapped(label: str) -> str:
    """Return a long label in lines that end at its commas."""
    return label.replace(", ", ",\n") if len(label) > 14 else label
