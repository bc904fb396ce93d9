"""What one call of the model is given: embeddings, image positions, mask columns; what does not fit is an error."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import SparseCache, require_sparse_cache, seen_tokens
from .call_arguments import CALL_ARGUMENTS
from .configuration_dynamic_llava import DynamicLlavaConfig
from .options import SparsityOptions
from .sparsity_config import SparsityConfig
from .token_masks import TokenMasks, generated_token_mask, image_token_mask, last_user_turn_mask

# What transformers hands on to any decoder; every other keyword of a call would be ignored.
DECODER_KEYWORDS = {"output_attentions", "output_hidden_states", "cache_position"}


def check_keywords(keywords: Mapping[str, Any], forward: Callable) -> None:
    """`TypeError` when a call has a keyword that nothing reads, with the nearest arguments of `forward`."""
    for name, value in keywords.items():
        if value is not None and name not in DECODER_KEYWORDS:
            known = [known for known in inspect.signature(forward).parameters if known not in ("self", "kwargs")]
            known += CALL_ARGUMENTS
            near = difflib.get_close_matches(name, known, n=3) or known
            raise TypeError(f"forward() takes no {name!r}; did you mean {', '.join(near)}?")


def split_arguments(kwargs: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`kwargs` in two: those of `names`, and the rest."""
    taken = {name: value for name, value in kwargs.items() if name in names}
    return taken, {name: value for name, value in kwargs.items() if name not in names}


def check_tensors(**arguments: Any) -> None:
    """`TypeError` where an argument of a call is there and no tensor."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}.")


def check_sources(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, pixel_values: Tensor | None, encoded: dict | None
) -> None:
    """`ValueError` unless tokens come from one of two arguments, and pictures from one of two at most."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
    if pixel_values is not None and encoded:
        raise ValueError("Pass pixel_values or mm_encoder_outputs, not both.")


def count_generated(num_generated: int | None, length: int, cache: SparseCache | None) -> int:
    """How many of a call's last tokens the model has generated; `ValueError` where they cannot be judged."""
    started = cache is not None and cache.started
    if num_generated is None:
        return int(started and length == 1)
    if isinstance(num_generated, bool) or not isinstance(num_generated, int) or not 0 <= num_generated <= length:
        raise ValueError(
            f"num_generated counts the last tokens of the call, of which there are {length}; got {num_generated!r}."
        )
    if num_generated and length > 1 and cache is not None and not (started and num_generated == length):
        raise ValueError(
            f"{num_generated} generated of {length} tokens in one call on a cache, which takes a prompt and the output "
            "behind it in calls of their own. Feed the prompt first, or leave the cache out; num_generated=0 stores "
            "all, as a prompt."
        )
    return num_generated


def new_columns(mask: Tensor | None, cache: SparseCache | None, shape: torch.Size, output_alone: bool) -> Tensor | None:
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
    if output_alone:
        return None  # A generated token is never padding; looking would copy from the device in every step.
    check_mask("attention_mask", mask)
    start = int(seen_tokens(cache))
    return mask[:, start : start + length]


