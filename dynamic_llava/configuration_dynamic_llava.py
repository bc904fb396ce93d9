"""`DynamicLlavaConfig`: LLaVA's configuration with a `sparsity` section."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import LlavaConfig

from .carried_code import installed_config, note_code
from .config_checks import MOST_LAYERS, check_decoder, check_model_values, config_errors
from .model_kinds import check_kind, is_published
from .reading import read_json_object
from .registration import register_names
from .sparsity_config import SparsityConfig


class DynamicLlavaConfig(LlavaConfig):
    """`LlavaConfig` with a `sparsity` section.

    Changes from `LlavaConfig`:
        - `sparsity`: `SparsityConfig` or its dict; None means the paper's values.
        - `projector_layers`: linear layers of the projector (1 is LLaVA's `linear`, N its `mlpNx_gelu`).
        - `published`: entries of a published `config.json` that nothing here reads, kept for the way back.
        - `from_pretrained` also takes a stock LLaVA-1.5 folder.
    """

    model_type = "dynamic_llava"

    if TYPE_CHECKING:
        # What they are once the configuration is made.
        sparsity: SparsityConfig
        text_config: Any
        vision_config: Any
    else:
        sparsity: dict | SparsityConfig | None = None
    projector_layers: int = 2
    published: dict | None = None

    def __post_init__(self, **kwargs):
        if type(self.projector_layers) is not int or not 1 <= self.projector_layers <= MOST_LAYERS:
            raise ValueError(f"projector_layers must be from 1 to {MOST_LAYERS}, got {self.projector_layers!r}.")
        for name in ("sparsity", "published"):
            if not isinstance(getattr(self, name), SparsityConfig | dict | None):
                raise ValueError(f"{name} must be an object, got {getattr(self, name)!r}.")
        if not isinstance(self.sparsity, SparsityConfig):
            self.sparsity = SparsityConfig.from_dict(self.sparsity or {})
        super().__post_init__(**kwargs)
        check_decoder(self.text_config)
        self.text_config.tie_word_embeddings = self.tie_word_embeddings
        check_model_values(self)
        self.sparsity.check_decoder(self.text_config.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        output = super().to_dict()
        output["sparsity"] = asdict(self.sparsity)
        return output

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As `LlavaConfig.save_pretrained`; `auto_map` names the code that is saved with it."""
        note_code(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `LlavaConfig.get_config_dict`; a stock LLaVA's counts as ours, which transformers would warn of.

        Raises:
            ValueError: a model of another kind, which is named.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        check_kind(config_dict, str(args[0] if args else "the configuration"))
        if config_dict["model_type"] == LlavaConfig.model_type and not is_published(config_dict):
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `LlavaConfig.from_dict`; a stock LLaVA configuration is taken with the paper's sparsity.

        `sparsity`, a `SparsityConfig` or a dict of some of its keys, goes on top of what `config_dict` holds.
        """
        if is_published(config_dict):
            raise ValueError(
                f"This is a checkpoint in LLaVA's own layout (model_type {config_dict['model_type']!r}); load it with "
                "dynamic_llava.checkpoints.load_published, or convert it once with "
                "python -m dynamic_llava.checkpoints convert SRC DST --to ours."
            )
        changes = kwargs.pop("sparsity", None)
        stored = config_dict.get("sparsity") or {}
        if isinstance(changes, SparsityConfig):
            # What was trained is told by the checkpoint.
            learned = {name: stored[name] for name in ("untrained", "output_offsets") if name in stored}
            config_dict = {**config_dict, "sparsity": {**asdict(changes), "untrained": [], **learned}}
        elif changes:
            config_dict = {**config_dict, "sparsity": {**stored, **changes}}
        with config_errors("config.json"):
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `LlavaConfig.from_pretrained`; a file that describes no model is a `ValueError` that names it.

        Code that came with a checkpoint leaves the checkpoint to the installed package, where there is one.
        """
        installed = installed_config(cls)
        if installed is not cls:
            return installed.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        with config_errors(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict[str, Any]:
        return cls._decode_special_floats(read_json_object(json_file, "configuration"))


DynamicLlavaConfig.register_for_auto_class()
register_names(DynamicLlavaConfig.model_type, "DynamicLlavaForConditionalGeneration")
