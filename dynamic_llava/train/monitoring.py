"""What a run says of itself beside its losses: gradient norms by group, throughput, memory, and what it keeps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from ..checkpoints.loaded import LoadedModel
from ..data.conversation import parse_turns
from ..data.dataset import ConversationDataset
from ..data.mixture import MixtureDataset
from ..data.samples import pictures_of
from ..machine import peak_bytes
from ..token_masks import answer_token_mask, image_token_mask
from ..visualize.drawing import patch_sheet
from ..visualize.views import view_patches

# A forward and a backward pass cost about six floating point operations for each weight and token.
FLOPS_PER_WEIGHT = 6
#: What `keep_counts` counts.
KEEP_COUNTS = ("image_kept", "image_judged", "output_kept", "output_decided", "output_judged")


def group_norms(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
    """Norm of the gradients of each parameter group before clipping; empty where they are sharded (DeepSpeed).

    Args:
        optimizer: of one or two groups.
        scaler: what the gradients are still multiplied by (fp16).
    """
    groups = optimizer.param_groups
    scale = 1.0 if scaler is None else scaler.get_scale()
    names = ["decoder", "predictors"] if len(groups) == 2 else ["predictors"]
    norms = {}
    for name, group in zip(names, groups, strict=False):
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if grads:
            norms[f"grad_norm_{name}"] = float(nn.utils.get_total_norm(grads)) / scale
    return norms


class Meter:
    """Tokens and seconds since the last log.

    Args:
        weights: parameters of the model.
        peak_tflops: of one device in the compute dtype; None leaves out the utilisation.
        device: whose memory is read.
    """

    def __init__(self, weights: int, peak_tflops: float | None, device: torch.device) -> None:
        self.weights, self.peak_tflops, self.device = weights, peak_tflops, device
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self.started = time.perf_counter()

    def read(self, tokens: float, ranks: int) -> dict[str, float]:
        """`tokens_per_second` of all ranks, `mfu` in [0, 1] (of a dense model of this size), and `memory_gb`."""
        speed = tokens / max(time.perf_counter() - self.started, 1e-9)
        self.restart()
        found = {"tokens_per_second": speed, "memory_gb": peak_bytes(self.device) / 1e9}
        if self.peak_tflops:
            found["mfu"] = FLOPS_PER_WEIGHT * self.weights * speed / (self.peak_tflops * 1e12 * ranks)
        return found


@dataclass(frozen=True)
class Example:
    """A picture of the data, with what is asked and answered about it."""

    picture: Image.Image
    question: str
    answer: str


def examples_of(dataset: ConversationDataset | MixtureDataset, number: int = 4) -> list[Example]:
    """The first samples of `dataset` with one picture that can be opened, at most `number`.

    Raises:
        ValueError: there is none.
    """
    found: list[Example] = []
    for part in dataset.parts if isinstance(dataset, MixtureDataset) else [dataset]:
        for sample in part.samples:
            pictures = pictures_of(sample)
            if len(found) == number or len(pictures) != 1:
                continue
            # What is wrong with a picture is said where it is trained on.
            with suppress(ValueError, FileNotFoundError):
                question, answer = (turn.text for turn in parse_turns(sample["conversations"])[:2])
                found.append(Example(part.pictures.open(pictures[0]), question, answer))
    if not found:
        raise ValueError("The data has no sample with one picture to draw; leave out picture_steps.")
    return found


class KeptPatches(TrainerCallback):
    """A picture of the patches kept of a fixed batch, every `steps` steps, in `pictures/` of the run.

    Args:
        examples: what is drawn.
        processor: LLaVA processor.
        steps: optimizer steps between pictures.
    """

    def __init__(self, examples: list[Example], processor, steps: int) -> None:
        self.examples, self.processor, self.steps = examples, processor, steps

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.steps == 0:
            # On every rank: where weights are sharded, a forward pass takes all of them.
            sheet = self.draw(model)
            if state.is_world_process_zero:
                path = Path(args.output_dir, "pictures", f"step-{state.global_step:06d}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(path)

    def draw(self, model: nn.Module) -> Image.Image:
        """The sheet of the fixed batch; the model and the random state are left as they were."""
        training = model.training
        loaded = LoadedModel("", model.eval(), self.processor)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            views = [view_patches(loaded, e.picture, e.question, e.answer, 0, ("predictor",)) for e in self.examples]
        model.train(training)
        return patch_sheet(views)


def keep_counts(inputs: dict[str, Tensor], outputs: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    """How many tokens of a batch were judged and how many the draws kept, by `KEEP_COUNTS`; of output tokens also how
    many inference would keep as they were learned."""
    counts = {}
    for name in ("image", "output"):
        mask, logits = outputs.get(f"{name}_keep_mask"), outputs.get(f"{name}_keep_logits")
        if mask is None or logits is None:
            continue
        judged = _judged(name, inputs, config)
        counts |= {f"{name}_kept": (mask.detach() * judged).sum(), f"{name}_judged": judged.sum()}
        if name == "output":
            # Logits of a row are packed to the left.
            packed = torch.arange(logits.shape[1], device=logits.device) < judged.sum(dim=-1, keepdim=True)
            counts["output_decided"] = ((logits[..., 0] > logits[..., 1]) & packed).sum()
    return counts


def pop_keep_rates(sums: dict[str, float]) -> dict[str, float]:
    """The realised rates of summed `keep_counts`, which leave `sums`."""
    found = {key: sums.pop(key, 0.0) for key in KEEP_COUNTS}
    rates = {}
    for key, number in found.items():
        name, _, count = key.partition("_")
        if count != "judged" and found[f"{name}_judged"]:
            rates[f"{name}_{'keep' if count == 'kept' else count}_rate"] = number / found[f"{name}_judged"]
    return rates


def _judged(name: str, inputs: dict[str, Tensor], config) -> Tensor:
    """`(B, N)` bool: tokens whose fate the predictor decided in this batch."""
    if name == "image":
        return image_token_mask(inputs["input_ids"], config.image_token_id)
    answers = inputs.get("output_mask")
    if answers is None:
        answers = answer_token_mask(inputs["labels"], inputs.get("attention_mask"))
    return answers & (answers.sum(dim=-1, keepdim=True) >= config.sparsity.min_output_length)
