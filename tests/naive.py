"""Dynamic-LLaVA's inference by its definition: one row, no cache, Python lists and loops over queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynamic_llava.diversity import LEAST_DISTANCE

from .tiny import IMAGE_TOKEN


def rotate(vectors: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of `(N, H, d)`, halves rotated against each other."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-torch.arange(half) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(attention, states: Tensor, visible: list[list[int]]) -> Tensor:
    """Softmax attention of every token over the tokens in its list, `(N, D)`."""
    dim, groups, positions = attention.head_dim, attention.num_key_value_groups, torch.arange(len(states))
    query, key, value = (
        projection(states).view(len(states), -1, dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query = rotate(query, positions)
    key = rotate(key, positions).repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    outputs = []
    for i, seen in enumerate(visible):
        weights = ((query[i] * key[seen]).sum(-1) / math.sqrt(dim)).softmax(dim=0)
        outputs.append((weights[..., None] * value[seen]).sum(0).flatten())
    return attention.o_proj(torch.stack(outputs))


def run_layer(layer, states: Tensor, visible: list[list[int]]) -> Tensor:
    states = states + attend(layer.self_attn, layer.input_layernorm(states), visible)
    return states + layer.mlp(layer.post_attention_layernorm(states))


class NaiveRow:
    """One row: its prompt, and one forward over everything for each token.

    Args:
        image_keep_rate, image_selection, output_sparsity, output_keep_rate: as in `generate`.
        output_offset: what this rate adds to the first keep logit; None steers.
    """

    def __init__(
        self,
        model,
        row: list[int],
        image: Tensor | None,
        image_keep_rate: float | None = None,
        image_selection: str = "topk",
        output_sparsity: bool = True,
        output_keep_rate: float | None = None,
        output_offset: float | None = None,
    ) -> None:
        self.model, self.row = model, row
        self.image_keep_rate = model.config.sparsity.image_keep_rate if image_keep_rate is None else image_keep_rate
        self.image_selection, self.output_sparsity = image_selection, output_sparsity
        self.output_keep_rate, self.output_offset = output_keep_rate, output_offset
        self.features = None
        if image is not None:
            encoded = model.model.get_image_features(pixel_values=image, return_dict=True).pooler_output
            self.features = torch.cat(list(encoded))

    def logits(self, output: list[int]) -> Tensor:
        """Logits of the token after `output`."""
        decoder, sparsity = self.model.model.language_model, self.model.config.sparsity
        tokens = self.row + output
        states = self.model.get_input_embeddings()(torch.tensor(tokens))
        images = [i for i, token in enumerate(self.row) if token == IMAGE_TOKEN]
        for number, i in enumerate(images):
            states[i] = self.features[number]
        everything = [list(range(i + 1)) for i in range(len(tokens))]
        for layer in decoder.layers[: sparsity.sparse_layer]:
            states = run_layer(layer, states, everything)
        kept = self._kept_images(images, states) | (set(range(len(tokens))) - set(images))
        kept -= self._dropped_outputs(states)
        visible = [[j for j in range(i + 1) if j in kept or j == i] for i in range(len(tokens))]
        for layer in decoder.layers[sparsity.sparse_layer :]:
            states = run_layer(layer, states, visible)
        return self.model.lm_head(decoder.norm(states[-1]))

    def _kept_images(self, images: list[int], states: Tensor) -> set[int]:
        if not images or (self.image_keep_rate == 1 and self.image_selection != "threshold"):
            return set(images)
        hidden = states[images][None]
        predictor = self.model.model.language_model.image_predictor
        logits = predictor(hidden, torch.ones(1, len(images), dtype=torch.bool))[0].log_softmax(-1)
        ranked = sorted(range(len(images)), key=lambda n: -logits[n, 0].item())
        if self.image_selection == "threshold":
            return {images[n] for n in ranked if logits[n, 0] > logits[n, 1]} | {images[ranked[0]]}
        number = max(1, int(len(images) * self.image_keep_rate))
        if self.image_selection == "diverse":
            ranked = naive_diversity(logits[:, 0].tolist(), hidden[0])
        return {images[n] for n in ranked[:number]}

    def _dropped_outputs(self, states: Tensor) -> set[int]:
        if not self.output_sparsity:
            return set()
        outputs = range(len(self.row), len(states))
        logits = [self.model.model.language_model.output_predictor(states[i]) for i in outputs]
        margins = [(x[0] - x[1]).item() for x in logits]
        if self.output_keep_rate is None or self.output_offset is not None:
            margins = [margin + (self.output_offset or 0.0) for margin in margins]
            return {i for i, margin in zip(outputs, margins, strict=True) if margin <= 0}
        keep = naive_steering(margins, self.output_keep_rate)
        return {i for i, stays in zip(outputs, keep, strict=True) if not stays}


def naive_diversity(log_keep: list[float], states: Tensor) -> list[int]:
    """Tokens by falling keep probability x cosine distance to the nearest likelier one, of equal ones the first."""
    directions = [state / state.norm() for state in states.double()]
    worth = []
    for j in range(len(log_keep)):
        likelier = [i for i in range(len(log_keep)) if (-log_keep[i], i) < (-log_keep[j], j)]
        nearest = min([2.0, *(1 - float(directions[i] @ directions[j]) for i in likelier)])
        worth.append(log_keep[j] + math.log(max(nearest, LEAST_DISTANCE)))
    return sorted(range(len(log_keep)), key=lambda j: (-worth[j], j))


def naive_steering(margins: list[float], rate: float) -> list[bool]:
    """Keep decisions of one row by the definition: a threshold moved by mean |margin| * (kept - rate)."""
    threshold, total, decisions = 0.0, 0.0, []
    for number, margin in enumerate(margins, start=1):
        keep = margin >= threshold
        total += abs(margin)
        threshold += total / number * (keep - rate)
        decisions.append(keep)
    return decisions


def naive_generate(model, row: list[int], image: Tensor | None, steps: int, **arguments) -> tuple[list[int], Tensor]:
    """Greedy decoding; the image token and the end token are suppressed. Tokens and their logits `(steps, V)`."""
    naive, output, found = NaiveRow(model, row, image, **arguments), [], []
    with torch.no_grad():
        for _ in range(steps):
            logits = naive.logits(output)
            found.append(logits)
            output.append(int(logits.index_fill(0, torch.tensor([2, IMAGE_TOKEN]), float("-inf")).argmax()))
    return output, torch.stack(found)


def naive_sequence(model, row: list[int], image: Tensor | None, output: list[int], **arguments) -> Tensor:
    """Log-probability of each token of `output`, by one naive forward per token."""
    naive = NaiveRow(model, row, image, **arguments)
    with torch.no_grad():
        return torch.stack([naive.logits(output[:n]).log_softmax(-1)[token] for n, token in enumerate(output)])
