"""Vicuna v1 text, its chat template, and which tokens are learned."""

from __future__ import annotations

import copy

import pytest
from PIL import Image
from transformers import LlavaProcessor

from dynamic_llava.checkpoints.chat_template import (
    ASSISTANT,
    SYSTEM_PROMPT,
    USER,
    chat_template,
    marker_ids,
    system_prompt_of,
)
from dynamic_llava.data.conversation import (
    Turn,
    encode_conversation,
    expand_image_tokens,
    parse_turns,
    render_conversation,
)
from dynamic_llava.token_masks import IGNORE_INDEX
from tools.tiny_base.config import SYSTEM_PROMPT as TINY_PROMPT

from .conftest import talk

TURNS = [
    Turn("user", "<image>\nWhat colour is the cross?"),
    Turn("assistant", "red"),
    Turn("user", "How many objects are there?"),
    Turn("assistant", "three"),
]


def answers_of(input_ids: list[int], labels: list[int], processor: LlavaProcessor) -> list[str]:
    """Decodes each unbroken run of supervised tokens."""
    runs, previous = [], False
    for token, label in zip(input_ids, labels, strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = label != IGNORE_INDEX
    return [processor.tokenizer.decode(run) for run in runs]


def test_text_is_vicuna_v1() -> None:
    text, answers = render_conversation(TURNS)
    assert text == (
        f"{SYSTEM_PROMPT} USER: <image>\nWhat colour is the cross? ASSISTANT: red</s>"
        "USER: How many objects are there? ASSISTANT: three</s>"
    )
    assert [text[start:end] for start, end in answers] == [" red</s>", " three</s>"]
    assert render_conversation(TURNS[:1])[0].endswith("cross? ASSISTANT:")


def test_chat_template_renders_the_same_text(processor: LlavaProcessor) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What colour is the cross?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "How many objects are there?"}]},
    ]
    expected = render_conversation(TURNS[:3], TINY_PROMPT)[0]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    plain = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    assert processor.tokenizer.apply_chat_template(plain, tokenize=False) == render_conversation(TURNS, TINY_PROMPT)[0]
    own = [{"role": "system", "content": "Be brief."}, *plain]
    assert processor.apply_chat_template(own) == render_conversation(TURNS, system="Be brief.")[0]


def test_the_prompt_is_that_of_the_chat_template(processor: LlavaProcessor) -> None:
    """LLaVA-1.5 was trained on `conv_vicuna_v1`; templates without a system prompt, such as the hub's, get that one."""
    assert SYSTEM_PROMPT.startswith("A chat between a curious user and")
    assert system_prompt_of(processor) == TINY_PROMPT
    processor = copy.deepcopy(processor)
    processor.chat_template = chat_template()
    assert system_prompt_of(processor) == SYSTEM_PROMPT
    processor.chat_template = "USER: {{ messages[0]['content'][0]['text'] }} ASSISTANT:"
    assert system_prompt_of(processor) == SYSTEM_PROMPT
    processor.chat_template = None
    assert system_prompt_of(processor) == SYSTEM_PROMPT


def test_markers_are_found_in_a_conversation(processor: LlavaProcessor) -> None:
    input_ids, _ = encode_conversation(TURNS[:2], processor.tokenizer, [64])
    for marker in (USER, ASSISTANT):
        ids = marker_ids(processor.tokenizer, marker)
        assert processor.tokenizer.decode(ids).strip() == marker
        assert any(input_ids[i : i + len(ids)] == ids for i in range(len(input_ids)))


def test_only_answers_and_their_end_tokens_are_learned(processor: LlavaProcessor) -> None:
    input_ids, labels = encode_conversation(TURNS, processor.tokenizer, [64])
    assert answers_of(input_ids, labels, processor) == [" red</s>", " three</s>"]
    assert input_ids[0] == processor.tokenizer.bos_token_id
    assert input_ids.count(processor.image_token_id) == 64


def test_training_text_equals_the_processors_prompt(processor: LlavaProcessor) -> None:
    input_ids, labels = encode_conversation(TURNS, processor.tokenizer, [64])
    prompt = render_conversation(TURNS[:1])[0]
    ids = processor.tokenizer(expand_image_tokens(prompt, [64]))["input_ids"]
    assert ids == input_ids[: len(ids)]
    assert labels[len(ids)] == input_ids[len(ids)] != IGNORE_INDEX
    assert set(labels[: len(ids)]) == {IGNORE_INDEX}


@pytest.mark.parametrize("answer", ["  spaced out ", "Zwölf Bücher — naïve!", "a\nb", "red."])
def test_any_answer_is_found_by_its_characters(processor: LlavaProcessor, answer: str) -> None:
    turns = parse_turns(talk("red?", answer, "red red", "red"))
    input_ids, labels = encode_conversation(turns, processor.tokenizer)
    assert answers_of(input_ids, labels, processor) == [f" {answer}</s>", " red</s>"]


