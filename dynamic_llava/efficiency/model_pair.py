"""Stock LLaVA and ours on the same random weights, and what they are fed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from ..configuration_dynamic_llava import DynamicLlavaConfig
from ..modeling_dynamic_llava import DynamicLlavaForConditionalGeneration
from .flops import image_tokens_per_image
from .shapes import stock_config

CALIBRATION_TOKENS = 256


@dataclass
class Pair:
    """Both models; ours shares the storage of every stock weight."""

    config: DynamicLlavaConfig
    dense: LlavaForConditionalGeneration
    ours: DynamicLlavaForConditionalGeneration

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.dense.device


def build_model(config, dtype: torch.dtype, device: torch.device, attention: str):
    """A model of `config` (stock or ours) with random weights, in inference mode."""
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def build_pair(config: DynamicLlavaConfig, dtype: torch.dtype, device: torch.device, attention: str) -> Pair:
    """Both models on the same weights, our output predictor brought to the configuration's keep rate."""
    dense = build_model(stock_config(config), dtype, device, attention)
    ours = build_model(config, dtype, device, attention)
    # At the usual 0.02 the context outweighs the token, and one decision would hold for all tokens of a context.
    dense.get_input_embeddings().weight.data.normal_()
    weights = dict(dense.named_parameters())
    for name, parameter in ours.named_parameters():
        if name in weights:
            parameter.data = weights[name].data
    calibrate(ours, config.sparsity.output_keep_rate)
    return Pair(config, dense, ours)


def calibrate(model: DynamicLlavaForConditionalGeneration, output_keep_rate: float) -> None:
    """Shift the output predictor's last bias so that about `output_keep_rate` of random tokens are kept.

    An untrained predictor keeps an arbitrary share. Its decisions stay its own, token by token, at its own cost; the
    rate that the timed steps really had is reported beside their times.
    """
    prompt = prompt_inputs(model.config, text_tokens=16, batch=1, device=model.device, dtype=model.dtype)
    answer = random_tokens(model.config, 1, CALIBRATION_TOKENS, model.device)
    prompt["input_ids"] = torch.cat([prompt["input_ids"], answer], dim=1)
    with torch.no_grad():
        logits = model(**prompt, num_generated=CALIBRATION_TOKENS, use_cache=False, logits_to_keep=1).output_keep_logits
        margin = (logits[..., 0] - logits[..., 1]).float().flatten()
        head = model.model.language_model.output_predictor.head[-1]
        head.bias[0] -= margin.quantile(1 - output_keep_rate).to(head.bias.dtype)


def random_tokens(config: DynamicLlavaConfig, batch: int, length: int, device: torch.device) -> Tensor:
    """`(batch, length)` long, never the image token."""
    tokens = torch.randint(0, config.text_config.vocab_size - 1, (batch, length), device=device)
    return tokens + (tokens >= config.image_token_id)


def prompt_inputs(
    config: DynamicLlavaConfig, text_tokens: int, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`input_ids` with one image after the first text token, and its noise as `pixel_values`."""
    text = random_tokens(config, batch, text_tokens, device)
    image = torch.full((batch, image_tokens_per_image(config)), config.image_token_id, device=device)
    vision = config.vision_config
    size = (batch, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": torch.cat([text[:, :1], image, text[:, 1:]], dim=1),
        "pixel_values": torch.randn(size, device=device, dtype=dtype),
    }
