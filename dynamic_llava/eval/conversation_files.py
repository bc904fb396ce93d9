"""Benchmarks in LLaVA's conversation JSON: a task is one YAML file that names its data and its metric.

Of this project's own tasks and of those in `tasks_dir` alike:

    task: my_vqa
    conversations:
      file: my_vqa.json            # below the data root
      build: python make_it.py     # optional: the command that makes it, {root} is the data root
      metric: exact_match          # of METRICS, or my_module:score
      scored: false                # optional: report the perplexity of the reference answers
    generation_kwargs: {max_new_tokens: 16}
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from lmms_eval.utils import load_yaml_config

from ..data.shapes.scene import COLOURS, SHAPES
from .meteor import meteor
from .metrics import exact_match, mentioned_objects, multiset_f1

OWN_TASKS_DIR = Path(__file__).with_name("tasks")
SECTION = "conversations"
Scorer = Callable[[dict[str, Any], list[Any]], dict[str, float]]


@dataclass(frozen=True)
class ConversationFile:
    """What the section `conversations` of a task says.

    Attributes:
        file: name of the JSON below the data root.
        build: the command that makes it.
        metric: how an answer is scored, see `scorer`.
        scored: whether the perplexity of its reference answers is reported.
        kinds: kinds of questions whose scores are reported by themselves.
        rounds: whether the questions of a conversation are asked one after the other.
    """

    file: str
    build: str = ""
    metric: str = "exact_match"
    scored: bool = False
    kinds: tuple[str, ...] = ()
    rounds: bool = False

    @classmethod
    def of(cls, section: Any, where: str) -> ConversationFile:
        """From the section; `ValueError` naming `where` when it is none."""
        known = {field.name for field in fields(cls)}
        if not isinstance(section, dict) or not isinstance(section.get("file"), str) or not section.keys() <= known:
            expected = f"a mapping with file and some of {', '.join(sorted(known - {'file'}))}"
            raise ValueError(f"{where}: {SECTION} must be {expected}; got {section!r}.")
        return cls(**{**section, "kinds": tuple(section.get("kinds", ()))})

    @property
    def meteor(self) -> bool:
        """Whether generated answers are compared with the references by METEOR."""
        return self.metric == "meteor"

    def require(self, root: Path) -> Path:
        """Its path below `root`; `FileNotFoundError` with the command that builds it."""
        path = root / self.file
        if not path.is_file():
            how = f"Build it with `{self.build.format(root=root)}`, or point" if self.build else "Point"
            raise FileNotFoundError(f"No data: {path} is missing. {how} --data-root (or ${ROOT_VARIABLE}) to it.")
        return path

    def scorer(self, where: str) -> tuple[Scorer, list[str]]:
        """The function that scores an answer, and the names of its figures; `ValueError` where there is none."""
        if self.metric in METRICS:
            score, names = METRICS[self.metric]
            figures = [*names, *(f"{names[0]}_{kind}" for kind in self.kinds)]
            return partial(_figures, score, figures), figures
        module, _, name = self.metric.partition(":")
        try:
            return getattr(importlib.import_module(module), name), [name]
        except (ImportError, AttributeError, ValueError) as error:
            known = f"{', '.join(METRICS)}, nor a function my_module:score"
            raise ValueError(f"{where}: metric {self.metric!r} is none of {known} ({error}).") from error


ROOT_VARIABLE = "DYNAMIC_LLAVA_DATA_ROOT"


def conversation_files(tasks_dir: str | Path | None = None) -> dict[str, ConversationFile]:
    """The conversation files of this project's tasks, and of those in `tasks_dir`, by task; `ValueError` for a section
    that is none."""
    found = {}
    for folder in (OWN_TASKS_DIR, *([] if tasks_dir is None else [Path(tasks_dir)])):
        for path in sorted(folder.glob("*.yaml")):
            config = load_yaml_config(str(path), mode="simple")
            if isinstance(config, dict) and SECTION in config:
                found[str(config.get("task"))] = ConversationFile.of(config[SECTION], str(path))
    return found


def _figures(score: Scorer, names: list[str], doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The figures of an answer that the task has announced; kinds of questions that it does not name are left out."""
    return {name: value for name, value in score(doc, results).items() if name in names}


def score_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match, once for the total and once for the kind of question."""
    score = exact_match(results[0], doc["answer"])
    return {"accuracy": score, f"accuracy_{doc['kind']}": score}


def score_objects(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of the objects named (colour and shape), and whether the whole description is right."""
    predicted, reference = (mentioned_objects(text, tuple(COLOURS), SHAPES) for text in (results[0], doc["answer"]))
    return {"object_f1": multiset_f1(predicted, reference), "exact_match": exact_match(results[0], doc["answer"])}


def score_meteor(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """METEOR of the answer, of several rounds the mean over them."""
    answers = results[0] if isinstance(results[0], list) else results
    scores = [meteor(said, told) for said, told in zip(answers, doc["answers"], strict=True)]
    return {"meteor": sum(scores) / len(scores)}


#: The scoring function of each metric, and its figures.
METRICS: dict[str, tuple[Scorer, list[str]]] = {
    "exact_match": (score_match, ["accuracy"]),
    "objects": (score_objects, ["object_f1", "exact_match"]),
    "meteor": (score_meteor, ["meteor"]),
}
