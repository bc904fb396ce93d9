"""Small data sets and the processor of the tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from dynamic_llava.data.shapes import build_shapes

ASSET = Path(__file__).parents[2] / "assets" / "tiny-llava"


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    """The tiny base's own processor."""
    return AutoProcessor.from_pretrained(ASSET)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small build of the shapes."""
    return build_shapes(
        tmp_path_factory.mktemp("shapes") / "data", seed=3, train_pictures=24, val_pictures=6, test_pictures=6
    )


@pytest.fixture
def write_samples(tmp_path: Path) -> Callable[[object], Path]:
    """Writes samples as a LLaVA JSON file beside two good pictures, `a.png` (wide) and `b.png`."""
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 80, 3)), ("b.png", (64, 64, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n half a picture")

    def write(samples: object) -> Path:
        path = tmp_path / "samples.json"
        path.write_text(samples if isinstance(samples, str) else json.dumps(samples))
        return path

    return write


def talk(*texts: str) -> list[dict[str, str]]:
    """Returns LLaVA turns: human, gpt, human, ..."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def noise(path: Path, size: tuple[int, int] = (90, 60), seed: int = 0) -> Path:
    """Writes a picture that does not compress to nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures."""
    noise(tmp_path / "images" / "a.png", seed=1)
    noise(tmp_path / "images" / "b.png", (60, 90), seed=2)
    return tmp_path
