"""Which tokens are likely kept *and* unlike those chosen before them: greedy choice in rounds of all tokens at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rounds of `diverse_scores`.
ROUNDS = 3
# Cosine distances below this are taken for it: tokens that are alike rank by their keep probability, not by rounding.
LEAST_DISTANCE = 1e-3


def diverse_scores(log_keep: Tensor, states: Tensor, valid: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Scores whose highest are the tokens that a greedy choice takes first, of equal ones the first.

    The greedy choice takes, one after the other, the token with the highest keep probability x smallest cosine distance
    to those taken. What a token was worth when it was taken never exceeds what those before it were worth, so that it
    is its keep probability x its smallest distance to the tokens of higher worth. Each round computes this for all
    tokens from the worths of the round before, the first from the keep probabilities. After `r` rounds at least the
    first `r` tokens are those of the greedy choice, and after N all; in practice a few rounds give nearly all.

    Cost for one picture of LLaVA-1.5-7B (N = 576, D = 4096), of which 115 tokens stay: 2 N^2 D = 2.7 GFLOP for the
    distances and some 2 M for each round, against 2.9 TFLOP of the sparse prefill.

    Args:
        log_keep: `(B, N)` float, log-probability of keeping.
        states: `(B, N, D)` float, what tokens are compared by.
        valid: `(B, N)` bool; nothing depends on other entries.
        rounds: at least 1.

    Returns:
        `(B, N)` float32, logarithms of the worths; -inf where not valid.
    """
    states = F.normalize(states.float(), dim=-1)
    distance = (1 - states @ states.transpose(1, 2)).clamp(min=LEAST_DISTANCE).log()
    log_keep = log_keep.float().masked_fill(~valid, float("-inf"))
    places = torch.arange(log_keep.shape[1], device=log_keep.device)
    earlier = places[:, None] < places
    worth = log_keep
    for _ in range(rounds):
        one, other = worth[:, :, None], worth[:, None, :]
        # Of two that are worth the same the earlier one goes first.
        ahead = torch.where(earlier, one >= other, one > other)
        # The first of all is at the largest distance there is.
        worth = log_keep + torch.where(ahead, distance, math.log(2)).amin(dim=1)
    return worth
