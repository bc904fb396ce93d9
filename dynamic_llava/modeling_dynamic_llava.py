"""Dynamic-LLaVA: LLaVA-1.5 on the sparse decoder, with its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .cache import SparseCache
from .call_checks import (
    check_cache,
    check_features,
    check_keywords,
    check_labels,
    check_skip_logits,
    check_sources,
    check_tensors,
    count_generated,
    embed,
    image_positions,
    instruct_tokens,
    new_columns,
    refuse_cache,
    split_arguments,
)
from .compat import slice_logits_to_keep
from .configuration_dynamic_llava import DynamicLlavaConfig
from .decisions import weighted_losses
from .functional import gather_kept, pack_left
from .generation import DynamicGenerationMixin
from .loading import DynamicLoadingMixin
from .modeling_sparse_decoder import sparse_decoder_class
from .options import SparsityOptions
from .outputs import DynamicLlavaModelOutput, DynamicLlavaOutput
from .projector import MultiModalProjector
from .registration import register_classes
from .token_masks import IGNORE_INDEX, check_position_ids, find_masks, shifted_labels

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .call_arguments import CallArguments

# Arguments of the call that concern the tower.
TOWER_ARGUMENTS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


class DynamicLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Base of the classes below: their configuration, and what their decoder can do."""

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _supports_flex_attn = False


