"""Write the tables of the pages from the recorded results: `python scripts/readme_tables.py [--check]`.

Each table stands between `<!-- table NAME -->` and `<!-- end NAME -->`. `--check` changes nothing and exits with 1
where a page and the records differ.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.config import Command, option
from dynamic_llava.errors import ExitStatus, run_command
from dynamic_llava.files import write_atomically
from dynamic_llava.reading import read_json_object, read_text

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = ROOT / "eval" / "expected"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" if any(line) else "|" * (len(line) + 1) for line in lines)


def read(name: str) -> dict[str, Any]:
    """The recorded result `name`."""
    return read_json_object(EXPECTED / name, "recorded result")


def percent(fraction: float) -> str:
    """0.988 as 98.8 %."""
    return f"{100 * fraction:.1f} %"


def shapes() -> str:
    """Accuracy, perplexity and cost of every row of the default run."""
    report = read("shapes.json")
    columns = ["", "accuracy", "perplexity of descriptions", "image tokens kept", "output tokens kept"]
    rows = []
    for row in report["rows"]:
        label = row["label"]
        if row["settings"]["output_keep_rate"]:
            label += f", output rate driven to {row['settings']['output_keep_rate']}"
        rows.append(
            [
                label,
                percent(row["accuracy"]),
                f"{row['perplexity']:.3f} (×{row['perplexity_vs_dense']:.3f})",
                f"{row['image_tokens_kept']:.0f} of {row['image_tokens']:.0f}",
                f"{row['output_tokens_kept']:.1f} of {row['output_tokens']:.1f}",
                f"{row['prefill_flops'] / 1e6:.0f} M (×{row['prefill_flops_vs_dense']:.2f})",
                f"{row['kv_bytes'] / 1e3:.0f} k (×{row['kv_bytes_vs_dense']:.2f})",
            ]
        )
    return markdown([*columns, "prefill FLOPs", "KV bytes"], rows)


def efficiency() -> str:
    """Time and memory, ours over stock, of two runs of `measure`."""
    runs = [read("efficiency_cpu.json"), read("efficiency_cpu_repeat.json")]
    batches = sorted({case["batch"] for case in runs[0]["decode"]})

    def cell(found: Callable[[dict[str, Any]], list[float]]) -> str:
        values = [found(run) for run in runs]
        same = all(f"{x:.2f}" == f"{values[0][n]:.2f}" for value in values for n, x in enumerate(value))
        shown = [" / ".join(f"{x:.2f}" for x in value) for value in values]
        return shown[0] if same else "; ".join(shown)

    def decode(batch: int, value: Callable[[dict[str, Any]], float]) -> str:
        return cell(lambda run: [value(case) for case in run["decode"] if case["batch"] == batch])

    def whole(mode: str, batch: int, value: Callable[[dict[str, Any]], float]) -> str:
        if not any(case["batch"] == batch for case in runs[0][mode]):
            return ""
        return cell(lambda run: [value(case) for case in run[mode] if case["batch"] == batch])

    lengths = " / ".join(f"{case['output_length']:,}" for case in runs[0]["decode"] if case["batch"] == batches[0])
    prefill, no_cache = runs[0]["prefill"][0], runs[0]["no_cache"][0]
    rows = [
        [
            f"time to first token (FLOPs promise {prefill['flops']['ratio']:.2f})",
            *(whole("prefill", b, lambda c: c["time"]["ratio"]["median"]) for b in batches),
        ],
        [
            "share of the speed-up that the FLOPs promise",
            *(whole("prefill", b, lambda c: c["share_of_promise"]) for b in batches),
        ],
        [
            f"decode step with cache at {lengths} output tokens",
            *(decode(b, lambda c: c["time"]["ratio"]["median"]) for b in batches),
        ],
        [
            f"KV memory held at {lengths} output tokens",
            *(decode(b, lambda c: c["kv_bytes"]["ratio"]) for b in batches),
        ],
        [
            f"{no_cache['output_length']} tokens without cache",
            *(whole("no_cache", b, lambda c: c["total_s"]["ratio"]) for b in batches),
        ],
    ]
    return markdown(["", *(f"batch {b}" for b in batches)], rows)


def train_step() -> str:
    """Time of a step and bytes saved for its backward, ours over stock; what models trained so do on the shapes."""
    rows = []
    for mode, case in read("train_step_cpu.json")["modes"].items():
        name = "_".join(["shapes", *mode.split()]).removesuffix("_masked")
        trained = {row["name"]: row for row in read(f"{name}.json")["rows"]}
        rows.append(
            [
                mode,
                f"{case['time']['ratio']['median']:.2f}",
                f"{case['saved_ratio']:.2f}",
                percent(trained["image_output"]["accuracy"]),
                f"{trained['image_output']['perplexity']:.3f}",
                percent(trained["random_image"]["accuracy"]),
            ]
        )
    columns = ["ours over stock", "time", "activations saved", "accuracy on the shapes", "perplexity"]
    return markdown([*columns, "accuracy with random image tokens"], rows)


#: The tables of each page.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"shapes": shapes},
    "docs/efficiency.md": {"efficiency": efficiency},
    "docs/training.md": {"train_step": train_step},
}


def render(path: str, page: str) -> str:
    """The text `page` of `path` with its tables made anew."""
    for name, build in PAGES[path].items():
        pattern = re.compile(f"(<!-- table {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{path} has no place for the table {name!r}: <!-- table {name} -->")
        table = build()
        page = pattern.sub(lambda match, table=table: match[1] + table + match[2], page)
    return page


@dataclass(frozen=True)
class TableOptions:
    """What is done."""

    check: bool = option(False, "only say whether the pages are up to date")


COMMAND = Command("scripts/readme_tables.py", __doc__, (TableOptions,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see `errors.ExitStatus`: 1 where `--check` finds a difference."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str] | None) -> ExitStatus:
    (options,) = COMMAND.parse(arguments)
    status = ExitStatus.DONE
    for name in PAGES:
        page = read_text(ROOT / name)
        made = render(name, page)
        if not options.check:
            write_atomically(ROOT / name, made)
        elif made != page:
            print(f"{name} differs from eval/expected; run python scripts/readme_tables.py", file=sys.stderr)
            status = ExitStatus.FINDINGS
    return status


if __name__ == "__main__":
    sys.exit(main())
