"""Between the stages: the projector learns the language of the decoder, as in LLaVA's own pretraining.

Each patch is mapped to the sum of the word embeddings that describe it. A decoder that starts from there needs one
general rule (attend to what carries the same word) in the place of one for every colour, shape and position.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.data.shapes.scene import (
    COLOURS,
    COLUMNS,
    PATCH_SIZE,
    PICTURE_SIZE,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    patch_coverage,
)
from tools.tiny_base.config import AlignStage
from tools.tiny_base.tower import OBJECT_COVERAGE, TRACE, learning_rate

logger = logging.getLogger(__name__)

_BACKGROUND, _CENTRE = "background", "object"


def word_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Returns the token of each describing word as it stands inside a sentence, with its leading space."""
    words = (*COLOURS, *SHAPES, *SIZES, *ROWS, *COLUMNS, _BACKGROUND, _CENTRE)
    ids = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in words}
    split = [word for word, tokens in ids.items() if len(tokens) != 1]
    assert not split, f"the tokenizer splits {split}"
    return {word: tokens[0] for word, tokens in ids.items()}


def patch_words(scenes: list[Scene], ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which words describe each patch.

    Args:
        scenes: the scenes.
        ids: tokens from `word_ids`; their order is the order of the words here.

    Returns:
        bool `(n, patches, words)`, and bool `(n, patches)` that is False on patches with just a trace of an object.
    """
    column_of = {word: index for index, word in enumerate(ids)}
    side = PICTURE_SIZE // PATCH_SIZE
    words = np.zeros((len(scenes), side * side, len(ids)), dtype=bool)
    clear = np.zeros((len(scenes), side * side), dtype=bool)
    for n, scene in enumerate(scenes):
        coverage = patch_coverage(scene).reshape(len(scene.objects), -1)
        owner, most = coverage.argmax(0), coverage.max(0)
        words[n, most < TRACE, column_of[_BACKGROUND]] = True
        clear[n] = (most < TRACE) | (most >= OBJECT_COVERAGE)
        for index, item in enumerate(scene.objects):
            mine = (most >= OBJECT_COVERAGE) & (owner == index)
            for word in (item.colour, item.shape, item.size, ROWS[item.row], COLUMNS[item.column]):
                words[n, mine, column_of[word]] = True
            words[n, item.y // PATCH_SIZE * side + item.x // PATCH_SIZE, column_of[_CENTRE]] = True
    return torch.from_numpy(words), torch.from_numpy(clear)


def align_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    features: torch.Tensor,
    stage: AlignStage,
    seed: int,
) -> None:
    """Trains the projector in place towards the (frozen) word embeddings, which the output layer then starts from too.

    Args:
        model: the model, its tower trained.
        tokenizer: its tokenizer.
        scenes: the training scenes.
        features: their cached features, `(n, patches, D)`.
        stage: steps, batch and rate.
        seed: order of the pictures.
    """
    ids = word_ids(tokenizer)
    table = model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        model.lm_head.weight.copy_(table)
    vectors, scale = table[list(ids.values())], table.var()
    projector = model.model.multi_modal_projector
    _start_whitened(projector, features)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=stage.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(stage.steps):
        rows = rng.integers(0, len(scenes), stage.batch_size)
        words, clear = patch_words([scenes[row] for row in rows], ids)
        optimizer.param_groups[0]["lr"] = learning_rate(step, stage.steps, stage.learning_rate)
        difference = projector(features[rows].float())[clear] - words[clear].float() @ vectors
        # Most patches are background; without the weight they would drown the objects.
        weight = 0.3 + 0.7 * (~words[clear][:, list(ids).index(_BACKGROUND)]).float()
        loss = (difference.square().mean(-1) * weight).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            logger.info("align %d/%d loss %.4f", step + 1, stage.steps, loss.item())


@torch.no_grad()
def _start_whitened(projector: nn.Module, features: torch.Tensor) -> None:
    """Lets the projector see every direction of the features alike.

    Where an object stands is in the tower's features, but with so little variance beside colour and shape that a
    projector with random weights learns colours and loses positions.
    """
    sample = features[:2000].float().flatten(0, 1)[::7]
    values, vectors = torch.linalg.eigh(torch.cov(sample.T))
    whitening = vectors @ torch.diag((values + 1e-3).rsqrt()) @ vectors.T
    weight = nn.init.orthogonal_(torch.empty_like(projector.linear_1.weight)) @ whitening
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-(weight @ sample.mean(0)))
    nn.init.orthogonal_(projector.linear_2.weight, gain=0.1)
    projector.linear_2.bias.zero_()
