"""The embedded data: deterministic, disjoint, truthful, and hard in the intended way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor

from dynamic_llava.data.shapes import KINDS, PATCH_SIZE, build_shapes, patch_coverage, sample_scene, split_of
from dynamic_llava.data.shapes.describe import STYLES, describe
from dynamic_llava.data.shapes.draw import draw_scene
from dynamic_llava.data.shapes.questions import NUMBERS, PLURALS, RELATIONS, Question, ask, ask_many
from dynamic_llava.data.shapes.scene import COLOURS, Scene, sample_split_scene


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    counts = {"train_pictures": 4, "val_pictures": 2, "test_pictures": 2}
    first, second, other = (
        read_all(build_shapes(tmp_path / name, seed=seed, **counts)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second
    assert first["images/train/000000.png"] != other["images/train/000000.png"]


def test_a_second_build_writes_nothing_and_other_arguments_raise(tmp_path: Path) -> None:
    counts = {"train_pictures": 3, "val_pictures": 1, "test_pictures": 1}
    build_shapes(tmp_path / "data", **counts)
    marker = tmp_path / "data" / "images" / "train" / "000000.png"
    stamp = marker.stat().st_mtime_ns
    build_shapes(tmp_path / "data", **counts)
    assert marker.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="overwrite"):
        build_shapes(tmp_path / "data", seed=5, **counts)
    build_shapes(tmp_path / "data", seed=5, overwrite=True, **counts)
    assert json.loads((tmp_path / "data" / "info.json").read_text())["seed"] == 5


def test_an_unfinished_build_is_built_anew(tmp_path: Path) -> None:
    counts = {"train_pictures": 3, "val_pictures": 1, "test_pictures": 1}
    whole = read_all(build_shapes(tmp_path / "data", **counts))
    (tmp_path / "data" / "info.json").unlink()
    (tmp_path / "data" / "images" / "train" / "000001.png").write_bytes(b"half")
    assert read_all(build_shapes(tmp_path / "data", **counts)) == whole


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not shapes"):
        build_shapes(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_splits_share_no_scene() -> None:
    drawn = {}
    for index, split in enumerate(("train", "val", "test")):
        rng = np.random.default_rng(index)
        drawn[split] = {sample_split_scene(rng, split).content_key() for _ in range(300)}
    assert not drawn["train"] & drawn["val"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["val"] & drawn["test"]


def test_the_split_does_not_hang_on_the_exact_pixels() -> None:
    for scene in scenes(20):
        moved = Scene(scene.objects, scene.texture_seed + 1)
        assert split_of(moved) == split_of(scene)


def test_files_are_llava_json_and_pictures_exist(shapes: Path) -> None:
    for name in ("train", "val_vqa", "val_describe", "test_vqa", "test_describe"):
        rows = json.loads((shapes / f"{name}.json").read_text())
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            split = name.split("_")[0]
            assert row["image"].startswith(f"images/{split}/")
            assert Image.open(shapes / row["image"]).size == (128, 128)
            assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (
                len(row["conversations"]) // 2
            )
            assert "".join(turn["value"] for turn in row["conversations"]).count("<image>") == 1
            assert ("kind" in row) == (split != "train")


def test_questions_and_answers_are_true() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(200):
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is not None:
                assert question.answer == true_answer(scene, question), (scene, question)


def true_answer(scene: Scene, question: Question) -> str:
    """Works the answer out from the text of the question alone."""
    words = question.text.rstrip("?").split()
    found = {(o.colour, o.shape): o for o in scene.objects}
    if question.kind == "colour":
        (item,) = (o for o in scene.objects if o.shape == words[-1])
        return item.colour
    if question.kind == "shape":
        (item,) = (o for o in scene.objects if o.colour == words[-2])
        return item.shape
    if question.kind == "count":
        return NUMBERS[sum(words[2] in ("objects", PLURALS[o.shape]) for o in scene.objects)]
    if question.kind == "existence":
        return "yes" if (words[-2], words[-1]) in found else "no"
    a, b = found[words[5], words[6]], found[words[-2], words[-1]]
    axis, sign = RELATIONS[words[3].rstrip(",")]
    return a.colour if sign * (getattr(a, axis) - getattr(b, axis)) > 0 else b.colour


def test_answers_are_balanced() -> None:
    rng = np.random.default_rng(0)
    answers = Counter(q.answer for s in scenes(600) if (q := ask(s, "existence", rng)) is not None)
    assert 0.42 < answers["yes"] / answers.total() < 0.58
    relations = [q for s in scenes(600) if (q := ask(s, "relation", rng)) is not None]
    first = sum(q.text.split()[5] == q.answer for q in relations)
    assert 0.42 < first / len(relations) < 0.58
    colours = Counter(q.answer for s in scenes(600) if (q := ask(s, "colour", rng)) is not None)
    assert set(colours) == set(COLOURS)
    assert max(colours.values()) < 0.25 * colours.total()


def test_questions_of_one_picture_differ() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(30):
        texts = [q.text for q in ask_many(scene, 8, rng)]
        assert len(set(texts)) == len(texts) == 8


def test_unknown_kind_and_split_are_named() -> None:
    with pytest.raises(ValueError, match="'smell'"):
        ask(scenes(1)[0], "smell", np.random.default_rng(0))
    with pytest.raises(ValueError, match="'dev'"):
        sample_split_scene(np.random.default_rng(0), "dev")


def test_descriptions_are_longer_than_fifty_tokens_and_name_everything(processor: LlavaProcessor) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(150):
        for _ in STYLES:
            _, text = describe(scene, rng)
            tokens = processor.tokenizer.encode(text, add_special_tokens=False)
            assert len(tokens) > 50
            content = [word for o in scene.objects for word in (o.size, o.colour, o.shape)]
            assert all(f"{o.colour} {o.shape}" in text for o in scene.objects)
            assert len(content) < len(tokens) / 2, "a good half of the words must be filler"


def test_objects_span_several_patches_and_a_fifth_of_the_patches_shows_them_all() -> None:
    keep = int(64 * 0.2)
    covered, fifth, chance = [], [], []
    rng = np.random.default_rng(0)
    for scene in scenes(200):
        coverage = patch_coverage(scene).reshape(len(scene.objects), -1)
        assert ((coverage > 0.05).sum(1) >= 3).all()
        covered.append((coverage.sum(0) > 0.05).mean())
        best = np.argsort(-coverage.sum(0))[:keep]
        fifth.append((coverage[:, best].max(1) > 0.4).all())
        chance.append((coverage[:, rng.permutation(64)[:keep]].max(1) > 0.4).all())
    assert np.mean(covered) < 1 / 3
    assert np.mean(fifth) > 0.9
    assert np.mean(chance) < 0.3


def test_coverage_agrees_with_the_picture() -> None:
    scene = scenes(1, seed=4)[0]
    pixels = np.asarray(draw_scene(scene)).astype(int)
    saturation = pixels.max(-1) - pixels.min(-1)
    coloured = (saturation > 70).reshape(8, PATCH_SIZE, 8, PATCH_SIZE).mean(axis=(1, 3))
    assert np.abs(coloured - patch_coverage(scene).sum(0)).max() < 0.2


def test_the_background_is_not_uniform() -> None:
    scene = scenes(1)[0]
    pixels = np.asarray(draw_scene(scene)).astype(float)
    background = patch_coverage(scene).sum(0) == 0
    spread = pixels.reshape(8, PATCH_SIZE, 8, PATCH_SIZE, 3).std(axis=(1, 3, 4))
    assert (spread[background] > 1).all()
