"""How well the base answers and describes, also when most image tokens are taken away."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dynamic_llava.checkpoints.chat_template import IMAGE_TOKEN
from dynamic_llava.data.conversation import Turn, encode_conversation
from dynamic_llava.data.shapes.questions import KINDS, ask
from dynamic_llava.data.shapes.scene import Scene, patch_coverage
from tools.tiny_base.config import SYSTEM_PROMPT
from tools.tiny_base.decoder import EncodedConversation, description_turns, predict

_BATCH = 50


@dataclass(frozen=True)
class Score:
    """Accuracy of single-turn short answers (greedy, whole answer) and perplexity of descriptions."""

    accuracy: float
    by_kind: dict[str, float]
    questions: int
    perplexity: float
    descriptions: int

    def line(self) -> str:
        """Returns the score in one line of text."""
        kinds = " ".join(f"{kind} {value:.3f}" for kind, value in self.by_kind.items())
        return f"accuracy {self.accuracy:.4f} ({kinds}) perplexity {self.perplexity:.4f}"


@dataclass(frozen=True)
class HeldOut:
    """Tokenized single-turn samples of some pictures: questions with their kinds, and descriptions."""

    questions: list[tuple[str, EncodedConversation]]
    descriptions: list[EncodedConversation]


def held_out(scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, image_tokens: int, seed: int) -> HeldOut:
    """Asks one question of each kind that a scene allows, and for one description of each scene."""
    rng = np.random.default_rng(seed)
    questions, descriptions = [], []

    def encode(row: int, turns: list[Turn]) -> EncodedConversation:
        return EncodedConversation(row, *encode_conversation(turns, tokenizer, [image_tokens], system=SYSTEM_PROMPT))

    for row, scene in enumerate(scenes):
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                turns = [Turn("user", f"{IMAGE_TOKEN}\n{question.text}"), Turn("assistant", question.answer)]
                questions.append((kind, encode(row, turns)))
        descriptions.append(encode(row, description_turns(scene, rng)))
    return HeldOut(questions, descriptions)


def object_patches(scenes: list[Scene], keep: int) -> torch.Tensor:
    """Returns the `keep` patches that the objects cover most, one per object in turn: bool `(n, patches)`."""
    masks = []
    for scene in scenes:
        coverage = patch_coverage(scene).reshape(len(scene.objects), -1)
        chosen = dict.fromkeys((-coverage).argsort(axis=1, kind="stable").T.flatten().tolist())
        mask = torch.zeros(coverage.shape[1], dtype=torch.bool)
        mask[list(chosen)[:keep]] = True
        masks.append(mask)
    return torch.stack(masks)


def random_patches(count: int, patches: int, keep: int, seed: int) -> torch.Tensor:
    """Returns `keep` random patches per picture: bool `(count, patches)`."""
    order = torch.rand(count, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return torch.zeros(count, patches, dtype=torch.bool).scatter(1, order[:, :keep], True)


@torch.no_grad()
def score(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    samples: HeldOut,
    visible: torch.Tensor | None = None,
) -> Score:
    """Scores the model.

    Args:
        model: the model; its tower is not called.
        features: cached features `(n, patches, D)`.
        samples: what to ask.
        visible: bool `(n, patches)`, the image tokens left in the input (the others are hidden from every layer,
            positions stay); None keeps all.
    """
    model.eval()
    right, total = defaultdict(int), defaultdict(int)
    ranked = sorted(samples.questions, key=lambda sample: len(sample[1].input_ids))
    for start in range(0, len(ranked), _BATCH):
        kinds, batch = zip(*ranked[start : start + _BATCH], strict=True)
        logits, targets, rows = predict(model, features, list(batch), visible)
        wrong = torch.zeros(len(batch)).index_add(0, rows, (logits.argmax(-1) != targets).float())
        for kind, errors in zip(kinds, wrong.tolist(), strict=True):
            right[kind] += errors == 0
            total[kind] += 1
    loss, tokens = 0.0, 0
    for start in range(0, len(samples.descriptions), _BATCH):
        logits, targets, _ = predict(model, features, samples.descriptions[start : start + _BATCH], visible)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
    model.train()
    return Score(
        sum(right.values()) / sum(total.values()),
        {kind: right[kind] / total[kind] for kind in KINDS if total[kind]},
        sum(total.values()),
        math.exp(loss / tokens),
        len(samples.descriptions),
    )
