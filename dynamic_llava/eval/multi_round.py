"""Conversations of several rounds, each answered on the cache of those before it, in batches.

A later round sees the model's own answers, as in use. They stay as they were decided: of a dropped output token the
sparse layers have nothing. End tokens and what pads a batch behind them are masked; the chat template's text between
two turns brings the end token again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cache import SparseCache
from ..checkpoints.loaded import LoadedModel
from ..data.prompts import encode_prompts, generation_arguments
from ..statistics import SparsityStatistics

# A round's number and the answers so far -> the next question, None where the conversation is over.
NextQuestion = Callable[[int, list[str]], str | None]
PLACEHOLDER = "ANSWER"
# What a conversation has counted at its end.
COUNTS = ("prompt_tokens", "image_tokens", "image_tokens_kept", "output_tokens", "output_tokens_kept")


@dataclass
class Conversation:
    """One conversation while it is held: counts are those of the prompt, its images and all answers.

    `image_tokens_kept` and `output_tokens_kept` are what the sparse layers store; of a dense model everything.
    """

    first_question: str
    images: Sequence[Image.Image]
    next_question: NextQuestion
    answers: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    image_tokens: int = 0
    image_tokens_kept: int = 0
    output_tokens: int = 0
    output_tokens_kept: int = 0


def question_of_round(doc_to_text: Callable, doc: dict[str, Any], number: int, answers: list[str]) -> str | None:
    """The question of a later round by lmms-eval's protocol, None at the end; `ValueError` where it brings pictures."""
    pictures, question, ended, *_ = doc_to_text(
        doc, round_idx=number, previous_output=answers, previous_round_info=None
    )
    if not ended and pictures:
        raise ValueError("Rounds with pictures of their own are not conversations on one cache; leave the task out.")
    return None if ended else question


def between_turns(processor: Any, question: str) -> str:
    """What the chat template writes behind an answer up to where the next one begins."""
    turn = {"role": "user", "content": [{"type": "text", "text": question}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": PLACEHOLDER}]}
    first = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    text = processor.apply_chat_template([first, said, turn], add_generation_prompt=True, tokenize=False)
    return text.split(PLACEHOLDER, 1)[1]


@torch.inference_mode()
def hold_conversations(
    loaded: LoadedModel, conversations: Sequence[Conversation], gen_kwargs: dict[str, Any], call_kwargs: dict[str, Any]
) -> None:
    """Answer all rounds of `conversations`, in place.

    Args:
        loaded: dense or sparse model.
        conversations: a batch; each may end after another number of rounds.
        gen_kwargs: lmms-eval's generation arguments, the same in every round.
        call_kwargs: of `LoadedModel.call_kwargs`.
    """
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    arguments = {**generation_arguments(gen_kwargs), **call_kwargs, "return_dict_in_generate": True}
    inputs = encode_prompts(
        loaded.processor, [c.first_question for c in conversations], [list(c.images) for c in conversations]
    ).to(loaded.device)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    image = (ids == model.config.image_token_id).sum(dim=1).tolist()
    for conversation, number, tokens in zip(conversations, image, mask.sum(dim=1).tolist(), strict=True):
        conversation.image_tokens, conversation.prompt_tokens = number, tokens
    active, cache, number = list(conversations), None, 0
    while active:
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **inputs, **arguments)
        inputs, cache, number = {}, output.past_key_values, number + 1
        written = ~ended_mask(output.sequences[:, ids.shape[1] :], model.generation_config.eos_token_id)
        mask = torch.cat([mask, written.to(mask.dtype)], dim=1)
        for row, conversation in enumerate(active):
            answer = output.sequences[row, ids.shape[1] :][written[row]]
            conversation.answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
            conversation.output_tokens += len(answer)
        questions = [c.next_question(number, c.answers) for c in active]
        stays = [row for row, question in enumerate(questions) if question is not None]
        _count_kept(active, cache, mask)
        texts = [between_turns(loaded.processor, questions[row]) for row in stays]
        turns = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        active = [active[row] for row in stays]
        for conversation, turn in zip(active, turns, strict=True):
            conversation.prompt_tokens += len(turn)
        ids, mask = _next_turn(output.sequences, mask, cache.get_seq_length(), turns, stays, tokenizer.pad_token_id)
        if active and len(stays) < len(questions):
            cache.batch_select_indices(torch.tensor(stays, device=ids.device))


def _count_kept(active: Sequence[Conversation], cache: Any, mask: Tensor) -> None:
    if not isinstance(cache, SparseCache):
        for conversation in active:
            conversation.image_tokens_kept = conversation.image_tokens
            conversation.output_tokens_kept = conversation.output_tokens
        return
    found = SparsityStatistics.of(cache, mask)
    judged, kept = found.output_tokens.tolist(), found.output_tokens_kept.tolist()
    for row, conversation in enumerate(active):
        assert found.image_tokens[row] == conversation.image_tokens
        conversation.image_tokens_kept = int(found.image_tokens_kept[row])
        # What was not judged is kept: the last token of an answer that was cut off is fed with the next question.
        conversation.output_tokens_kept = kept[row] + conversation.output_tokens - judged[row]


def _next_turn(
    sequences: Tensor, mask: Tensor, seen: int, turns: Sequence[list[int]], stays: Sequence[int], pad_token: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask of the rows that go on: what the cache has seen, and the new turn, padded in front.

    Args:
        sequences, mask: `(B, N)` of all rows, the mask 0 at padding and end tokens.
        seen: columns that the cache has seen; what an answer has behind them is fed with the turn.
        turns: the new token ids of the rows that go on.
        stays: which rows these are.
        pad_token: id of the padding.
    """
    fed = [
        sequences[row, seen:][mask[row, seen:].bool()].tolist() + turn for row, turn in zip(stays, turns, strict=True)
    ]
    width = max(map(len, fed), default=0)
    added, present = sequences.new_full((len(fed), width), pad_token), mask.new_zeros(len(fed), width)
    for row, turn in enumerate(fed):
        added[row, width - len(turn) :] = torch.tensor(turn, device=added.device)
        present[row, width - len(turn) :] = 1
    rows = torch.tensor(list(stays), dtype=torch.long, device=sequences.device)
    return torch.cat([sequences[rows, :seen], added], dim=1), torch.cat([mask[rows, :seen], present], dim=1)


def ended_mask(generated: Tensor, end_tokens: int | list[int] | None) -> Tensor:
    """`(B, T)` bool, true from the end token of each row of `generated (B, T)` on."""
    if end_tokens is None:
        return torch.zeros_like(generated, dtype=torch.bool)
    ends = torch.as_tensor(end_tokens, device=generated.device).view(-1)
    return torch.isin(generated, ends).cumsum(dim=1) > 0
