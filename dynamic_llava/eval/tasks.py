"""Where lmms-eval finds tasks: our YAML files first, its own as soon as another name is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

# Before lmms_eval.tasks: it sets the log level, and the index would otherwise print hundreds of debug lines.
import lmms_eval.models  # noqa: F401
from lmms_eval.tasks import TaskManager

import dynamic_llava

DEFAULT_TASKS_DIR = Path(dynamic_llava.__file__).resolve().parent.parent / "eval" / "tasks"
MODEL_NAME = "dynamic_llava"


def task_manager_for(names: Sequence[str], tasks_dir: str | Path | None = None) -> TaskManager:
    """A task manager that knows all of `names`; indexing lmms-eval's own 2,000 tasks only where needed.

    Args:
        names: task, group or tag names.
        tasks_dir: folder of our task YAML; None means `eval/tasks` beside the package.

    Raises:
        FileNotFoundError: the folder holds no task files.
        ValueError: no name given, or an unknown one (the nearest names are offered).
    """
    folder = Path(tasks_dir or DEFAULT_TASKS_DIR)
    if not any(folder.glob("*.yaml")):
        raise FileNotFoundError(f"No task files in {folder}; pass --tasks-dir with the repository's eval/tasks folder.")
    if not names:
        raise ValueError("No task given; pass for example --tasks shapes_vqa,shapes_describe.")
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=MODEL_NAME)
    if all(name in manager.task_index for name in names):
        return manager
    manager = TaskManager(include_path=str(folder), model_name=MODEL_NAME)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=4, cutoff=0.5)
            offer = f"did you mean {', '.join(near)}?" if near else "`python -m lmms_eval --tasks list` shows all."
            raise ValueError(f"Unknown task {name!r}: {offer}")
    return manager
