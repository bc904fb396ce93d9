"""`image_selection="diverse"`: the score against its definition in loops, and the model in every mode."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynamic_llava.diversity import diverse_scores
from dynamic_llava.functional import keep_counts, keep_scores, top_k_keep_mask
from dynamic_llava.rules import Diverse, Evidence, keep_of

from .naive import naive_diversity, naive_generate
from .test_static_cache import NoHostCopies
from .tiny import batch_of, mixed_prompts, tiny_model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def problem(seed: int, tokens: int, width: int = 8, objects: int = 4):
    """Tokens of a few objects: states near one direction each, keep logits that go with the object."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(objects, width, generator=generator)
    which = torch.randint(0, objects, (tokens,), generator=generator)
    states = centres[which] + 0.3 * torch.randn(tokens, width, generator=generator)
    logits = torch.randn(objects, 2, generator=generator)[which] + 0.5 * torch.randn(tokens, 2, generator=generator)
    return keep_scores(logits), states


def chosen(log_keep, states, keep: int) -> set[int]:
    valid = torch.ones(1, len(log_keep), dtype=torch.bool)
    scores = diverse_scores(log_keep[None], states[None], valid)
    return set(top_k_keep_mask(scores, valid, torch.tensor([keep]))[0].nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", range(10))
def test_kept_sets_are_those_of_the_loops(seed):
    log_keep, states = problem(seed, tokens=40)
    order = naive_diversity(log_keep.tolist(), states)
    for keep in (1, 2, 5, 13, 39, 40):
        assert chosen(log_keep, states, keep) == set(order[:keep])


def test_of_equal_tokens_the_first_are_taken():
    """Four directions, each three times, all as likely: likeness is exactly 0 or 1."""
    states = torch.eye(4).repeat(3, 1)
    log_keep = torch.full((12,), -0.5)
    order = naive_diversity(log_keep.tolist(), states)
    assert order == list(range(12))
    for keep in range(1, 13):
        assert chosen(log_keep, states, keep) == set(order[:keep])
    # The same in another order: one direction first.
    states = torch.eye(4).repeat_interleave(3, dim=0)
    assert naive_diversity(log_keep.tolist(), states)[:4] == [0, 3, 6, 9]
    for keep in range(1, 13):
        assert chosen(log_keep, states, keep) == set(naive_diversity(log_keep.tolist(), states)[:keep])


def test_tokens_that_are_alike_rank_by_probability_and_not_by_rounding():
    states = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(6, 64)
    states = states * (1 + 1e-6 * torch.arange(6)[:, None])
    log_keep = torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1, 0.8]).log()
    for keep, expected in enumerate([{1}, {1, 5}, {1, 5, 3}, {1, 5, 3, 2}], start=1):
        assert chosen(log_keep, states, keep) == expected


def test_novelty_goes_before_a_little_more_probability():
    """Three tokens of one object and one of another: the other goes second."""
    states = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.4], [0.0, 1.0]])
    log_keep = torch.tensor([0.9, 0.8, 0.7, 0.5]).log()
    assert chosen(log_keep, states, 2) == {0, 3}
    # Where the other is hardly ever kept, it is not.
    assert chosen(torch.tensor([0.9, 0.8, 0.7, 1e-9]).log(), states, 3) == {0, 1, 2}


@pytest.mark.parametrize("filling", [0.0, 1e4, float("nan"), float("inf")])
def test_a_row_is_chosen_from_by_itself(filling):
    parts = [problem(seed, tokens) for seed, tokens in ((1, 20), (2, 7), (3, 1))]
    log_keep, states = torch.full((4, 20), filling), torch.full((4, 20, 8), filling)
    valid = torch.zeros(4, 20, dtype=torch.bool)
    for row, (own_keep, own_states) in enumerate(parts):
        number = len(own_keep)
        log_keep[row, :number], states[row, :number], valid[row, :number] = own_keep, own_states, True
    scores = diverse_scores(log_keep, states, valid)
    assert torch.equal(scores == float("-inf"), ~valid)
    keep = keep_counts(valid, 0.4)
    mask = top_k_keep_mask(scores, valid, keep)
    for row, (own_keep, own_states) in enumerate(parts):
        assert set(mask[row].nonzero().flatten().tolist()) == chosen(own_keep, own_states, int(keep[row]))
    assert not mask[3].any()


def test_16_bit_states_and_huge_ones_are_taken():
    log_keep, states = problem(4, tokens=16)
    exact = states.bfloat16()
    assert chosen(log_keep, exact, 5) == chosen(log_keep, exact.double() * 1e6, 5)


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: every operation but views and empty storage."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or any(word in str(func) for word in ("empty", "detach", "scalar_tensor")))
        return func(*args, **(kwargs or {}))


def test_a_choice_is_a_few_launches_without_host_reads_however_many_stay():
    log_keep, states = problem(0, tokens=50)
    logits = torch.stack([log_keep, (1 - log_keep.exp()).log()], dim=-1)[None]
    counts = []
    for rate in (0.1, 0.9):
        evidence = Evidence(states[None], torch.ones(1, 50, dtype=torch.bool), rate, False, keep_logits=logits)
        with NoHostCopies(), Launches() as launches:
            keep_of(Diverse(), evidence)
        counts.append(launches.count)
    assert counts[0] == counts[1] <= 40


@pytest.mark.parametrize("arguments", [{}, {"image_keep_rate": 0.2}, {"image_keep_rate": 1.0}])
def test_generation_is_the_definition(arguments):
    """Per call, in the configuration, cached and not, in a batch and alone, with several pictures in a row."""
    model, batch = tiny_model(), batch_of(*mixed_prompts(), "left")
    arguments = {**arguments, "image_selection": "diverse"}
    together = model.generate(**batch, **GREEDY, **arguments, return_sparsity=True)
    assert torch.equal(together.sequences, model.generate(**batch, **GREEDY, **arguments, use_cache=False))
    configured = tiny_model(image_selection="diverse")
    arguments.pop("image_selection")
    assert torch.equal(together.sequences, configured.generate(**batch, **GREEDY, **arguments))
    plain = model.generate(**batch, **GREEDY, **arguments, return_sparsity=True)
    assert torch.equal(together.sparsity.image_tokens_kept, plain.sparsity.image_tokens_kept)
    if arguments.get("image_keep_rate") != 1.0:
        one, two = together.sparsity.kept_columns, plain.sparsity.kept_columns
        assert one != two
    rows, images = mixed_prompts()
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        alone = model.generate(**batch_of([row], [image], "left"), **GREEDY, **arguments, image_selection="diverse")
        assert torch.equal(together.sequences[number, -8:], alone[0, -8:])
        tokens, _ = naive_generate(model, row, image, 8, **arguments, image_selection="diverse")
        assert together.sequences[number, -8:].tolist() == tokens


def test_training_draws_as_ever():
    from .test_modeling import training_batch

    masks = []
    for selection in ("topk", "diverse"):
        torch.manual_seed(0)
        output = tiny_model(image_selection=selection).train()(**training_batch(), gumbel_tau=0.7)
        masks.append((output.image_keep_mask.detach(), output.loss.detach()))
    assert torch.equal(masks[0][0], masks[1][0])
    assert masks[0][1] == masks[1][1]
