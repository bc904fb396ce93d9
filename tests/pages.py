"""The pages of the project as tests read them: their blocks of code, and the marks in front of these."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "eval/README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<marks>(?:<!--(?:(?!-->).)*-->\n)*)```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"<!-- (not run|file|continues): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    `marks` are the comments in front of it: `not run` says why, `file` where it is saved, `continues` the page whose
    Python comes first.
    """

    page: Path
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        """The page and the line of the block's fence."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text() if text is None else text
    return [
        Block(
            page,
            text[: match.start("language")].count("\n") + 1,
            match["language"],
            match["text"],
            dict(MARK.findall(match["marks"])),
        )
        for match in FENCE.finditer(text)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command of a block of shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def anchors_of(page: Path) -> set[str]:
    """What links to headings of a page may name."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
