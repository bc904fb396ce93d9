"""The rows, figures and files of a report: a run against its dense base and against random selection."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ..checkpoints.loaded import LoadedModel, SparsitySettings, environment, load_model
from ..data.opening import open_picture
from ..efficiency.flops import image_tokens_per_image, kv_cache_bytes, predictor_flops, prefill_flops
from ..files import output_folder, write_atomically
from ..rules import LEARNED
from ..screen import console, progress
from ..visualize.drawing import PatchView, WordView, patch_sheet, word_sheet
from ..visualize.views import view_patches, view_words
from .conversation_files import conversation_files
from .conversations import data_root, read_documents
from .perplexity import AnswerScores, score_answers
from .report_html import COLUMNS, format_cells, render_html
from .runner import EvaluationOptions, check_data, evaluate_tasks

VQA_TASK = "shapes_vqa"
DESCRIBE_TASK = "shapes_describe"
PATCH_VIEWS = 4


@dataclass(frozen=True)
class Row:
    """One line of the report: which model, with which settings."""

    name: str
    label: str
    settings: SparsitySettings
    dense: bool = False
    at_output_rate: bool = False

    def settings_for(self, loaded: LoadedModel) -> SparsitySettings:
        """The settings; with `at_output_rate` the output rate is driven to the checkpoint's own."""
        if not self.at_output_rate:
            return self.settings
        return replace(self.settings, output_keep_rate=loaded.model.config.sparsity.output_keep_rate)


ROWS = (
    Row("dense", "Dense base", SparsitySettings(), dense=True),
    Row("image", "Image only (I)", SparsitySettings(output_sparsity=False)),
    Row("image_output", "Image, output (I|T)", SparsitySettings(), at_output_rate=True),
    Row("image_output_learned", "I|T, decisions as learned", SparsitySettings()),
    Row("random_image", "Random image tokens", SparsitySettings(output_sparsity=False, image_selector="random")),
    Row("random_output", "Random output tokens", SparsitySettings(output_selector="random")),
)


def evaluate_row(
    row: Row, loaded: LoadedModel, options: EvaluationOptions, num_descriptions: int | None = None
) -> dict[str, Any]:
    """Every number of one row, with the settings that made them."""
    started = time.perf_counter()
    settings = row.settings_for(loaded)
    evaluation = evaluate_tasks(loaded, settings, options)
    root = data_root()
    scores = score_answers(
        loaded,
        conversation_files()[DESCRIBE_TASK].require(root),
        root,
        settings,
        options.batch_size,
        num_descriptions,
        seed=options.seed,
    )
    accuracy = evaluation.metrics[VQA_TASK]
    return {
        "name": row.name,
        "label": row.label,
        "model": loaded.path,
        "settings": asdict(settings),
        "image_keep_rate": loaded.image_keep_rate(settings),
        "accuracy": accuracy["accuracy"],
        "accuracy_stderr": accuracy.get("accuracy_stderr"),
        "accuracy_by_kind": {
            name.removeprefix("accuracy_"): value
            for name, value in accuracy.items()
            if name.startswith("accuracy_") and not name.endswith("_stderr")
        },
        **scores.summary(),
        **efficiency(loaded, settings, scores),
        "seconds": time.perf_counter() - started,
    }


