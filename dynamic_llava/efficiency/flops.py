"""FLOPs and KV bytes of LLaVA-1.5, dense and sparsified, from the configuration alone.

Two counts:

* `paper_flops`: the paper's formula (arXiv 2412.00876, Sec. 4), 32 B N C^2 + 4 B N^2 C per layer over one kind of
  token, every projection taken as C x C and the MLP as three matrices C x 4C. Quote it beside the paper's tables.
* everything else: what really runs, text and image tokens together, with the Llama shapes (grouped queries, MLP width),
  vision tower, projector, predictors and head.

One multiply-add is 2 FLOPs. Attention counts the whole N x M rectangle, not the causal half, as
`torch.utils.flop_counter` counts scaled-dot-product attention; norms, activations, softmax and the rotary embedding
are left out, as there. A rate of None means that this kind of token is not sparsified.
"""

from __future__ import annotations

from typing import Any

from ..sparsity_config import check_keep_rate


def paper_flops(hidden: int, layers: int, tokens: int, kept: int, sparse_layer: int, batch: int = 1) -> int:
    """The paper's formula with `tokens` in the first `sparse_layer` of `layers` layers and `kept` in the others.

    Its image tokens: 10.1 -> 2.5 T for a 7B, 19.6 -> 4.7 T for a 13B (Table 1).
    """

    def layer(number: int) -> int:
        return batch * (32 * number * hidden**2 + 4 * number**2 * hidden)

    return sparse_layer * layer(tokens) + (layers - sparse_layer) * layer(kept)


def kept_image_tokens(image_tokens: int, image_keep_rate: float) -> int:
    """`int(n * rate)`, at least one of any; ValueError for a rate outside (0, 1]."""
    rate = check_keep_rate("image_keep_rate", image_keep_rate)
    return min(image_tokens, max(1, int(image_tokens * rate)))


def image_tokens_per_image(config: Any) -> int:
    """Tokens that one image takes in the decoder (576 for CLIP ViT-L/336)."""
    return _patches(config) + (config.vision_feature_select_strategy == "full")


def vision_flops(config: Any, num_images: int = 1) -> int:
    """Vision tower (all layers, as transformers runs them) and projector for `num_images` images."""
    vision = config.vision_config
    dim, tokens = vision.hidden_size, _patches(config) + 1
    patch_embedding = _linear(_patches(config), vision.num_channels * vision.patch_size**2, dim)
    layer = 4 * _linear(tokens, dim, dim) + 4 * tokens**2 * dim + 2 * _linear(tokens, dim, vision.intermediate_size)
    levels = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    features, hidden = image_tokens_per_image(config), config.text_config.hidden_size
    projector = _linear(features, levels * dim, hidden) + _linear(features, hidden, hidden)
    return num_images * (patch_embedding + vision.num_hidden_layers * layer + projector)


