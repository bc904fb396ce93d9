"""How `generate` works on the sparse decoder: its cache, what counts as generated, right padding, statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.utils import ModelOutput

from .assisted import DraftsAfterPrompt, assistant_arguments, check_drafts
from .cache import SparseCache, require_sparse_cache
from .call_arguments import GENERATE_ARGUMENTS, TRAINING_ARGUMENTS, configured_arguments, given_arguments
from .compat import Stock
from .generation_record import GenerationRecord, RecordedStops
from .options import SparsityOptions
from .padding import move_padding_left, repeat_by_row
from .statistics import SparsityStatistics

BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
CACHES = (None, "dynamic", "static", "offloaded")
OF_STOPPING = ("tokenizer", "assistant_tokenizer")
# Those that say how it learns or is scored; `generate` counts for itself what was generated.
NOT_GENERATING = ("labels", "output_mask", "num_items_in_batch", "skip_logits", "num_generated", *TRAINING_ARGUMENTS)


class DynamicGenerationMixin(Stock):
    """Changes from `GenerationMixin`:
    - the cache is a `SparseCache`; every pass is told how many of its tokens were generated;
    - right-padded prompts are moved to the right first, so that every row goes on from its last token;
    - `return_sparsity=True` adds `sparsity` (`SparsityStatistics`) to the output.
    """

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args,
        return_sparsity: bool = False,
        **kwargs,
    ):
        """As `GenerationMixin.generate`, which see; also takes the per-call arguments of `forward`, which may stand in
        a `GenerationConfig` too (`call_arguments.configured_arguments`).

        Args:
            return_sparsity: return a `ModelOutput` whose `sparsity` says what was kept; needs the cache.

        Raises:
            ValueError: an argument of `forward` that could have no effect, a cache that would not drop tokens, a row
                without a token to go on from.
        """
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids are the same argument; pass one of them.")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if not isinstance(return_sparsity, bool):
            raise ValueError(f"return_sparsity is True or False, got {return_sparsity!r}.")
        idle = [name for name in NOT_GENERATING if kwargs.get(name) is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)} of forward: generate makes no use of it. Leave it out.")
        if kwargs.get("past_key_values") is not None:
            require_sparse_cache(kwargs["past_key_values"])
        move_padding_left(kwargs)
        # Counted up behind every pass by `_update_model_kwargs_for_generation`.
        kwargs["num_generated"] = 0
        call = (generation_config, logits_processor, stopping_criteria, *args)
        if not return_sparsity:
            return super().generate(None, *call, **kwargs)
        prompt_mask, record = kwargs.get("attention_mask"), GenerationRecord()
        criteria = StoppingCriteriaList([*(stopping_criteria or ()), record])
        kwargs["return_dict_in_generate"] = True
        output: ModelOutput = super().generate(None, generation_config, logits_processor, criteria, *args, **kwargs)
        cache = output.get("past_key_values")
        if not isinstance(cache, SparseCache):
            raise ValueError("return_sparsity=True reads the SparseCache; leave out use_cache=False.")
        output["sparsity"] = SparsityStatistics.of_generation(cache, record, output.get("beam_indices"), prompt_mask)
        return output

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """As `GenerationMixin`; the per-call arguments are the model's, in whichever of the two they stand."""
        explicit = given_arguments(kwargs, GENERATE_ARGUMENTS)
        rest = {name: value for name, value in kwargs.items() if name not in GENERATE_ARGUMENTS}
        config, model_kwargs = super()._prepare_generation_config(generation_config, **rest)
        call = {**configured_arguments(config), **explicit}
        SparsityOptions.resolve(self.config.sparsity, training=False, call=call)
        for name in GENERATE_ARGUMENTS:
            config.__dict__.pop(name, None)
        return config, {**model_kwargs, **call}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As `GenerationMixin`, which knows the named arguments of `forward` alone."""
        known = set(GENERATE_ARGUMENTS)
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in known})

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: `generate_batch`, `cache_implementation="paged"` and `transformers serve` all begin here."""
        raise ValueError(
            "Continuous batching (generate_batch, cache_implementation='paged') keeps a paged cache, which would store "
            "dropped tokens; call generate with a padded batch."
        )

    def _prepare_cache_for_generation(
        self,
        generation_config,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            check_drafts(generation_config, started=getattr(model_kwargs.get("past_key_values"), "started", False))
        self._check_chunks(generation_config, model_kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.use_cache is not False:
            if generation_config.cache_implementation not in CACHES:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not one that drops tokens; "
                    "leave it out to decode on a SparseCache, or pass 'static' for one of fixed size, 'offloaded' for "
                    "one in host memory."
                )
            fixed = generation_config.cache_implementation == "static"
            length = max(max_cache_length, generation_config.max_cache_len or 0) if fixed else None
            offload = generation_config.cache_implementation == "offloaded"
            model_kwargs["past_key_values"] = SparseCache(self.config, max_length=length, offload=offload)
        if model_kwargs.get("past_key_values") is not None:
            # The rows of returned beams are no longer in the cache when the search ends.
            model_kwargs["past_key_values"].table.history.log_rows(generation_mode in BEAMS)

    def _check_chunks(self, generation_config, model_kwargs: dict[str, Any]) -> None:
        pictures = any(model_kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs"))
        if generation_config.prefill_chunk_size is not None and pictures:
            options = SparsityOptions.resolve(self.config.sparsity, training=False, call=_per_call(model_kwargs))
            if "instruct" in options.kinds or not options.keeps_all_images:
                raise ValueError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size}: what stays of a prompt with images is "
                    "chosen over the whole of it. Leave it out, or keep all image tokens (image_keep_rate=1.0)."
                )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor | None, *args, inputs_embeds: Tensor | None = None, num_generated: int = 0, **kwargs
    ) -> dict[str, Any]:
        # Handed on to every pass, though only the stopping criteria read them.
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_STOPPING}
        if kwargs.get("past_key_values") is not None and not kwargs["past_key_values"].started:
            # transformers lets no assistant see the pictures.
            kwargs["is_first_iteration"] = True
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        fed = next(model_inputs[name] for name in ("inputs_embeds", "input_ids") if model_inputs.get(name) is not None)
        cache = model_inputs.get("past_key_values")
        # On a cache all that is fed behind the prompt, drafts included. Where one token is fed a constant, so that a
        # compiled step is compiled once.
        behind = num_generated if cache is None else num_generated and fed.shape[1]
        model_inputs["num_generated"] = min(behind, fed.shape[1])
        growing = isinstance(cache, SparseCache) and cache.max_length is None
        if num_generated and growing and cache.rows == 1 and model_inputs.get("attention_mask") is None:
            # `generate` leaves out a mask that hides nothing. One row needs none in the sparse layers either, where its
            # end is known; `generate` has just read whether it goes on, so that this waits for nothing.
            cache.table.tighten()
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args, num_new_tokens: int = 1, **kwargs
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        return {**model_kwargs, "num_generated": model_kwargs.get("num_generated", 0) + num_new_tokens}

    def _get_candidate_generator(self, *, input_ids: Tensor, model_kwargs: dict[str, Any], **kwargs):
        sparse = isinstance(kwargs.get("assistant_model"), DynamicGenerationMixin)
        given, make = dict(model_kwargs), super()._get_candidate_generator

        def drafts(prompt: Tensor):
            told = assistant_arguments(given, prompt.shape[1], sparse)
            return make(input_ids=prompt, model_kwargs=told, **kwargs)

        return DraftsAfterPrompt(drafts)

    def _get_logits_processor(self, *args, model_kwargs: dict[str, Any] | None = None, **kwargs):
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = _GuidancePass(processor.model, _per_call(model_kwargs))
                move_padding_left(processor.unconditional_context)
        return processors

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        return RecordedStops.of(super()._get_stopping_criteria(*args, **kwargs))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ) -> tuple[Tensor, dict[str, Any]]:
        cache = model_kwargs.get("past_key_values")
        if expand_size > 1 and isinstance(cache, SparseCache) and cache.started and cache.rows == len(input_ids):
            cache.batch_repeat_interleave(expand_size)
        # transformers before 5.19 repeats picture by picture (5.17 pixels, 5.18 features): beams of a row with several
        # pictures would each see another choice of them.
        pixel_values, encoded = model_kwargs.get("pixel_values"), model_kwargs.get("mm_encoder_outputs") or {}
        if expand_size > 1 and input_ids is not None:
            model_kwargs |= {"pixel_values": None, "mm_encoder_outputs": None}
        expanded, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if expand_size > 1 and input_ids is not None:
            tokens = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
            if pixel_values is not None:
                model_kwargs["pixel_values"] = repeat_by_row(pixel_values, tokens, expand_size)
            if "image" in encoded:
                features = encoded["image"].pooler_output
                encoded["image"].pooler_output = repeat_by_row(features, tokens, expand_size)
                model_kwargs["mm_encoder_outputs"] = encoded
        return expanded, model_kwargs

    def create_masks_for_generate(
        self, attention_mask: Tensor | None, past_key_values: SparseCache, **_
    ) -> Tensor | None:
        """The 2D mask of a cache of fixed size, `(B, max_length)`: its shape does not change from step to step."""
        if attention_mask is None:
            return None
        past_key_values.check_room(attention_mask.shape[1])
        return torch.nn.functional.pad(attention_mask, (0, past_key_values.max_length - attention_mask.shape[1]))


def _per_call(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What says what the call drops; it counts in every pass of a `generate`."""
    return given_arguments(kwargs, GENERATE_ARGUMENTS)


class _GuidancePass:
    """The model as classifier-free guidance calls it for the other prompt: with the per-call arguments, and told what
    was generated."""

    def __init__(self, model, per_call: dict[str, Any]) -> None:
        self.model, self.per_call, self.generated = model, per_call, 0

    def __call__(self, input_ids: Tensor, **kwargs) -> ModelOutput:
        number = min(self.generated, input_ids.shape[1])
        self.generated += 1
        return self.model(input_ids, num_generated=number, **kwargs, **self.per_call)
