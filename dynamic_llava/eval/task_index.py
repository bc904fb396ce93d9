"""Where lmms-eval finds tasks: our YAML files first, its own as soon as another name is asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before lmms_eval.tasks: it sets the log level, and the index would otherwise print hundreds of debug lines.
import lmms_eval.models
import lmms_eval.tasks
import yaml
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from tenacity import RetryError
from tqdm import tqdm

from .conversation_files import OWN_TASKS_DIR, SECTION
from .conversations import ConversationTask
from .llava_prompts import with_llava_prompt
from .local.task import MODEL_NAME, local_config
from .mmbench_static import aggregate_cn_static
from .names import OWN_TASKS, SHORT_NAMES, STATIC_SCORERS, stock_folders

STOCK_TASKS_DIR = Path(lmms_eval.tasks.__file__).parent
CN_JUDGED = "mmbench_cn_dev"
CN_STATIC = STATIC_SCORERS[CN_JUDGED]


class BenchmarkTasks(TaskManager):
    """lmms-eval's task manager with our additions.

    Changes from `TaskManager`:
        - a task named in `local` reads that file of JSON lines in place of its dataset.
        - `mmbench_cn_dev_static` is `mmbench_cn_dev` with the static scorer, which lmms-eval has for English only.
        - `llava_prompts` asks as LLaVA's own scripts do, see `llava_prompts`.
        - `read` loads tasks ahead of the evaluation, which then takes these.
    """

    def __init__(
        self,
        include_path: list[str],
        include_defaults: bool,
        local: Mapping[str, Path] | None = None,
        llava_prompts: bool = False,
    ) -> None:
        self.local = dict(local or {})
        self.llava_prompts = llava_prompts
        self._ready: dict[tuple[str, ...], dict[str, Any]] = {}
        super().__init__(include_path=include_path, include_defaults=include_defaults, model_name=MODEL_NAME)

    def initialize_tasks(self, include_path: list[str] | None = None, include_defaults: bool = True) -> dict[str, Any]:
        """The index, with the static scorer for Chinese where its judged form is known."""
        index = super().initialize_tasks(include_path, include_defaults)
        if CN_JUDGED in index:
            index[CN_STATIC] = dict(index[CN_JUDGED])
        return index

    def read(self, names: Sequence[str]) -> None:
        """Load `names` with their data now, so that what is missing shows before a model is loaded."""
        self._ready[tuple(names)] = super().load_task_or_group(list(names))

    def load_task_or_group(self, task_list=None, *args, **kwargs) -> dict[str, Any]:
        """The tasks, those that `read` has loaded only once."""
        names = (task_list,) if isinstance(task_list, str) else tuple(task_list or ())
        ready = self._ready.pop(names, None)
        return super().load_task_or_group(task_list, *args, **kwargs) if ready is None else ready

    def _get_config(self, name: str) -> dict[str, Any]:
        config = super()._get_config(name)
        if SECTION in config:
            config.setdefault("class", ConversationTask)
        if name == CN_STATIC:
            metric = {"metric": "gpt_eval_score", "aggregation": aggregate_cn_static, "higher_is_better": True}
            config = {**config, "task": CN_STATIC, "metric_list": [metric, *config["metric_list"][1:]]}
        if self.llava_prompts:
            config = with_llava_prompt(name, config)
        return local_config(config, self.local[name]) if name in self.local else config


def task_manager_for(
    names: Sequence[str],
    tasks_dir: str | Path | None = None,
    local: Mapping[str, Path] | None = None,
    llava_prompts: bool = False,
) -> BenchmarkTasks:
    """A task manager that knows all of `names`; indexing lmms-eval's own 2,000 tasks only where needed.

    Args:
        names: task, group or tag names.
        tasks_dir: folder of further task YAML; its tasks stand beside those of this project.
        local, llava_prompts: see `BenchmarkTasks`.

    Raises:
        FileNotFoundError: the folder holds no task files.
        ValueError: no name given, an unknown one (the nearest names are offered), or a task file that is none.
    """
    folders = [str(OWN_TASKS_DIR)]
    if tasks_dir is not None:
        if not any(Path(tasks_dir).glob("*.yaml")):
            raise FileNotFoundError(f"tasks_dir={tasks_dir} holds no task files (*.yaml); name the folder that does.")
        folders.insert(0, str(tasks_dir))
    if not names:
        raise ValueError("No task given; pass for example --tasks shapes_vqa,shapes_describe.")
    manager = _indexed(folders, False, local, llava_prompts)
    missing = [name for name in names if name not in manager.task_index]
    if not missing:
        return manager
    named = stock_folders(missing)
    stock = [] if named is None else [str(STOCK_TASKS_DIR / name) for name in named]
    manager = _indexed([*folders, *stock], not stock, local, llava_prompts)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*SHORT_NAMES, *OWN_TASKS, *manager.all_tasks], n=4, cutoff=0.5)
            near = list(dict.fromkeys(near))
            offer = f"did you mean {', '.join(near)}?" if near else "`python -m lmms_eval --tasks list` shows all."
            raise ValueError(f"Unknown task {name!r}: {offer}")
    return manager


def _indexed(folders: list[str], *arguments) -> BenchmarkTasks:
    """The manager of the tasks in `folders`, of which the first is the user's."""
    try:
        return BenchmarkTasks(folders, *arguments)
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"A task file in {folders[0]} is not what lmms-eval reads ({type(error).__name__}: {error}); correct it, "
            "or leave --tasks-dir out."
        ) from error


