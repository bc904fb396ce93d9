"""Vicuna v1, the way LLaVA-1.5 writes conversations."""

from __future__ import annotations

IMAGE_TOKEN = "<image>"
END_TOKEN = "</s>"
USER, ASSISTANT = "USER:", "ASSISTANT:"

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat_template(system: str = SYSTEM_PROMPT) -> str:
    """The text of `data.conversation.render_conversation`, for tokenizers and processors."""
    return (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}"
        "{% set system = '" + system.replace("'", "\\'") + "' %}{% set turns = messages %}"
        "{% endif %}"
        "{% if system is not string %}{% set system = system[0]['text'] %}{% endif %}"
        "{{ system + ' ' }}"
        "{% for message in turns %}"
        "{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
        "{% if message['content'] is string %}{{ ' ' + message['content'] }}"
        "{% else %}{{ ' ' }}"
        "{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}{{ '<image>\\n' }}"
        "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{{ ' ' if message['role'] == 'user' else '</s>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def system_prompt_of(processor) -> str:
    """The system prompt that the chat template of a processor (or tokenizer) writes, Vicuna v1's where it writes none.

    Training then sees the text that inference will be asked with.
    """
    if getattr(processor, "chat_template", None) is None:
        return SYSTEM_PROMPT
    content = [{"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    own = text.partition("USER:")[0].strip()
    return own or SYSTEM_PROMPT


def marker_ids(tokenizer, marker: str) -> list[int]:
    """Token ids of `USER` or `ASSISTANT` as they stand in a conversation, behind a space."""
    text = f"? {marker} ?"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = text.index(marker) + len(marker)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (start, stop) in spans if start >= 1 and stop <= end and stop > start]
