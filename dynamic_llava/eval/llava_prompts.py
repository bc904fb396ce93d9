"""LLaVA's own prompts where lmms-eval's differ, from the public evaluation scripts of LLaVA-1.5.

MMBench: the hint on a line of its own, then the question, then one line per option, without the sentence that
announces them; in Chinese another request for the letter. TextVQA: OCR tokens. VizWiz: the question as it was asked
(lmms-eval writes all but its first letter small). VQAv2, GQA, ScienceQA, SEED-Bench, POPE and MME are asked alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

OCR_TASK = "textvqa_val"
LETTERS = ("A", "B", "C", "D", "E")
EMPTY = ("", "nan", "none")
ASK_LETTER = "Answer with the option's letter from the given choices directly."
ASK_LETTER_CN = "请直接回答选项字母。"


def mmbench_text(request: str) -> Callable[..., str]:
    """`doc_to_text` of MMBench that ends in `request`."""

    def text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
        options = [f"{letter}. {doc[letter]}" for letter in LETTERS if not _empty(doc.get(letter))]
        hint = [] if _empty(doc.get("hint")) else [doc["hint"]]
        return "\n".join([*hint, doc["question"], *options, request])

    return text


def vizwiz_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """`doc_to_text` of VizWiz with the question as it was asked."""
    return f"{doc['question']}{(lmms_eval_specific_kwargs or {}).get('post_prompt', '')}"


def _empty(value: Any) -> bool:
    return value is None or str(value).strip().lower() in EMPTY


TEXTS = {
    **{f"mmbench_en_{form}": mmbench_text(ASK_LETTER) for form in ("dev", "dev_static", "test")},
    **{f"mmbench_cn_{form}": mmbench_text(ASK_LETTER_CN) for form in ("dev", "dev_static", "test")},
    "vizwiz_vqa_val": vizwiz_text,
    "vizwiz_vqa_test": vizwiz_text,
}


def with_llava_prompt(task: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of lmms-eval's `task` with LLaVA's prompt."""
    if task in TEXTS:
        return {**config, "doc_to_text": TEXTS[task]}
    if task == OCR_TASK:
        prompt = config.get("lmms_eval_specific_kwargs") or {}
        return {
            **config,
            "lmms_eval_specific_kwargs": {**prompt, "default": {**prompt.get("default", {}), "ocr": True}},
        }
    return config
