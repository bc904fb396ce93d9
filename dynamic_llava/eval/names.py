"""Short names of benchmarks, and the judge's key that some of them need before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STOCK_PREFIX = "stock:"


@dataclass(frozen=True)
class ShortName:
    """A benchmark of the paper: its task in lmms-eval and the folder of lmms-eval's tasks that holds it."""

    task: str
    folder: str


SHORT_NAMES = {
    "vqav2": ShortName("vqav2_val", "vqav2"),
    "gqa": ShortName("gqa", "gqa"),
    "vizwiz": ShortName("vizwiz_vqa_val", "vizwiz_vqa"),
    # The papers of LLaVA report the questions with an image.
    "scienceqa": ShortName("scienceqa_img", "scienceqa"),
    "textvqa": ShortName("textvqa_val", "textvqa"),
    "pope": ShortName("pope", "pope"),
    "mme": ShortName("mme", "mme"),
    "mmbench": ShortName("mmbench_en_dev", "mmbench"),
    "mmbench_cn": ShortName("mmbench_cn_dev", "mmbench"),
    "seedbench": ShortName("seedbench", "seedbench"),
    "mmvet": ShortName("mmvet", "mmvet"),
    "mmvp": ShortName("mmvp", "mmvp"),
    "realworldqa": ShortName("realworldqa", "realworldqa"),
    "cvbench": ShortName("cv_bench", "cv_bench"),
    "llava_bench": ShortName("llava_in_the_wild", "llava-in-the-wild"),
}

# Tasks of this project.
OWN_TASKS = tuple(sorted(path.stem for path in Path(__file__).with_name("tasks").glob("*.yaml")))
# Tasks whose answers a judge matches with the options, and the same tasks with lmms-eval's static matching.
STATIC_SCORERS = {"mmbench_en_dev": "mmbench_en_dev_static", "mmbench_cn_dev": "mmbench_cn_dev_static"}
# Open answers: nothing but a judge can score them.
JUDGED = ("mmvet", "llava_in_the_wild")


def judge_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of the judge that lmms-eval asks: `OPENAI_API_KEY`, or `AZURE_API_KEY` where `API_TYPE` is azure."""
    azure = environment.get("API_TYPE", "openai") == "azure"
    return environment.get("AZURE_API_KEY" if azure else "OPENAI_API_KEY") or None


def resolve_names(names: Sequence[str], has_judge: bool) -> tuple[tuple[str, ...], list[str]]:
    """Task names of lmms-eval for `names`, and one notice per name that stands for something else.

    Args:
        names: short names, names of tasks, or `stock:NAME` for lmms-eval's own NAME where a short name hides it.
        has_judge: whether a judge's key is set.

    Raises:
        ValueError: a benchmark that only a judge can score, without a key.
    """
    tasks, notices = [], []
    for name in names:
        short = SHORT_NAMES.get(name)
        task = short.task if short else name.removeprefix(STOCK_PREFIX)
        if task in JUDGED and not has_judge:
            raise ValueError(
                f"{name} has open answers that only a judge model can score, and no judge key is set; "
                "set OPENAI_API_KEY (or API_TYPE=azure and AZURE_API_KEY), or leave the task out."
            )
        if task in STATIC_SCORERS and not has_judge:
            notices.append(
                f"{name}: no judge key (OPENAI_API_KEY), so answers are matched with the options by the static scorer "
                f"({STATIC_SCORERS[task]}); figures of judged runs may differ slightly."
            )
            task = STATIC_SCORERS[task]
        elif task != name and short:
            notices.append(f"{name} is lmms-eval's task {task}.")
        if task not in tasks:
            tasks.append(task)
    return tuple(tasks), notices


def stock_folders(tasks: Sequence[str]) -> list[str] | None:
    """Folders of lmms-eval's tasks that hold `tasks`; None where one of them is not a benchmark of the table."""
    folders = {short.task: short.folder for short in SHORT_NAMES.values()}
    folders |= {static: folders[task] for task, static in STATIC_SCORERS.items()}
    found = [folders.get(task) for task in tasks]
    return None if None in found else sorted(set(found))
