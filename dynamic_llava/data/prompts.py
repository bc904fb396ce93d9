"""Prompts and generation arguments: from what lmms-eval asks to what the processor and `generate` take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..checkpoints.chat_template import IMAGE_TOKEN
from .opening import for_processor

DEFAULT_MAX_NEW_TOKENS = 1024
PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
PASSED_ON_SAMPLING = ("temperature", "top_p", "top_k")


def encode_prompts(processor: Any, contexts: Sequence[str], visuals: Sequence[Sequence[Image.Image]]) -> Any:
    """Chat prompts of one user turn each, padded on the left, as the processor's batch.

    Raises:
        ValueError: a context names another number of images than it has, or an image cannot be worked on.
    """
    texts = []
    for context, images in zip(contexts, visuals, strict=True):
        message = [{"role": "user", "content": _user_content(context, len(images))}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    flat = for_processor([image for images in visuals for image in images], processor.image_processor)
    bos = processor.tokenizer.bos_token
    return processor(
        images=flat or None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )


def _user_content(context: str, num_images: int) -> list[dict[str, str]]:
    """Images first, as LLaVA was trained, unless the text places several of them itself."""
    pieces = context.split(IMAGE_TOKEN)
    if len(pieces) - 1 not in (0, num_images):
        raise ValueError(f"The prompt {context!r} has {len(pieces) - 1} {IMAGE_TOKEN} for {num_images} images.")
    if len(pieces) <= 2:
        return [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": "".join(pieces).strip()}]
    content = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in content if part.get("text") != ""]


def generation_arguments(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation arguments as those of `generate`; greedy unless a temperature above 0 is asked for."""
    sample = bool(gen_kwargs.get("do_sample", True)) and float(gen_kwargs.get("temperature") or 0) > 0
    names = PASSED_ON + (PASSED_ON_SAMPLING if sample else ())
    passed = {name: gen_kwargs[name] for name in names if gen_kwargs.get(name) is not None}
    return {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **passed, "do_sample": sample}


def stop_strings(until: str | Sequence[str] | None) -> list[str]:
    """The strings that end an answer. Blank ones are dropped: lmms-eval fills in a blank line where a task has none."""
    stops = [until] if isinstance(until, str) else list(until or [])
    return [stop for stop in stops if stop.strip()]


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`, without outer white space."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()
