"""Pictures of any mode and turn are opened by one rule; what is none, or too large, is refused in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor
from transformers.image_utils import load_image

from dynamic_llava.checkpoints.aspect_ratio import with_aspect_ratio
from dynamic_llava.data.opening import MAX_PIXELS, check_size, for_processor, open_picture, to_rgb
from dynamic_llava.data.pictures import PictureReader

from ..odd_pictures import PICTURES, REFUSED, grey16, rotated, stripes, thin


@pytest.mark.parametrize("name", [name for name in PICTURES if not name.startswith("grey")])
def test_pictures_are_opened_as_transformers_opens_them(tmp_path: Path, name: str) -> None:
    """`load_image` is what chat templates and pipelines call."""
    path = tmp_path / name
    path.write_bytes(PICTURES[name]())
    picture = open_picture(path)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tiff", "grey32.tiff"])
def test_sixteen_bits_are_scaled(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PICTURES[name]())
    pixels = np.asarray(open_picture(path))
    assert np.array_equal(pixels, np.repeat(grey16()[..., None] >> 8, 3, axis=-1))
    assert np.asarray(load_image(str(path))).mean() > 250, "Pillow's own conversion is all but white"


def test_turns_are_those_of_the_file_and_happen_once(tmp_path: Path) -> None:
    for turn in range(1, 9):
        (tmp_path / "a.jpg").write_bytes(rotated(turn))
        picture = open_picture(tmp_path / "a.jpg")
        assert picture.size == ((70, 40) if turn < 5 else (40, 70))
        assert to_rgb(picture).size == picture.size
    with Image.open(tmp_path / "a.jpg") as opened:
        assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(picture)), "of pictures opened elsewhere too"


@pytest.mark.parametrize("tag", [b"II*\0\xff\xff\xff\xff", b"garbage", b"MM\0*\0\0\0\x08\xff\xff"])
def test_an_orientation_that_cannot_be_read_turns_nothing(tmp_path: Path, tag: bytes) -> None:
    stripes().save(tmp_path / "a.jpg", exif=b"Exif\0\0" + tag)
    assert open_picture(tmp_path / "a.jpg").size == (90, 30)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_what_is_no_picture_or_too_large_is_refused(
    tmp_path: Path, processor: LlavaProcessor, name: str, ratio: str
) -> None:
    make, reason = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    reader = PictureReader(with_aspect_ratio(processor, ratio), [tmp_path])
    for attempt in (reader.open, reader.verify):
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*({reason}).*on_bad_sample='skip'"):
            attempt(name)


def test_sizes_are_bounded_at_each_step(processor: LlavaProcessor) -> None:
    padding, cutting = (with_aspect_ratio(processor, ratio).image_processor for ratio in ("pad", "square"))
    side = int(MAX_PIXELS**0.5)
    shortest = cutting.size["shortest_edge"]
    for size in ((side, side), (1, side), (1000, 1)):
        check_size(size, padding)
    for size in ((side, side), (MAX_PIXELS // shortest**2, 1), (1920, 1080)):
        check_size(size, cutting)
    for size, image_processor, word in (
        ((side + 1, side), None, "pixels: with"),
        ((side + 1, 1), padding, "padded to a square"),
        ((1, MAX_PIXELS // shortest**2 + 1), cutting, f"shorter side resized to {shortest}"),
        ((0, 5), None, "0 x 5"),
    ):
        with pytest.raises(ValueError, match=word):
            check_size(size, image_processor)
        if size[0] and image_processor is not None:
            # As an evaluation brings them: opened by others.
            with pytest.raises(ValueError, match=word):
                for_processor([Image.new("1", size)], image_processor)


def test_only_pictures_become_pixels(processor: LlavaProcessor) -> None:
    for value in ("a.png", None, np.zeros((4, 4, 3))):
        with pytest.raises(TypeError, match=f"a {type(value).__name__}; pass pictures of Pillow"):
            for_processor([value], processor.image_processor)


MEMORY = """
import resource, sys
from pathlib import Path
from transformers import AutoProcessor
from dynamic_llava.checkpoints.aspect_ratio import with_aspect_ratio
from dynamic_llava.data.pictures import PictureReader
processor = AutoProcessor.from_pretrained(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for ratio in ("pad", "square"):
    reader = PictureReader(with_aspect_ratio(processor, ratio), [Path(sys.argv[2])])
    for name in sys.argv[3:]:
        try:
            reader.pixel_values([reader.open(name)])
        except ValueError:
            pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_picture_takes_much_memory(tmp_path: Path) -> None:
    """A file of about a hundred bytes took 5.3 GB."""
    from .conftest import ASSET

    sizes = {"a.png": (1, 20000), "b.png": (20000, 1), "c.png": (3, 16000), "d.png": (2900, 2900)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(thin(*size))
    command = [sys.executable, "-c", MEMORY, str(ASSET), str(tmp_path), *sizes]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500_000, "kilobytes"


def test_pipes_and_folders_are_refused_and_not_waited_on(tmp_path: Path, processor: LlavaProcessor) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(ValueError, match="give the path of a picture"):
            open_picture(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=name):
            PictureReader(processor, [tmp_path]).open(name)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_picture(tmp_path / "none.png")
