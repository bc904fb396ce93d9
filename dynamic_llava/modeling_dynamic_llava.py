"""Dynamic-LLaVA: LLaVA-1.5 on the sparse decoder, with its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .cache import SparseCache, require_sparse_cache
from .configuration_dynamic_llava import DynamicLlavaConfig
from .decisions import SparsityOptions
from .generation import DynamicGenerationMixin
from .loading import DynamicLoadingMixin
from .modeling_dynamic_llama import DynamicLlamaModel, seen_tokens
from .outputs import DynamicLlavaModelOutput, DynamicLlavaOutput
from .projector import MultiModalProjector
from .token_spans import (
    IGNORE_INDEX,
    TokenSpans,
    check_position_ids,
    find_spans,
    generated_token_mask,
    image_token_mask,
    last_user_turn_mask,
)


class DynamicLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Base of the classes below: their configuration, and what their decoder can do."""

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _supports_flex_attn = False


class DynamicLlavaModel(DynamicLlavaPreTrainedModel, LlavaModel):
    """Tower, projector and sparse decoder.

    Changes from `LlavaModel`:
        - the decoder is a `DynamicLlamaModel`;
        - `forward` finds the image and output tokens and passes on what the call drops.
    """

    def __init__(self, config: DynamicLlavaConfig) -> None:
        # Not LlavaModel's own __init__: it would build a stock decoder first, 26 GB of it for a 7B in fp32.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = DynamicLlamaModel(config.text_config, config.sparsity)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        prompt_length: int | None = None,
        options: SparsityOptions | None = None,
        **kwargs,
    ) -> DynamicLlavaModelOutput:
        """As `LlavaModel.forward`; for `labels`, `prompt_length` see `DynamicLlavaForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Pass pixel_values or mm_encoder_outputs, not both.")
        if options is None:
            options = SparsityOptions.resolve(self.config.sparsity, training=False)
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        if pixel_values is not None:
            encoded = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
            mm_encoder_outputs = {"image": encoded}
        image_mask = image_features = None
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            image_features = torch.cat(list(mm_encoder_outputs["image"].pooler_output), dim=0)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = self._image_mask(input_ids, inputs_embeds, prompt_length)
            self._check_features(image_mask, len(image_features))
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], image_features)
        elif input_ids is not None and input_ids.shape[1] > 1:
            self._check_features(self._image_mask(input_ids, inputs_embeds, prompt_length), 0)
        self._check_cache(past_key_values, *inputs_embeds.shape[:2])
        if use_cache and past_key_values is None:
            past_key_values = SparseCache(self.config)
        present = self._new_columns(attention_mask, past_key_values, inputs_embeds.shape)
        if position_ids is not None and inputs_embeds.shape[1] > 1:
            check_position_ids(position_ids, present, *inputs_embeds.shape[:2])
        spans = find_spans(
            inputs_embeds.shape[:2],
            inputs_embeds.device,
            attention_mask=present,
            single_output=inputs_embeds.shape[1] == 1 and past_key_values is not None and past_key_values.started,
            image=image_mask,
            labels=labels,
            prompt_length=prompt_length,
        )
        if self.config.sparsity.instruct_predictor and not spans.single_output:
            spans.instruct = self._instruct_tokens(input_ids, spans, past_key_values, options)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            spans=spans,
            options=options,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return DynamicLlavaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            decision=outputs.decision,
        )

    def _new_columns(self, mask: Tensor | None, cache: SparseCache | None, shape: torch.Size) -> Tensor | None:
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
        if length == 1:
            return None  # A single token is never padding; looking would copy from the device in every step.
        start = int(seen_tokens(cache))
        return mask[:, start : start + length]

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings `(B, N, D)`; the image token need not be in the vocabulary, its place is filled anyway."""
        embedding = self.get_input_embeddings()
        if not 0 <= self.config.image_token_id < self.config.text_config.vocab_size:
            input_ids = input_ids.masked_fill(image_token_mask(input_ids, self.config.image_token_id), 0)
        return embedding(input_ids)

    def _instruct_tokens(
        self, input_ids: Tensor | None, spans: TokenSpans, cache: SparseCache | None, options: SparsityOptions
    ) -> Tensor | None:
        """`(B, N)` bool: text of the last user turn of rows with images; None on a cache that has started."""
        if spans.image is None or (cache is not None and cache.started):
            return None
        if input_ids is None:
            raise ValueError("The instruct predictor finds the user's turn in input_ids; pass them, not inputs_embeds.")
        output = torch.zeros_like(spans.present) if spans.output is None else spans.output
        sparsity = self.config.sparsity
        tokens = last_user_turn_mask(
            input_ids, spans.image, output | ~spans.present, sparsity.user_marker, sparsity.assistant_marker
        )
        if not options.training:
            # The published code judges the last one in training only.
            tokens = tokens & tokens.roll(-1, dims=1)
        return tokens

    def _image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, prompt_length: int | None) -> Tensor:
        """`(B, N)` bool: where image features go. A generated token is never an image, whatever its id."""
        if input_ids is None:
            if not 0 <= self.config.image_token_id < self.config.text_config.vocab_size:
                raise ValueError(
                    f"The image token {self.config.image_token_id} is outside the vocabulary of "
                    f"{self.config.text_config.vocab_size}, so that inputs_embeds cannot hold it; pass input_ids."
                )
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
        else:
            mask = image_token_mask(input_ids, self.config.image_token_id)
        if prompt_length is not None:
            mask = mask & ~generated_token_mask(mask.shape, prompt_length, mask.device)
        return mask

    def _check_features(self, image_mask: Tensor, features: int) -> None:
        """`ValueError` unless there is one image token for each of `features` image features."""
        number = int(image_mask.sum())
        if number == features:
            return
        by_row = image_mask.sum(dim=-1).tolist()
        if not features:
            raise ValueError(
                f"input_ids hold {number} image tokens (id {self.config.image_token_id}; by row {by_row}) but no "
                "pixel_values were passed; pass the processor's pixel_values, or remove <image> from the prompt."
            )
        raise ValueError(
            f"{number} image tokens (id {self.config.image_token_id}; by row {by_row}) for {features} image features; "
            "pass the images of exactly these rows in the order of their tokens, and none for text-only rows."
        )

    def _check_cache(self, cache: Cache | None, batch_size: int, length: int) -> None:
        """`ValueError` when `cache` is not a `SparseCache` for this model and call."""
        if cache is None:
            return
        require_sparse_cache(cache)
        cache.check_call(self.config, batch_size, length)


