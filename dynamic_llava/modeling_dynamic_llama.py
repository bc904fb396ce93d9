"""The decoder: dense prefix -> decide -> sparse suffix."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import backend_mask, causal_candidates, gated_implementation, lowest_score, training_mask
from .cache import SparseCache, seen_tokens
from .configuration_dynamic_llava import SparsityConfig
from .decisions import Decision, decide, draw
from .functional import gather_kept, pack_left, scale_gradient, scatter_kept, visible_columns
from .masked_kernels import choose_kernel
from .options import SparsityOptions
from .outputs import DynamicLlamaOutput
from .predictors import ImagePredictor, OutputPredictor, PredictorLinear
from .token_spans import TokenSpans


class DynamicLlamaModel(LlamaModel):
    """Llama decoder whose layers from `sparse_layer` on see kept tokens only.

    Changes from `LlamaModel`:
        - `image_predictor` and `output_predictor` between layer `sparse_layer - 1` and `sparse_layer`;
        - in training the sparse layers attend by MaskedSoftmax, in inference they run on the kept tokens;
        - the cache is a `SparseCache`.
    """

    def __init__(self, config: LlamaConfig, sparsity: SparsityConfig) -> None:
        super().__init__(config)
        sparsity.check_decoder(config.num_hidden_layers)
        self.sparsity = sparsity
        self.image_predictor = ImagePredictor(config.hidden_size, sparsity)
        self.output_predictor = OutputPredictor(config.hidden_size, sparsity)
        if sparsity.instruct_predictor:
            self.instruct_predictor = OutputPredictor(config.hidden_size, sparsity)
        # Attention reads its back end from its config; the sparse layers have one of their own that names the gated
        # form of the decoder's back end. Set once and for all modes, so that a recomputed layer does the same.
        self.sparse_config = copy.copy(config)
        for layer in self.layers[sparsity.sparse_layer :]:
            layer.self_attn.config = self.sparse_config
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module) -> None:
        if isinstance(module, PredictorLinear):
            module.draw(next(name for name, other in self.named_modules() if other is module))
        else:
            super()._init_weights(module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        spans: TokenSpans,
        options: SparsityOptions,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SparseCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> DynamicLlamaOutput:
        """Run the decoder.

        Args:
            inputs_embeds: `(B, N, D)`, image features merged in.
            spans: image and output tokens of this call.
            options: what is dropped in this call.
            attention_mask: `(B, seen + N)`, 0 at padding; None means no padding.
            position_ids: `(B or 1, N)`; None counts the tokens of the mask, or those seen.
            past_key_values: cache to continue and to write.

        Returns:
            `last_hidden_state (B, N, D)`, 0 at tokens that the sparse layers did not compute, and the decision.
        """
        seen = seen_tokens(past_key_values)
        if position_ids is None:
            position_ids = _position_ids(inputs_embeds, attention_mask, seen)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            layer_idx=0,
        )
        if causal_mask is not None and causal_mask.dtype == torch.float64:
            causal_mask = causal_mask.clamp(min=lowest_score(causal_mask.dtype))
        kwargs["past_key_values"], kwargs["use_cache"] = past_key_values, use_cache
        dense = self.layers[: self.sparsity.sparse_layer]
        hidden = self._run(dense, inputs_embeds, causal_mask, position_ids, position_ids=position_ids, **kwargs)
        self.sparse_config._attn_implementation = gated_implementation(self.config._attn_implementation)
        if options.training:
            decision = draw(self, hidden, spans, options)
            gates = decision.keep_mask(torch.ones(hidden.shape[:2], device=hidden.device))
            if self.sparsity.sparse_training == "pruned":
                hidden = self._pruned(hidden, gates, decision, spans, position_ids, **kwargs)
            else:
                hidden = self._gated(hidden, gates, spans.present, position_ids, **kwargs)
        else:
            steering = past_key_values.table.steering if past_key_values is not None else None
            decision = decide(self, hidden, spans, options, steering)
            if spans.single_output:
                hidden = self._step(hidden, decision, position_ids, attention_mask, seen, **kwargs)
            else:
                masks = (causal_mask, attention_mask)
                hidden = self._kept(hidden, decision, spans, position_ids, masks, seen, **kwargs)
            if past_key_values is not None:
                past_key_values.table.record(decision, spans, seen)
        return DynamicLlamaOutput(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values, decision=decision
        )

    def _run(self, layers, hidden: Tensor, mask: Tensor | None, positions: Tensor, **kwargs) -> Tensor:
        """The layers see positions as rotary embeddings only: flash attention takes gaps in `position_ids` for the
        borders of packed sequences, and kept tokens have gaps."""
        position_embeddings = self.rotary_emb(hidden, position_ids=positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=position_embeddings, **kwargs)
        return hidden

    def _run_sparse(
        self, hidden: Tensor, visible: Tensor | None, position_ids: Tensor, valid: Tensor | None = None, **kwargs
    ) -> Tensor:
        mask = backend_mask(visible, hidden.shape[1], self.config._attn_implementation, hidden, valid)
        return self._run(self.layers[self.sparsity.sparse_layer :], hidden, mask, position_ids, **kwargs)

    def _gated(self, hidden: Tensor, gates: Tensor, present: Tensor, position_ids: Tensor, **kwargs) -> Tensor:
        """The sparse layers in training: every token is computed, dropped ones are seen by themselves alone."""
        mask = training_mask(present, self.config._attn_implementation)
        sparse = self.layers[self.sparsity.sparse_layer :]
        if self.config._attn_implementation != "eager":
            kwargs["masked_kernel"] = choose_kernel(self.sparsity.masked_kernel, hidden, sparse[0].self_attn.head_dim)
        estimator = self.sparsity.gate_estimator
        return self._run(sparse, hidden, mask, position_ids, keep_mask=gates, gate_estimator=estimator, **kwargs)

    def _pruned(
        self, hidden: Tensor, gates: Tensor, decision: Decision, spans: TokenSpans, position_ids: Tensor, **kwargs
    ) -> Tensor:
        """The sparse layers in training on the tokens that stay; dropped output tokens stay, with a next token to say.

        NOTE(paper): an option of this project. The paper masks. Nobody sees a dropped token, so that the gradient of
        its gate does not depend on which others stay: probes at a rate, weighed by its inverse, give on average what
        masking gives.
        """
        stay = spans.present.clone()
        for mask in (decision.image_keep_mask, decision.instruct_keep_mask):
            if mask is not None:
                stay &= mask.detach() > 0.5
        if spans.asked is not None:
            # What stands in front of an answer says its first token, also where it is a dropped image token.
            stay |= spans.asked
        rate = self.sparsity.pruned_probe_rate
        if rate > 0:
            probes = spans.present & ~stay & (torch.rand(stay.shape, device=stay.device) < rate)
            gates = torch.where(probes, scale_gradient(gates, 1 / rate), gates)
            stay |= probes
        index, valid, _ = pack_left(stay)
        positions = position_ids.expand(hidden.shape[:2]).gather(1, index)
        packed = self._gated(gather_kept(hidden, index), gather_kept(gates, index), valid, positions, **kwargs)
        return scatter_kept(packed, index, valid, torch.zeros_like(hidden))

    def _step(
        self,
        hidden: Tensor,
        decision: Decision,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        seen: int | Tensor,
        **kwargs,
    ) -> Tensor:
        """One generated token per row on the cache: it sees the slots and itself, and stays only where it is kept."""
        table = kwargs["past_key_values"].table
        one = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        columns = torch.zeros_like(one, dtype=torch.long) + seen
        visible = table.plan(one, columns, padded=False, present=attention_mask)
        hidden = self._run_sparse(hidden, visible, position_ids, **kwargs)
        keep = one if decision.output_keep_mask is None else decision.output_keep_mask
        table.commit(keep[:, 0].long(), most=1)
        return hidden

    def _kept(
        self,
        hidden: Tensor,
        decision: Decision,
        spans: TokenSpans,
        position_ids: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        seen: int | Tensor,
        **kwargs,
    ) -> Tensor:
        """Several tokens per row: the sparse layers run on those that stay, at their original positions."""
        cache: SparseCache | None = kwargs["past_key_values"]
        causal_mask, attention_mask = masks
        stay, dropped = _split(decision, spans)
        started = cache is not None and cache.started
        if stay is None and not started:
            # Nothing to drop: exactly the stock decoder, padding included.
            if cache is not None:
                columns = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
                cache.table.plan(spans.present, columns, padded=spans.has_padding)
            sparse = self.layers[self.sparsity.sparse_layer :]
            if causal_mask is not None:
                # A cache of fixed size has columns that are not written yet.
                causal_mask = causal_mask[..., : hidden.shape[1]]
            output = self._run(sparse, hidden, causal_mask, position_ids, **kwargs)
            if cache is not None:
                cache.table.commit_all(hidden.shape[1])
            return output
        index, valid, full = pack_left(spans.present if stay is None else stay)
        packed = gather_kept(hidden, index)
        positions = position_ids.expand(hidden.shape[:2]).gather(1, index)
        # In scoring dropped tokens that are asked stay as queries that no other token sees.
        hiding = dropped is not None and spans.asked is not None
        hiding = hiding and (torch.compiler.is_exporting() or bool(dropped.any()))
        visible, causal_over = None, None if started or hiding else valid
        if cache is not None:
            present = attention_mask if started else None
            visible = cache.table.plan(valid, index + seen, padded=False, present=present)
            if full and not started:
                visible = None
        elif hiding:
            visible = visible_columns(~dropped.gather(1, index), causal_candidates(valid))
        elif not full:
            visible = causal_candidates(valid) | torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
        output = self._run_sparse(packed, visible, positions, valid=causal_over, **kwargs)
        if cache is not None:
            # On a cache the last token of a row is the only dropped one that was computed; it is not stored.
            unstored = 0 if dropped is None else dropped.sum(dim=-1)
            cache.table.commit(valid.sum(dim=-1) - unstored, most=index.shape[1])
            if stay is not None and cache.max_length is None:
                cache.table.note_drops(seen, _chosen_from(decision, spans))
        return scatter_kept(output, index, valid, torch.zeros_like(hidden))


def _split(decision: Decision, spans: TokenSpans) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens the sparse layers compute, and which of these are dropped, `(B, N)` bool; None where none is judged.

    Dropped tokens leave, but for those whose logits count: the last of a row, and with labels all that are asked. These
    see the kept tokens and themselves, and no other token sees them.
    """
    masks = (decision.image_keep_mask, decision.instruct_keep_mask, decision.output_keep_mask)
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return None, None
    keep = torch.stack(masks).all(dim=0)
    stay = keep | (spans.present.flip(-1).cumsum(dim=-1).flip(-1) == 1)
    if spans.asked is not None:
        stay = stay | spans.asked
    stay = stay & spans.present
    return stay, stay & ~keep


def _chosen_from(decision: Decision, spans: TokenSpans) -> Tensor:
    """`(B, N)` bool: the tokens on which it depended which ones left the sequence."""
    if decision.instruct_keep_mask is not None:
        # The user's turn is told by the marker behind it.
        return torch.ones_like(spans.present)
    return torch.zeros_like(spans.present) if spans.image is None else spans.image


def _position_ids(inputs_embeds: Tensor, attention_mask: Tensor | None, seen: int | Tensor) -> Tensor:
    """Number of present tokens in front of each token, `(B or 1, N)`."""
    columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
    if attention_mask is None:
        return columns[None]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, columns]
