"""What one call of the model is given: embeddings, image positions, mask columns; what does not fit is an error."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import SparseCache, require_sparse_cache, seen_tokens
from .configuration_dynamic_llava import DynamicLlavaConfig, SparsityConfig
from .decisions import SparsityOptions
from .token_spans import TokenSpans, generated_token_mask, image_token_mask, last_user_turn_mask


def new_columns(mask: Tensor | None, cache: SparseCache | None, shape: torch.Size) -> Tensor | None:
    """The columns of the attention mask that belong to this call's tokens, `(B, N)`."""
    if mask is None:
        return None
    batch_size, length = shape[:2]
    fixed = cache is not None and cache.max_length is not None
    columns = cache.max_length if fixed else seen_tokens(cache) + length
    if mask.shape != (batch_size, columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but with {length} tokens passed for each of "
            f"{batch_size} rows it must cover all {columns} columns; pass one of shape {(batch_size, columns)}."
        )
    if length == 1:
        return None  # A single token is never padding; looking would copy from the device in every step.
    start = int(seen_tokens(cache))
    return mask[:, start : start + length]


def embed(embedding: nn.Module, config: DynamicLlavaConfig, input_ids: Tensor) -> Tensor:
    """Embeddings `(B, N, D)`; the image token need not be in the vocabulary, its place is filled anyway."""
    if not 0 <= config.image_token_id < config.text_config.vocab_size:
        input_ids = input_ids.masked_fill(image_token_mask(input_ids, config.image_token_id), 0)
    return embedding(input_ids)


def instruct_tokens(
    sparsity: SparsityConfig,
    input_ids: Tensor | None,
    spans: TokenSpans,
    cache: SparseCache | None,
    options: SparsityOptions,
) -> Tensor | None:
    """`(B, N)` bool: text of the last user turn of rows with images; None on a cache that has started."""
    if spans.image is None or (cache is not None and cache.started):
        return None
    if input_ids is None:
        raise ValueError("The instruct predictor finds the user's turn in input_ids; pass them, not inputs_embeds.")
    output = torch.zeros_like(spans.present) if spans.output is None else spans.output
    tokens = last_user_turn_mask(
        input_ids, spans.image, output | ~spans.present, sparsity.user_marker, sparsity.assistant_marker
    )
    if not options.training:
        # The published code judges the last one in training only.
        tokens = tokens & tokens.roll(-1, dims=1)
    return tokens


def image_positions(
    embedding: nn.Module,
    config: DynamicLlavaConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    prompt_length: int | None,
) -> Tensor:
    """`(B, N)` bool: where image features go. A generated token is never an image, whatever its id."""
    if input_ids is None:
        if not 0 <= config.image_token_id < config.text_config.vocab_size:
            raise ValueError(
                f"The image token {config.image_token_id} is outside the vocabulary of "
                f"{config.text_config.vocab_size}, so that inputs_embeds cannot hold it; pass input_ids."
            )
        image_token = torch.tensor(config.image_token_id, device=inputs_embeds.device)
        mask = (inputs_embeds == embedding(image_token)).all(dim=-1)
    else:
        mask = image_token_mask(input_ids, config.image_token_id)
    if prompt_length is not None:
        mask = mask & ~generated_token_mask(mask.shape, prompt_length, mask.device)
    return mask


def check_features(image_mask: Tensor, features: int, image_token_id: int) -> None:
    """`ValueError` unless there is one image token for each of `features` image features."""
    if torch.compiler.is_exporting():
        torch._assert_async(image_mask.sum() == features, f"input_ids must hold {features} image tokens.")
        return
    number = int(image_mask.sum())
    if number == features:
        return
    by_row = image_mask.sum(dim=-1).tolist()
    if not features:
        raise ValueError(
            f"input_ids hold {number} image tokens (id {image_token_id}; by row {by_row}) but no "
            "pixel_values were passed; pass the processor's pixel_values, or remove <image> from the prompt."
        )
    raise ValueError(
        f"{number} image tokens (id {image_token_id}; by row {by_row}) for {features} image features; "
        "pass the images of exactly these rows in the order of their tokens, and none for text-only rows."
    )


def check_cache(cache: Cache | None, config: DynamicLlavaConfig, batch_size: int, length: int) -> None:
    """`ValueError` when `cache` is not a `SparseCache` for this model and call."""
    if cache is None:
        return
    require_sparse_cache(cache)
    cache.check_call(config, batch_size, length)
