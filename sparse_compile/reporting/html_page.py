"""A page of HTML in one file that needs nothing else: no script, no network.

Text is escaped wherever it comes from: only what ``tag`` made passes as it is.
"""

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1f23; --faint: #666c76; --line: #dcdfe4; --card: #f5f6f8;
  --sparse: #1a7f5a; --fp8: #2f6fd0; --dense: #c46a1b; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #e6e8ec; --faint: #9aa1ac;
  --line: #333841; --card: #1d2026; --sparse: #3fb98a; --fp8: #6ea3f0; --dense: #e39a55; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
summary, code, strong { overflow-wrap: anywhere; } summary { cursor: pointer; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; } h3 { font-size: 1rem; }
p { margin: .25rem 0; } .faint, small { color: var(--faint); } code { font-size: .85em; }
.bar { display: flex; height: 1.5rem; border-radius: .25rem; overflow: hidden; background: var(--card); }
.bar > span, .key { background: var(--dense); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar > span { display: block; height: 100%; }
.half { opacity: .6; } .faded { opacity: .3; }
.sparse { background: var(--sparse) !important; } .fp8 { background: var(--fp8) !important; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem; }
.keys { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .4rem .75rem; align-items: center;
  margin: .75rem 0; }
ol { padding-left: 1.6rem; } ol > li { margin-bottom: .5rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; margin-top: .75rem; }
th { white-space: nowrap; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; } .number, .whole { white-space: nowrap; }
details { min-width: 9rem; } details ul { margin: .25rem 0; padding-left: 1rem; }
figure { margin: 1.5rem 0; } svg { display: block; width: 100%; height: 8rem; background: var(--card); }
.axis { display: flex; justify-content: space-between; font-size: .8rem; color: var(--faint); }
@media screen and (max-width: 45rem) {
  thead { display: none; } tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td { display: flex; gap: .75rem; border: 0; padding: .1rem 0; } td:empty { display: none; }
  td::before { content: attr(data-label); flex: 0 0 6.5rem; color: var(--faint); }
  .number { text-align: left; }
  .bars { grid-template-columns: 1fr; gap: .1rem; } .bars > :nth-child(3n) { margin-bottom: .5rem; }
}
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 9pt; }
  tr, li, figure, .bars { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
# No request leaves the page, whatever stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Markup(str):
    """HTML, as opposed to text."""

    __slots__ = ()


def page(title: str, *body: str) -> str:
    """The whole file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def tag(element: str, *children: str, **attributes: str) -> Markup:
    """An element; ``class_`` for class, ``data_label`` for data-label.  Children that are no Markup are escaped."""
    given = "".join(
        f' {attribute.rstrip("_").replace("_", "-")}="{escape(value)}"' for attribute, value in attributes.items()
    )
    inside = "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    if element == "meta":
        return Markup(f"<{element}{given}>")
    newline = "\n" if element in ("p", "li", "tr", "section", "table", "div") else ""
    return Markup(f"<{element}{given}>{inside}</{element}>{newline}")


def table(headers: Sequence[str], lines: Sequence[Sequence[str]], whole: Iterable[str] = ()) -> Markup:
    """A table of the columns that hold something; where the page is narrow, each line becomes a list of its own.

    Args:
        whole: headers of columns whose cells are never wrapped.  Those that name a unit hold numbers.
    """
    filled = [index for index in range(len(headers)) if index == 0 or any(line[index] for line in lines)]
    headers, *lines = ([cells[index] for index in filled] for cells in (headers, *lines))
    kinds = {header: {"class_": "whole"} if header in whole else {} for header in headers}
    kinds |= {header: {"class_": "number"} for header in headers if "µs" in header}
    head = tag("thead", tag("tr", *(tag("th", header, **kinds[header]) for header in headers)))
    body = [
        tag("tr", *(tag("td", cell, data_label=h, **kinds[h]) for h, cell in zip(headers, line, strict=True)))
        for line in lines
    ]
    return tag("table", head, tag("tbody", *body))
