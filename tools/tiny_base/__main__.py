"""`python -m tools.tiny_base --config tools/tiny_base/tiny_base.yaml`: makes `assets/tiny-llava`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.config import Command, option
from dynamic_llava.data.shapes.scene import PATCH_SIZE, PICTURE_SIZE, sample_split_scene
from dynamic_llava.errors import run_command
from tools.tiny_base.align import align_projector
from tools.tiny_base.build import build_model, build_processor, build_tokenizer
from tools.tiny_base.card import model_card
from tools.tiny_base.config import TinyBaseConfig, load_config
from tools.tiny_base.decoder import train_decoder
from tools.tiny_base.evaluate import Score, held_out, object_patches, random_patches, score
from tools.tiny_base.saving import run_stage, save_asset
from tools.tiny_base.tower import Pictures, cache_features, draw_pictures, train_tower

logger = logging.getLogger(__name__)

_IMAGE_TOKENS = (PICTURE_SIZE // PATCH_SIZE) ** 2
_KEPT_TOKENS = int(_IMAGE_TOKENS * 0.2)


@dataclass(frozen=True)
class MakeOptions:
    """What is made, and where."""

    config: str = option("tools/tiny_base/tiny_base.yaml", "YAML file with the settings")
    output: str | None = option(None, "where to write the asset, instead of the config's place")


COMMAND = Command("tools.tiny_base", __doc__, (MakeOptions,))


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and makes the asset; returns the exit status."""
    return run_command(_run, argv)


def _run(argv: Sequence[str] | None) -> None:
    (arguments,) = COMMAND.parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = load_config(arguments.config)
    make_tiny_base(config, arguments.output or config.output, f"--config {arguments.config}")


def make_tiny_base(config: TinyBaseConfig, output: str, command: str) -> None:
    """Runs all stages and writes the asset, also at every checkpoint on the way."""
    tokenizer = build_tokenizer(config.seed)
    processor, model = build_processor(tokenizer), build_model(config, tokenizer)
    train, val = draw_split(config, "train", config.pictures), draw_split(config, "val", config.val_pictures)
    logger.info("drew the pictures")
    tower, folder = model.model.vision_tower, Path(config.work_dir)
    settings = [config.seed, config.pictures, config.bf16, asdict(config.vision), asdict(config.tower)]
    patches = run_stage(
        folder / "tower.safetensors",
        settings,
        tower,
        lambda: train_tower(tower, train, val, processor, config.tower, config.seed, config.bf16),
    )
    tower.requires_grad_(False).eval()
    features, val_features = (cache_features(tower, pictures, processor) for pictures in (train, val))
    train = Pictures(train.scenes, np.empty(0, dtype=np.uint8))
    val_samples = held_out(val.scenes, tokenizer, _IMAGE_TOKENS, config.seed)

    def checkpoint(step: int) -> None:
        result = score(model, val_features, val_samples)
        logger.info("val at step %d: %s", step, result.line())
        save_asset(output, model, processor, f"# tiny-llava\n\nUnfinished, step {step}, on val: {result.line()}.\n")

    def decode() -> dict[str, float]:
        align_projector(model, tokenizer, train.scenes, features, config.align, config.seed)
        rate = train_decoder(
            model, tokenizer, train.scenes, features, config.decoder, config.seed, config.bf16, checkpoint
        )
        return {"conversations_per_second": rate}

    settings += [asdict(config.text), config.rope_theta, asdict(config.align), asdict(config.decoder)]
    facts = [patches, run_stage(folder / "decoder.safetensors", settings, model, decode)]
    save_asset(output, model, processor, model_card(config, model, facts, _test(config, model, processor), command))


def _test(config: TinyBaseConfig, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> dict[str, Score]:
    """Scores the finished model on the test split, also with most of the image tokens hidden."""
    test = draw_split(config, "test", config.test_pictures)
    features = cache_features(model.model.vision_tower, test, processor)
    samples = held_out(test.scenes, processor.tokenizer, _IMAGE_TOKENS, config.seed)
    shown = {
        f"all {_IMAGE_TOKENS}": None,
        f"the {_KEPT_TOKENS} most covered by objects": object_patches(test.scenes, _KEPT_TOKENS),
        f"{_KEPT_TOKENS} random ones": random_patches(len(test.scenes), _IMAGE_TOKENS, _KEPT_TOKENS, config.seed),
    }
    scores = {name: score(model, features, samples, visible) for name, visible in shown.items()}
    for name, result in scores.items():
        logger.info("test, %s: %s", name, result.line())
    return scores


def draw_split(config: TinyBaseConfig, split: str, count: int) -> Pictures:
    """Draws the pictures of a split."""
    rng = np.random.default_rng([config.seed, ("train", "val", "test").index(split)])
    return draw_pictures([sample_split_scene(rng, split) for _ in range(count)])


if __name__ == "__main__":
    sys.exit(main())
