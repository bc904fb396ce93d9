"""Vicuna v1 conversations as LLaVA-1.5 writes them, and the labels that train on the answers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from transformers import PreTrainedTokenizerBase

from ..checkpoints.chat_template import END_TOKEN, IMAGE_TOKEN, SYSTEM_PROMPT
from ..token_masks import IGNORE_INDEX

SPACELESS_IMAGE = re.compile(rf"{IMAGE_TOKEN}(?! |{IMAGE_TOKEN}|$)")


@dataclass(frozen=True)
class Turn:
    """What one side said: `role` is "user" or "assistant"."""

    role: str
    text: str


def parse_turns(conversations: object) -> list[Turn]:
    """Reads LLaVA's `[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]`.

    As LLaVA does, an opening turn of the model is skipped and a lone `<image>` is moved to the front of its turn, which
    is then stripped of white space around it; turns without an image stay as they are written. Several images in one
    turn stay where they are, since their place in the text tells them apart.

    Raises:
        ValueError: on any other structure, with the place and the remedy.
    """
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("'conversations' must be a non-empty list of {'from': 'human' | 'gpt', 'value': text}")
    roles = {"human": "user", "gpt": "assistant"}
    turns = []
    for index, entry in enumerate(conversations):
        side, text = (entry.get("from"), entry.get("value")) if isinstance(entry, dict) else (None, None)
        if not isinstance(side, str) or side not in roles or not isinstance(text, str):
            raise ValueError(f"turn {index} is {short(entry)}; write {{'from': 'human' | 'gpt', 'value': text}}")
        if not _is_text(text):
            raise ValueError(f"turn {index} is {short(entry)}, with half a surrogate pair; write the character itself")
        turns.append(Turn(roles[side], _image_first(text)))
    if turns[0].role == "assistant":
        turns = turns[1:]
    for index, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[index % 2]:
            raise ValueError(f"turn {index} is out of order: 'human' and 'gpt' must alternate")
        if turn.role == "assistant" and IMAGE_TOKEN in turn.text:
            raise ValueError(f"turn {index} has {IMAGE_TOKEN} in an answer; images belong to the 'human' turns")
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise ValueError("the conversation has no answer; add a non-empty 'gpt' turn or remove the sample")
    return turns


def printable(text: str) -> str:
    """Returns `text` with lone surrogates, which JSON can hold and no terminal or file takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def short(value: object, most: int = 200) -> str:
    """Returns `value` as it would be written in Python, cut where that is long; it can be printed."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = f"a {type(value).__name__} too deep to be shown"
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _is_text(text: str) -> bool:
    """Whether `text` can be written and tokenized: JSON can hold lone surrogates, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_first(text: str) -> str:
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def count_images(turns: Sequence[Turn]) -> int:
    """Returns how many images the turns refer to."""
    return sum(turn.text.count(IMAGE_TOKEN) for turn in turns)


def render_conversation(turns: Sequence[Turn], system: str = SYSTEM_PROMPT) -> tuple[str, list[tuple[int, int]]]:
    """Renders the Vicuna v1 text: `system USER: ... ASSISTANT: ...</s>USER: ...`.

    Args:
        turns: alternating turns from `parse_turns`; when the last one is the user's, the text ends in "ASSISTANT:".
        system: the system prompt.

    Returns:
        The text, and the `[start, end)` characters of each answer with its leading space and its end token.
    """
    text, answers = f"{system} ", []
    for turn in turns:
        if turn.role == "user":
            text += f"USER: {turn.text} "
            continue
        text += "ASSISTANT:"
        start = len(text)
        text += f" {turn.text}{END_TOKEN}"
        answers.append((start, len(text)))
    if turns and turns[-1].role == "user":
        text += "ASSISTANT:"
    return text, answers


