"""Small files in the layouts of LVIS-Instruct4V and ShareGPT4V, with pictures, and the benchmarks built from them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from PIL import Image

from dynamic_llava.eval.conversation_files import conversation_files

TASKS = Path(__file__).parents[2] / "dynamic_llava" / "eval" / "tasks"
WORDS = ["there", "is", "a", "red", "circle", "and", "a", "blue", "square", "in", "the", "picture"]


def said(number: int, shift: int = 0) -> str:
    """So many words."""
    return " ".join(WORDS[(shift + place) % len(WORDS)] for place in range(number)) + "."


def conversation(name: str, image, *words: int) -> dict:
    """A sample with answers of so many words."""
    turns = []
    for number, count in enumerate(words):
        asked = "<image>\nDescribe the picture." if number == 0 else f"What else is there, number {number}?"
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": said(count, number)}]
    return {"id": name, "image": image, "conversations": turns}


def write_downloads(folder: Path) -> Path:
    """`lvis.json`, `sharegpt4v.json` and `coco/train2017/`; what fits no rule is there too."""
    pictures = folder / "coco" / "train2017"
    pictures.mkdir(parents=True)
    names = []
    for number in range(6):
        names.append(f"coco/train2017/{number:012d}.jpg")
        Image.new("RGB", (96, 64), (40 * number, 90, 120)).save(folder / names[-1])
    lvis = [
        conversation("short", names[0], 100),
        *(conversation(f"single-{n}", names[n], 101 + 10 * n) for n in range(4)),
        conversation("seven", names[1], *[60] * 7),
        conversation("few words", names[2], *[30] * 10),
        conversation("multi-8", names[3], *[38] * 8),
        conversation("multi-9", names[4], *[34] * 9),
        conversation("multi-10", names[5], *[31] * 10),
        conversation("two pictures", names[:2], 150),
        {"id": "text only", "conversations": conversation("", "", 150)["conversations"]},
    ]
    (folder / "lvis.json").write_text(json.dumps(lvis))
    shares = [conversation(f"share-{n}", names[n], 299 + n) for n in range(4)]
    (folder / "sharegpt4v.json").write_text(json.dumps(shares))
    return folder


def shorter_tasks(folder: Path, tokens: int) -> Path:
    """Our task files, with answers of so many tokens at most."""
    shutil.copytree(TASKS, folder)
    for name in (name for name, file in conversation_files().items() if file.meteor):
        path = folder / f"{name}.yaml"
        text, count = re.subn(r"max_new_tokens: \d+", f"max_new_tokens: {tokens}", path.read_text())
        assert count == 1
        path.write_text(text)
    return folder
