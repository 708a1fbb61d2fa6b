"""Templates of the pages: what is text is escaped, and a page needs no other file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from dmgen.estimates.score import Score
from dmgen.report import phrasing

_HERE = Path(__file__).parent
# XML, and so a strict reader, refuses these even when escaped; a model can write any of them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"
)


@dataclass(frozen=True)
class Number:
    """A number as it is shown, and all its digits.

    Attributes:
        text: the rounded number.
        exact: the number with all its digits.
    """

    text: str
    exact: str

    @classmethod
    def of(cls, score: Score) -> Number:
        """Return the number of a score, shown with its error."""
        return cls(phrasing.number(score), repr(score.value))


def render(template: str, **values: object) -> str:
    """Return a template filled with values, in HTML escaped.

    Args:
        template: file name in `templates/`.
        values: the variables of the template; a missing one raises `UndefinedError`.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["style"] = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    environment.filters["rows"] = _markdown_rows
    return environment


def _printable(value: object) -> object:
    """Return text without the characters that XML refuses; other values as they are."""
    if isinstance(value, str):
        return type(value)(_UNPRINTABLE.sub("\ufffd", value))
    return value


def _markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return lines of a Markdown table; a bar, as in "female | sports", would end its cell."""
    return "".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n" for row in rows
    )
