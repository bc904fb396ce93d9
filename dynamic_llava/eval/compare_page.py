"""Tables of `compare` as Markdown and as one self-contained page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from string import Template

from .report_html import html_table

# (value, small print)
Cell = tuple[str, str]

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: #1c2024; background: #f5f6f8; margin: 0; }
  main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
  .card { background: #fff; border: 1px solid #e3e7eb; border-radius: 10px; padding: 1rem 1.2rem; overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid #e3e7eb; }
  th { color: #68727c; font-size: .85rem; }
  th:first-child, td:first-child { text-align: left; }
  td small { display: block; color: #68727c; font-size: .78rem; }
  tr:last-child td { border-bottom: 0; }
  ul { color: #68727c; font-size: .9rem; padding-left: 1.2rem; }
</style>
</head>
<body><main>
<h1>$title</h1>
$sections
<ul>$notes</ul>
</main></body></html>
""")


@dataclass(frozen=True)
class Section:
    """One table: its header, and rows of (value, small print)."""

    title: str
    header: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Comparison:
    """The tables of a page and the notes below them."""

    title: str
    sections: list[Section]
    notes: list[str]


def render_markdown(comparison: Comparison) -> str:
    """The page as Markdown; small print follows its value in brackets."""
    blocks = [f"# {comparison.title}"]
    for section in comparison.sections:
        lines = [_line(section.header), _line(["---"] + ["---:"] * (len(section.header) - 1))]
        lines += [_line([f"{value} ({note})" if note else value for value, note in row]) for row in section.rows]
        blocks.append(f"## {section.title}\n\n" + "\n".join(lines))
    blocks.append("\n".join(f"* {note}" for note in comparison.notes))
    return "\n\n".join(blocks) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def render_html(comparison: Comparison) -> str:
    """The page as HTML without anything from outside."""
    sections = [
        f"<h2>{escape(section.title)}</h2>\n<div class='card'>"
        f"{html_table(section.header, [(False, row) for row in section.rows])}</div>"
        for section in comparison.sections
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    return _PAGE.substitute(title=escape(comparison.title), sections="\n".join(sections), notes=notes)
