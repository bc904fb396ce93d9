"""`diversity` against its definition in loops: kept sets, ties, rows, padding."""

from __future__ import annotations

import pytest
import torch

from dynamic_llava.diversity import ROUNDS, diverse_scores
from dynamic_llava.functional import keep_counts, keep_scores, top_k_keep_mask

from .naive import naive_distances, naive_greedy, naive_rounds


def problem(seed: int, tokens: int, width: int = 8, objects: int = 4):
    """Tokens of a few objects: states near one direction each, keep logits that go with the object."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(objects, width, generator=generator)
    which = torch.randint(0, objects, (tokens,), generator=generator)
    states = centres[which] + 0.3 * torch.randn(tokens, width, generator=generator)
    logits = torch.randn(objects, 2, generator=generator)[which] + 0.5 * torch.randn(tokens, 2, generator=generator)
    return keep_scores(logits), states


def chosen(log_keep, states, keep: int, rounds: int = ROUNDS) -> set[int]:
    valid = torch.ones(1, len(log_keep), dtype=torch.bool)
    scores = diverse_scores(log_keep[None], states[None], valid, rounds)
    return set(top_k_keep_mask(scores, valid, torch.tensor([keep]))[0].nonzero().flatten().tolist())


@pytest.mark.parametrize("rounds", [1, 2, ROUNDS, 5])
@pytest.mark.parametrize("seed", range(8))
def test_rounds_are_those_of_the_loops(seed, rounds):
    log_keep, states = problem(seed, tokens=30)
    order = naive_rounds(log_keep.tolist(), naive_distances(states), rounds)
    for keep in (1, 3, 9, 30):
        assert chosen(log_keep, states, keep, rounds) == set(order[:keep])


@pytest.mark.parametrize("seed", range(8))
def test_enough_rounds_are_the_greedy_choice(seed):
    log_keep, states = problem(seed, tokens=24)
    greedy = naive_greedy(log_keep.tolist(), naive_distances(states), keep=24)
    for keep in range(1, 25):
        assert chosen(log_keep, states, keep, rounds=24) == set(greedy[:keep])
        # So many of the first are right whatever the tokens are.
        assert set(greedy[: min(keep, ROUNDS)]) <= chosen(log_keep, states, keep)


def test_of_equal_tokens_the_first_are_taken():
    """Four directions, each three times, all as likely: distances and worths are exactly equal."""
    states = torch.eye(4).repeat(3, 1)
    log_keep = torch.full((12,), -0.5)
    distance = naive_distances(states)
    for keep in range(1, 13):
        expected = set(naive_greedy(log_keep.tolist(), distance, keep))
        assert chosen(log_keep, states, keep, rounds=12) == expected == set(range(keep))
        assert chosen(log_keep, states, keep) == set(range(keep))


def test_novelty_comes_before_a_little_more_probability():
    """Three tokens of one object and one of another: the other goes second."""
    states = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [0.0, 1.0]])
    log_keep = torch.tensor([0.9, 0.8, 0.7, 0.5]).log()
    assert chosen(log_keep, states, 2) == {0, 3}
    assert chosen(log_keep, states, 3) == {0, 2, 3} or chosen(log_keep, states, 3) == {0, 1, 3}
    # Where the other is hardly ever kept, it is not.
    assert chosen(torch.tensor([0.9, 0.8, 0.7, 1e-9]).log(), states, 3) == {0, 1, 2}


@pytest.mark.parametrize("filling", [0.0, 1e4, float("nan")])
def test_a_row_is_chosen_from_by_itself(filling):
    parts = [problem(seed, tokens) for seed, tokens in ((1, 20), (2, 7), (3, 1))]
    log_keep, states = torch.full((4, 20), filling), torch.full((4, 20, 8), filling)
    valid = torch.zeros(4, 20, dtype=torch.bool)
    for row, (own_keep, own_states) in enumerate(parts):
        number = len(own_keep)
        log_keep[row, :number], states[row, :number], valid[row, :number] = own_keep, own_states, True
    keep = keep_counts(valid, 0.4)
    mask = top_k_keep_mask(diverse_scores(log_keep, states, valid), valid, keep)
    for row, (own_keep, own_states) in enumerate(parts):
        assert set(mask[row].nonzero().flatten().tolist()) == chosen(own_keep, own_states, int(keep[row]))
    assert not mask[3].any()


def test_16_bit_states_and_huge_ones_are_taken():
    log_keep, states = problem(4, tokens=16)
    exact = states.bfloat16()
    assert chosen(log_keep, exact, 5) == chosen(log_keep, exact.double() * 1e6, 5)