class DynamicLlavaModel(DynamicLoadingMixin, DynamicLlavaPreTrainedModel, LlavaModel):  # type: ignore[misc]
    """Tower, projector and sparse decoder.

    Changes from `LlavaModel`:
        - the decoder is the sparse form of the stock one;
        - `forward` finds the image and output tokens and passes on what the call drops.
    """

    # Checkpoints hold the head too.
    _keys_to_ignore_on_load_unexpected = (r"(^|\.)lm_head\.",)  # type: ignore[assignment]

    def __init__(self, config: DynamicLlavaConfig) -> None:
        # Not LlavaModel's own __init__: it would build a stock decoder first, 26 GB of it for a 7B in fp32.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = sparse_decoder_class(config.text_config.model_type)(config.text_config, config.sparsity)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SparseCache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        num_generated: int | None = None,
        output_mask: Tensor | None = None,
        options: SparsityOptions | None = None,
        **kwargs,
    ) -> DynamicLlavaModelOutput:
        """As `LlavaModel.forward`; for further arguments see `DynamicLlavaForConditionalGeneration`."""
        check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        check_tensors(position_ids=position_ids, labels=labels, output_mask=output_mask)
        check_sources(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs)
        tower, kwargs = split_arguments(kwargs, TOWER_ARGUMENTS)
        if options is None:
            options, kwargs = SparsityOptions.of_call(self.config.sparsity, kwargs, training=False)
        check_keywords(kwargs, DynamicLlavaForConditionalGeneration.forward)
        if inputs_embeds is None:
            inputs_embeds = embed(self.get_input_embeddings(), self.config, input_ids)
        shape = inputs_embeds.shape[:2]
        check_cache(past_key_values, self.config, *shape)
        check_labels(labels, output_mask, past_key_values, shape)
        if self.training and self.language_model.gradient_checkpointing:
            refuse_cache(past_key_values)
            use_cache = False
        num_generated = count_generated(num_generated, shape[1], past_key_values)
        output_alone = bool(num_generated) and past_key_values is not None and past_key_values.started
        features = self._encode(pixel_values, mm_encoder_outputs, tower, inputs_embeds)
        image = None
        if features is not None or (input_ids is not None and not output_alone):
            image = image_positions(self.get_input_embeddings(), self.config, input_ids, inputs_embeds, num_generated)
            check_features(image, 0 if features is None else len(features), self.config)
        inputs_embeds, image = self._merge(inputs_embeds, image, features, labels)
        if use_cache and past_key_values is None:
            past_key_values = SparseCache(self.config)
        present = new_columns(attention_mask, past_key_values, shape, output_alone)
        if position_ids is not None and not output_alone:
            check_position_ids(position_ids, present, *shape)
        tokens = find_masks(inputs_embeds, present, image, labels, output_mask, num_generated, output_alone)
        if self.config.sparsity.instruct_predictor and not output_alone:
            tokens.instruct = instruct_tokens(self.config.sparsity, input_ids, tokens, past_key_values, options)
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache, "position_ids": position_ids}
        outputs = self.language_model(inputs_embeds, tokens, options, attention_mask, **kwargs)
        return DynamicLlavaModelOutput(image_hidden_states=features, **outputs)

    def _encode(self, pixel_values: Tensor | None, encoded: dict | None, tower: dict, like: Tensor) -> Tensor | None:
        """Projected features of all pictures of a call, `(image tokens, D)`; None where it has none."""
        if pixel_values is not None:
            encoded = {"image": self.get_image_features(pixel_values=pixel_values, return_dict=True, **tower)}
        if not encoded or encoded.get("image") is None:
            return None
        return torch.cat(list(encoded["image"].pooler_output), dim=0).to(like.device, like.dtype)

    def _merge(
        self, embeds: Tensor, image: Tensor | None, features: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`embeds (B, N, D)` with the features at the `image (B, N)` tokens, and these; None where there are none.

        With labels, a rank whose batch has no image runs tower and predictor too, on a blank picture: ZeRO-3 and FSDP
        gather the weights of a module on all ranks together, and DDP waits for a projector's gradients.
        """
        if features is not None:
            return embeds.masked_scatter(image[..., None], features), image
        if labels is None or not torch.distributed.is_initialized():
            return embeds, None
        vision = self.config.vision_config
        blank = torch.zeros(1, 3, vision.image_size, vision.image_size, device=self.device, dtype=self.dtype)
        embeds = embeds + 0.0 * self._encode(blank, None, {}, embeds).sum()
        return embeds, torch.zeros_like(embeds[..., 0], dtype=torch.bool)


class DynamicLlavaForConditionalGeneration(  # type: ignore[misc]
    DynamicGenerationMixin, DynamicLoadingMixin, DynamicLlavaPreTrainedModel, LlavaForConditionalGeneration
):
    """LLaVA-1.5 that drops image and output tokens from its sparse layers (arXiv 2412.00876).

    Changes from `LlavaForConditionalGeneration`:
        - the decoder is the sparse form of the stock one, its cache a `SparseCache`;
        - training draws keep masks and adds their budget losses;
        - `from_pretrained` also takes stock LLaVA-1.5 folders, with new predictors.

    Arguments of `forward` beside those of the stock class are `call_arguments.CallArguments`, which say what the call
    drops, and:
        labels: `(B, N)` long, -100 where ignored. The output tokens of a row are those after its last -100.
        num_generated: how many of this call's last tokens are the model's own output; None: the single token of a call
            on a cache that has started, else none. `generate` says it in each of its passes.
        logits_to_keep: compute the logits of so many last positions, 0 for all; with labels the loss is theirs.
        skip_logits: with labels, run the head on supervised tokens alone, for the same loss and no `logits`. None does
            so in training mode, where False gives them.
        output_mask: `(B, N)` bool, with labels: the output tokens, where they are not the last answer alone.
        num_items_in_batch: number of supervised tokens to divide the LM loss by; None counts this batch's.
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
        num_generated: int | None = None,
        output_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[CallArguments],
    ) -> DynamicLlavaOutput:
        """In training mode with labels, keep masks are drawn and the loss holds the budgets. Otherwise decisions are
        those of inference; with labels, one forward scores the last answer as token-by-token cached decoding would.

        Raises:
            ValueError: image tokens and images that do not match, a cache of another kind, model or batch, an
                attention mask of another length, a rate outside (0, 1], an argument that could have no effect.
            TypeError: an unknown keyword.
        """
        if labels is not None:
            if not isinstance(logits_to_keep, int):
                raise ValueError("With labels logits_to_keep is a number of last positions; leave the tensor out.")
            use_cache = False
        training = self.training and labels is not None
        skip_logits = check_skip_logits(skip_logits, labels, training)
        options, rest = SparsityOptions.of_call(self.config.sparsity, kwargs, training)
        tower = zip(TOWER_ARGUMENTS, (vision_feature_layer, vision_feature_select_strategy, image_sizes), strict=True)
        rest |= {
            "use_cache": self.config.text_config.use_cache if use_cache is None else use_cache,
            "return_dict": True,
        }
        rest |= {"labels": labels, "num_generated": num_generated, "output_mask": output_mask, "options": options}
        rest |= {"past_key_values": past_key_values, "mm_encoder_outputs": mm_encoder_outputs, **dict(tower)}
        outputs = self.model(input_ids, pixel_values, attention_mask, position_ids, inputs_embeds=inputs_embeds, **rest)
        own, stock = split_arguments(outputs, ("decision", "last_hidden_state"))
        decided = own["decision"].outputs()
        hidden = slice_logits_to_keep(own["last_hidden_state"], logits_to_keep)
        targets = None if labels is None else shifted_labels(labels[:, -logits_to_keep:])
        if skip_logits:
            hidden, targets = self._supervised(hidden, targets)
        logits = self._logits(hidden, None if skip_logits else own["decision"].computed, logits_to_keep)
        loss = lm_loss = None
        if labels is not None:
            loss = lm_loss = self._lm_loss(logits, targets, num_items_in_batch)
            for part in weighted_losses(decided, self.config.sparsity):
                loss = loss + part
        logits = None if skip_logits else logits
        return DynamicLlavaOutput(loss=loss, lm_loss=lm_loss, logits=logits, **stock, **decided)

    def _supervised(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of `hidden (B, N, D)` that have a target, as one row `(1, K, D)`, and these `(1, K)`.

        K is at least 1, so that the head runs on every rank also where a batch has no label.
        """
        targets = targets.flatten()[None]
        index, _, _ = pack_left(targets != IGNORE_INDEX)
        return gather_kept(hidden.flatten(0, 1)[None], index), targets.gather(1, index)

    def _logits(self, hidden: Tensor, computed: Tensor | None, logits_to_keep: int | Tensor) -> Tensor:
        """Logits of `hidden (B, n, D)`, the positions `logits_to_keep` of a call.

        Tokens out of `computed (B, N)` bool are 0, and share the logits of one of them.
        """
        if computed is None or hidden.shape[1] == 1 or torch.compiler.is_exporting():
            return self.lm_head(hidden)
        computed = slice_logits_to_keep(computed[..., None], logits_to_keep).flatten()
        index, _, full = pack_left(computed[None])
        if full and index.shape[1] == len(computed):
            return self.lm_head(hidden)
        rows = F.pad(hidden.flatten(0, 1)[index[0]], (0, 0, 0, 1))
        place = torch.where(computed, computed.cumsum(dim=0) - 1, len(rows) - 1)
        return self.lm_head(rows)[place].unflatten(0, hidden.shape[:2])

    def _lm_loss(self, logits: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if num_items_in_batch is None:
            # Counted here, so that a batch without an answer gives 0 and not 0 / 0.
            num_items_in_batch = (targets != IGNORE_INDEX).sum().clamp(min=1)
        return self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )


register_classes(DynamicLlavaConfig, DynamicLlavaModel, DynamicLlavaForConditionalGeneration)
# Saving them saves their code too (`carried_code`).
DynamicLlavaModel.register_for_auto_class("AutoModel")
DynamicLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
