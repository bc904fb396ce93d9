"""How `generate` works on the sparse decoder: its cache, and decoding without one."""

from __future__ import annotations

from typing import Any

from .cache import SparseCache

CACHES = (None, "dynamic")


class DynamicGenerationMixin:
    """Changes from `GenerationMixin`: a `SparseCache`; without a cache, output columns are told from the prompt."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args, **kwargs) -> None:
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            if not isinstance(cache, SparseCache):
                raise ValueError(
                    f"past_key_values is a {type(cache).__name__}, which would store dropped tokens; "
                    "pass dynamic_llava.SparseCache(model.config), or nothing."
                )
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            if generation_config.cache_implementation not in CACHES:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not one that drops tokens; "
                    "leave it out to decode on a SparseCache."
                )
            model_kwargs["past_key_values"] = SparseCache(self.config)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        if not model_kwargs.get("use_cache", True) and "prompt_length" not in model_kwargs:
            # After the first step, and before the mask grows: what it covers is the prompt.
            model_kwargs["prompt_length"] = model_kwargs["attention_mask"].shape[1]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
