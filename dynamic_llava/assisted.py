"""Assisted decoding: drafted tokens are judged in one call, each as if it had been fed by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import CandidateGenerator

from .options import GENERATE_ARGUMENTS


class DraftsAfterPrompt(CandidateGenerator):
    """Candidates of another generator from the second pass on: what is kept of a prompt is chosen by itself."""

    def __init__(self, drafts: CandidateGenerator) -> None:
        self.drafts, self.refused = drafts, 0
        self.begun = False

    def get_candidates(self, input_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """The drafts; in the first pass they are made, as the generator's own state needs them, and refused."""
        candidates, logits = self.drafts.get_candidates(input_ids, *args, **kwargs)
        self.refused = 0 if self.begun else candidates.shape[1] - input_ids.shape[1]
        if self.begun:
            return candidates, logits
        self.begun = True
        return input_ids, None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """As the generator's own, which hears that refused drafts did not match."""
        scores = scores.expand(-1, scores.shape[1] + self.refused, -1) if self.refused else scores
        self.drafts.update_candidate_strategy(input_ids, scores, num_matches)


def check_drafts(config: GenerationConfig) -> None:
    """`ValueError` for drafts that are made on the model's own cache or by its own layers."""
    for name in ("assistant_early_exit", "use_mtp", "speculation_type"):
        if value := getattr(config, name, None):
            raise ValueError(
                f"{name}={value!r} drafts with layers of this model, which would write into its SparseCache; pass "
                "assistant_model or prompt_lookup_num_tokens."
            )


def assistant_arguments(arguments: dict[str, Any], sparse: bool) -> dict[str, Any]:
    """What an assistant's `generate` gets of the arguments of ours, where it is a sparse model or another one."""
    ours = ("num_generated",) if sparse else ("num_generated", *GENERATE_ARGUMENTS)
    return {name: value for name, value in arguments.items() if name not in ours}