def space_images(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with a space between each `<image>` and the text behind it, where there is none."""
    return [Turn(turn.role, SPACELESS_IMAGE.sub(f"{IMAGE_TOKEN} ", turn.text)) for turn in turns]


def expand_image_tokens(text: str, tokens_per_image: Sequence[int]) -> str:
    """Repeats each `<image>` as often as its picture has tokens, the form that the model reads."""
    parts = text.split(IMAGE_TOKEN)
    if len(parts) != len(tokens_per_image) + 1:
        raise ValueError(f"the text has {len(parts) - 1} {IMAGE_TOKEN} for {len(tokens_per_image)} pictures")
    pieces = [parts[0]]
    for count, part in zip(tokens_per_image, parts[1:], strict=True):
        pieces += [IMAGE_TOKEN * count, part]
    return "".join(pieces)


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_image: Sequence[int] = (),
    max_length: int = 2048,
    system: str = SYSTEM_PROMPT,
    space_behind_image: bool = False,
) -> tuple[list[int], list[int]]:
    """Tokenizes a conversation and marks what is learned, as LLaVA does: every answer with its end token.

    The text is tokenized whole, as the processor does with a prompt, so that training and inference see the same
    tokens. LLaVA tokenizes the text between images piece by piece; where that differs, `space_behind_image` gives the
    same tokens.

    Args:
        turns: the turns, from `parse_turns`.
        tokenizer: a fast tokenizer; labels follow its character offsets, so that merged prefix spaces do not
            shift them.
        tokens_per_image: image tokens of each picture, in order.
        max_length: longer conversations are cut at the end; where that falls into a picture, in front of it.
        system: the system prompt.
        space_behind_image: whether the processor's chat template writes one (`writes_space_behind_image`).

    Returns:
        `input_ids` and `labels` of equal length; labels are `IGNORE_INDEX` except on answers and their end tokens.

    Raises:
        ValueError: on a `max_length` that is none; when the cut leaves no answer, or the tokens of an answer are not
            found or do not close with the end token.
    """
    check_max_length(max_length)
    turns = space_images(turns) if space_behind_image else turns
    # Expanding first keeps the answer spans aligned with the tokenizer's offsets: they are shifted by the expansion.
    expanded = [Turn(turn.role, text) for turn, text in zip(turns, _expand(turns, tokens_per_image), strict=True)]
    text, answers = render_conversation(expanded, system)
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    input_ids = encoded["input_ids"]
    end_id = tokenizer.convert_tokens_to_ids(END_TOKEN)
    labels = _label_answers(input_ids, encoded["offset_mapping"], answers, end_id)
    if len(input_ids) > max_length:
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        end = cut_position(input_ids, image_id, tokens_per_image, max_length)
        input_ids, labels = input_ids[:end], labels[:end]
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(f"no answer is left within max_length {max_length}; raise it or remove the sample")
    return input_ids, labels


def check_max_length(max_length: int) -> None:
    """`ValueError` unless it is a whole number of at least 1."""
    if isinstance(max_length, bool) or not isinstance(max_length, Integral) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}; give a whole number of at least 1")


def _label_answers(
    input_ids: list[int], offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]], end_id: int
) -> list[int]:
    """Returns the labels of tokens at `offsets`, of a text with answers at the characters `answers`."""
    labels = [IGNORE_INDEX] * len(input_ids)
    position = 0
    for number, (start, end) in enumerate(answers, 1):
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        first = position
        while position < len(offsets) and offsets[position][0] < end:
            labels[position] = input_ids[position]
            position += 1
        # Without this, a tokenizer that does not fit would train on nothing, or never on the end of an answer.
        if position == first or input_ids[position - 1] != end_id:
            raise ValueError(
                f"tokenization mismatch: answer {number} has {position - first} supervised tokens and does not close "
                f"with {END_TOKEN}; load the checkpoint's own fast tokenizer, with {END_TOKEN} as a special token"
            )
    return labels


def cut_position(input_ids: Sequence[int], image_id: int, tokens_per_image: Sequence[int], max_length: int) -> int:
    """Returns where to cut `input_ids`: at `max_length`, or in front of the picture that this would cut through.

    Args:
        input_ids: token ids with each image token repeated.
        image_id: id of the image token.
        tokens_per_image: image tokens of each picture, in order.
        max_length: most tokens to keep.
    """
    places = [position for position, token in enumerate(input_ids) if token == image_id]
    first = 0
    for count in tokens_per_image:
        start, last = places[first], places[first + count - 1]
        if start < max_length <= last:
            return start
        first += count
    return max_length


def _expand(turns: Sequence[Turn], tokens_per_image: Sequence[int]) -> list[str]:
    """Returns the text of each turn with its images expanded."""
    texts, used = [], 0
    for turn in turns:
        here = turn.text.count(IMAGE_TOKEN)
        texts.append(expand_image_tokens(turn.text, tokens_per_image[used : used + here]))
        used += here
    if used != len(tokens_per_image):
        raise ValueError(f"the conversation has {used} {IMAGE_TOKEN} for {len(tokens_per_image)} pictures")
    return texts
