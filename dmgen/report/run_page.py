"""A run folder as one HTML page: what was asked, what was reached, at what price, how surely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmgen import storage
from dmgen.constraints.feature import Feature
from dmgen.estimates.score import Score
from dmgen.report import answers, figures, phrasing
from dmgen.report.markup import Markup, join, page, table, tag
from dmgen.report.panels import Curves, figure_grid, save_pngs
from dmgen.report.read import Row, RunRecord, as_score

__all__ = ["write_report"]

# Pairs of texts shown at once; the others unfold.
_N_SHOWN = 8
# Below this, a fit's own errors are not to be believed.
_FEW_HITS, _SMALL_ESS = 20, 100
_LABELS = {
    "tv": "Total variation distance of p and π",
    "js": "Jensen-Shannon divergence of p and π, nats",
    "kl_target_policy": "KL(p‖π), still missing, nats",
    "kl_policy_base": "KL(π‖a), paid, nats",
    "kl_target_base": "KL(p‖a), the least possible, nats",
    "excess": "KL(π‖a) − KL(p‖a), excess, nats",
    "gain": "KL(p‖a) − KL(p‖π), nearer to the target than the base, nats",
    "length": "Length in tokens",
    "perplexity": "Perplexity a token, under the base",
}


def write_report(
    run: str | Path, out: str | Path | None = None, *, png: bool = False
) -> list[Path]:
    """Writes the page of a run folder, finished or not, and returns the paths written.

    Args:
        run: the run folder.
        out: the page; None is `report.html` in the run folder.
        png: write each plot as `<page>-<name>.png` beside it, too.

    Raises:
        ValueError: there is no run in the folder.
        ImportError: matplotlib is not installed.
    """
    figures.need_matplotlib()
    record = RunRecord.read(run)
    path = record.folder / "report.html" if out is None else Path(out)
    curves = Curves([record], [(record.method, 0)])
    shown = _panels(record, curves)
    title = f"{_base(record)}, {record.method}"
    sections = [
        _head(record, title),
        *answers.certificate(record),
        *_training(curves, shown),
        *_fit(record),
        *_measured(record),
        *_texts(record),
        *_settings(record),
    ]
    storage.write_text(path, page(f"{title}: dmgen report", *sections))
    return [path, *(save_pngs((p for group in shown.values() for p in group), path) if png else [])]


def _head(record: RunRecord, title: str) -> Markup:
    """The question, and how far the answer has come."""
    final, config = record.final, record.config
    drawn = int(record.samples_at(record.n_steps)) if record.n_steps else 0
    parts = [tag("p", "dmgen report", class_="quiet"), tag("h1", answers.headline(record))]
    parts.append(
        tag(
            "p",
            "A language model (the base, ", tag("b", _base(record)), ") was to write texts that "
            "obey the constraints below as a distribution, and otherwise to stay as it was. "
            f"{record.method} trained a copy of it (the policy) for {record.n_steps:,} steps on "
            f"{drawn:,} texts.",
        )
    )  # fmt: skip
    planned = config.n_steps if config else None
    if planned is not None and record.n_steps < planned:
        parts.append(
            tag(
                "p",
                f"This run is not finished: it stands at step {record.n_steps:,} of {planned:,}.",
                class_="note",
            )
        )
    if final is None:
        text = (
            "Nothing has been measured on fresh texts yet, so there is no verdict. What the plots "
            "show comes from training batches."
        )
        parts.append(tag("p", text, class_="note"))
    elif final["step"] < record.n_steps:
        text = (
            f"The last measurement is that of step {final['step']:,}; the run has gone on to step "
            f"{record.n_steps:,} since."
        )
        parts.append(tag("p", text, class_="note"))
    return tag("header", *parts)


def _panels(record: RunRecord, curves: Curves) -> dict[str, list[Any]]:
    if not len(record.metrics):
        return {}
    paid = curves.paid()
    return {
        "How training went": [
            *curves.moments(),
            curves.distance(),
            *([paid] if paid and curves.evaluations["step"].nunique() > 1 else []),
        ],
        "How good the weights were": curves.weights(),
        "How noisy the steps were": curves.noise(),
    }


def _training(curves: Curves, shown: dict[str, list[Any]]) -> list[Markup]:
    parts: list[Markup] = []
    for title, group in shown.items():
        if group:
            parts.append(tag("h2", title))
            parts += [] if len(parts) > 1 else [tag("p", curves.reading, class_="quiet")]
            parts.append(figure_grid(group))
    return parts


def _fit_notes(record: RunRecord) -> list[str]:
    """What a reader of the table of the fit must know who knows the answers above it."""
    notes = []
    asked = record.target["constraints"]
    if any("pointwise" in row or math.isinf(float(row["lambda"])) for row in asked):
        notes.append(
            "Means under the base, and numbers of texts, are of those texts that satisfy what is "
            "asked of every text."
        )
    if record.config is not None and any("given" in c for c in record.config.constraints):
        notes.append(
            "A moment of the texts that meet a condition stands here as the mean, over all texts, "
            "of condition · (feature − asked), which is to be 0."
        )
    return notes


def _fit(record: RunRecord) -> list[Markup]:
    """How λ was found."""
    fit = record.target.get("moment_fit")
    if not fit:
        return []
    n = fit["n_samples"]
    rows = []
    for i, name in enumerate(fit["names"]):
        base, found, reached = (
            Score(fit[key][i], fit[f"{key}_stderr"][i], n)
            for key in ("base_moments", "lambdas", "moments")
        )
        low, high = (fit["targets"][i] + fit["targets"][i])[:2] if isinstance(
            fit["targets"][i], list
        ) else [fit["targets"][i]] * 2  # fmt: skip
        asked = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        weight = tag("data", phrasing.number(found), value=repr(found.value))
        rows.append([name, str(base), f"{fit['hits'][i]:,}", asked, weight, str(reached)])
    parts = [
        tag("h2", "How the target was found"),
        tag(
            "p",
            "The target is the base with every text weighted: P(x) = a(x) · exp(λ·φ(x)), and "
            "without the texts that break a constraint on every text. λ says how strongly a "
            f"feature φ is favoured. It was fitted on {n:,} texts of the base.",
        ),
    ]
    if rows:
        head = [
            "feature",
            "mean under the base",
            "texts with it",
            "asked",
            "λ",
            "mean when weighted",
        ]
        parts.append(table(head, rows))
        parts += [tag("p", note, class_="quiet") for note in _fit_notes(record)]
    log_z = Score(fit["log_z"], fit["log_z_stderr"], n)
    least = Score(fit["kl_target_base"], fit["kl_target_base_stderr"], n)
    parts.append(
        tag(
            "p",
            f"Weighted, these texts are worth {fit['ess']:,.0f} (ESS, the effective sample size). "
            f"log Z, the logarithm of the mean weight, is {log_z}; "
            f"KL(p‖a) {least} nats.",
        )
    )
    few = [name for name, hits in zip(fit["names"], fit["hits"], strict=True) if hits < _FEW_HITS]
    if few or fit["ess"] < _SMALL_ESS:
        seen = f"{', '.join(few)} was seen in fewer than {_FEW_HITS} texts. " if few else ""
        text = f"{seen}The errors above are rough: fit on more texts (`dmgen fit` says how many)."
        parts.append(tag("p", text, class_="note"))
    return parts


def _measured(record: RunRecord) -> list[Markup]:
    """Every number of the last evaluation."""
    final = record.final
    if final is None:
        return []
    by_metric: dict[str, dict[str, Row]] = {}
    for row in final["rows"]:
        by_metric.setdefault(row["metric"], {})[row["model"]] = row
    rows = []
    for metric, found in by_metric.items():
        own = found.get("policy") or found.get("")
        cells = [found.get(model) for model in ("base", "target")]
        shown = [phrasing.number(as_score(cell)) if cell else "" for cell in cells]
        if own is not None:
            value = tag("data", phrasing.number(as_score(own)), value=repr(as_score(own).value))
            rows.append(
                [label(metric), *shown, value, phrasing.spread(own), own.get("verdict", "")]
            )
    head = ["", "base", "target p", "policy π", "99 % interval of π", "verdict"]
    return [tag("h2", f"All measurements, at step {final['step']:,}"), table(head, rows)]


def label(metric: str) -> str:
    """What a metric is called on a page."""
    if metric.startswith("E["):
        return f"Mean of {metric[2:-1]}"
    name, _, order = metric.rpartition("_")
    if name in ("self_bleu", "distinct"):
        return f"{'Self-BLEU' if name == 'self_bleu' else 'Distinct'}-{order}"
    return _LABELS.get(metric, metric)


def _texts(record: RunRecord) -> list[Markup]:
    """Texts before and after side by side, with what the features look for marked."""
    if not record.pairs:
        return []
    features = list({f.name: f for c in record.constraints for f in c.features}.values())
    pairs = [_pair(pair, features) for pair in record.pairs]
    heads = tag(
        "div", tag("div", "before: the base"), tag("div", "after: the policy"), class_="pair heads"
    )
    parts = [
        tag("h2", "Texts before and after"),
        tag(
            "p",
            "Not chosen: the first ones that base and policy wrote from the same random numbers. "
            "Marked are the words that the features look at; a text that has a feature names it.",
        ),
        heads,
        *pairs[:_N_SHOWN],
    ]
    if len(pairs) > _N_SHOWN:
        more = tag("summary", f"{len(pairs) - _N_SHOWN} more")
        parts.append(tag("details", more, *pairs[_N_SHOWN:]))
    return parts


def _pair(pair: Row, features: Sequence[Feature]) -> Markup:
    cells = []
    for model, title in (("base", "before"), ("policy", "after")):
        has = [
            tag("span", name if value == 1 else f"{name} {value:g}", class_="has")
            for name, value in pair.get("features", {}).get(model, {}).items()
            if value
        ]
        gaps = [part for chip in has for part in (" ", chip)]
        text = pair[model]
        cells.append(tag("div", tag("b", title + " "), _marked(text, features), *gaps, dir="auto"))
    return tag("div", *cells, class_="pair")


def _marked(text: str, features: Sequence[Feature]) -> Markup:
    """The text with the matches of all features marked, those that overlap as one."""
    parts: list[str] = []
    done = 0
    for start, end in sorted(span for feature in features for span in feature.spans(text)):
        if end <= done:
            continue
        start = max(start, done)
        parts += [text[done:start], tag("mark", text[start:end])]
        done = end
    return join([*parts, text[done:]])


def _settings(record: RunRecord) -> list[Markup]:
    """What it takes to do it again."""
    rows = [["run folder", str(record.folder)]]
    config = record.config
    if config:
        seeds = (
            f"fit {config.fit.seed}, training {config.trainer.seed}, evaluation "
            f"{config.evaluate.seed}"
        )
        rows += [
            ["base", config.base],
            ["prompt", repr(config.prompt) if config.prompt else "none"],
            ["longest text", f"{config.max_new_tokens} tokens"],
            ["method", f"{record.method}, batches of {config.trainer.batch_size:,}, learning rate "
             f"{config.trainer.learning_rate}"],
            ["seeds", seeds],
        ]  # fmt: skip
    if len(record.metrics):
        seconds = float(record.metrics["seconds"].iloc[-1])
        rows.append(
            [
                "time of training",
                f"{seconds / 60:.1f} minutes" if seconds > 99 else f"{seconds:.0f} s",
            ]
        )
    if record.versions:
        rows.append(["ran under", ", ".join(f"{k} {v}" for k, v in record.versions.items())])
    parts = [tag("h2", "Settings, versions, seeds"), table(["", ""], rows)]
    if config:
        yaml = tag("pre", tag("code", config.to_yaml()))
        parts.append(tag("details", tag("summary", "The whole configuration"), yaml))
    return parts


def _base(record: RunRecord) -> str:
    return Path(record.config.base).name if record.config else record.folder.name
