"""Pictures: found in several folders, verified without decoding, counted in tokens."""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlavaProcessor

from dynamic_llava.checkpoints.aspect_ratio import with_aspect_ratio
from dynamic_llava.data.pictures import PictureReader, StoredPicture

from .conftest import noise


@dataclass
class InMemory(StoredPicture):
    """Bytes as a picture."""

    content: bytes
    name: str = "the stored one"

    def read(self) -> bytes:
        return self.content


def test_the_first_folder_that_has_the_file_wins(tmp_path: Path, processor: LlavaProcessor) -> None:
    first = noise(tmp_path / "one" / "coco" / "a.png", seed=1)
    noise(tmp_path / "two" / "coco" / "a.png", seed=2)
    second = noise(tmp_path / "two" / "coco" / "b.png", seed=3)
    reader = PictureReader(processor, [tmp_path / "one", tmp_path / "two"])
    assert reader.find("coco/a.png") == first
    assert reader.find("coco/b.png") == second
    assert reader.find(str(second)) == second, "absolute paths stay"
    for name in ("coco/c.png", "coco", "", "x" * 5000, "a\0b"):
        with pytest.raises(FileNotFoundError, match=r"(?s)no picture at .*one.* or .*two.*image_folder"):
            reader.find(name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
@pytest.mark.parametrize("stored", [False, True])
def test_whole_pictures_pass(tmp_path: Path, processor: LlavaProcessor, suffix: str, stored: bool) -> None:
    path = noise(tmp_path / f"a.{suffix}")
    picture = InMemory(path.read_bytes()) if stored else path.name
    reader = PictureReader(processor, [tmp_path])
    for decode in (False, True):
        reader.verify(picture, decode)
    assert reader.open(picture).size == (90, 60)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("stored", [False, True])
def test_pictures_that_were_cut_short_are_found(
    tmp_path: Path, processor: LlavaProcessor, suffix: str, stored: bool
) -> None:
    path = noise(tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    picture = InMemory(path.read_bytes()) if stored else path.name
    reader = PictureReader(processor, [tmp_path])
    name = "the stored one" if stored else path.name
    for attempt in (reader.verify, reader.open):
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*on_bad_sample='skip'"):
            attempt(picture)


def test_a_jpeg_with_bytes_behind_its_end_is_whole(tmp_path: Path, processor: LlavaProcessor) -> None:
    path = noise(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(10_000))
    PictureReader(processor, [tmp_path]).verify("a.jpg")


def test_decoding_finds_damage_inside(tmp_path: Path, processor: LlavaProcessor) -> None:
    path = tmp_path / "a.bmp"
    noise(path)
    path.write_bytes(path.read_bytes()[:-2000])
    reader = PictureReader(processor, [tmp_path])
    reader.verify("a.bmp")
    with pytest.raises(ValueError, match=r"a\.bmp cannot be read"):
        reader.verify("a.bmp", decode=True)


def test_other_files_are_no_pictures(tmp_path: Path, processor: LlavaProcessor) -> None:
    (tmp_path / "page.jpg").write_text("<html>404 Not Found</html>")
    with pytest.raises(ValueError, match=r"page\.jpg cannot be read"):
        PictureReader(processor, [tmp_path]).verify("page.jpg")


def test_tokens_of_a_picture_are_known_beforehand(tmp_path: Path, processor: LlavaProcessor) -> None:
    assert PictureReader(processor, []).tokens_per_picture() == 64
    uncropped = copy(processor)
    uncropped.image_processor = deepcopy(processor.image_processor)
    uncropped.image_processor.do_center_crop = False
    with pytest.raises(ValueError, match=r"64 to 128 tokens.*image_aspect_ratio=pad"):
        PictureReader(uncropped, []).tokens_per_picture()
    assert PictureReader(with_aspect_ratio(uncropped, "pad"), []).tokens_per_picture() == 64
    bare = copy(processor)
    bare.patch_size = None
    with pytest.raises(ValueError, match="no patch_size"):
        PictureReader(bare, []).tokens_per_picture()


def test_what_another_library_asks_of_pillow_changes_nothing(monkeypatch) -> None:
    """lmms-eval lets Pillow fill pictures that are cut short with grey, in the whole process."""
    from PIL import ImageFile

    from dynamic_llava.data.opening import _whole_files_only

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with _whole_files_only():
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES
