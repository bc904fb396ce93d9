"""One answer: its text and what it cost, as it is stored and as lmms-eval takes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts

from .costs import RequestRecord


@dataclass(frozen=True)
class Answer:
    """The text of one answer, or those of all rounds, and what it cost."""

    text: str | list[str]
    record: RequestRecord

    def stored(self) -> dict[str, Any]:
        """As it is kept by `ResponseStore`."""
        return {"text": self.text, "record": asdict(self.record)}

    @classmethod
    def from_stored(cls, row: dict[str, Any]) -> Answer:
        """From what `stored` gave; `ValueError` where it is something else."""
        text, record = row.get("text"), row.get("record")
        texts = text if isinstance(text, list) else [text]
        if all(isinstance(one, str) for one in texts) and RequestRecord.fits(record):
            return cls(text, RequestRecord(**record))
        raise ValueError(f"The answers to resume hold {str(row)[:80]}, no answer; start without --resume.")

    def result(self) -> GenerationResult | list[str]:
        """As lmms-eval takes it."""
        if isinstance(self.text, list):
            return self.text
        counts = TokenCounts(input_tokens=self.record.prompt_tokens, output_tokens=self.record.output_tokens)
        return GenerationResult(self.text, counts)
