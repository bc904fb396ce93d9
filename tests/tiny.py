"""Tiny random models and batches for the equality tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration

IMAGE_TOKEN = 99
IMAGE_TOKENS = 16
PAD = 0
# What a small decoder of a family takes beside the sizes.
DECODER_VALUES = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 8}}


def tiny_config(
    attention: str = "sdpa",
    kv_heads: int = 2,
    width: int = 32,
    projector_layers: int = 2,
    decoder: str = "llama",
    **sparsity,
) -> DynamicLlavaConfig:
    config = DynamicLlavaConfig(
        text_config=AutoConfig.for_model(
            decoder,
            **DECODER_VALUES.get(decoder, {}),
            vocab_size=100,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
            projection_dim=32,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        projector_layers=projector_layers,
        sparsity={
            "predictor_dim": 32,
            "predictor_num_heads": 4,
            "predictor_ffn_dim": 64,
            "image_keep_rate": 0.4,
            "min_output_length": 4,
            **sparsity,
        },
    )
    config._attn_implementation = attention
    return config


def tiny_model(seed: int = 0, **kwargs) -> DynamicLlavaForConditionalGeneration:
    """A random model whose keep decisions differ between tokens."""
    torch.manual_seed(seed)
    model = DynamicLlavaForConditionalGeneration(tiny_config(**kwargs)).eval()
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    with torch.no_grad():
        for predictor in (model.model.language_model.image_predictor, model.model.language_model.output_predictor):
            for parameter in predictor.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.orthogonal_(parameter, gain=2.0)
    return model


def stock_model(model: DynamicLlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Stock LLaVA with the weights of `model`."""
    values = model.config.to_dict()
    values.pop("sparsity")
    config = LlavaForConditionalGeneration.config_class(**{**values, "model_type": "llava"})
    config._attn_implementation = model.config._attn_implementation
    stock = LlavaForConditionalGeneration(config).eval()
    state = {key: value for key, value in model.state_dict().items() if "_predictor." not in key}
    stock.load_state_dict(state)
    stock.generation_config.suppress_tokens = [IMAGE_TOKEN]
    return stock


def image_run(number: int = 1) -> list[int]:
    return [IMAGE_TOKEN] * (IMAGE_TOKENS * number)


def words(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 98, (length,), generator=generator).tolist()


def pictures(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[list[int]], side: str, fill: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded to one length, and their attention mask."""
    width = max(map(len, rows))
    padded, mask = [], []
    for row in rows:
        gap = width - len(row)
        padded.append([fill] * gap + row if side == "left" else row + [fill] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return torch.tensor(padded), torch.tensor(mask)


def mixed_prompts() -> tuple[list[list[int]], list[torch.Tensor | None]]:
    """One image, two images in different turns, text only, an image at the end of a longer prompt."""
    rows = [
        [1, *words(2, 1), *image_run(), *words(4, 2)],
        [1, *image_run(), *words(3, 3), *image_run(), *words(2, 4)],
        [1, *words(7, 5)],
        [1, *words(9, 6), *image_run(), *words(1, 7)],
    ]
    return rows, [pictures(1, 1), pictures(2, 2), None, pictures(1, 3)]


def batch_of(rows, images, side: str) -> dict[str, torch.Tensor]:
    input_ids, mask = pad_rows(rows, side)
    batch = {"input_ids": input_ids, "attention_mask": mask}
    found = [image for image in images if image is not None]
    if found:
        batch["pixel_values"] = torch.cat(found)
    return batch
