"""The model card of the tiny base: measured facts only."""

from __future__ import annotations

import os
import platform

import torch
import transformers
from transformers import LlavaForConditionalGeneration

from tools.tiny_base.config import DecoderStage, TinyBaseConfig
from tools.tiny_base.evaluate import Score
from tools.tiny_base.tower import CLASSES

_CARD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# tiny-llava

A dense LLaVA of {parameters:.2f} M parameters in the layout of LLaVA-1.5 (CLIP tower, MLP projector, Llama decoder),
trained on the procedural pictures of `dynamic_llava.data.shapes`. It plays the part of LLaVA-1.5-7B where no such model
fits: in tests, examples and the embedded default of the sparsification stage. It knows nothing but these pictures.

| Part | Parameters | Shape |
|---|---|---|
| vision tower (CLIP, patches of {patch}, layer -2 is read) | {vision:,} | {vision_shape} |
| projector | {projector:,} | two layers, GELU |
| decoder (Llama) and output layer | {decoder:,} | {text_shape} |

One picture of {size} x {size} pixels is {image_tokens} image tokens. Vocabulary: {vocabulary} byte-level tokens.

## How it was made

    python -m tools.tiny_base {command}

1. **Tower**: {tower_steps} steps of {tower_batch} pictures; every patch learns, by linear heads on the layer that the
   projector reads, what covers it (object or not, colour, shape, size, centre). Then the tower is frozen.
   Patch accuracy on `val`: {patches}.
2. **Alignment**: {align_steps} steps of {align_batch} pictures; the projector learns to map each patch to the sum of
   the word embeddings that describe it, which are frozen here.
3. **Projector and decoder**: {decoding}. The {pictures:,} pictures are of the `train` split; every pass asks other
   questions about them.

Seed {seed}. {seconds:.0f} s of training in all ({parts} s), {rate:.0f} conversations/s in the last;
wall clock on {machine}, shared with other work.

## What it reaches

Held-out `test` split, never looked at before the end of training: one single-turn question of each kind that a
picture allows ({question_count:,} questions) and one description of each of {description_count:,} pictures.
Accuracy: the greedy answer equals the expected one. Perplexity: descriptions, per token. The last two rows hide the
other image tokens from every layer (positions stay) without any training for it.

| Image tokens seen | Accuracy | {kinds} | Perplexity |
|---|---|{dashes}---|
{rows}
"""


def model_card(
    config: TinyBaseConfig,
    model: LlavaForConditionalGeneration,
    facts: list[dict[str, float]],
    scores: dict[str, Score],
    command: str,
) -> str:
    """Returns the text of the card.

    Args:
        config: settings of the run.
        model: the trained model.
        facts: what the stages (tower, decoder) found, with their "seconds".
        scores: test scores by the image tokens that were seen, all of them first.
        command: arguments of the command.
    """
    whole = next(iter(scores.values()))
    rows = [
        f"| {name} | {_percent(s.accuracy)} | "
        + " | ".join(_percent(value) for value in s.by_kind.values())
        + f" | {s.perplexity:.3f} |"
        for name, s in scores.items()
    ]
    parts = {"all": model, "vision": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    vision = model.config.vision_config
    return _CARD.format(
        parameters=count["all"] / 1e6,
        vision=count["vision"],
        projector=count["projector"],
        decoder=count["all"] - count["vision"] - count["projector"],
        vision_shape=_shape(vars(config.vision)),
        text_shape=_shape(vars(config.text)),
        patch=vision.patch_size,
        size=vision.image_size,
        image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vocabulary=model.config.text_config.vocab_size,
        command=command,
        tower_steps=config.tower.steps,
        tower_batch=config.tower.batch_size,
        patches=", ".join(f"{k} {_percent(v)} %" for k, v in facts[0].items() if k in CLASSES),
        align_steps=config.align.steps,
        align_batch=config.align.batch_size,
        decoding=_stage(config.decoder),
        pictures=config.pictures,
        seed=config.seed,
        seconds=sum(fact["seconds"] for fact in facts),
        parts=" + ".join(f"{fact['seconds']:.0f}" for fact in facts),
        rate=facts[-1]["conversations_per_second"],
        machine=_machine(),
        question_count=whole.questions,
        description_count=whole.descriptions,
        kinds=" | ".join(whole.by_kind),
        dashes="---|" * len(whole.by_kind),
        rows="\n".join(rows),
    )


def _stage(stage: DecoderStage) -> str:
    return (
        f"{stage.steps} steps of {stage.batch_size} conversations (one long description with probability "
        f"{stage.description_share}, else {stage.questions_per_picture} short questions)"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _shape(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _machine() -> str:
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.get_num_threads()} threads), "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
