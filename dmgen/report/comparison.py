"""Several run folders on one HTML page: methods as colours, seeds as bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmgen import storage
from dmgen.evaluation.verdicts import TOLERANCE
from dmgen.report import figures, phrasing
from dmgen.report.answers import questions
from dmgen.report.markup import Markup, page, table, tag
from dmgen.report.panels import Curves, Panel, figure_grid, save_pngs
from dmgen.report.read import RunRecord, as_score, goals_of, policy_rows, score
from dmgen.report.run_page import label

__all__ = ["write_comparison"]

# Settings that say which run it is, and not what kind of run.
_SEEDS = {"trainer.seed", "fit.seed", "evaluate.seed"}
_COMPARED = ("kl_target_policy", "kl_policy_base", "excess", "self_bleu_5", "distinct_1")


def write_comparison(
    folders: Sequence[str | Path], out: str | Path, *, png: bool = False
) -> list[Path]:
    """Writes one page about several runs, finished or not, and returns the paths written.

    Runs that differ in their seeds alone are one method, drawn as the mean of its seeds in a band.

    Args:
        folders: run folders, at least two.
        out: the page.
        png: write each plot as `<page>-<name>.png` beside it, too.

    Raises:
        ValueError: fewer than two folders, or one without a run or a configuration.
        ImportError: matplotlib is not installed.
    """
    figures.need_matplotlib()
    if len(folders) < 2:
        raise ValueError(f"a comparison takes two run folders at least, got {len(folders)}")
    records = [RunRecord.read(folder) for folder in folders]
    names = group_names(records)
    curves = Curves(records, names)
    goals = {f"E[{name}]": target for name, target in goals_of(records).items()}
    finals = curves.finals([(m, label(m)) for m in (*goals, *_COMPARED)], goals)
    paid = curves.paid() if len(curves.evaluations) else None
    training: list[Panel] = []
    noise: list[Panel] = []
    if len(curves.metrics):
        training = [*curves.moments(), curves.distance(), *([paid] if paid else [])]
        noise = [*curves.weights(), *curves.noise()]
    sections = [
        _head(records, names),
        *_results(records, names, finals),
        *_group("How training went", training, curves.reading),
        *_group("Weights and noise", noise, "Lower is steadier, but for the effective texts."),
        _runs(records, names),
    ]
    path = Path(out)
    storage.write_text(path, page("Runs compared: dmgen report", *sections))
    return [path, *(save_pngs([*finals, *training, *noise], path) if png else [])]


def group_names(records: Sequence[RunRecord]) -> list[tuple[str, Any]]:
    """(method with the settings in which it differs from other runs, seed) of each run.

    Raises:
        ValueError: a run has no configuration, so it cannot be told what differs.
    """
    settings = []
    for record in records:
        if record.config is None:
            raise ValueError(f"{record.folder} has no config.yaml, so it cannot be compared")
        settings.append(_flat(record.config.to_mapping()))
    keys = dict.fromkeys(key for flat in settings for key in flat)
    differing = [
        key
        for key in keys
        if key not in _SEEDS | {"method"} and len({repr(flat.get(key)) for flat in settings}) > 1
    ]
    names: list[tuple[str, Any]] = []
    for record, flat in zip(records, settings, strict=True):
        notes = [f"{key.removeprefix('trainer.')}={flat.get(key)}" for key in differing]
        name = ", ".join([record.method, *notes])
        seed = flat["trainer.seed"]
        # The same run twice, or seeds that differ elsewhere.
        names.append((name, str(record.folder) if (name, seed) in names else seed))
    return names


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _head(records: Sequence[RunRecord], names: Sequence[tuple[str, Any]]) -> Markup:
    asked = list(dict.fromkeys(q for record in records for q in questions(record)))
    return tag(
        "header",
        tag("p", "dmgen report", class_="quiet"),
        tag("h1", f"{len(records)} runs, {len({name for name, _ in names})} settings compared"),
        tag("p", "Asked of what the base writes, as a distribution:"),
        tag("ul", *(tag("li", question) for question in asked)),
    )


def _results(
    records: Sequence[RunRecord], names: Sequence[tuple[str, Any]], finals: Sequence[Panel]
) -> list[Markup]:
    """The last evaluation of every run, a row each, and the same drawn."""
    rows = []
    moments = list(goals_of(records))
    for record, (name, seed) in zip(records, names, strict=True):
        if record.final is None:
            rows.append([name, str(seed), "not measured yet"])
            continue
        by_name = {row["metric"][2:-1]: row for row in policy_rows(record.final)}
        cells = [
            f"{phrasing.number(as_score(by_name[m]))} ({by_name[m]['verdict']})"
            if m in by_name
            else ""
            for m in moments
        ]
        for metric in _COMPARED:
            model = "policy" if metric.startswith(("self_bleu", "distinct")) else ""
            found = score(record.final, metric, model)
            cells.append("" if found is None else phrasing.number(found))
        rows.append([name, str(seed), f"{record.final['step']:,}", *cells])
    head = ["method", "seed", "step", *(f"mean of {m}" for m in moments), *map(label, _COMPARED)]
    note = (
        "Measured on fresh texts of each policy at its last evaluation, ± one standard error; a "
        f"moment is met if its 99 % interval lies within {TOLERANCE:g} of what was asked, or the "
        "tolerance that its run chose."
    )
    parts = [tag("h2", "What was reached"), table(head, rows), tag("p", note, class_="quiet")]
    return [*parts, figure_grid(finals)] if finals else parts


def _group(title: str, panels: Sequence[Panel], reading: str) -> list[Markup]:
    if not panels:
        return []
    return [tag("h2", title), tag("p", reading, class_="quiet"), figure_grid(panels)]


def _runs(records: Sequence[RunRecord], names: Sequence[tuple[str, Any]]) -> Markup:
    rows = [
        [str(record.folder), name, str(seed), f"{record.n_steps:,}"]
        for record, (name, seed) in zip(records, names, strict=True)
    ]
    return tag(
        "section",
        tag("h2", "The runs"),
        table(["run folder", "method", "seed", "steps"], rows),
    )
