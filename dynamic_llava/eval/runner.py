"""One evaluation of one loaded model: lmms-eval tasks, and perplexity where descriptions are asked for."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from ..checkpoints.loaded import LoadedModel, SparsitySettings
from ..files import output_folder, write_atomically
from ..screen import progress
from .conversation_files import conversation_files
from .conversations import data_root
from .costs import summarize
from .generation_metrics import corpus_metrics, table_3
from .llava_prompts import OCR_TASK
from .lmms_model import DynamicLlava
from .local.files import local_files, require_ocr_tokens
from .meteor import require_wordnet
from .perplexity import score_answers
from .responses import ResponseStore
from .task_index import BenchmarkTasks, check_hub_access, leaf_tasks, plain_errors, task_manager_for, without_bars


@dataclass(frozen=True)
class EvaluationOptions:
    """What an evaluation covers.

    Args:
        tasks: lmms-eval task names.
        batch_size: prompts per `generate` call and samples per scoring call.
        limit: documents per task; None means all.
        seed: of the random selectors; the same seed and batch size repeat an evaluation.
        tasks_dir: folder of task YAML, see `task_manager_for`.
        data_root: folder of prepared documents that stock tasks read in place of the hub, see `local_files`.
        llava_prompts: ask as LLaVA's own scripts do where lmms-eval asks otherwise, see `llava_prompts`.
    """

    tasks: tuple[str, ...]
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    tasks_dir: str | None = None
    data_root: str | None = None
    llava_prompts: bool = False


@dataclass
class Evaluation:
    """Results with the settings that made them. `metrics` maps task -> metric -> value, `samples` task -> documents,
    `efficiency` task -> what `costs.summarize` gives.

    `dense` tells the baseline, a stock LLaVA; `image_aspect_ratio` how pictures became square, see `loading`.
    """

    model: str
    settings: SparsitySettings
    options: EvaluationOptions
    metrics: dict[str, dict[str, float]]
    lmms_eval_version: str
    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)
    efficiency: dict[str, dict[str, float | None]] = field(default_factory=dict)
    dense: bool = False
    image_aspect_ratio: str | None = None

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON."""
        return {
            "model": self.model,
            "dense": self.dense,
            "image_aspect_ratio": self.image_aspect_ratio,
            "settings": asdict(self.settings),
            "options": asdict(self.options),
            "metrics": self.metrics,
            "efficiency": self.efficiency,
            "lmms_eval_version": self.lmms_eval_version,
        }


def check_data(tasks: Sequence[str], tasks_dir: str | None) -> None:
    """`FileNotFoundError` where the data of a task in conversation JSON is missing, before a model is loaded; so it is
    where generated answers are compared by METEOR and its word lists are missing."""
    files = conversation_files(tasks_dir)
    for file in (files[task] for task in tasks if task in files):
        file.require(data_root())
        if file.meteor:
            require_wordnet()


def check_tasks(options: EvaluationOptions) -> BenchmarkTasks:
    """The task manager of an evaluation, after everything that can be checked without a model.

    Raises:
        FileNotFoundError: a file of documents, or an image, is missing.
        ValueError: an unknown task, an incomplete document, half a pair of questions, or no hub token where one is
            needed.
    """
    manager = task_manager_for(options.tasks, options.tasks_dir, llava_prompts=options.llava_prompts)
    check_data(options.tasks, options.tasks_dir)
    leaves = [leaf for task in options.tasks for leaf in leaf_tasks(manager, task)]
    if "mme" in leaves and (options.limit or 0) % 2:
        raise ValueError(f"MME scores pairs of questions; --limit must be even, got {options.limit}.")
    manager.local = local_files(options.data_root, leaves)
    if options.llava_prompts and OCR_TASK in manager.local:
        require_ocr_tokens(manager.local[OCR_TASK])
    check_hub_access(manager, options.tasks)
    return manager


def read_tasks(manager: BenchmarkTasks, options: EvaluationOptions) -> None:
    """Read the documents of all tasks ahead of the evaluation; `ValueError` where that fails."""
    with plain_errors(options.tasks):
        manager.read(options.tasks)


