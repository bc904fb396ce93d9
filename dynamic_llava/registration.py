"""What transformers has to know of the classes of this model, also where no package was imported but a checkpoint's own
copy of its code."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

# The server of transformers tells what a model takes by the names in these.
NAMES_BY_MODALITY = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def register_names(model_type: str, model: str) -> None:
    """Tell the server of transformers what the model class of that name takes: it asks when it has seen no more than
    the configuration."""
    for name in NAMES_BY_MODALITY:
        getattr(modeling_auto, name)[model_type] = model


def register_classes(config: type[PretrainedConfig], base: type[PreTrainedModel], model: type[PreTrainedModel]) -> None:
    """Register the configuration, the headless model and the model with the Auto classes, under the configuration's
    `model_type`, and give them LLaVA's renaming of old checkpoint keys, which subclasses elsewhere do not inherit."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)
    AutoModelForMultimodalLM.register(config, model, exist_ok=True)
    AutoProcessor.register(config, LlavaProcessor, exist_ok=True)
    for name, stock in ((config.model_type, "llava"), (model.__name__, "llava"), (base.__name__, "LlavaModel")):
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
