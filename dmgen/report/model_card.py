"""The certificate of a policy: a model card for people, dmgen.json for programs."""

from __future__ import annotations

from pathlib import Path

import yaml

from dmgen import storage
from dmgen.experiment.publish import publish
from dmgen.report import phrasing
from dmgen.report.answers import questions
from dmgen.report.read import RunRecord, as_score, policy_rows
from dmgen.target.fit import TargetFit

__all__ = ["write_model_card"]


def write_model_card(run: str | Path) -> Path:
    """Writes README.md and dmgen.json into the `policy/` of a finished run; the card's path.

    dmgen.json holds the configuration and the target, from which `load_published` makes the EBM.

    Raises:
        ValueError: the run has no policy or no evaluation yet.
    """
    record = RunRecord.read(run)
    folder = record.folder / "policy"
    if record.config is None or record.final is None or not folder.is_dir():
        raise ValueError(f"the run in {run} is not finished: it has no policy that was measured")
    constraints = record.config.build_constraints()
    publish(folder, record.config, TargetFit.from_dict(record.target, constraints))
    path = folder / "README.md"
    storage.write_text(path, _card(record))
    return path


def _card(record: RunRecord) -> str:
    config, final = record.config, record.final
    if config is None or final is None:
        raise ValueError(f"{record.folder} has not been measured")
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    is_hub_id = config.base != "tiny-bios" and not Path(config.base).is_dir()
    tags = {"tags": ["dmgen", "distribution-matching", record.method]}
    front = yaml.safe_dump(head | tags | ({"base_model": config.base} if is_hub_id else {}))
    rows = [
        _row(
            asked,
            phrasing.asked_in_numbers(row, final["tolerance"]),
            _base_mean(record, row),
            phrasing.number(as_score(row)),
            phrasing.spread(row),
            row["verdict"],
        )
        for asked, row in zip(questions(record), policy_rows(final), strict=True)
    ]
    prices = [
        _row(p.title, p.symbol, phrasing.number(p.score), p.meaning) for p in phrasing.prices(final)
    ]
    base_name = config.base if is_hub_id else Path(config.base).name
    seeds = f"fit {config.fit.seed}, training {config.trainer.seed}, judging {final.get('seed')}"
    return "\n".join([
        f"---\n{front}---",
        f"# {base_name}, trained to a distribution",
        "",
        f"A copy of `{base_name}` that was trained by {record.method} for {record.n_steps:,} steps "
        "so that its texts obey the constraints below *as a distribution* and otherwise stay as "
        "they were. Draw from it at temperature 1, without top-k and top-p: what is measured here "
        "holds for nothing else.",
        "",
        "| asked | in numbers | base | policy | 99 % interval | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "| price | | nats | |",
        "| --- | --- | --- | --- |",
        *prices,
        "",
        f"Measured on {phrasing.n_texts(final):,} fresh texts. a is the base, "
        "π this policy, p the distribution closest to the base that meets the constraints exactly. "
        "± is one standard error.",
        "",
        f"- Prompt: {config.prompt!r}; texts of at most {config.max_new_tokens} tokens",
        *(f"- λ of {row['moment']}: {row['lambda']}" for row in record.target["constraints"]
          if "moment" in row),
        f"- Seeds: {seeds}",
        f"- Made under: {', '.join(f'{k} {v}' for k, v in record.versions.items())}",
        "- `dmgen.json` holds the configuration and the target: "
        "`from dmgen.experiment.publish import load_published; load_published(folder)` rebuilds it",
        "",
    ])  # fmt: skip


def _row(*cells: str) -> str:
    """A line of a table; names such as "female | sports" would end their cells."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _base_mean(record: RunRecord, row: dict[str, object]) -> str:
    final = record.final or {"rows": []}
    found = [r for r in final["rows"] if r["metric"] == row["metric"] and r["model"] == "base"]
    return phrasing.number(as_score(found[0])) if found else ""
