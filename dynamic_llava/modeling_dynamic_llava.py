"""Dynamic-LLaVA: LLaVA-1.5 on the sparse decoder, with its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .cache import SparseCache
from .call_inputs import check_cache, check_features, embed, image_positions, instruct_tokens, new_columns
from .compat import slice_logits_to_keep
from .configuration_dynamic_llava import DynamicLlavaConfig
from .decisions import SparsityOptions
from .generation import DynamicGenerationMixin
from .loading import DynamicLoadingMixin
from .modeling_dynamic_llama import DynamicLlamaModel
from .outputs import DynamicLlavaModelOutput, DynamicLlavaOutput
from .projector import MultiModalProjector
from .token_spans import IGNORE_INDEX, check_position_ids, find_spans


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
        output_mask: Tensor | None = None,
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
        embedding = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = embed(embedding, self.config, input_ids)
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
            image_mask = image_positions(embedding, self.config, input_ids, inputs_embeds, prompt_length)
            check_features(image_mask, len(image_features), self.config.image_token_id)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], image_features)
        elif input_ids is not None and input_ids.shape[1] > 1:
            unfilled = image_positions(embedding, self.config, input_ids, inputs_embeds, prompt_length)
            check_features(unfilled, 0, self.config.image_token_id)
        if image_mask is None and labels is not None and torch.distributed.is_initialized():
            inputs_embeds = inputs_embeds + 0.0 * self._idle_features().to(inputs_embeds).sum()
            image_mask = torch.zeros_like(inputs_embeds[..., 0], dtype=torch.bool)
        check_cache(past_key_values, self.config, *inputs_embeds.shape[:2])
        if use_cache and past_key_values is None:
            past_key_values = SparseCache(self.config)
        present = new_columns(attention_mask, past_key_values, inputs_embeds.shape)
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
            output_mask=output_mask,
        )
        if self.config.sparsity.instruct_predictor and not spans.single_output:
            spans.instruct = instruct_tokens(self.config.sparsity, input_ids, spans, past_key_values, options)
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

    def _idle_features(self) -> Tensor:
        """Features of a blank picture: with labels, a rank whose batch has no image runs tower and predictor too.

        ZeRO-3 and FSDP gather the weights of a module on all ranks together, and DDP waits for a projector's gradients.
        """
        vision = self.config.vision_config
        blank = torch.zeros(1, 3, vision.image_size, vision.image_size, device=self.device, dtype=self.dtype)
        encoded = self.get_image_features(pixel_values=blank, return_dict=True)
        return torch.cat(list(encoded.pooler_output))


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
        elastic: bool = False,
        image_keep_rate: float | None = None,
        image_selection: str | None = None,
        image_selector: str = "predictor",
        output_selector: str = "predictor",
        output_sparsity: bool | None = None,
        output_keep_rate: float | None = None,
        prompt_length: int | None = None,
        output_mask: Tensor | None = None,
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
            elastic: in training, shift the keep logits of each row to the keep rates of this call
                (`functional.match_keep_rate`), so that one checkpoint learns to serve many rates.
            image_keep_rate: fraction of image tokens kept in this call, in (0, 1]; None takes the configuration's. In
                training the rate of the budget, as `output_keep_rate` is.
            image_selection: `topk` or `threshold` in this call.
            image_selector, output_selector: `predictor`, or the name of a rival such as `random`.
            output_sparsity: False keeps all output tokens in this call.
            output_keep_rate: drive each row's kept fraction of output tokens to this value, in (0, 1], by an online
                threshold on the keep probability (`functional.steered_keep_mask`); None leaves the learned decisions.
            prompt_length: columns from here on were generated (decoding without a cache).
            logits_to_keep: compute the logits of so many last positions, 0 for all; with labels the loss is theirs.
            output_mask: `(B, N)` bool, with labels: the output tokens, where they are not the last answer alone.
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
            if not isinstance(logits_to_keep, int):
                raise ValueError("With labels logits_to_keep is a number of last positions; leave the tensor out.")
            use_cache = False
        options = SparsityOptions.resolve(
            self.config.sparsity,
            training=training,
            gumbel_tau=gumbel_tau,
            elastic=elastic,
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
            output_mask=output_mask,
            options=options,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        decision = outputs.decision
        loss = lm_loss = None
        if labels is not None:
            loss = lm_loss = self._lm_loss(logits, labels[:, -logits_to_keep:], num_items_in_batch)
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
