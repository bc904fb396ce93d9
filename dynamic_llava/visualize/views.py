"""What a model keeps of a picture and of its own answer, asked of the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.loaded import LoadedModel, SparsitySettings
from ..data.prompts import encode_prompts
from ..token_masks import IGNORE_INDEX, image_token_mask
from .drawing import PatchView, WordView


@torch.inference_mode()
def view_patches(
    loaded: LoadedModel, picture: Image.Image, question: str, reference: str, seed: int, selectors: Sequence[str]
) -> PatchView:
    """Ask `question` about `picture`; one forward per selector tells which patches it keeps."""
    inputs = encode_prompts(loaded.processor, [question], [[picture]]).to(loaded.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    image = image_token_mask(inputs["input_ids"], loaded.model.config.image_token_id)
    kept = {}
    for selector in selectors:
        torch.manual_seed(seed)
        kwargs = loaded.call_kwargs(SparsitySettings(image_selector=selector))
        mask = loaded.model(**inputs, **kwargs).image_keep_mask
        kept[selector] = (image if mask is None else mask)[image].bool().tolist()
    sequence = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    answer = loaded.processor.tokenizer.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    seen = seen_picture(inputs["pixel_values"][0], loaded.processor.image_processor)
    return PatchView(seen, question, reference, answer.strip(), kept)


def seen_picture(pixel_values: Tensor, image_processor) -> Image.Image:
    """The square picture that the model sees, on which its patches lie, of `pixel_values (3, H, W)`."""
    mean, std = (torch.tensor(getattr(image_processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (pixel_values.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


@torch.inference_mode()
def view_words(loaded: LoadedModel, picture: Image.Image, question: str, max_new_tokens: int = 256) -> WordView:
    """Let the model describe `picture`, then score its own words: scoring takes the decisions of cached decoding."""
    inputs = encode_prompts(loaded.processor, [question], [[picture]]).to(loaded.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    # An image token among the words would be taken for a picture when they are scored.
    banned = [loaded.model.config.image_token_id]
    sequence = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=banned)
    prompt_length = inputs["input_ids"].shape[1]
    labels = sequence.clone()
    labels[:, :prompt_length] = IGNORE_INDEX
    mask = loaded.model(
        input_ids=sequence,
        attention_mask=torch.ones_like(sequence),
        pixel_values=inputs["pixel_values"],
        labels=labels,
    ).output_keep_mask
    answer = sequence[0, prompt_length:]
    kept = [True] * len(answer) if mask is None else mask[0, prompt_length:].bool().tolist()
    pieces = text_pieces(loaded.processor.tokenizer, answer)
    shown = [(piece, keep) for piece, keep in zip(pieces, kept, strict=True) if piece]
    return WordView(picture, question, [piece for piece, _ in shown], [keep for _, keep in shown])


def text_pieces(tokenizer, token_ids: Tensor) -> list[str]:
    """The text that each token adds to the decoded answer; empty for special tokens."""
    texts = [tokenizer.decode(token_ids[:end], skip_special_tokens=True) for end in range(len(token_ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]