def predictor_flops(config: Any, image_tokens: int = 0, output_tokens: int = 0) -> int:
    """Image predictor over `image_tokens` of one row, output predictor over `output_tokens` (paper, App. A)."""
    sparsity, hidden = _sparsity(config), config.text_config.hidden_size
    dim = sparsity.predictor_dim

    def down_and_head(tokens: int) -> int:
        head = _linear(tokens, dim, dim // 2) + _linear(tokens, dim // 2, dim // 4) + _linear(tokens, dim // 4, 2)
        return _linear(tokens, hidden, dim) + head

    mlp = 2 * _linear(image_tokens, dim, sparsity.predictor_ffn_dim)
    block = 4 * _linear(image_tokens, dim, dim) + 4 * image_tokens**2 * dim + mlp
    return down_and_head(image_tokens) + sparsity.predictor_num_layers * block + down_and_head(output_tokens)


def prefill_flops(
    config: Any,
    num_text_tokens: int,
    image_keep_rate: float | None = None,
    num_images: int = 1,
    batch: int = 1,
    logits_to_keep: int = 1,
) -> int:
    """The call that reads the prompt, everything included; the head sees the last `logits_to_keep` positions.

    Args:
        config: `LlavaConfig`, or `DynamicLlavaConfig` where a rate is given.
        num_text_tokens: tokens of the prompt that are not image tokens, per row.
        image_keep_rate: fraction of image tokens kept, in (0, 1]; None means dense.
        num_images: images of each row.
        batch: rows.
        logits_to_keep: positions whose logits are computed; `generate` asks for 1.

    Raises:
        ValueError: a rate outside (0, 1], or a rate for a configuration without `sparsity`.
    """
    images = num_images * image_tokens_per_image(config)
    tokens, kept, predictors = _after_images(config, num_text_tokens, images, image_keep_rate)
    decoder = _decoder(config, (tokens, tokens), (kept, kept))
    return batch * (vision_flops(config, num_images) + decoder + predictors + _head(config, logits_to_keep))


def decode_step_flops(config: Any, dense_context: int, sparse_context: int | None = None, batch: int = 1) -> int:
    """One generated token per row on a cache, the output predictor included where `sparse_context` is given.

    Args:
        config: configuration.
        dense_context: tokens that the cache of the layers below `sparse_layer` holds before the step.
        sparse_context: tokens that the other layers hold; None means a dense model.
        batch: rows.
    """
    if sparse_context is None:
        sparse_context, predictors = dense_context, 0
    else:
        predictors = predictor_flops(config, output_tokens=1)
    decoder = _decoder(config, (1, dense_context + 1), (1, sparse_context + 1))
    return batch * (decoder + predictors + _head(config, 1))


def decode_step_flops_no_cache(
    config: Any,
    num_text_tokens: int,
    num_output_tokens: int,
    image_keep_rate: float | None = None,
    output_keep_rate: float | None = None,
    num_images: int = 1,
    batch: int = 1,
) -> int:
    """One step of `generate(use_cache=False)`: the decoder reads the whole sequence; the tower ran before the first.

    `num_output_tokens` are in the sequence already; the last of them always stays, of the others a fraction
    `output_keep_rate` is taken as kept.
    """
    images = num_images * image_tokens_per_image(config)
    tokens, kept, predictors = _after_images(config, num_text_tokens, images, image_keep_rate)
    kept_output = num_output_tokens
    if output_keep_rate is not None and num_output_tokens:
        kept_output = 1 + _kept_outputs(num_output_tokens - 1, output_keep_rate)
        predictors += predictor_flops(config, output_tokens=num_output_tokens)
    tokens, kept = tokens + num_output_tokens, kept + kept_output
    decoder = _decoder(config, (tokens, tokens), (kept, kept))
    return batch * (decoder + predictors + _head(config, 1))


def generation_flops(
    config: Any,
    num_text_tokens: int,
    output_length: int,
    image_keep_rate: float | None = None,
    output_keep_rate: float | None = None,
    use_cache: bool = True,
    num_images: int = 1,
    batch: int = 1,
) -> int:
    """A whole generation: the prompt gives the first of `output_length` tokens, one step each of the others."""
    total = prefill_flops(config, num_text_tokens, image_keep_rate, num_images, batch)
    dense, sparse = context_lengths(config, num_text_tokens, image_keep_rate, num_images)
    for fed in range(1, output_length):
        if not use_cache:
            total += decode_step_flops_no_cache(
                config, num_text_tokens, fed, image_keep_rate, output_keep_rate, num_images, batch
            )
            continue
        stored = sparse + (fed - 1 if output_keep_rate is None else _kept_outputs(fed - 1, output_keep_rate))
        total += batch * _decoder(config, (1, dense + fed), (1, stored + 1)) + batch * _head(config, 1)
        if output_keep_rate is not None:
            total += batch * predictor_flops(config, output_tokens=1)
    return total


def context_lengths(
    config: Any, num_text_tokens: int, image_keep_rate: float | None = None, num_images: int = 1
) -> tuple[int, int]:
    """Tokens of a prompt that the dense prefix and the sparse suffix hold after the prefill."""
    images = num_images * image_tokens_per_image(config)
    kept = images if image_keep_rate is None or not images else kept_image_tokens(images, image_keep_rate)
    return num_text_tokens + images, num_text_tokens + kept


def kv_cache_bytes(
    config: Any, dense_tokens: int, sparse_tokens: int | None = None, dtype_bytes: int = 2, batch: int = 1
) -> int:
    """Bytes of the keys and values of `dense_tokens` in the dense prefix and `sparse_tokens` in the sparse suffix."""
    text = config.text_config
    prefix, suffix = _split_layers(config)
    per_layer = 2 * text.num_key_value_heads * _head_dim(text) * dtype_bytes
    sparse_tokens = dense_tokens if sparse_tokens is None else sparse_tokens
    return batch * per_layer * (prefix * dense_tokens + suffix * sparse_tokens)


def _kept_outputs(number: int, output_keep_rate: float) -> int:
    return round(number * check_keep_rate("output_keep_rate", output_keep_rate))


def _after_images(config: Any, text: int, images: int, rate: float | None) -> tuple[int, int, int]:
    """Tokens in front of and behind the image predictor, and its FLOPs."""
    if rate is None or not images:
        return text + images, text + images, 0
    kept = kept_image_tokens(images, rate)
    cosines = 2 * images**2 * config.text_config.hidden_size * (_sparsity(config).image_selection == "diverse")
    # All kept is known beforehand, so that the model does not ask its predictor.
    predictors = 0 if rate == 1 else predictor_flops(config, image_tokens=images) + cosines
    return text + images, text + kept, predictors


def _decoder(config: Any, dense: tuple[int, int], sparse: tuple[int, int]) -> int:
    """All decoder layers of one row; each pair is (queries, keys) of a layer."""
    prefix, suffix = _split_layers(config)
    return prefix * _decoder_layer(config.text_config, *dense) + suffix * _decoder_layer(config.text_config, *sparse)


def _decoder_layer(text: Any, queries: int, keys: int) -> int:
    width, kv_width = text.num_attention_heads * _head_dim(text), text.num_key_value_heads * _head_dim(text)
    projections = 2 * _linear(queries, text.hidden_size, width) + 2 * _linear(queries, text.hidden_size, kv_width)
    return projections + 4 * queries * keys * width + 3 * _linear(queries, text.hidden_size, text.intermediate_size)


def _head(config: Any, positions: int) -> int:
    return _linear(positions, config.text_config.hidden_size, config.text_config.vocab_size)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _patches(config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _split_layers(config: Any) -> tuple[int, int]:
    """Layers of the dense prefix and of the sparse suffix; without `sparsity` all are prefix."""
    layers, sparsity = config.text_config.num_hidden_layers, getattr(config, "sparsity", None)
    prefix = layers if sparsity is None else sparsity.sparse_layer
    return prefix, layers - prefix


def _sparsity(config: Any) -> Any:
    sparsity = getattr(config, "sparsity", None)
    if sparsity is None:
        raise ValueError(f"A keep rate needs a DynamicLlavaConfig (its `sparsity`), got {type(config).__name__}.")
    return sparsity
