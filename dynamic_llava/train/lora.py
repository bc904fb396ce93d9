"""LoRA and QLoRA: adapters on the decoder's linear layers, predictors trained in full."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..checkpoints.adapter_files import with_adapters
from ..loading import PREDICTORS
from .arguments import ModelArguments

# Of the decoder alone: the tower's attention has layers of the same names.
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


def quantization(arguments: ModelArguments) -> BitsAndBytesConfig | None:
    """How the frozen base is quantized, None where it is not.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if arguments.quantize is None:
        return None
    if not is_bitsandbytes_available():
        raise ValueError(f"quantize={arguments.quantize} needs bitsandbytes: pip install bitsandbytes.")
    if arguments.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def add_adapters(model, arguments: ModelArguments, gradient_checkpointing: bool):
    """`model` as a `PeftModel`: adapters and predictors learn, everything else is frozen."""
    from peft import LoraConfig, prepare_model_for_kbit_training

    if arguments.quantize:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    decoder = model.model.language_model
    predictors = [name.rstrip(".") for name in PREDICTORS if hasattr(decoder, name.rstrip("."))]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=TARGETS,
        modules_to_save=predictors,
    )
    return with_adapters(model, config)
