"""`report.html`: one self-contained page, pictures inside, from the content of `report.json`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Dynamic-LLaVA report</title>
<style>
  :root { --ink: #1c2024; --soft: #68727c; --line: #e3e7eb; --kept: #ffe27a; --accent: #e25822; }
  body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: #f5f6f8; margin: 0; }
  main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
  h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
  h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
  p { margin: .4rem 0; }
  .soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
  .card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem;
    overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: .5rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
  th { font-weight: 600; font-size: .85rem; color: var(--soft); white-space: normal; vertical-align: bottom; }
  th:first-child, td:first-child { text-align: left; }
  td small { display: block; color: var(--soft); font-weight: 400; font-size: .78rem; }
  tr:last-child td { border-bottom: 0; }
  tr.main td { font-weight: 600; background: #fff6ee; }
  tr.main td:first-child { box-shadow: inset 3px 0 var(--accent); }
  figure { margin: 0; }
  img { max-width: 100%; height: auto; display: block; }
  .words { font-size: 1.1rem; line-height: 2; color: #a9b1b8; }
  .words mark { background: var(--kept); color: var(--ink); border-radius: 4px; padding: .1em .12em; }
  .pair { display: flex; gap: 1.4rem; align-items: flex-start; }
  .pair img { width: 200px; flex: none; border-radius: 6px; }
  details { margin-top: .8rem; } pre { font-size: .8rem; overflow-x: auto; }
</style>
</head>
<body><main>
<h1>Dynamic-LLaVA against its dense base</h1>
<p class="soft">Run <b>$run</b>, base <b>$base</b>, held-out shapes in <b>$data_root</b>. Keep rates: image $image_rate,
output $output_rate; dense layers in front: $sparse_layer.</p>

<h2>Results</h2>
<div class="card">$table</div>
<p class="soft">Small figures compare with the dense base. Accuracy: exact match on short questions through lmms-eval.
Perplexity: reference descriptions, scored with the decisions of inference. Tokens kept: mean per description. FLOPs:
prefill of a description prompt, all its tokens. KV: cache of one sample when its description is written.</p>

<h2>Accuracy by kind of question</h2>
<div class="card">$kinds</div>

<h2>Which patches are kept</h2>
<figure class="card"><img alt="Kept patches of held-out images" src="$patches">
<figcaption>Held-out images with the answer of I|T. Dropped patches are faded; second row: learned, third row: random
at the same rate.</figcaption></figure>

<h2>Which words are kept</h2>
<div class="card pair"><img alt="The picture described" src="$described"><div>
<p class="soft">$question</p><p class="words">$words</p>
<p class="soft">Written by the model. Highlighted tokens stay in the cache of the sparse layers ($kept_words), grey ones
are forgotten after their own step.</p></div></div>

<footer><p>$environment</p>
<details><summary>Settings of every row</summary><pre>$settings</pre></details></footer>
</main></body></html>
""")


def scaled(value: float, unit: str, base: int = 1000) -> str:
    """`value` with three digits and a prefix: `scaled(2.5e9, "FLOPs")` is `2.50 GFLOPs`."""
    prefixes = ["", "K", "M", "G", "T", "P"]
    index = 0
    while abs(value) >= base and index < len(prefixes) - 1:
        value, index = value / base, index + 1
    digits = 0 if index == 0 else 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {prefixes[index]}{unit}"


# Title, and (value, comparison with the dense base) from a row.
COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], tuple[str, str]]], ...] = (
    ("", lambda row: (row["label"], "")),
    ("Accuracy", lambda row: (f"{100 * row['accuracy']:.1f} %", f"{row['accuracy_points_vs_dense']:+.1f}")),
    ("Perplexity", lambda row: (f"{row['perplexity']:.3f}", f"×{row['perplexity_vs_dense']:.3f}")),
    ("Image tokens kept", lambda row: _kept(row, "image")),
    ("Output tokens kept", lambda row: _kept(row, "output")),
    ("Prefill", lambda row: (scaled(row["prefill_flops"], "FLOPs"), f"×{row['prefill_flops_vs_dense']:.2f}")),
    ("KV cache", lambda row: (scaled(row["kv_bytes"], "B"), f"×{row['kv_bytes_vs_dense']:.2f}")),
)


def _kept(row: dict[str, Any], part: str) -> tuple[str, str]:
    kept, total = row[f"{part}_tokens_kept"], row[f"{part}_tokens"]
    return f"{100 * row[f'{part}_kept_fraction']:.1f} %", f"{kept:.3g} of {total:.3g}"


def format_cells(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(value, comparison) of one row in the order of `COLUMNS`; the base is not compared with itself."""
    cells = [cell(row) for _, cell in COLUMNS]
    return [(value, "" if row["name"] == "dense" and note[:1] in "×+" else note) for value, note in cells]


def html_table(header: Sequence[str], rows: Sequence[tuple[bool, Sequence[tuple[str, str]]]]) -> str:
    """A table; rows are (emphasised, cells), cells are (value, small print), all plain text."""
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(
        ('<tr class="main">' if main else "<tr>")
        + "".join(f"<td>{escape(value)}<small>{escape(note)}</small></td>" for value, note in cells)
        + "</tr>"
        for main, cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def embed_png(path: Path) -> str:
    """The file as a data address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def render_html(report: dict[str, Any], folder: Path) -> str:
    """The page for `report`, with the pictures that lie in `folder`."""
    rows = report["rows"]
    kinds = sorted(rows[0]["accuracy_by_kind"])
    words = report["description"]
    marked = [
        f"<mark>{escape(piece)}</mark>" if keep else escape(piece)
        for piece, keep in zip(words["pieces"], words["kept"], strict=True)
    ]
    settings = [f"{row['label']}: model={row['model']} {row['settings']}" for row in rows]
    return _PAGE.substitute(
        run=escape(report["run"]),
        base=escape(report["base"]),
        data_root=escape(report["data_root"]),
        image_rate=report["sparsity"]["image_keep_rate"],
        output_rate=report["sparsity"]["output_keep_rate"],
        sparse_layer=report["sparsity"]["sparse_layer"],
        table=html_table([title for title, _ in COLUMNS], [(_is_main(row), format_cells(row)) for row in rows]),
        kinds=html_table(["", *kinds], [(_is_main(row), _kind_cells(row, kinds)) for row in rows]),
        patches=embed_png(folder / "kept_patches.png"),
        described=embed_png(folder / "described.png"),
        question=escape(words["question"]),
        words="".join(marked),
        kept_words=f"{sum(words['kept'])} of {len(words['kept'])}",
        environment=escape(", ".join(f"{name}: {value}" for name, value in report["environment"].items())),
        settings=escape("\n".join(settings)),
    )


def _is_main(row: dict[str, Any]) -> bool:
    return row["name"] == "image_output"


def _kind_cells(row: dict[str, Any], kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [(row["label"], ""), *((f"{100 * row['accuracy_by_kind'][kind]:.1f} %", "") for kind in kinds)]
