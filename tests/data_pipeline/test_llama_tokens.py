"""Labels with Llama's tokenizer, in both ways that it writes its prefix space, against LLaVA's own rule."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, LlavaProcessor

from dynamic_llava import DynamicLlavaConfig
from dynamic_llava.checkpoints.chat_template import SYSTEM_PROMPT, chat_template, needs_space_behind_image
from dynamic_llava.checkpoints.tokenizer import build_processor
from dynamic_llava.data.conversation import Turn, encode_conversation, parse_turns, render_conversation
from dynamic_llava.data.dataset import ConversationDataset
from dynamic_llava.data.lengths import conversation_lengths
from dynamic_llava.token_masks import IGNORE_INDEX

from .conftest import ASSET, talk

CONVERSATIONS = {
    "one turn": talk("<image>\nWhat colour is it?", "The cross is red."),
    "image last": talk("What colour is it?\n<image>", "red"),
    "image in the middle": talk("Look at <image> and say what it is", "a cross"),
    "several turns": talk("<image>\nWhat is it?", "a cross", "And the colour?", "red\nand blue", "Sure?", "Yes."),
    "text only": talk("Is red a colour?", "Yes.", "And blue?", "Yes, blue is a colour too."),
    "image in a later turn": talk("Hello", "Hello!", "<image>\nWhat is it?", "a cross"),
    "several images": talk("<image> or <image>?", "the cross", "<image>\nAnd this?", "blue"),
    "space around the answer": talk("<image>\nWhat is it?", "  a cross ", " And now? ", "\nred"),
    "characters outside the vocabulary": talk("<image>\nWas?", "Zwölf 猫 — naïve!", "USER: what?", "a USER"),
}


def llama_tokenizer(legacy: bool) -> LlamaTokenizer:
    """A small Llama tokenizer; `legacy` writes the prefix space behind special tokens too."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [turn["value"].replace("\n", " ") for talked in CONVERSATIONS.values() for turn in talked]
    corpus = [SYSTEM_PROMPT, "USER: ASSISTANT: USER: ASSISTANT:", *(text for text in texts if text.isascii())]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, special_tokens=specials))
    vocab = trained.get_vocab()
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["prefix first", "prefix always"])
def tokenizer(request: pytest.FixtureRequest) -> LlamaTokenizer:
    """Both forms."""
    return llama_tokenizer(request.param)


def llava_tokens(text: str, tokenizer: LlamaTokenizer) -> list[int]:
    """LLaVA's rule: every piece of text between images is tokenized as a text of its own."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = [tokenizer.bos_token_id]
    for number, piece in enumerate(text.split("<image>")):
        ids += [image] if number else []
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def llava_labels(text: str, tokenizer: LlamaTokenizer) -> list[int]:
    """LLaVA's rule: rounds end at `</s>`; of each, as many tokens are masked as its instruction has."""
    labels = llava_tokens(text, tokenizer)
    place = 1
    for number, told in enumerate(text.split("</s>")[:-1]):
        # In front of later rounds stands the end token, as the beginning token in front of the first.
        before = "</s>" if number else ""
        instruction = told[: told.index("ASSISTANT: ")] + "ASSISTANT: "
        extra = 1 if number else 0
        length = len(llava_tokens(before + told, tokenizer)) - extra
        masked = len(llava_tokens(before + instruction, tokenizer)) - extra - 2
        labels[place : place + masked] = [IGNORE_INDEX] * masked
        place += length
    labels[0] = IGNORE_INDEX
    assert place == len(labels), "LLaVA's check for a mismatch"
    return labels


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_tokens_and_labels_are_llavas(conversation: list[dict[str, str]], tokenizer: LlamaTokenizer) -> None:
    turns = parse_turns(conversation)
    images = sum(turn.text.count("<image>") for turn in turns)
    space = needs_space_behind_image(tokenizer)
    assert space == (not tokenizer.legacy)
    input_ids, labels = encode_conversation(turns, tokenizer, [1] * images, space_behind_image=space)
    text, _ = render_conversation(turns)
    assert input_ids == llava_tokens(text, tokenizer)
    assert labels == llava_labels(text, tokenizer)
    (length,) = conversation_lengths([turns], tokenizer, 1, space_behind_image=space)
    supervised = sum(label != IGNORE_INDEX for label in labels)
    assert (length.total, length.answers) == (len(input_ids), supervised)