def test_image_placeholder_is_moved_as_llava_does() -> None:
    assert parse_turns(talk("What is it?\n<image>", "red"))[0].text == "<image>\nWhat is it?"
    assert parse_turns(talk("<image>", "red"))[0].text == "<image>"
    assert parse_turns(talk(" Is it? ", " no\n"))[1].text == " no\n", "turns without an image stay as they are"
    both = "Is <image> like <image>?"
    assert parse_turns(talk(both, "no"))[0].text == both


def test_opening_turn_of_the_model_is_skipped() -> None:
    turns = parse_turns([{"from": "gpt", "value": "Hello"}, *talk("Hi", "Hey")])
    assert [turn.text for turn in turns] == ["Hi", "Hey"]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (None, "non-empty list"),
        ([], "non-empty list"),
        ([{"from": "human"}], "turn 0"),
        ([{"from": "robot", "value": "x"}], "turn 0"),
        (talk("Hi"), "no answer"),
        (talk("Hi", "  "), "no answer"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "alternate"),
        (talk("Hi", "look <image>"), "in an answer"),
    ],
)
def test_malformed_conversations_are_named(conversations: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_turns(conversations)


def test_long_conversations_are_cut_but_never_through_pictures_or_to_nothing(processor: LlavaProcessor) -> None:
    whole, _ = encode_conversation(TURNS, processor.tokenizer, [64])
    first_end = whole.index(processor.tokenizer.eos_token_id) + 1
    input_ids, labels = encode_conversation(TURNS, processor.tokenizer, [64], max_length=first_end + 3)
    assert input_ids == whole[: first_end + 3]
    assert answers_of(input_ids, labels, processor) == [" red</s>"]
    with pytest.raises(ValueError, match="no answer is left"):
        encode_conversation(TURNS, processor.tokenizer, [64], max_length=first_end - 4)
    with pytest.raises(ValueError, match="no answer is left"):
        encode_conversation(TURNS, processor.tokenizer, [64], max_length=50)


def test_a_cut_inside_a_later_picture_falls_in_front_of_it(processor: LlavaProcessor) -> None:
    turns = [*TURNS[:2], Turn("user", "<image><image>\nAnd these?"), Turn("assistant", "blue")]
    whole, _ = encode_conversation(turns, processor.tokenizer, [64, 64, 64])
    places = [position for position, token in enumerate(whole) if token == processor.image_token_id]
    second, third = places[64], places[128]
    assert third == second + 64, "two pictures side by side"
    for max_length, end in ((second, second), (second + 1, second), (third - 1, second), (third, third)):
        input_ids, labels = encode_conversation(turns, processor.tokenizer, [64] * 3, max_length=max_length)
        assert input_ids == whole[:end]
        assert answers_of(input_ids, labels, processor) == [" red</s>"]
    for max_length, end in ((third + 63, third), (third + 64, third + 64), (third + 66, third + 66)):
        assert len(encode_conversation(turns, processor.tokenizer, [64] * 3, max_length=max_length)[0]) == end


def test_picture_counts_must_match(processor: LlavaProcessor) -> None:
    with pytest.raises(ValueError, match="1 <image> for 2 pictures"):
        encode_conversation(TURNS, processor.tokenizer, [64, 64])
    with pytest.raises(ValueError, match="1 <image> for 0 pictures"):
        expand_image_tokens("<image>", [])


def said(turn: Turn, image: Image.Image | None) -> dict:
    """A turn as a message of parts, its `<image>` a picture."""
    parts = [{"type": "text", "text": turn.text.removeprefix("<image>\n")}]
    if turn.text.startswith("<image>\n"):
        parts.insert(0, {"type": "image", "image": image})
    return {"role": turn.role, "content": parts}


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_assistant_masks_are_the_labels(processor: LlavaProcessor, number: int, pictures: int) -> None:
    image = Image.new("RGB", (64, 64), "red")
    turns = [Turn(turn.role, turn.text.removeprefix("<image>\n")) for turn in TURNS[:number]]
    for place in [0, 2][:pictures]:
        if place < number:
            turns[place] = Turn("user", f"<image>\n{turns[place].text}")
    shown = sum(turn.text.startswith("<image>") for turn in turns)
    encoded = processor.apply_chat_template(
        [said(turn, image) for turn in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=turns[-1].role == "user",
    )
    input_ids, labels = encode_conversation(turns, processor.tokenizer, [64] * shown, system=TINY_PROMPT)
    assert encoded["input_ids"][0] == input_ids
    assert encoded["assistant_masks"][0] == [int(label != IGNORE_INDEX) for label in labels]
