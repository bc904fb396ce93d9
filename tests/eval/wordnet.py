"""A WordNet of a few nouns in the files that nltk reads, for machines without the real one."""

from __future__ import annotations

from pathlib import Path

SYNSETS = (("picture", "image"), ("cat", "feline"), ("bench", "seat"))
EMPTY = (
    "cntlist.rev",
    "index.sense",
    "adj.exc",
    "adv.exc",
    "noun.exc",
    "verb.exc",
    "index.adj",
    "index.adv",
    "index.verb",
)
HEADER = "  1 WordNet 3.0 Copyright, made for a test  \n"


def write_wordnet(folder: Path) -> Path:
    """Write `corpora/wordnet` below `folder`, which NLTK_DATA may name."""
    root = folder / "corpora" / "wordnet"
    root.mkdir(parents=True)
    for name in EMPTY:
        (root / name).write_text("")
    for part in ("adj", "adv", "verb"):
        (root / f"data.{part}").write_text(HEADER)
    (root / "lexnames").write_text("".join(f"{n:02d}\tlex{n}\t1\n" for n in range(45)))
    data, index = HEADER, ""
    for words in SYNSETS:
        offset = len(data)
        listed = " ".join(f"{word} 0" for word in words)
        data += f"{offset:08d} 03 n {len(words):02x} {listed} 000 | a test  \n"
        for word in words:
            index += f"{word} n 1 0 1 0 {offset:08d}  \n"
    (root / "data.noun").write_text(data)
    (root / "index.noun").write_text("".join(sorted(index.splitlines(keepends=True))))
    return folder
