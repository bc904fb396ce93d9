"""Dynamic-LLaVA on stock transformers: public names, and registration with the Auto classes."""

from .errors import end_quietly_on_interrupt, starts_a_command

# isort: split
if starts_a_command():
    # What follows takes seconds.
    end_quietly_on_interrupt()

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaProcessor,
)

from . import selection
from .cache import SparseCache
from .configuration_dynamic_llava import DynamicLlavaConfig, SparsityConfig
from .loading import register_key_renaming
from .modeling_dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaModel

AutoConfig.register(DynamicLlavaConfig.model_type, DynamicLlavaConfig, exist_ok=True)
AutoModel.register(DynamicLlavaConfig, DynamicLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(DynamicLlavaConfig, LlavaProcessor, exist_ok=True)
register_key_renaming(
    DynamicLlavaConfig.model_type, DynamicLlavaForConditionalGeneration.__name__, DynamicLlavaModel.__name__
)

__all__ = [
    "DynamicLlavaConfig",
    "DynamicLlavaForConditionalGeneration",
    "DynamicLlavaModel",
    "SparseCache",
    "SparsityConfig",
    "selection",
]
