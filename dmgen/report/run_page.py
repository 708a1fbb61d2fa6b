"""A run as one HTML page: requests, verdicts, prices, the training, the target, texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmgen import storage
from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.estimates.score import Score
from dmgen.evaluation.result import Evaluation, MomentRow
from dmgen.experiment.result import Run, TextPair
from dmgen.report import figures, phrasing
from dmgen.report.page import Number, render
from dmgen.report.panels import Curves, Panel, save_pngs
from dmgen.report.run_values import (
    as_run,
    base_of,
    constraints_of,
    last_evaluation,
    measurements,
    method_of,
    n_drawn,
)
from dmgen.report.track import Track
from dmgen.target.fit import TargetFit
from dmgen.target.moment_fit import MomentFit, target_text

# Pairs of texts shown at once; the others unfold.
_N_SHOWN = 8
# With fewer hits or effective texts, the errors of a fit are not reliable.
_FEW_HITS, _SMALL_ESS = 20, 100
_BADGES = {"met": "met", "not met": "unmet", "undecided": "open"}


def write_report(
    run: Run | str | Path, out: str | Path | None = None, *, png: bool = False
) -> list[Path]:
    """Write the page of a run, finished or not, and return the paths written.

    Args:
        run: the run, or its folder.
        out: the page; None is `report.html` in the run folder.
        png: write each plot as `<page>-<name>.png` beside it, too.

    Raises:
        ValueError: there is no run in the folder.
        ImportError: matplotlib is not installed.
    """
    figures.need_matplotlib()
    run = as_run(run)
    path = run.folder / "report.html" if out is None else Path(out)
    curves = Curves([run], [(method_of(run), 0)])
    panel_groups = _panel_groups(run, curves)
    final = last_evaluation(run)
    page = render(
        "run_page.html",
        title=f"{base_of(run)}, {method_of(run)}",
        headline=phrasing.headline(run.evaluation),
        base=base_of(run),
        method=method_of(run),
        run=run,
        n_drawn=int(n_drawn(run, run.n_steps)) if run.n_steps else 0,
        n_planned=None if run.config is None else run.config.n_steps,
        final=final,
        requests=phrasing.requests(run),
        panel_groups=panel_groups,
        reading=curves.reading,
        pairs=_pairs(run),
        n_shown=_N_SHOWN,
        settings=_settings(run),
        **_results(run, run.evaluation),
        **_fit(run),
    )
    storage.write_text(path, page)
    pictures = [panel for group in panel_groups.values() for panel in group]
    return [path, *(save_pngs(pictures, path) if png else [])]


def _results(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the cards and the table of the last evaluation."""
    if evaluation is None:
        return {"answers": [], "prices": [], "off_target": [], "measurement_rows": []}
    return {
        "answers": [
            _answer(request, row, evaluation.tolerance)
            for request, row in zip(phrasing.requests(run), evaluation.moments, strict=True)
        ],
        "prices": [
            {
                "title": price.title,
                "symbol": price.symbol,
                "value": Number.of(price.score),
                "meaning": price.meaning,
            }
            for price in phrasing.prices(evaluation)
        ],
        "off_target": phrasing.off_target(evaluation),
        "measurement_rows": [
            [
                m.label,
                *("" if score is None else phrasing.number(score) for score in (m.base, m.target)),
                Number.of(m.policy),
                phrasing.span(*m.interval),
                m.verdict,
            ]
            for m in measurements(evaluation)
        ],
    }


def _answer(request: str, row: MomentRow, tolerance: float) -> dict[str, Any]:
    return {
        "request": request,
        "in_numbers": phrasing.request_in_numbers(row, tolerance),
        "value": Number(f"{row.policy.value:.3g}", repr(row.policy.value)),
        "interval": phrasing.span(*row.interval),
        "verdict": row.verdict,
        "badge": _BADGES[row.verdict],
        "reason": phrasing.verdict_reason(row, tolerance),
        "base": str(row.base),
        "track": Track.of(row, tolerance),
    }


def _panel_groups(run: Run, curves: Curves) -> dict[str, list[Panel]]:
    if not len(run.history):
        return {}
    paid = curves.paid()
    has_course = paid is not None and curves.evaluations["step"].nunique() > 1
    return {
        "How training went": [
            *curves.moments(),
            curves.distance(),
            *([paid] if paid and has_course else []),
        ],
        "How good the weights were": curves.weights(),
        "How noisy the steps were": curves.noise(),
    }


