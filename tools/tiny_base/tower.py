"""First stage: the vision tower learns to recognise what covers each patch.

A tower trained only through the decoder takes far longer, and one trained with a picture-wide loss mixes the picture
into every token. Supervising each patch with what is under it keeps the information where it is, as a pretrained CLIP
tower does, so that dropping a token loses something.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaProcessor

from dynamic_llava.data.shapes.draw import draw_scene
from dynamic_llava.data.shapes.scene import COLOURS, PATCH_SIZE, PICTURE_SIZE, SHAPES, SIZES, Scene, patch_coverage
from tools.tiny_base.config import TowerStage

logger = logging.getLogger(__name__)

# Patches covered less than this are neither object nor background: they are left out of the loss.
OBJECT_COVERAGE, TRACE = 0.15, 0.01
CLASSES = {"object": 2, "centre": 2, "colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES)}


@dataclass(frozen=True)
class Pictures:
    """Scenes and their pixels, uint8 `(n, 128, 128, 3)`."""

    scenes: list[Scene]
    pixels: np.ndarray


def draw_pictures(scenes: list[Scene]) -> Pictures:
    """Draws scenes into one array."""
    pixels = np.empty((len(scenes), PICTURE_SIZE, PICTURE_SIZE, 3), dtype=np.uint8)
    for index, scene in enumerate(scenes):
        pixels[index] = np.asarray(draw_scene(scene))
    return Pictures(scenes, pixels)


def normalise(pixels: np.ndarray, processor: LlavaProcessor) -> torch.Tensor:
    """Does what the image processor does to a picture of the right size: `(n, 3, 128, 128)` float32."""
    mean = torch.tensor(processor.image_processor.image_mean)
    std = torch.tensor(processor.image_processor.image_std)
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def patch_labels(scenes: list[Scene]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the classes of each patch, long `(n, 64)` with -100 where none applies, and the object centres.

    The centres are float32 `(n, 64, 2)` in [0, 1], NaN where a patch shows no object.
    """
    side = PICTURE_SIZE // PATCH_SIZE
    labels = {name: np.full((len(scenes), side * side), -100) for name in CLASSES}
    centres = np.full((len(scenes), side * side, 2), np.nan, dtype=np.float32)
    for n, scene in enumerate(scenes):
        coverage = patch_coverage(scene).reshape(len(scene.objects), -1)
        owner, most = coverage.argmax(0), coverage.max(0)
        shown = most >= OBJECT_COVERAGE
        labels["object"][n][shown] = 1
        labels["object"][n][most < TRACE] = 0
        labels["centre"][n] = 0
        for index, item in enumerate(scene.objects):
            mine = shown & (owner == index)
            labels["colour"][n][mine] = list(COLOURS).index(item.colour)
            labels["shape"][n][mine] = SHAPES.index(item.shape)
            labels["size"][n][mine] = list(SIZES).index(item.size)
            labels["centre"][n][item.y // PATCH_SIZE * side + item.x // PATCH_SIZE] = 1
            centres[n][mine] = (item.x / PICTURE_SIZE, item.y / PICTURE_SIZE)
    return {name: torch.from_numpy(value) for name, value in labels.items()}, torch.from_numpy(centres)


class PatchHeads(nn.Module):
    """Linear read-outs of the patch features; thrown away after the warm-up."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(hidden_size, count) for name, count in CLASSES.items()})
        self.centre = nn.Linear(hidden_size, 2)

    def loss(
        self, features: torch.Tensor, labels: dict[str, torch.Tensor], centres: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the summed loss and the accuracy per label; shapes as in `patch_labels`."""
        loss, accuracy = features.new_zeros(()), {}
        for name, head in self.classes.items():
            logits = head(features)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[name].flatten(), ignore_index=-100)
            known = labels[name] != -100
            accuracy[name] = (logits.argmax(-1) == labels[name])[known].float().mean().item()
        known = ~centres.isnan()
        difference = self.centre(features)[known] - centres[known]
        accuracy["centre_error_px"] = difference.abs().mean().item() * PICTURE_SIZE
        return loss + 4 * F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=0.05), accuracy


def patch_features(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns what LLaVA's projector reads: the last layer but one without its class token, `(n, 64, D)`."""
    return tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.04) -> float:
    """Linear warm-up, then cosine to a twentieth of the peak."""
    ramp = max(1, int(total * warmup))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp))))


def train_tower(
    tower: CLIPVisionModel,
    train: Pictures,
    val: Pictures,
    processor: LlavaProcessor,
    stage: TowerStage,
    seed: int,
    bf16: bool,
) -> dict[str, float]:
    """Trains the tower in place; returns the accuracy per label on the validation pictures."""
    heads = PatchHeads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    labels, centres = patch_labels(train.scenes)
    rng, started = np.random.default_rng(seed), time.perf_counter()
    order = np.empty(0, dtype=np.int64)
    for step in range(stage.steps):
        if len(order) < stage.batch_size:
            order = rng.permutation(len(train.scenes))
        rows, order = order[: stage.batch_size], order[stage.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage.learning_rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = patch_features(tower, normalise(train.pixels[rows], processor))
        loss, accuracy = heads.loss(features.float(), {k: v[rows] for k, v in labels.items()}, centres[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            shown = " ".join(f"{k} {v:.3f}" for k, v in accuracy.items())
            logger.info("tower %d/%d loss %.3f %s (%.0f s)", step, stage.steps, loss.item(), shown, seconds)
    tower.eval()
    with torch.no_grad():
        val_labels, val_centres = patch_labels(val.scenes)
        _, accuracy = heads.loss(patch_features(tower, normalise(val.pixels, processor)), val_labels, val_centres)
    logger.info("tower on val: %s", " ".join(f"{k} {v:.4f}" for k, v in accuracy.items()))
    return accuracy


@torch.no_grad()
def cache_features(tower: CLIPVisionModel, pictures: Pictures, processor: LlavaProcessor) -> torch.Tensor:
    """Returns the frozen tower's features of all pictures, float16 `(n, 64, D)`: computed once, read every epoch."""
    batches = [
        patch_features(tower, normalise(pictures.pixels[start : start + 128], processor)).half()
        for start in range(0, len(pictures.scenes), 128)
    ]
    return torch.cat(batches)
