"""The keys of an evaluation; without torch and lmms-eval, so that help and wrong words answer at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from .names import OWN_TASKS, SHORT_NAMES

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
SEEDS = "[0, 4294967296)"
TASKS = f"of {', '.join([*SHORT_NAMES, *OWN_TASKS])}, or any lmms-eval task; with commas between them"


@dataclass
class EvalOptions:
    """What is evaluated, and how."""

    model: str = option(help="folder or hub name: a Dynamic-LLaVA run, or a dense LLaVA")
    tasks: list[str] = option(help=TASKS, commas=True)
    image_keep_rate: float | None = option(None, "fraction of image tokens kept", "(0, 1]")
    output_sparsity: bool | None = option(None, "whether output tokens are dropped; --no-output-sparsity keeps all")
    image_selector: str = option("predictor", "predictor, or another rule such as random")
    output_keep_rate: float | None = option(None, "drive the kept fraction of output tokens to this value", "(0, 1]")
    output_selector: str = option("predictor", "predictor, or another rule such as random")
    image_selection: str | None = option(None, "how the predictor chooses", choices=("topk", "diverse", "threshold"))
    output_rate_control: str | None = option(None, "how an output rate is met", choices=("offset", "steered"))
    batch_size: int = option(16, "prompts of a call", "[1, inf)")
    limit: int | None = option(None, "first documents of each task only", "[1, inf)")
    image_aspect_ratio: str | None = option(
        None,
        "how pictures become square; else as the model was trained, and for a dense LLaVA pad",
        choices=("pad", "square", "keep"),
    )
    dtype: str = option("auto", "of the weights", choices=DTYPES)
    device: str | None = option(None, "torch device (the GPU where there is one)")
    seed: int = option(0, "of random selectors", SEEDS)
    data_root: str | None = option(None, "documents of eval/prepare_data.py; also the shapes (data/shapes)")
    llava_prompts: bool = option(False, "ask as LLaVA's scripts do: TextVQA, MMBench, ...")
    tasks_dir: str | None = option(None, "folder of further task YAML")
    output: str | None = option(None, "folder for results.json and samples (MODEL/eval)")
    resume: bool = option(False, "take over the answers in OUTPUT/responses.jsonl")