def _fit(run: Run) -> dict[str, Any]:
    """Return the table of the fit of λ with its notes."""
    fit = None if run.target is None else run.target.moment_fit
    if run.target is None or fit is None:
        return {"fit": None}
    n = fit.n_samples
    return {
        "fit": fit,
        "fit_rows": [_fit_row(fit, i) for i in range(len(fit.names))],
        "fit_notes": _fit_notes(run.target),
        "fit_log_z": Score(fit.log_z, fit.log_z_stderr, n),
        "fit_kl": Score(fit.kl_target_base, fit.kl_target_base_stderr, n),
        "fit_warning": _fit_warning(fit),
    }


def _fit_row(fit: MomentFit, i: int) -> list[Any]:
    base, weight, reached = (
        Score(float(values[i]), float(errors[i]), fit.n_samples)
        for values, errors in (
            (fit.base_moments, fit.base_moments_stderr),
            (fit.lambdas, fit.lambdas_stderr),
            (fit.moments, fit.moments_stderr),
        )
    )
    target = target_text(fit.targets[i])
    return [fit.names[i], str(base), f"{fit.hits[i]:,}", target, Number.of(weight), str(reached)]


def _fit_notes(target: TargetFit) -> list[str]:
    """Return notes on the table of the fit, whose means differ from those of the cards."""
    notes = []
    hard = any(isinstance(c, Pointwise) for c in target.constraints)
    if hard or bool(target.lambdas.isinf().any()):
        notes.append(
            "Means under the base, and numbers of texts, are of those texts that satisfy the "
            "constraints on every text."
        )
    if any(isinstance(c, Moment) and c.given is not None for c in target.constraints):
        notes.append(
            "A moment of the texts that meet a condition stands here as the mean, over all texts, "
            "of condition · (feature − requested), which is to be 0."
        )
    return notes


def _fit_warning(fit: MomentFit) -> str:
    rare = [name for name, n in zip(fit.names, fit.hits, strict=True) if n < _FEW_HITS]
    if not rare and fit.ess >= _SMALL_ESS:
        return ""
    cause = f"{', '.join(rare)} was seen in fewer than {_FEW_HITS} texts. " if rare else ""
    return f"{cause}The errors above are rough: fit on more texts (`dmgen fit` says how many)."


@dataclass(frozen=True)
class _Piece:
    """A part of a text, marked where a feature matches it."""

    text: str
    marked: bool


@dataclass(frozen=True)
class _TextCell:
    """A text in pieces, and the features that it has."""

    pieces: list[_Piece]
    chips: list[str]


def _pairs(run: Run) -> list[dict[str, _TextCell]]:
    features = list({f.name: f for c in constraints_of(run) for f in c.features}.values())
    return [
        {
            "base": _text_cell(pair.base, "base", pair, features),
            "policy": _text_cell(pair.policy, "policy", pair, features),
        }
        for pair in run.samples
    ]


def _text_cell(text: str, model: str, pair: TextPair, features: Sequence[Feature]) -> _TextCell:
    chips = [
        name if value == 1 else f"{name} {value:g}"
        for name, value in pair.features.get(model, {}).items()
        if value
    ]
    return _TextCell(_marked(text, features), chips)


def _marked(text: str, features: Sequence[Feature]) -> list[_Piece]:
    """Return the text with the matches of all features marked, where they overlap only once."""
    pieces = []
    done = 0
    for start, end in sorted(span for feature in features for span in feature.spans(text)):
        if end > done:
            start = max(start, done)
            pieces += [_Piece(text[done:start], False), _Piece(text[start:end], True)]
            done = end
    return [*pieces, _Piece(text[done:], False)]


def _settings(run: Run) -> list[list[str]]:
    """Return the settings that repeat the run."""
    rows = [["run folder", str(run.folder)]]
    config = run.config
    if config is not None:
        trainer = config.trainer
        seeds = f"fit {config.fit.seed}, training {trainer.seed}, evaluation {config.evaluate.seed}"
        training = f"batches of {trainer.batch_size:,}, learning rate {trainer.learning_rate}"
        rows += [
            ["base", config.base],
            ["prompt", repr(config.prompt) if config.prompt else "none"],
            ["longest text", f"{config.max_new_tokens} tokens"],
            ["method", f"{method_of(run)}, {training}"],
            ["seeds", seeds],
        ]
    if len(run.history):
        seconds = float(run.history["seconds"].iloc[-1])
        time = f"{seconds / 60:.1f} minutes" if seconds > 99 else f"{seconds:.0f} s"
        rows.append(["time of training", time])
    if run.versions:
        rows.append(["ran under", ", ".join(f"{k} {v}" for k, v in run.versions.items())])
    return rows