def test_the_processor_of_a_published_checkpoint_writes_llavas_prompt(
    tokenizer: LlamaTokenizer, tmp_path: Path
) -> None:
    """Training with that processor sees the prompt's tokens too."""
    tokenizer.save_pretrained(tmp_path)
    processor = build_processor(tmp_path, DynamicLlavaConfig.from_pretrained(ASSET), None)
    content = [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]
    messages = [{"role": "user", "content": content}]
    expected = llava_tokens(f"{SYSTEM_PROMPT} USER: <image>\nWhat colour is it? ASSISTANT:", tokenizer)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert processor.tokenizer(prompt)["input_ids"] == expected
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    sample = {"id": "a", "image": "a.png", "conversations": CONVERSATIONS["one turn"]}
    dataset = ConversationDataset([sample], "some.json", tmp_path, processor)
    input_ids, _ = dataset.encode(0, 1)
    assert input_ids[: len(expected)] == expected
    assert dataset.full_lengths == [len(dataset[0]["input_ids"])]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_every_answer_is_supervised_to_its_end(conversation: list[dict[str, str]], tokenizer: LlamaTokenizer) -> None:
    turns = parse_turns(conversation)
    images = sum(turn.text.count("<image>") for turn in turns)
    input_ids, labels = encode_conversation(turns, tokenizer, [5] * images)
    runs: list[list[int]] = []
    for before, label in zip([IGNORE_INDEX, *labels], labels, strict=False):
        if label != IGNORE_INDEX:
            runs += [[]] if before == IGNORE_INDEX else []
            runs[-1].append(label)
    assert all(run[-1] == tokenizer.eos_token_id and run.count(tokenizer.eos_token_id) == 1 for run in runs)
    said = [tokenizer.decode(run[:-1]) for run in runs]
    assert [text.strip() for text in said] == [turn.text.strip() for turn in turns[1::2]]
    assert input_ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_the_end_token_is_refused(processor: LlavaProcessor, tokenizer: LlamaTokenizer) -> None:
    """LLaVA's own code would train such a sample with no loss at all, and go on."""
    stranger = LlamaTokenizer(vocab=None, merges=[], eos_token="<end>", legacy=tokenizer.legacy)
    with pytest.raises(ValueError, match=r"tokenization mismatch: answer 1 .*</s>"):
        encode_conversation([Turn("user", "Hi"), Turn("assistant", "Hey")], stranger)
    foreign = copy(processor)
    foreign.tokenizer = stranger
    sample = {"id": "greeting", "conversations": talk("Hi", "Hey")}
    dataset = ConversationDataset([sample], "some.json", ".", foreign)
    with pytest.raises(ValueError, match=r"some\.json: sample 'greeting': tokenization mismatch"):
        dataset[0]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_assistant_masks_are_the_labels(legacy: bool, name: str) -> None:
    """What trl's `assistant_only_loss` learns from the tokenizer's chat template is what LLaVA learns."""
    tokenizer, turns = llama_tokenizer(legacy), parse_turns(CONVERSATIONS[name])
    tokenizer.chat_template = chat_template()
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pictures = sum(turn.text.count("<image>") for turn in turns)
    input_ids, labels = encode_conversation(turns, tokenizer, [1] * pictures)
    # A tokenizer, unlike a processor, leaves the first token to the template.
    assert encoded["input_ids"] == input_ids[1:]
    assert encoded["assistant_masks"] == [int(label != IGNORE_INDEX) for label in labels[1:]]
