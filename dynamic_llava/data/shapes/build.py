"""Writes the shapes as LLaVA's conversation JSON with PNG pictures beside it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from ...files import write_atomically
from ...reading import read_json_object
from .describe import describe
from .draw import draw_scene
from .questions import EMBEDDED_KINDS, ask, ask_many
from .scene import SPLITS, Scene, sample_split_scene

FORMAT_VERSION = 2
INFO_FILE = "info.json"


def build_shapes(
    output: str | Path,
    seed: int = 0,
    train_pictures: int = 4000,
    val_pictures: int = 200,
    test_pictures: int = 400,
    questions_per_picture: int = 8,
    min_objects: int = 2,
    max_objects: int = 4,
    overwrite: bool = False,
) -> Path:
    """Draws the pictures of all splits and writes their questions and descriptions.

    Files: `images/{train,val,test}/*.png`; `train.json` with a conversation of several short questions and one that
    asks for a description of each picture; `{val,test}_vqa.json` with one single-turn question of each kind that a
    picture allows (key "kind" says which); `{val,test}_describe.json` with one description of each picture;
    `info.json`, written last: a folder without it is unfinished and is built anew.

    Args:
        output: folder to write.
        seed: seed of everything.
        train_pictures: pictures to train on.
        val_pictures: pictures to watch during training.
        test_pictures: pictures to evaluate on.
        questions_per_picture: turns of a training conversation.
        min_objects: fewest objects in a picture.
        max_objects: most objects in a picture.
        overwrite: replace data that other arguments made.

    Returns:
        The folder. With the arguments that made what is there, nothing is written.

    Raises:
        ValueError: when the folder holds shapes made with other arguments, or something else.
    """
    output = Path(output)
    arguments = {
        "version": FORMAT_VERSION,
        "seed": seed,
        "pictures": {"train": train_pictures, "val": val_pictures, "test": test_pictures},
        "questions_per_picture": questions_per_picture,
        "objects": [min_objects, max_objects],
    }
    if min(arguments["pictures"].values()) < 1 or questions_per_picture < 1:
        raise ValueError(f"picture and question counts must be at least 1, got {arguments}")
    if _is_built(output, arguments, overwrite):
        return output
    samples = {}
    for index, split in enumerate(SPLITS):
        (output / "images" / split).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, index])
        samples |= _build_split(output, split, arguments, rng)
    for name, rows in samples.items():
        write_atomically(output / f"{name}.json", json.dumps(rows, indent=1))
    counts = {"samples": {name: len(rows) for name, rows in samples.items()}}
    write_atomically(output / INFO_FILE, json.dumps(arguments | counts, indent=1))
    return output


def _is_built(output: Path, arguments: dict, overwrite: bool) -> bool:
    """Says whether the folder already holds this data; clears what an interrupted or replaced build left."""
    info = output / INFO_FILE
    if info.exists():
        found = read_json_object(info, "description of the shapes")
        found.pop("samples", None)
        if found == arguments:
            return True
        if not overwrite:
            raise ValueError(
                f"{output} holds shapes made with {found}, not with {arguments}; "
                "choose another folder or pass overwrite"
            )
        info.unlink()
    elif output.exists() and not all(_is_own(path.name) for path in output.iterdir()):
        raise ValueError(f"{output} holds files that are not shapes; choose an empty folder")
    shutil.rmtree(output / "images", ignore_errors=True)
    for path in output.glob(".*.part"):
        path.unlink()
    return False


def _is_own(name: str) -> bool:
    """Whether a build writes `name` into its folder, or leaves it there when it is killed."""
    files = ("train", "val_vqa", "val_describe", "test_vqa", "test_describe")
    written = {f"{file}.json" for file in files} | {INFO_FILE}
    unfinished = re.fullmatch(r"\.(.+)\.\d+\.part", name)
    return name == "images" or (unfinished[1] if unfinished else name) in written


def _build_split(output: Path, split: str, arguments: dict, rng: np.random.Generator) -> dict[str, list[dict]]:
    """Draws the pictures of one split and returns its samples by file name."""
    low, high = arguments["objects"]
    talks, descriptions = [], []
    for index in range(arguments["pictures"][split]):
        scene = sample_split_scene(rng, split, min_objects=low, max_objects=high)
        name, image = f"{split}-{index:06d}", f"images/{split}/{index:06d}.png"
        draw_scene(scene).save(output / image, compress_level=1)
        request, answer = describe(scene, rng)
        descriptions.append(_sample(f"{name}-describe", image, [(request, answer)], kind="description"))
        if split == "train":
            questions = ask_many(scene, arguments["questions_per_picture"], rng, EMBEDDED_KINDS)
            talks.append(_sample(f"{name}-vqa", image, [(q.text, q.answer) for q in questions]))
        else:
            talks += _single_questions(scene, name, image, rng)
    if split != "train":
        return {f"{split}_vqa": talks, f"{split}_describe": descriptions}
    mixed = talks + [{k: v for k, v in sample.items() if k != "kind"} for sample in descriptions]
    return {"train": [mixed[i] for i in rng.permutation(len(mixed))]}


def _single_questions(scene: Scene, name: str, image: str, rng: np.random.Generator) -> list[dict]:
    asked = [ask(scene, kind, rng) for kind in EMBEDDED_KINDS]
    return [_sample(f"{name}-{q.kind}", image, [(q.text, q.answer)], kind=q.kind) for q in asked if q is not None]


def _sample(name: str, image: str, talk: list[tuple[str, str]], kind: str | None = None) -> dict:
    """Returns one sample of LLaVA's JSON; the picture comes first in the first question."""
    conversations = []
    for index, (question, answer) in enumerate(talk):
        opening = "<image>\n" if index == 0 else ""
        conversations += [{"from": "human", "value": f"{opening}{question}"}, {"from": "gpt", "value": answer}]
    sample = {"id": name, "image": image, "conversations": conversations}
    return sample if kind is None else sample | {"kind": kind}