def check_labels(labels: Tensor | None, output_mask: Tensor | None, cache: Cache | None, shape: torch.Size) -> None:
    """`ValueError` unless both are `(B, N)`, without a cache, and `output_mask` tells answers among labels."""
    if labels is not None and cache is not None:
        raise ValueError("labels are scored in one forward without a cache; pass labels or past_key_values.")
    for name, tensor in (("labels", labels), ("output_mask", output_mask)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass one of the call's {tuple(shape)}.")
    if output_mask is not None:
        if labels is None:
            raise ValueError("output_mask tells the output tokens among labels; pass labels too, or num_generated.")
        check_mask("output_mask", output_mask)


def check_skip_logits(skip_logits: bool | None, labels: Tensor | None, training: bool) -> bool:
    """Whether a call gives no logits; `ValueError` where it is to give neither these nor a loss."""
    if not isinstance(skip_logits, bool | None) or (skip_logits and labels is None):
        raise ValueError(
            f"skip_logits={skip_logits!r}: it is True, False or None, and True needs labels, whose loss is left. Leave "
            "it out."
        )
    return training if skip_logits is None else skip_logits


def check_mask(name: str, mask: Tensor) -> None:
    """`ValueError` unless `mask` holds 0 and 1 alone."""
    if mask.dtype == torch.bool:
        return
    right = (mask == 0) | (mask == 1)
    if torch.compiler.is_exporting():
        torch._assert_async(right.all(), f"{name} must hold 0 and 1 alone.")
    elif not bool(right.all()):
        wrong = mask[~right][0].item()
        raise ValueError(f"{name} holds {wrong}; write 1 at tokens that count and 0 at those that do not.")


def embed(embedding: nn.Module, config: DynamicLlavaConfig, input_ids: Tensor) -> Tensor:
    """Embeddings `(B, N, D)`; the image token need not be in the vocabulary, its place is filled anyway."""
    if not 0 <= config.image_token_id < config.text_config.vocab_size:
        input_ids = input_ids.masked_fill(image_token_mask(input_ids, config.image_token_id), 0)
    return embedding(input_ids)


def instruct_tokens(
    sparsity: SparsityConfig,
    input_ids: Tensor | None,
    tokens: TokenMasks,
    cache: SparseCache | None,
    options: SparsityOptions,
) -> Tensor | None:
    """`(B, N)` bool: text of the last user turn of rows with images; None on a cache that has started."""
    if tokens.image is None or (cache is not None and cache.started):
        return None
    if input_ids is None:
        raise ValueError("The instruct predictor finds the user's turn in input_ids; pass them, not inputs_embeds.")
    output = torch.zeros_like(tokens.present) if tokens.output is None else tokens.output
    text = last_user_turn_mask(
        input_ids, tokens.image, output | ~tokens.present, sparsity.user_marker, sparsity.assistant_marker
    )
    # The published code judges the last one in training only.
    return text if options.training else text & text.roll(-1, dims=1)


def image_positions(
    embedding: nn.Module,
    config: DynamicLlavaConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    num_generated: int,
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
    if num_generated:
        mask = mask & ~generated_token_mask(mask.shape, num_generated, mask.device)
    return mask


def check_features(image_mask: Tensor, features: int, config: DynamicLlavaConfig) -> None:
    """`ValueError` unless there is one image token for each of `features` image features."""
    if torch.compiler.is_exporting():
        torch._assert_async(image_mask.sum() == features, f"input_ids must hold {features} image tokens.")
        return
    number = int(image_mask.sum())
    if number == features:
        return
    by_row, image_token_id = image_mask.sum(dim=-1).tolist(), config.image_token_id
    if not features:
        raise ValueError(
            f"input_ids hold {number} image tokens (id {image_token_id}; by row {by_row}) but no "
            "pixel_values were passed; pass the processor's pixel_values, or remove <image> from the prompt."
        )
    raise ValueError(
        f"{number} image tokens (id {image_token_id}; by row {by_row}) for {features} image features; "
        "pass the images of exactly these rows in the order of their tokens, and none for text-only rows."
    )


def refuse_cache(cache: Cache | None) -> None:
    """`ValueError` when a call that recomputes its layers in the backward has a cache."""
    if cache is not None:
        raise ValueError(
            "Gradient checkpointing in training mode writes no cache; call model.eval() first, or pass "
            "use_cache=False and no past_key_values."
        )


def check_cache(cache: Cache | None, config: DynamicLlavaConfig, batch_size: int, length: int) -> None:
    """`ValueError` when `cache` is not a `SparseCache` for this model and call."""
    if cache is None:
        return
    sparse = require_sparse_cache(cache)
    sparse.check_call(config, batch_size, length)