class DynamicLlavaForConditionalGeneration(
    DynamicGenerationMixin, DynamicLoadingMixin, DynamicLlavaPreTrainedModel, LlavaForConditionalGeneration
):
    """LLaVA-1.5 that drops image and output tokens from its sparse layers (arXiv 2412.00876).

    Changes from `LlavaForConditionalGeneration`:
        - the decoder is a `DynamicLlamaModel`, its cache a `SparseCache`;
        - training draws keep masks and adds their budget losses; see `forward`;
        - `from_pretrained` also takes stock LLaVA-1.5 folders, with new predictors.
    """

    def __init__(self, config: DynamicLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = DynamicLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        gumbel_tau: float = 1.0,
        image_keep_rate: float | None = None,
        image_selection: str | None = None,
        image_selector: str = "predictor",
        output_selector: str = "predictor",
        output_sparsity: bool | None = None,
        output_keep_rate: float | None = None,
        prompt_length: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> DynamicLlavaOutput:
        """Run the model.

        In training mode with labels, keep masks are drawn and the loss holds the budgets. Otherwise decisions are those
        of inference; with labels, one forward scores the last answer as token-by-token cached decoding would.

        Args:
            input_ids: `(B, N)` long, each image as its run of image tokens.
            pixel_values: `(num_images, 3, H, W)`, images in the order of their tokens.
            attention_mask: `(B, seen + N)`, 0 at padding on either side.
            labels: `(B, N)` long, -100 where ignored. The output tokens of a row are those after its last -100.
            gumbel_tau: temperature of the draw in training.
            image_keep_rate: fraction of image tokens kept in this call, in (0, 1]; None takes the configuration's.
            image_selection: `topk` or `threshold` in this call.
            image_selector, output_selector: `predictor`, or the name of a rival such as `random`.
            output_sparsity: False keeps all output tokens in this call.
            output_keep_rate: drive each row's kept fraction of output tokens to this value, in (0, 1], by an online
                threshold on the keep probability (`functional.steered_keep_mask`); None leaves the learned decisions.
            prompt_length: columns from here on were generated (decoding without a cache).
            num_items_in_batch: number of supervised tokens to divide the LM loss by; None counts this batch's.

        Returns:
            `DynamicLlavaOutput`.

        Raises:
            ValueError: image tokens and images that do not match, a cache of another kind, model or batch, an
                attention mask of another length, a rate outside (0, 1].
        """
        training = self.training and labels is not None
        if labels is not None:
            if past_key_values is not None:
                raise ValueError("labels are scored in one forward without a cache; pass labels or past_key_values.")
            use_cache = False
        options = SparsityOptions.resolve(
            self.config.sparsity,
            training=training,
            gumbel_tau=gumbel_tau,
            image_keep_rate=image_keep_rate,
            image_selection=image_selection,
            image_selector=image_selector,
            output_selector=output_selector,
            output_sparsity=output_sparsity,
            output_keep_rate=output_keep_rate,
        )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=self.config.text_config.use_cache if use_cache is None else use_cache,
            labels=labels,
            prompt_length=prompt_length,
            options=options,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        decision = outputs.decision
        loss = lm_loss = None
        if labels is not None:
            loss = lm_loss = self._lm_loss(logits, labels, num_items_in_batch)
            for budget in (decision.image_budget_loss, decision.output_budget_loss, decision.instruct_budget_loss):
                if budget is not None:
                    loss = loss + self.config.sparsity.budget_weight * budget
        return DynamicLlavaOutput(
            loss=loss,
            lm_loss=lm_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_budget_loss=decision.image_budget_loss,
            output_budget_loss=decision.output_budget_loss,
            instruct_budget_loss=decision.instruct_budget_loss,
            image_keep_mask=decision.image_keep_mask,
            output_keep_mask=decision.output_keep_mask,
            instruct_keep_mask=decision.instruct_keep_mask,
            image_keep_logits=decision.image_keep_logits,
            output_keep_logits=decision.output_keep_logits,
        )

    def _lm_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if num_items_in_batch is None:
            # Counted here, so that a batch without an answer gives 0 and not 0 / 0.
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
