"""Second stage: projector and decoder learn to answer and to describe, on the frozen tower's cached features."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.checkpoints.chat_template import IMAGE_TOKEN
from dynamic_llava.data.conversation import IGNORE_INDEX, Turn, encode_conversation
from dynamic_llava.data.shapes.describe import describe
from dynamic_llava.data.shapes.questions import ask_many, ask_position, ask_relation
from dynamic_llava.data.shapes.scene import Scene
from tools.tiny_base.config import SYSTEM_PROMPT, DecoderStage
from tools.tiny_base.tower import learning_rate

logger = logging.getLogger(__name__)

# Sequences are sorted by length within this many batches, so that little is padded and the order stays random.
_BATCHES_PER_BUCKET = 16


@dataclass(frozen=True)
class EncodedConversation:
    """A tokenized conversation about one picture, given by its row in the feature cache."""

    picture: int
    input_ids: list[int]
    labels: list[int]


def question_turns(scene: Scene, stage: DecoderStage, rng: np.random.Generator) -> list[Turn]:
    """Returns a conversation of short questions in random order, the picture in the first."""
    questions = {question.text: question for question in ask_many(scene, stage.questions_per_picture, rng)}
    extra = [ask_relation(scene, rng) for _ in range(stage.extra_relation_questions)]
    extra += [ask_position(scene, rng) for _ in range(stage.position_questions)]
    questions |= {question.text: question for question in extra if question is not None}
    asked = list(questions.values())
    turns = []
    for question in rng.permutation(asked) if extra else asked:
        turns += [Turn("user", question.text), Turn("assistant", question.answer)]
    return [Turn("user", f"{IMAGE_TOKEN}\n{turns[0].text}"), *turns[1:]]


def description_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Returns a conversation that asks for a description of the picture."""
    request, answer = describe(scene, rng)
    return [Turn("user", f"{IMAGE_TOKEN}\n{request}"), Turn("assistant", answer)]


def training_batches(
    scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, image_tokens: int, stage: DecoderStage, seed: int
) -> Iterator[list[EncodedConversation]]:
    """Yields batches for ever: each pass over the pictures asks other questions."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    bucket = stage.batch_size * _BATCHES_PER_BUCKET
    while True:
        while len(order) < bucket:
            order = np.concatenate([order, rng.permutation(len(scenes))])
        rows, order = order[:bucket], order[bucket:]
        sequences = []
        for row in rows:
            if rng.random() < stage.description_share:
                turns = description_turns(scenes[row], rng)
            else:
                turns = question_turns(scenes[row], stage, rng)
            sequences.append(
                EncodedConversation(
                    int(row), *encode_conversation(turns, tokenizer, [image_tokens], system=SYSTEM_PROMPT)
                )
            )
        sequences.sort(key=lambda s: len(s.input_ids))
        for index in rng.permutation(_BATCHES_PER_BUCKET):
            yield sequences[index * stage.batch_size : (index + 1) * stage.batch_size]


def predict(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    batch: list[EncodedConversation],
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs projector and decoder on right-padded conversations.

    Args:
        model: the model; its tower is not called.
        features: cached features `(n, patches, D)`.
        batch: conversations about one picture each.
        visible: bool `(n, patches)`, the image tokens that the decoder may see; None shows all.

    Returns:
        Logits `(S, V)` of the positions that predict a supervised token, those tokens `(S,)` and the rows of the batch
        that they belong to `(S,)`.
    """
    length = max(len(s.input_ids) for s in batch)
    ids = torch.tensor([s.input_ids + [0] * (length - len(s.input_ids)) for s in batch])
    labels = torch.tensor([s.labels + [IGNORE_INDEX] * (length - len(s.labels)) for s in batch])
    pictures = [s.picture for s in batch]
    images = model.model.multi_modal_projector(features[pictures].float())
    embeds = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1).expand_as(embeds), images.to(embeds.dtype))
    # Right padding under a causal mask: no real token sees a padded one, so that no mask is needed for it.
    mask = None if visible is None else torch.ones_like(ids).masked_scatter(is_image, visible[pictures].long())
    positions = torch.arange(length).expand(len(batch), -1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    learned = labels[:, 1:] != IGNORE_INDEX
    return model.lm_head(hidden[:, :-1][learned]), labels[:, 1:][learned], learned.nonzero()[:, 0]


def train_decoder(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    features: torch.Tensor,
    stage: DecoderStage,
    seed: int,
    bf16: bool,
    on_checkpoint: Callable[[int], None],
) -> float:
    """Trains projector and decoder in place.

    Args:
        model: the model, its tower trained.
        tokenizer: its tokenizer.
        scenes: the training scenes.
        features: their cached features, `(n, 64, D)`.
        stage: steps, rates and mixture.
        seed: order and questions.
        bf16: autocast matrix products to bfloat16.
        on_checkpoint: called with the step every `save_every` steps and at the end.

    Returns:
        Sequences per second.
    """
    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
    batches = training_batches(scenes, tokenizer, features.shape[1], stage, seed)
    if stage.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    started = time.perf_counter()
    for step in range(1, stage.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, stage.steps, stage.learning_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, targets, _ = predict(model, features, next(batches))
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            seconds = time.perf_counter() - started
            rate = step * stage.batch_size / seconds
            logger.info("decoder %d/%d loss %.4f, %.1f/s (%.0f s)", step, stage.steps, loss.item(), rate, seconds)
        if step % stage.save_every == 0 or step == stage.steps:
            on_checkpoint(step)
    return stage.steps * stage.batch_size / (time.perf_counter() - started)
