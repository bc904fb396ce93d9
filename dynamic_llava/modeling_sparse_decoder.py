"""The decoder: dense prefix -> decide -> sparse suffix, on the stock decoder of any family in `DECODERS`."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import SparseCache, seen_tokens
from .compat import Stock
from .decisions import Decision, chosen_from, decide, draw, gate_estimator, split_computed
from .functional import gather_kept, pack_left, scale_gradient, scatter_kept
from .masked_attention import backend_mask, causal_visible, dense_mask, gated_implementation, training_mask
from .masked_attention_kernels import choose_kernel
from .masked_softmax import visible_columns
from .model_kinds import DECODERS
from .options import SparsityOptions
from .outputs import SparseDecoderOutput
from .predictors import ImagePredictor, OutputPredictor, PredictorLinear
from .sparsity_config import SparsityConfig
from .token_masks import TokenMasks, count_positions

# Position ids `(B or 1, N)` of a call's tokens, and their rotary embeddings.
Positions = tuple[Tensor, tuple[Tensor, Tensor]]


class SparseDecoderMixin(Stock):
    """A stock decoder whose layers from `sparse_layer` on see kept tokens only.

    Stands in front of a stock decoder with `layers`, `norm`, `rotary_emb`; its layers take `position_embeddings`.
    Changes from the stock decoder:
        - a predictor for each kind of tokens between layer `sparse_layer - 1` and `sparse_layer`;
        - in training the sparse layers attend by MaskedSoftmax, in inference they run on the kept tokens;
        - the cache is a `SparseCache`.
    """

    def __init__(self, config: PretrainedConfig, sparsity: SparsityConfig) -> None:
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
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PredictorLinear):
            module.draw(next(name for name, other in self.named_modules() if other is module))
        else:
            super()._init_weights(module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        tokens: TokenMasks,
        options: SparsityOptions,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SparseCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SparseDecoderOutput:
        """Run the decoder.

        Args:
            inputs_embeds: `(B, N, D)`, image features merged in.
            tokens: the tokens of this call by kind.
            options: what is dropped in this call.
            attention_mask: `(B, seen + N)`, 0 at padding; None means no padding.
            position_ids: `(B or 1, N)`; None counts the tokens of the mask, or those seen.
            past_key_values: cache to continue and to write.

        Returns:
            `last_hidden_state (B, N, D)`, 0 at tokens that the sparse layers did not compute, and the decision.
        """
        seen = seen_tokens(past_key_values)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, seen)
        causal_mask = dense_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        kwargs["past_key_values"], kwargs["use_cache"] = past_key_values, use_cache
        dense = self.layers[: self.sparsity.sparse_layer]
        rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden = self._run(dense, inputs_embeds, causal_mask, rotary, position_ids=position_ids, **kwargs)
        self.sparse_config._attn_implementation = gated_implementation(self.config._attn_implementation)
        if options.training:
            decision = draw(self, hidden, tokens, options)
            gates = decision.gates(torch.ones(hidden.shape[:2], device=hidden.device))
            kwargs["gate_estimator"] = gate_estimator(self.sparsity, tokens)
            if self.sparsity.sparse_training == "pruned":
                hidden = self._pruned(hidden, gates, decision, tokens, position_ids, **kwargs)
            else:
                hidden = self._gated(hidden, gates, tokens.present, rotary, **kwargs)
        else:
            masks, positions = (causal_mask, attention_mask), (position_ids, rotary)
            hidden, decision = self._infer(inputs_embeds, hidden, tokens, options, positions, masks, seen, **kwargs)
        return SparseDecoderOutput(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values, decision=decision
        )

    def _run(self, layers, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor], **kwargs) -> Tensor:
        """The sparse layers see positions as rotary embeddings only: flash attention takes gaps in `position_ids` for
        the borders of packed sequences, and kept tokens have gaps."""
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **kwargs)
        return hidden

    def _packed_rotary(self, hidden: Tensor, position_ids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embeddings of the tokens at `index (B, K)` of a call."""
        positions = position_ids.expand(len(index), -1).gather(1, index)
        return self.rotary_emb(hidden, position_ids=positions)

    def _run_sparse(
        self,
        hidden: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        valid: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        mask = backend_mask(visible, hidden.shape[1], self.config._attn_implementation, hidden, valid)
        return self._run(self.layers[self.sparsity.sparse_layer :], hidden, mask, rotary, **kwargs)

    def _gated(self, hidden: Tensor, gates: Tensor, present: Tensor, rotary: tuple[Tensor, Tensor], **kwargs) -> Tensor:
        """The sparse layers in training: every token is computed, dropped ones are seen by themselves alone."""
        mask = training_mask(present, self.config._attn_implementation)
        sparse = self.layers[self.sparsity.sparse_layer :]
        if self.config._attn_implementation != "eager":
            kwargs["masked_kernel"] = choose_kernel(self.sparsity.masked_kernel, hidden, sparse[0].self_attn.head_dim)
        return self._run(sparse, hidden, mask, rotary, keep_mask=gates, **kwargs)

    def _pruned(
        self, hidden: Tensor, gates: Tensor, decision: Decision, tokens: TokenMasks, position_ids: Tensor, **kwargs
    ) -> Tensor:
        """The sparse layers in training on the tokens that stay; dropped output tokens stay, with a next token to say.

        NOTE(paper): an option of this project. The paper masks. Nobody sees a dropped token, so that the gradient of
        its gate does not depend on which others stay: probes at a rate, weighed by its inverse, give on average what
        masking gives.
        """
        computed = tokens.present.clone()
        for mask in (decision.keep_mask("image"), decision.keep_mask("instruct")):
            if mask is not None:
                computed &= mask.detach() > 0.5
        if tokens.supervised is not None:
            # What stands in front of an answer says its first token, also where it is a dropped image token.
            computed |= tokens.supervised
        rate = self.sparsity.pruned_probe_rate
        if rate > 0:
            probes = tokens.present & ~computed & (torch.rand(computed.shape, device=computed.device) < rate)
            gates = torch.where(probes, scale_gradient(gates, 1 / rate), gates)
            computed |= probes
        decision.computed = computed
        index, valid, _ = pack_left(computed)
        rotary = self._packed_rotary(hidden, position_ids, index)
        if isinstance(kwargs["gate_estimator"], Tensor):
            kwargs["gate_estimator"] = kwargs["gate_estimator"].gather(1, index)
        packed = self._gated(gather_kept(hidden, index), gather_kept(gates, index), valid, rotary, **kwargs)
        return scatter_kept(packed, index, valid, torch.zeros_like(hidden))

    def _infer(
        self,
        embedded: Tensor,
        hidden: Tensor,
        tokens: TokenMasks,
        options: SparsityOptions,
        positions: Positions,
        masks: tuple[Tensor | None, Tensor | None],
        seen: int | Tensor,
        **kwargs,
    ) -> tuple[Tensor, Decision]:
        """The sparse layers in inference, and what was decided; `masks` are the causal and the attention mask."""
        cache: SparseCache | None = kwargs["past_key_values"]
        state = None
        if cache is not None:
            cache.table.begin(options.output_rule.state_size)
            state = cache.table.state
        decision = decide(self, hidden, embedded, tokens, options, state)
        if tokens.output_alone:
            hidden = self._step(hidden, decision, positions[1], masks[1], seen, **kwargs)
        else:
            hidden = self._kept(hidden, decision, tokens, positions, masks, seen, **kwargs)
        if cache is not None:
            cache.table.record(decision, tokens, seen)
        return hidden, decision

    def _step(
        self,
        hidden: Tensor,
        decision: Decision,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        seen: int | Tensor,
        **kwargs,
    ) -> Tensor:
        """Generated tokens on the cache: each sees what is stored, those in front of it that are kept, and itself."""
        table, number = kwargs["past_key_values"].table, hidden.shape[1]
        keep = decision.keep_mask("output")
        if number == 1:
            visible = table.plan_one(seen, attention_mask)
        else:
            keep = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if keep is None else keep
            columns = torch.arange(number, device=hidden.device) + seen
            visible = table.plan_drafts(keep, columns[None], attention_mask)
        hidden = self._run_sparse(hidden, visible, rotary, **kwargs)
        table.commit(1 if keep is None else keep.sum(dim=1) if number > 1 else keep[:, 0], most=number)
        return hidden

    def _kept(
        self,
        hidden: Tensor,
        decision: Decision,
        tokens: TokenMasks,
        positions: Positions,
        masks: tuple[Tensor | None, Tensor | None],
        seen: int | Tensor,
        **kwargs,
    ) -> Tensor:
        """Several tokens per row: the sparse layers run on those that stay, at their original positions."""
        cache: SparseCache | None = kwargs["past_key_values"]
        computed, dropped = split_computed(decision, tokens)
        started = cache is not None and cache.started
        if computed is None and not started:
            return self._all_kept(hidden, tokens, positions[1], masks[0], **kwargs)
        decision.computed = tokens.present if computed is None else computed
        index, valid, full = pack_left(decision.computed)
        packed = gather_kept(hidden, index)
        rotary = self._packed_rotary(hidden, positions[0], index)
        # In scoring dropped tokens that are supervised stay as queries that no other token sees.
        hiding = dropped is not None and tokens.supervised is not None
        hiding = hiding and (torch.compiler.is_exporting() or bool(dropped.any()))
        visible, causal_over = None, None if started or hiding else valid
        if cache is not None:
            present = masks[1] if started else None
            left = hidden.shape[1] - index.shape[1]
            visible = cache.table.plan(valid, index + seen, padded=False, present=present, dropped=left)
            if full and not started:
                visible = None
        elif hiding:
            visible = visible_columns(~dropped.gather(1, index), causal_visible(valid))
        elif not full:
            visible = causal_visible(valid) | torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
        output = self._run_sparse(packed, visible, rotary, valid=causal_over, **kwargs)
        if cache is not None:
            # On a cache the last token of a row is the only dropped one that was computed; it is not stored.
            unstored = 0 if dropped is None else dropped.sum(dim=-1)
            cache.table.commit(valid.sum(dim=-1) - unstored, most=index.shape[1])
            if computed is not None and cache.max_length is None:
                cache.table.history.note_drops(seen, chosen_from(decision, tokens))
        return scatter_kept(output, index, valid, torch.zeros_like(hidden))

    def _all_kept(
        self, hidden: Tensor, tokens: TokenMasks, rotary: tuple[Tensor, Tensor], causal_mask: Tensor | None, **kwargs
    ) -> Tensor:
        """Nothing to drop in the first call: exactly the stock decoder, padding included."""
        cache: SparseCache | None = kwargs["past_key_values"]
        number = hidden.shape[1]
        if cache is not None:
            columns = torch.arange(number, device=hidden.device).expand(hidden.shape[:2])
            cache.table.plan(tokens.present, columns, padded=tokens.has_padding)
        if causal_mask is not None:
            # A cache of fixed size has columns that are not written yet.
            causal_mask = causal_mask[..., :number]
        hidden = self._run(self.layers[self.sparsity.sparse_layer :], hidden, causal_mask, rotary, **kwargs)
        if cache is not None:
            cache.table.commit(number, most=number)
        return hidden


@cache
def sparse_decoder_class(model_type: str) -> type:
    """The sparse form of the stock decoder of a family, made once.

    Args:
        model_type: of the decoder's configuration, one of `DECODERS`.
    """
    stock = getattr(transformers, DECODERS[model_type])
    name = f"Sparse{stock.__name__}"
    made = type(name, (SparseDecoderMixin, stock), {"__module__": __name__, "__doc__": SparseDecoderMixin.__doc__})
    # Where pickle looks for it.
    globals()[name] = made
    return made