def run_lmms(lm: lmms, manager: BenchmarkTasks, options: EvaluationOptions, output: Path | None) -> dict[str, Any]:
    """lmms-eval's results of `lm`; submission files go to `output/submissions`. Empty on ranks other than the first."""
    from lmms_eval.evaluator import simple_evaluate

    # Some tasks write files beside their scores and ask for the command line's output folder.
    submissions = argparse.Namespace(output_path=str(output), process_with_media=False) if output else None
    with plain_errors(options.tasks), without_bars():
        results = simple_evaluate(
            model=lm,
            tasks=list(options.tasks),
            task_manager=manager,
            batch_size=options.batch_size,
            limit=options.limit,
            bootstrap_iters=0,
            torch_random_seed=options.seed,
            cli_args=submissions,
        )
    return results or {}


def evaluate_tasks(
    loaded: LoadedModel,
    settings: SparsitySettings,
    options: EvaluationOptions,
    manager: BenchmarkTasks | None = None,
    output: Path | None = None,
    store: ResponseStore | None = None,
) -> Evaluation | None:
    """Run lmms-eval on `options.tasks`, and score the reference answers of those that have long ones.

    Args:
        loaded, settings, options: what is evaluated and how.
        manager: what `check_tasks` gave; None checks now.
        output: folder for the submission files of tasks that write some.
        store: answers that are there already are not generated again.

    Returns:
        The evaluation; None on ranks other than the first.
    """
    manager = manager or check_tasks(options)
    lm = DynamicLlava(loaded, **asdict(settings), batch_size=options.batch_size, store=store, seed=options.seed)
    with progress(0, "Evaluating", lm.rank == 0):
        results = run_lmms(lm, manager, options, output)
        records = lm.gathered_records()
        if lm.rank != 0:
            return None
        metrics = task_metrics(results, options.tasks)
        files = conversation_files(options.tasks_dir)
        for task in (task for task in options.tasks if task in files):
            if files[task].scored:
                scores = score_answers(
                    loaded,
                    files[task].require(data_root()),
                    data_root(),
                    settings,
                    batch_size=options.batch_size,
                    limit=options.limit,
                    seed=options.seed,
                )
                found = metrics.setdefault(task, {})
                found.update(scores.summary())
                if files[task].meteor:
                    found.update(**table_3(loaded, scores), **corpus_metrics(results["samples"][task]))
    return Evaluation(
        loaded.path,
        settings,
        options,
        metrics,
        version("lmms_eval"),
        results["samples"],
        [asdict(record) for record in records],
        in_order(summarize(records, loaded, settings), options.tasks),
        loaded.is_dense,
        loaded.image_aspect_ratio,
    )


def task_metrics(results: dict[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value of lmms-eval's results, in the order asked for."""
    found = {task: numeric_metrics(values) for task, values in results["results"].items()}
    return in_order(found, tasks)


def in_order(found: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """`found` with the tasks asked for in their order; members of a group come last."""
    return {name: found[name] for name in sorted(found, key=lambda n: tasks.index(n) if n in tasks else len(tasks))}


def numeric_metrics(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's `{"accuracy,none": ..., "accuracy_stderr_clt,none": ...}` as plain names, numbers only.

    Of the standard errors only the one of the mean is kept, as `<metric>_stderr`; filters other than `none` stay in
    the name.
    """
    metrics = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        other_stderr = "_stderr" in name and not name.endswith("_stderr_clt")
        if other_stderr or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = name.replace("_stderr_clt", "_stderr")
        metrics[name if filter_name in ("", "none") else f"{name}/{filter_name}"] = float(value)
    return metrics


def write_evaluation(evaluation: Evaluation, output: str | Path) -> Path:
    """Write `results.json`, `samples_<task>.jsonl` and `requests.jsonl` into the folder `output`; returns the first."""
    folder = output_folder(output)
    for task, samples in evaluation.samples.items():
        # The name of a task is one part of a file's name.
        name = re.sub(r"[^\w.-]", "_", task)
        _write_lines(folder / f"samples_{name}.jsonl", samples)
    _write_lines(folder / "requests.jsonl", evaluation.records)
    path = folder / "results.json"
    write_atomically(path, json.dumps(evaluation.summary(), indent=2) + "\n")
    return path


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    # Half a surrogate pair is text in JSON, and in no file.
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