def efficiency(loaded: LoadedModel, settings: SparsitySettings, scores: AnswerScores) -> dict[str, float]:
    """Prefill FLOPs of a description prompt, and KV bytes when the description is written, per sample."""
    config = loaded.model.config
    text_tokens = scores.mean("dense_tokens") - scores.mean("image_tokens") - scores.mean("output_tokens")
    dtype_bytes = loaded.model.dtype.itemsize
    cached = [kv_cache_bytes(config, s.dense_tokens, s.sparse_tokens, dtype_bytes) for s in scores.samples]
    flops = prefill_flops(config, round(text_tokens), loaded.image_keep_rate(settings))
    if settings.image_selector != LEARNED:
        flops -= predictor_flops(config, image_tokens=image_tokens_per_image(config))
    return {
        "prompt_text_tokens": round(text_tokens),
        "prefill_flops": flops,
        "kv_bytes": sum(cached) / len(cached),
        "kv_dtype_bytes": dtype_bytes,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add what each row is of the first: accuracy difference in points, and ratios of the rest."""
    base = rows[0]
    for row in rows:
        row["accuracy_points_vs_dense"] = 100 * (row["accuracy"] - base["accuracy"])
        for name in ("perplexity", "prefill_flops", "kv_bytes"):
            row[f"{name}_vs_dense"] = row[name] / base[name]


def patch_views(loaded: LoadedModel, seed: int, count: int = PATCH_VIEWS) -> list[PatchView]:
    """Kept patches, learned and random, of the first held-out pictures, each with another kind of question."""
    root = data_root()
    chosen: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for document in read_documents(root, conversation_files()[VQA_TASK]):
        if document["kind"] not in chosen and document["image"] not in seen:
            chosen[document["kind"]] = document
            seen.add(document["image"])
    asked = enumerate(list(chosen.values())[:count])
    pictures = ((index, d, open_picture(root / d["image"])) for index, d in asked)
    return [
        view_patches(loaded, picture, d["question"], d["answer"], seed + index, (LEARNED, "random"))
        for index, d, picture in pictures
    ]


def word_view(loaded: LoadedModel) -> WordView:
    """Kept words of the description that the model writes for the first held-out picture."""
    root = data_root()
    document = read_documents(root, conversation_files()[DESCRIBE_TASK])[0]
    return view_words(loaded, open_picture(root / document["image"]), document["question"])


def screen_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a rich table."""
    table = Table(title="Dynamic-LLaVA against its dense base", title_style="bold")
    for title, _ in COLUMNS:
        table.add_column(title, justify="left" if title == COLUMNS[0][0] else "right")
    for row in rows:
        cells = [f"{value}\n[dim]{note}[/dim]" if note else value for value, note in format_cells(row)]
        table.add_row(*cells, style="bold" if row["name"] == "image_output" else None)
    return table


def make_report(
    run: str,
    base: str,
    output: str | Path,
    options: EvaluationOptions,
    num_descriptions: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluate every row, write the files into the folder `output` and return the content of `report.json`.

    Args:
        run: Dynamic-LLaVA checkpoint.
        base: its dense base.
        output: folder to write.
        options: of the questions; its batch size and seed serve the descriptions too.
        num_descriptions: first descriptions to score; None means all.
        dtype, device: see `load_model`.

    Raises:
        ValueError: `base` is not dense, or `run` is.
    """
    check_data([VQA_TASK, DESCRIBE_TASK], None)
    folder = output_folder(output)
    sparse = load_model(run, dtype, device)
    # Both are shown their pictures in the same way: in the run's.
    loaded = {True: load_model(base, dtype, device, sparse.image_aspect_ratio), False: sparse}
    for dense, model in loaded.items():
        if model.is_dense != dense:
            wanted = "--base must be a dense LLaVA" if dense else "--run must be a Dynamic-LLaVA checkpoint"
            raise ValueError(f"{wanted}; {model.path} is a {model.model.config.model_type!r} model.")
    rows = []
    for row in ROWS:
        with progress(0, row.label):
            rows.append(evaluate_row(row, loaded[row.dense], options, num_descriptions))
    add_ratios(rows)
    report = {
        "run": run,
        "base": base,
        "data_root": str(data_root()),
        "options": {**asdict(options), "num_descriptions": num_descriptions},
        "image_aspect_ratio": sparse.image_aspect_ratio,
        "sparsity": loaded[False].model.config.to_dict()["sparsity"],
        "environment": environment(loaded[False]),
        "rows": rows,
    }
    words = word_view(loaded[False])
    patch_sheet(patch_views(loaded[False], options.seed)).save(folder / "kept_patches.png")
    word_sheet(words).save(folder / "kept_words.png")
    words.picture.save(folder / "described.png")
    report["description"] = {"question": words.question, "pieces": words.pieces, "kept": words.kept}
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "report.html", render_html(report, folder))
    console().print(screen_table(rows), f"Report: {folder / 'report.html'}")
    return report
