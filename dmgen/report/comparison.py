"""Several runs on one HTML page: methods as colours, seeds as bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmgen import storage
from dmgen.evaluation.verdicts import TOLERANCE
from dmgen.experiment.result import Run
from dmgen.report import figures, phrasing
from dmgen.report.page import render
from dmgen.report.panels import Curves, Panel, save_pngs
from dmgen.report.run_values import (
    Measurement,
    as_run,
    last_evaluation,
    measurements,
    method_of,
    targets_in_common,
)

# Settings that tell apart runs of one kind.
_SEEDS = {"trainer.seed", "fit.seed", "evaluate.seed"}
# Measurements on the page, with their labels there.
_COMPARED = {
    "kl_target_policy": "KL(p‖π), still missing, nats",
    "kl_policy_base": "KL(π‖a), paid, nats",
    "excess": "KL(π‖a) − KL(p‖a), excess, nats",
    "self_bleu_5": "Self-BLEU-5",
    "distinct_1": "Distinct-1",
}


def write_comparison(
    folders: Sequence[Run | str | Path], out: str | Path, *, png: bool = False
) -> list[Path]:
    """Write one page about several runs, finished or not, and return the paths written.

    Runs that differ in their seeds alone are one method, drawn as the mean of its seeds in a band.

    Args:
        folders: runs or their folders, at least two.
        out: the page.
        png: write each plot as `<page>-<name>.png` beside it, too.

    Raises:
        ValueError: fewer than two folders, or one without a run or a configuration.
        ImportError: matplotlib is not installed.
    """
    figures.need_matplotlib()
    if len(folders) < 2:
        raise ValueError(f"a comparison takes two run folders at least, got {len(folders)}")
    runs = [as_run(run) for run in folders]
    names = group_names(runs)
    curves = Curves(runs, names)
    targets = targets_in_common(runs)
    titles = {f"E[{name}]": f"Mean of {name}" for name in targets} | _COMPARED
    finals = curves.finals(titles, {f"E[{name}]": target for name, target in targets.items()})
    groups = _panel_groups(curves)
    moments = list(targets)
    path = Path(out)
    page = render(
        "comparison.html",
        title="Runs compared",
        n_runs=len(runs),
        n_settings=len({name for name, _ in names}),
        requests=list(dict.fromkeys(r for run in runs for r in phrasing.requests(run))),
        head=["method", "seed", "step", *(f"mean of {m}" for m in moments), *_COMPARED.values()],
        rows=[
            [name, str(seed), *_result_cells(run, moments)]
            for run, (name, seed) in zip(runs, names, strict=True)
        ],
        tolerance=f"{TOLERANCE:g}",
        finals=finals,
        groups=groups,
        run_rows=[
            [str(run.folder), name, str(seed), f"{run.n_steps:,}"]
            for run, (name, seed) in zip(runs, names, strict=True)
        ],
    )
    storage.write_text(path, page)
    pictures: list[Panel] = [*finals, *(p for group in groups for p in group["panels"])]
    return [path, *(save_pngs(pictures, path) if png else [])]


def group_names(runs: Sequence[Run]) -> list[tuple[str, Any]]:
    """Return (method with the settings in which it differs from other runs, seed) of each run.

    Raises:
        ValueError: a run has no configuration, so its settings are not known.
    """
    settings = []
    for run in runs:
        if run.config is None:
            raise ValueError(f"{run.folder} has no config.yaml, so it cannot be compared")
        settings.append(_flat(run.config.to_mapping()))
    keys = dict.fromkeys(key for flat in settings for key in flat)
    differing = [
        key
        for key in keys
        if key not in _SEEDS | {"method"} and len({repr(flat.get(key)) for flat in settings}) > 1
    ]
    names: list[tuple[str, Any]] = []
    for run, flat in zip(runs, settings, strict=True):
        notes = [f"{key.removeprefix('trainer.')}={flat.get(key)}" for key in differing]
        name = ", ".join([method_of(run), *notes])
        seed = flat["trainer.seed"]
        # The same run twice, or other seeds that differ: the folder tells them apart.
        names.append((name, str(run.folder) if (name, seed) in names else seed))
    return names


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _panel_groups(curves: Curves) -> list[dict[str, Any]]:
    if not len(curves.metrics):
        return []
    paid = curves.paid() if len(curves.evaluations) else None
    training = [*curves.moments(), curves.distance(), *([paid] if paid else [])]
    return [
        {"title": "How training went", "panels": training, "reading": curves.reading},
        {
            "title": "Weights and noise",
            "panels": [*curves.weights(), *curves.noise()],
            "reading": "Lower is steadier, except for the effective texts.",
        },
    ]


def _result_cells(run: Run, moments: Sequence[str]) -> list[str]:
    """Return the last evaluation of a run as cells: its step, means, and other measurements."""
    final = last_evaluation(run)
    if final is None:
        return ["not measured yet"]
    by_name = {m.name: m for m in measurements(final.evaluation)}
    names = [*(f"E[{name}]" for name in moments), *_COMPARED]
    return [f"{final.step:,}", *(_result_cell(by_name.get(name)) for name in names)]


def _result_cell(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    text = phrasing.number(measurement.policy)
    return f"{text} ({measurement.verdict})" if measurement.verdict else text