def leaf_tasks(manager: TaskManager, name: str) -> Iterator[str]:
    """The single tasks behind a task, group or tag."""
    entry = manager.task_index[name]
    if entry["type"] in ("task", "python_task"):
        yield name
        return
    members = entry["task"] if entry["type"] == "tag" else load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    for member in members:
        yield from leaf_tasks(manager, member if isinstance(member, str) else member["task"])


def check_hub_access(manager: BenchmarkTasks, names: Sequence[str]) -> None:
    """`ValueError` where a dataset is fetched with a hub token and there is none, before a model is loaded."""
    from huggingface_hub import get_token

    if get_token() or any(os.environ.get(name) == "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return
    for task in (leaf for name in names for leaf in leaf_tasks(manager, name) if leaf not in manager.local):
        entry = manager.task_index[task]
        if entry["type"] == "task":
            kwargs = load_yaml_config(entry["yaml_path"], mode="simple").get("dataset_kwargs") or {}
            if kwargs.get("token") is True:
                raise ValueError(
                    f"lmms-eval fetches {task} with a token of the Hugging Face hub and there is none; run `hf auth "
                    "login` or set HF_TOKEN, or evaluate local files (--data-root, see eval/prepare_data.py)."
                )


@contextmanager
def plain_errors(tasks: Sequence[str]) -> Iterator[None]:
    """`ValueError` with what really went wrong: lmms-eval tries reading and scoring several times and then hides it."""
    try:
        yield
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise ValueError(
            f"lmms-eval could not read or score {', '.join(tasks)}: {cause!r}. Where the hub is out of reach, evaluate "
            "local files (--data-root, see eval/prepare_data.py)."
        ) from cause


def _no_bar(*args, **kwargs) -> tqdm:
    return tqdm(*args, **{**kwargs, "disable": True})


@contextmanager
def without_bars() -> Iterator[None]:
    """lmms-eval has no switch for its bars of what takes no time, before and behind the answers."""
    from lmms_eval import evaluator
    from lmms_eval.api import task

    before = {module: module.tqdm for module in (evaluator, task)}
    for module in before:
        module.tqdm = _no_bar
    try:
        yield
    finally:
        for module, bar in before.items():
            module.tqdm = bar
