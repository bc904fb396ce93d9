"""Assisted decoding: drafted tokens are judged in one call, each as if it had been fed by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import CandidateGenerator

from .call_arguments import GENERATE_ARGUMENTS


class DraftsAfterPrompt(CandidateGenerator):
    """Candidates of another generator from the second pass on: what is kept of a prompt is chosen by itself."""

    def __init__(self, make: Callable[[Tensor], CandidateGenerator]) -> None:
        """`make` gives the generator for a prompt, the first generated token included."""
        self.make = make
        self.begun = False
        self.drafts: CandidateGenerator | None = None

    def get_candidates(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """`input_ids` with drafts behind them, none in the first pass, and the logits of these where there are any."""
        if not self.begun:
            self.begun = True
            return input_ids, None
        self.drafts = self.drafts or self.make(input_ids)
        return self.drafts.get_candidates(input_ids, *args, **kwargs)

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        """As the generator's own."""
        if self.drafts is not None:
            self.drafts.update_candidate_strategy(input_ids, scores, num_matches)


def check_drafts(config: GenerationConfig, started: bool) -> None:
    """`ValueError` for drafts that are made by the model's own layers, or behind a cache that has `started`."""
    if started:
        raise ValueError(
            "Assisted decoding feeds the whole prompt again, which the SparseCache holds already; leave out "
            "past_key_values, or assistant_model and prompt_lookup_num_tokens."
        )
    for name in ("assistant_early_exit", "use_mtp", "speculation_type"):
        if value := getattr(config, name, None):
            raise ValueError(
                f"{name}={value!r} drafts with layers of this model, which would write into its SparseCache; pass "
                "assistant_model or prompt_lookup_num_tokens."
            )


def assistant_arguments(arguments: dict[str, Any], length: int, sparse: bool) -> dict[str, Any]:
    """What an assistant's `generate` gets of the arguments of ours, for a prompt of `length` tokens.

    Args:
        arguments: of this model.
        length: the first generated token included.
        sparse: whether the assistant is a sparse model too.
    """
    # Positions are told by the mask.
    ours = ("num_generated", "position_ids", *(() if sparse else GENERATE_ARGUMENTS))
    taken = {name: value for name, value in arguments.items() if name not in ours}
    if (mask := taken.get("attention_mask")) is not None:
        taken["attention_mask"] = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
    return taken
