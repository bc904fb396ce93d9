"""Vicuna v1, the way LLaVA-1.5 writes conversations."""

from __future__ import annotations

IMAGE_TOKEN = "<image>"
END_TOKEN = "</s>"
USER, ASSISTANT = "USER:", "ASSISTANT:"

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat_template(system: str = SYSTEM_PROMPT, space_behind_image: bool = False) -> str:
    """The text of `data.conversation.render_conversation`, for tokenizers and processors.

    What is learned of it, each answer with its end token, stands in `{% generation %}`: the assistant mask.

    Args:
        system: the system prompt of a conversation that brings none.
        space_behind_image: see `needs_space_behind_image`.
    """
    image = IMAGE_TOKEN + (" " if space_behind_image else "") + "\\n"
    return (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}"
        "{% set system = '" + system.replace("'", "\\'") + "' %}{% set turns = messages %}"
        "{% endif %}"
        "{% if system is not string %}{% set system = system[0]['text'] %}{% endif %}"
        "{{ system + ' ' }}"
        "{% for message in turns %}"
        "{% set said %}"
        "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
        "{% else %}{{ ' ' }}"
        "{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}{{ '" + image + "' }}"
        "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% endset %}"
        "{% if message['role'] == 'user' %}{{ 'USER:' + said + ' ' }}"
        "{% else %}{{ 'ASSISTANT:' }}{% generation %}{{ said + '</s>' }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def needs_space_behind_image(tokenizer) -> bool:
    """Whether only a space behind `<image>` gives the tokens of LLaVA, which tokenizes the text between images piece by
    piece: Llama tokenizers with `legacy=False` write their prefix space in front of the whole text only."""
    image, question = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), "\n?"
    behind = {}
    for space in ("", " "):
        ids = tokenizer(f"?{IMAGE_TOKEN}{space}{question}", add_special_tokens=False)["input_ids"]
        behind[space] = ids[ids.index(image) + 1 :]
    piece = tokenizer(question, add_special_tokens=False)["input_ids"]
    return behind[""] != piece and behind[" "] == piece


def writes_space_behind_image(processor) -> bool:
    """Whether the chat template of a processor (or tokenizer) writes that space; training then writes it too."""
    if getattr(processor, "chat_template", None) is None:
        return False
    return f"{IMAGE_TOKEN} " in _question(processor, [{"type": "image"}, {"type": "text", "text": "?"}])


def system_prompt_of(processor) -> str:
    """The system prompt that the chat template of a processor (or tokenizer) writes, Vicuna v1's where it writes none.

    Training then sees the text that inference will be asked with.
    """
    if getattr(processor, "chat_template", None) is None:
        return SYSTEM_PROMPT
    own = _question(processor, [{"type": "text", "text": "?"}]).partition("USER:")[0].strip()
    return own or SYSTEM_PROMPT


def _question(processor, content: list[dict[str, str]]) -> str:
    """A user's turn as the chat template of a processor writes it; `ValueError` where it cannot."""
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception as error:  # Whatever the template's own expressions raise.
        raise ValueError(f"The processor's chat template fails ({error}); copy chat_template.jinja again.") from error


def marker_ids(tokenizer, marker: str) -> list[int]:
    """Token ids of `USER` or `ASSISTANT` as they stand in a conversation, behind a space."""
    text = f"? {marker} ?"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = text.index(marker) + len(marker)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (start, stop) in spans if start >= 1 and stop <= end and stop > start]
