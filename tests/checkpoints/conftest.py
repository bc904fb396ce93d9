"""Checkpoints in each layout, written once for a module."""

from __future__ import annotations

import shutil

import pytest

from .writing import model_of, write_published

TINY = "assets/tiny-llava"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A folder with the same model as `ours` and `published`, and the embedded base as `tiny`."""
    folder = tmp_path_factory.mktemp("layouts")
    model = model_of()
    model.save_pretrained(folder / "ours")
    write_published(model, folder / "published")
    shutil.copytree(TINY, folder / "tiny")
    return folder
