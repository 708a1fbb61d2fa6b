"""HTML by construction: what is text is escaped, and tags are closed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Markup", "join", "page", "table", "tag"]

_VOID = {"br", "hr", "img", "meta"}
# What XML, and so a strict reader, refuses even when escaped; a model can write any of it.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"
)

_STYLE = """
:root { color-scheme: light; --ink: #1c2530; --quiet: #5b6673; --line: #d8dee5; --pale: #f4f6f8;
  --met: #12733a; --unmet: #b3261e; --open: #8a5a00; --blue: #0b62a8; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 75ch; }
small, .quiet, figcaption { color: var(--quiet); }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; }
.note { background: #fff6df; border-left: 4px solid #d99a00; padding: .5rem .8rem;
  max-width: 75ch; }
.cards { display: grid; gap: .9rem; margin: .9rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card h3 { margin: 0 0 .2rem; }
.big { font-size: 1.35rem; font-weight: 600; }
.verdict { display: inline-block; border-radius: 999px; padding: .05rem .7rem; font-weight: 600;
  color: #fff; background: var(--quiet); white-space: nowrap; }
.met { background: var(--met); }
.unmet { background: var(--unmet); }
.open { background: var(--open); }
.track { position: relative; height: 26px; margin: .7rem 0 0; background: var(--pale);
  border-radius: 4px; }
.track span { position: absolute; top: 0; height: 100%; }
.track .goal { background: #b9dcc6; border-left: 1px solid #4a9a68;
  border-right: 1px solid #4a9a68; }
.track .interval { top: 10px; height: 6px; background: var(--blue); opacity: .55;
  border-radius: 3px; }
.track .dot { top: 7px; width: 12px; height: 12px; margin-left: -6px; border-radius: 50%;
  background: var(--blue); border: 2px solid #fff; box-shadow: 0 0 0 1px var(--blue); }
.track .was { background: #fff; box-shadow: 0 0 0 2px var(--quiet); border: 0; top: 8px;
  width: 10px; height: 10px; margin-left: -5px; }
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--quiet); }
.figures { display: grid; gap: 1rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 500; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5rem; padding: .6rem 0;
  border-bottom: 1px solid var(--line); }
.pair div { unicode-bidi: isolate; white-space: pre-wrap; }
.pair b { display: none; font-size: .8rem; color: var(--quiet); }
.heads { font-weight: 600; color: var(--quiet); }
mark { background: #fde68a; color: inherit; border-radius: 2px; padding: 0 .1em; }
.has { font-size: .78rem; border: 1px solid var(--line); border-radius: 999px; padding: 0 .5rem;
  color: var(--quiet); white-space: nowrap; }
@media (max-width: 700px) {
  .pair { grid-template-columns: 1fr; gap: .4rem; }
  .pair b { display: block; }
  .heads { display: none; }
}
@media print { .card, figure, .pair { break-inside: avoid; } }
"""
# The page may load nothing: all that it shows is inside it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """A string that is HTML already and is not escaped again."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """An element; children that are plain text are escaped, and so are attributes.

    Args:
        name: of the element.
        children: `Markup`, or text.
        attributes: by name, with a "_" at the end where Python has the word for itself (`class_`)
            and for a "-" (`aria_hidden`).
    """
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_safe(v)}"' for key, v in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{name}{inside} />")
    return Markup(f"<{name}{inside}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Markup and text one after the other, the text escaped."""
    return Markup("".join(c if isinstance(c, Markup) else _safe(c) for c in children))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table that scrolls by itself where it is too wide; the first cell of a row names it."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    heads = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    return tag("div", tag("table", heads, tag("tbody", *body)), class_="scroll", tabindex="0")


def page(title: str, *sections: str) -> str:
    """A whole HTML page that needs nothing but itself."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_safe(_POLICY)}" />'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    body = tag("body", tag("main", *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _safe(text: str) -> str:
    return escape(_UNPRINTABLE.sub("\ufffd", text))
