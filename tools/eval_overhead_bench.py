"""The two sides of `overhead`: lmms-eval with a model that returns a word, and our evaluation with an instant one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from rich.table import Table
from torch import Tensor
from transformers import LlavaImageProcessorPil, LlavaProcessor

from dynamic_llava.checkpoints import load_processor
from dynamic_llava.checkpoints.loaded import LoadedModel, SparsitySettings
from dynamic_llava.config import command_line
from dynamic_llava.data.opening import open_picture
from dynamic_llava.data.prompts import encode_prompts
from dynamic_llava.efficiency.shapes import build_config
from dynamic_llava.efficiency.timing import time_pairs
from dynamic_llava.eval.conversation_files import conversation_files
from dynamic_llava.eval.conversations import data_root_at
from dynamic_llava.eval.responses import ResponseStore
from dynamic_llava.eval.runner import (
    EvaluationOptions,
    check_tasks,
    evaluate_tasks,
    read_tasks,
    run_lmms,
    write_evaluation,
)
from dynamic_llava.machine import machine_facts
from dynamic_llava.statistics import SparsityStatistics

TASK = "shapes_vqa"
QUESTION, ANSWER = "What is in the picture?", "circle"
CPU = torch.device("cpu")


class OneWord(lmms):
    """lmms-eval's side: one word per request, the pictures stay closed."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The word, for each."""
        return [ANSWER] * len(requests)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Not asked for."""
        raise NotImplementedError

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not asked for."""
        raise NotImplementedError


class InstantModel:
    """Our side: the shape of a 7B model without weights, whose `generate` gives the tokens of `answer`."""

    def __init__(self, image_token: int, answer: Sequence[int]) -> None:
        self.config = build_config("7b")
        self.config.image_token_id = image_token
        self.dtype, self.device = torch.float32, CPU
        self.said = torch.tensor([answer])

    def generate(self, input_ids: Tensor, stopping_criteria: Sequence, **_: Any) -> SimpleNamespace:
        """What `generate` returns with `return_dict_in_generate` and `return_sparsity`."""
        for step in stopping_criteria:
            step(input_ids, None)
        rows = len(input_ids)
        images = (input_ids == self.config.image_token_id).sum(dim=1)
        kept = (images * self.config.sparsity.image_keep_rate).long()
        none = torch.zeros(rows, dtype=torch.long)
        return SimpleNamespace(
            sequences=torch.cat([input_ids, self.said.expand(rows, -1)], dim=1),
            sparsity=SparsityStatistics(images, kept, none, none, 0, [[]] * rows),
        )


@dataclass(frozen=True)
class Bench:
    """Documents in a folder and the model that answers them."""

    folder: Path
    loaded: LoadedModel
    options: EvaluationOptions

    def lmms_eval(self) -> None:
        """Requests, scores and their means by lmms-eval alone."""
        with data_root_at(self.folder):
            run_lmms(OneWord(), check_tasks(self.options), self.options, None)

    def ours(self) -> None:
        """As `python -m dynamic_llava.eval` does it, with the same checks and files."""
        output = self.folder / "results"
        with data_root_at(self.folder):
            manager = check_tasks(self.options)
            read_tasks(manager, self.options)
            store = ResponseStore(output, "instant")
            evaluation = evaluate_tasks(self.loaded, SparsitySettings(), self.options, manager, output, store)
            write_evaluation(evaluation, output)

    def pictures_and_prompts(self) -> float:
        """Seconds to open all pictures and run the processor: any LLaVA needs them in front of its model."""
        samples = json.loads((self.folder / conversation_files()[TASK].file).read_text())
        size = self.options.batch_size
        started = time.perf_counter()
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            pictures = [[open_picture(self.folder / sample["image"])] for sample in batch]
            encode_prompts(self.loaded.processor, [QUESTION] * len(batch), pictures)
        return time.perf_counter() - started


def build_bench(folder: Path, processor_folder: str, documents: int, batch_size: int) -> Bench:
    """`documents` questions about as many noisy JPEGs of 640 x 480, and the model."""
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(documents):
        name = f"images/{number}.jpg"
        small = torch.randint(0, 256, (48, 64, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(small).resize((640, 480)).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
        samples.append({"id": str(number), "image": name, "kind": "shape", "conversations": turns})
    (folder / conversation_files()[TASK].file).write_text(json.dumps(samples))
    processor = llava_processor(processor_folder)
    tokenizer = processor.tokenizer
    answer = [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model = InstantModel(processor.image_token_id, answer)
    return Bench(folder, LoadedModel("instant", model, processor), EvaluationOptions((TASK,), batch_size))


def llava_processor(folder: str) -> LlavaProcessor:
    """The tokenizer and template of `folder` with LLaVA-1.5's pictures: 336 pixels, 576 tokens."""
    small = load_processor(folder)
    size = {"height": 336, "width": 336}
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=size, do_pad=True),
        tokenizer=small.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=small.chat_template,
    )


def measure_overhead(bench: Bench, repeats: int) -> dict[str, Any]:
    """Both sides in turns; seconds of each, of the difference, and of pictures and prompts alone."""
    times = time_pairs(bench.lmms_eval, bench.ours, pairs=repeats, warmup=1, seconds=float("inf"), device=CPU).summary()
    alone, ours = times["dense_s"]["median"], times["ours_s"]["median"]
    return {
        "machine": machine_facts(CPU),
        "command": command_line(),
        "documents": len(list((bench.folder / "images").iterdir())),
        "batch_size": bench.options.batch_size,
        "lmms_eval_s": times["dense_s"],
        "ours_s": times["ours_s"],
        "overhead_s": ours - alone,
        "pictures_and_prompts_s": bench.pictures_and_prompts(),
    }


def overhead_table(report: dict[str, Any]) -> Table:
    """The report as a rich table."""
    table = Table(title=f"{report['documents']} documents, instant model", title_style="bold")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for label, value in (
        ("lmms-eval itself", report["lmms_eval_s"]["median"]),
        ("python -m dynamic_llava.eval", report["ours_s"]["median"]),
        ("difference", report["overhead_s"]),
        ("of it pictures and prompts", report["pictures_and_prompts_s"]),
    ):
        table.add_row(label, f"{value:.2f}")
    return table
