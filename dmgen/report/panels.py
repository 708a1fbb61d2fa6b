"""Panels of the pages: the choice of plots, each with a caption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmgen.estimates.score import Score
from dmgen.evaluation.verdicts import LEVEL, TOLERANCE
from dmgen.experiment.result import Run
from dmgen.report import figures
from dmgen.report.run_values import (
    Target,
    base_moments_in_common,
    constraints_of,
    evaluations_frame,
    metrics_frame,
    targets_in_common,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Metrics of training about the noise in a step: column, title, caption.
_NOISE = (
    ("grad_variance", "Variance of the gradient", "Trace of the covariance over a batch."),
    ("grad_norm", "Norm of the gradient", "Of the step, before any clipping."),
    ("advantage_var", "Variance of the advantage", "Smaller is steadier; 0 if the policy is p."),
    ("advantage_abs_mean", "Mean size of the advantage", "Mean of |A|; 0 if the policy is p."),
    ("advantage_bias", "Size of the mean advantage", "|mean of A|; 0 in expectation for GDC++."),
)


@dataclass(frozen=True)
class Panel:
    """A figure with its file name (without suffix), its title and its caption."""

    name: str
    figure: Figure
    title: str
    caption: str

    @property
    def image(self) -> str:
        """Return the figure as a data URI."""
        return figures.to_data_uri(self.figure)


def save_pngs(panels: Iterable[Panel], page: Path) -> list[Path]:
    """Write each panel as `<page>-<name>.png` next to the page."""
    written = []
    for panel in panels:
        path = page.with_name(f"{page.stem}-{panel.name}.png")
        path.write_bytes(figures.to_png(panel.figure))
        written.append(path)
    return written


class Curves:
    """The frames of some runs, and the panels drawn from them.

    Args:
        runs: the runs.
        names: (method, seed) of each; methods are colours, seeds make bands.
    """

    def __init__(self, runs: Sequence[Run], names: Sequence[tuple[str, Any]]) -> None:
        self.runs = runs
        self.metrics = metrics_frame(runs, names)
        if "advantage_mean" in self.metrics:
            self.metrics["advantage_bias"] = self.metrics["advantage_mean"].abs()
        self.evaluations = evaluations_frame(runs, names)
        self.colours = figures.palette(method for method, _ in names)
        longest = max((len(run.history) for run in runs), default=0)
        self.window = max(1, longest // 20)

    @property
    def reading(self) -> str:
        """Return how lines, bands and points are to be read."""
        steps = f"the mean of the last {self.window} steps" if self.window > 1 else "a step each"
        bands = "; band: from the lowest to the highest seed" if len(self.runs) > 1 else ""
        return (
            f"Lines: training batches, {steps}{bands}. Points: measured on fresh texts, with "
            "99 % intervals."
        )

    def moments(self) -> list[Panel]:
        """Return a panel for each feature: its mean under the policy, and the requested one."""
        columns = [c for c in self.metrics if str(c).startswith("moment/")]
        targets, bases = targets_in_common(self.runs), base_moments_in_common(self.runs)
        panels = []
        for i, name in enumerate(str(c).removeprefix("moment/") for c in columns):
            figure, ax = figures.panel(f"Mean of {name}")
            if name in targets:
                figures.draw_target(ax, targets[name], tolerance=self._tolerance)
            if name in bases:
                figures.draw_level(ax, bases[name].value, "base")
            self._draw(ax, f"moment/{name}", measured=f"E[{name}]")
            caption = "Dashed: the requested mean, in the band that a verdict allows."
            if name not in targets:
                caption = "It is part of a condition; its own mean has no constraint."
                if any(name == c.name for r in self.runs for c in constraints_of(r)):
                    caption = "Not all runs request the same mean."
            panels.append(Panel(f"moment-{i + 1}", figure, f"Mean of {name}", caption))
        return panels

    def distance(self) -> Panel:
        """Return KL(p‖π) of training and evaluations, and KL(p‖q) if this is a single run."""
        title = "Still missing: KL(p‖π), nats"
        figure, ax = figures.panel(title)
        least = self._least()
        if least is not None:
            figures.draw_level(ax, least.value, "base: KL(p‖a)")
        single = len(self.runs) == 1
        if single and self._off_policy():
            series = figures.palette(["policy", "proposal q"])
            for column, label in zip(
                ("kl_target_proposal", "kl_target_policy"), reversed(series), strict=True
            ):
                renamed = self.metrics.assign(method=label)
                figures.draw_curves(ax, renamed, column, window=self.window, colours=series)
            measured = self.evaluations.assign(method="policy")
            figures.draw_points(ax, measured, "kl_target_policy", colours=series, label="measured")
        else:
            self._draw(ax, "kl_target_policy", measured="kl_target_policy")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        figures.finish(ax)
        caption = "0 would be perfect. A batch of few effective texts gives a rough figure."
        return Panel("kl-target-policy", figure, title, caption)

    def paid(self) -> Panel | None:
        """Return KL(π‖a) of the evaluations; None where there is none."""
        if "kl_policy_base" not in self.evaluations:
            return None
        title = "Paid: KL(π‖a), nats"
        figure, ax = figures.panel(title)
        least = self._least()
        if least is not None:
            figures.draw_level(ax, least.value, "least: KL(p‖a)")
        if self.evaluations["step"].nunique() > 1:
            figures.draw_curves(ax, self.evaluations, "kl_policy_base", colours=self.colours)
        figures.draw_points(
            ax, self.evaluations, "kl_policy_base", colours=self.colours, label=self._measured
        )
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        figures.finish(ax)
        caption = "Measured on fresh texts. The dotted line is the price of meeting all exactly."
        return Panel("kl-policy-base", figure, title, caption)

    def weights(self) -> list[Panel]:
        """Return the effective sample size of a batch, and log Z with its error."""
        title = "Effective texts in a batch (ESS)"
        figure, ax = figures.panel(title)
        self._draw(ax, "ess")
        sizes = {r.config.trainer.batch_size for r in self.runs if r.config}
        sizes = sizes if len(sizes) == 1 else set()
        for size in sizes:
            figures.draw_level(ax, size, "batch size")
        ax.set_ylim(bottom=0)
        figures.finish(ax)
        caption = "How many texts a batch is worth once weighted; all of them if q = p."
        panels = [Panel("ess", figure, title, caption)]
        title = "log Z, nats"
        figure, ax = figures.panel(title)
        self._draw(ax, "log_z", smooth=False)
        if len(self.runs) == 1 and "log_z_stderr" in self.metrics:
            x, log_z = self.metrics["samples"], self.metrics["log_z"]
            half = Score(0.0, 1.0, 1).interval(LEVEL)[1] * self.metrics["log_z_stderr"]
            finite = np.isfinite(log_z) & np.isfinite(half)
            ax.fill_between(
                x[finite], (log_z - half)[finite], (log_z + half)[finite], alpha=0.18, linewidth=0
            )
        figures.finish(ax)
        caption = "Pooled over all texts so far, with its 99 % interval; it should settle."
        if len(self.runs) > 1:
            caption = "Pooled over all texts so far; it should settle."
        return [*panels, Panel("log-z", figure, title, caption)]

    def noise(self) -> list[Panel]:
        """Return the noise of the gradient and the advantage, as far as it was recorded."""
        panels = []
        for column, title, caption in _NOISE:
            if column not in self.metrics or not (self.metrics[column] > 0).any():
                continue
            figure, ax = figures.panel(title, log=True)
            self._draw(ax, column)
            panels.append(Panel(column.replace("_", "-"), figure, title, caption))
        return panels

    def finals(self, titles: Mapping[str, str], targets: Mapping[str, Target]) -> list[Panel]:
        """Return the last evaluations beside each other, a panel for each metric.

        Args:
            titles: title of each metric, by its name in `evaluations`.
            targets: the requested means, by name of the metric.
        """
        if self.evaluations.empty:
            return []
        last = self.evaluations[self.evaluations["final"]]
        panels = []
        for i, (metric, title) in enumerate(titles.items()):
            rows = last["method"].nunique()
            figure, ax = figures.panel(title, xlabel="", rows=rows + rows // 2)
            if metric in targets:
                figures.draw_target(ax, targets[metric], tolerance=self._tolerance, vertical=True)
            figures.draw_intervals(ax, last, metric, colours=self.colours)
            caption = "A point a seed, with its 99 % interval on fresh texts."
            panels.append(Panel(f"final-{i + 1}", figure, title, caption))
        return panels

    @property
    def _measured(self) -> str | None:
        """Return the label of measured points; the lines already tell several methods apart."""
        return "measured" if len(self.colours) == 1 else None

    @property
    def _tolerance(self) -> float:
        return next((r.evaluation.tolerance for r in self.runs if r.evaluation), TOLERANCE)

    def _draw(
        self, ax: Axes, column: str, *, measured: str | None = None, smooth: bool = True
    ) -> None:
        """Draw a column of the metrics, and the measured points that belong to it."""
        figures.draw_curves(
            ax, self.metrics, column, window=self.window if smooth else 1, colours=self.colours
        )
        if measured is not None:
            figures.draw_points(
                ax, self.evaluations, measured, colours=self.colours, label=self._measured
            )
        figures.finish(ax)

    def _least(self) -> Score | None:
        """Return KL(p‖a) of the fit, where all runs have about the same."""
        fits = [r.target.moment_fit for r in self.runs if r.target is not None]
        values = [fit.kl_target_base for fit in fits if fit is not None]
        if not values or max(values) - min(values) > 0.1 * max(values):
            return None
        return Score(float(np.mean(values)), 0.0, 0)

    def _off_policy(self) -> bool:
        """Return whether training texts came from another model than the policy."""
        pair = self.metrics.reindex(columns=["kl_target_policy", "kl_target_proposal"]).dropna()
        return not np.allclose(pair.iloc[:, 0], pair.iloc[:, 1], rtol=1e-3, atol=1e-6)
