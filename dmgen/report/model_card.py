"""The model card of a policy, with `dmgen.json` beside it for programs."""

from __future__ import annotations

from pathlib import Path

import yaml

from dmgen import storage
from dmgen.evaluation.result import Evaluation
from dmgen.experiment.config import RunConfig
from dmgen.experiment.publish import publish
from dmgen.experiment.result import Run
from dmgen.models.embedded import EMBEDDED
from dmgen.report import phrasing
from dmgen.report.page import render
from dmgen.report.run_values import as_run, method_of
from dmgen.target.fit import TargetFit


def write_model_card(run: Run | str | Path) -> Path:
    """Write README.md and dmgen.json into the `policy/` of a finished run; return the card's path.

    dmgen.json holds the configuration and the target, from which `load_published` makes the EBM.

    Args:
        run: the run, or its folder.

    Raises:
        ValueError: the run has no policy or no evaluation yet.
    """
    run = as_run(run)
    folder = run.folder / "policy"
    config, target, evaluation = run.config, run.target, run.evaluation
    if config is None or target is None or evaluation is None or not folder.is_dir():
        raise ValueError(
            f"the run in {run.folder} is not finished: it has no policy that was measured"
        )
    publish(folder, config, target)
    path = folder / "README.md"
    storage.write_text(path, _card(run, config, target, evaluation))
    return path


def _card(run: Run, config: RunConfig, target: TargetFit, evaluation: Evaluation) -> str:
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dmgen", "distribution-matching", method_of(run)],
    }
    is_hub_id = config.base not in EMBEDDED and not Path(config.base).is_dir()
    return render(
        "model_card.md",
        front=yaml.safe_dump(front | ({"base_model": config.base} if is_hub_id else {})),
        base=config.base if is_hub_id else Path(config.base).name,
        method=method_of(run),
        run=run,
        config=config,
        evaluation=evaluation,
        prompt=repr(config.prompt),
        answers=[
            [
                request,
                phrasing.request_in_numbers(row, evaluation.tolerance),
                phrasing.number(row.base),
                phrasing.number(row.policy),
                phrasing.span(*row.interval),
                row.verdict,
            ]
            for request, row in zip(phrasing.requests(run), evaluation.moments, strict=True)
        ],
        prices=[
            [price.title, price.symbol, phrasing.number(price.score), price.meaning]
            for price in phrasing.prices(evaluation)
        ],
        lambdas=[
            (moment.name, repr(weight))
            for moment, weight in zip(target.moments, target.lambdas.tolist(), strict=True)
        ],
        versions=", ".join(f"{name} {version}" for name, version in run.versions.items()),
    )
