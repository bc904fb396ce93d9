"""Dynamic-LLaVA: LLaVA-1.5 on the sparse decoder, with its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from . import call_inputs
from .cache import SparseCache
from .compat import slice_logits_to_keep
from .configuration_dynamic_llava import DynamicLlavaConfig
from .generation import DynamicGenerationMixin
from .loading import DynamicLoadingMixin
from .modeling_dynamic_llama import DynamicLlamaModel
from .options import SparsityOptions
from .outputs import DynamicLlavaModelOutput, DynamicLlavaOutput
from .projector import MultiModalProjector
from .token_spans import IGNORE_INDEX, check_position_ids, find_spans


class DynamicLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Base of the classes below: their configuration, and what their decoder can do."""

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _supports_flex_attn = False


class DynamicLlavaModel(DynamicLoadingMixin, DynamicLlavaPreTrainedModel, LlavaModel):
    """Tower, projector and sparse decoder.

    Changes from `LlavaModel`:
        - the decoder is a `DynamicLlamaModel`;
        - `forward` finds the image and output tokens and passes on what the call drops.
    """

    # Checkpoints hold the head too.
    _keys_to_ignore_on_load_unexpected = (r"(^|\.)lm_head\.",)

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
        num_generated: int | None = None,
        output_mask: Tensor | None = None,
        options: SparsityOptions | None = None,
        **kwargs,
    ) -> DynamicLlavaModelOutput:
        """As `LlavaModel.forward`; for `labels`, `num_generated` see `DynamicLlavaForConditionalGeneration.forward`."""
        call_inputs.check_keywords(kwargs, DynamicLlavaForConditionalGeneration.forward)
        call_inputs.check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        call_inputs.check_tensors(position_ids=position_ids, labels=labels, output_mask=output_mask)
        call_inputs.check_sources(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs)
        sparsity = self.config.sparsity
        options = options or SparsityOptions.resolve(sparsity, training=False)
        embedding = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = call_inputs.embed(embedding, self.config, input_ids)
        if pixel_values is not None:
            encoded = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
            mm_encoder_outputs = {"image": encoded}
        call_inputs.check_cache(past_key_values, self.config, *inputs_embeds.shape[:2])
        call_inputs.check_labels(labels, output_mask, past_key_values, inputs_embeds.shape[:2])
        num_generated = call_inputs.count_generated(num_generated, inputs_embeds.shape[1], past_key_values)
        single_output = bool(num_generated) and past_key_values is not None and past_key_values.started
        image_mask = image_features = None
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            image_features = torch.cat(list(mm_encoder_outputs["image"].pooler_output), dim=0)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        if image_features is not None or (input_ids is not None and not single_output):
            found = call_inputs.image_positions(embedding, self.config, input_ids, inputs_embeds, num_generated)
            call_inputs.check_features(found, 0 if image_features is None else len(image_features), self.config)
        if image_features is not None:
            image_mask = found
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], image_features)
        if image_mask is None and labels is not None and torch.distributed.is_initialized():
            inputs_embeds = inputs_embeds + 0.0 * self._idle_features().to(inputs_embeds).sum()
            image_mask = torch.zeros_like(inputs_embeds[..., 0], dtype=torch.bool)
        if self.training and self.language_model.gradient_checkpointing:
            call_inputs.refuse_cache(past_key_values)
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = SparseCache(self.config)
        present = call_inputs.new_columns(attention_mask, past_key_values, inputs_embeds.shape, single_output)
        if position_ids is not None and not single_output:
            check_position_ids(position_ids, present, *inputs_embeds.shape[:2])
        spans = find_spans(
            inputs_embeds.shape[:2],
            inputs_embeds.device,
            attention_mask=present,
            single_output=single_output,
            image=image_mask,
            labels=labels,
            num_generated=num_generated,
            output_mask=output_mask,
        )
        if sparsity.instruct_predictor and not single_output:
            spans.instruct = call_inputs.instruct_tokens(sparsity, input_ids, spans, past_key_values, options)
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
        num_generated: int | None = None,
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
            num_generated: how many of this call's last tokens are the model's own output; None: the single token of a
                call on a cache that has started, else none. `generate` says it in each of its passes.
            logits_to_keep: compute the logits of so many last positions, 0 for all; with labels the loss is theirs.
            output_mask: `(B, N)` bool, with labels: the output tokens, where they are not the last answer alone.
            num_items_in_batch: number of supervised tokens to divide the LM loss by; None counts this batch's.

        Returns:
            `DynamicLlavaOutput`.

        Raises:
            ValueError: image tokens and images that do not match, a cache of another kind, model or batch, an
                attention mask of another length, a rate outside (0, 1], an argument that could have no effect.
            TypeError: an unknown keyword.
        """
        training = self.training and labels is not None
        if labels is not None:
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
            num_generated=num_generated,
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
