"""Names of the parameters in each layout. Every map goes by way of our own names, those of the model in memory.

`ours` is the model in memory, `saved` what `save_pretrained` writes (and `llava-hf` checkpoints of transformers 5),
`llava-hf` the names of the hub's `llava-hf/llava-1.5-*`, `published` those of LLaVA's and Dynamic-LLaVA's own code.
"""

from __future__ import annotations

import re

from ..parameter_names import DECODER, PROJECTOR, TOWER, from_hugging_face

PUBLISHED_TOWER = "model.vision_tower.vision_tower.vision_model."

# Published name of each predictor, and ours.
_PREDICTORS = {
    "image_score_predictor": "image_predictor",
    "output_text_score_predictor": "output_predictor",
    "instruct_score_predictor": "instruct_predictor",
}
_BLOCK_NAMES = ((".attn.qkv.", ".qkv."), (".attn.proj.", ".proj."), (".mlp.fc1.", ".fc1."), (".mlp.fc2.", ".fc2."))
# The published token predictors keep all layers in one sequence, the first three of them our `down`.
_DOWN_LAYERS = 3


def from_published(key: str) -> str:
    """Our name of a published parameter; names that are the same, or unknown, come back as they are."""
    if key.startswith("model.vision_tower.vision_tower."):
        return TOWER + key.removeprefix("model.vision_tower.vision_tower.").removeprefix("vision_model.")
    if key.startswith("model.mm_projector."):
        rest = key.removeprefix("model.mm_projector.")
        number, _, name = (rest if "." in rest else f"0.{rest}").partition(".")
        # Its odd members are activations.
        return f"{PROJECTOR}linear_{int(number) // 2 + 1}.{name}" if re.fullmatch(r"\d*[02468]", number) else key
    for theirs, own in _PREDICTORS.items():
        if key.startswith(f"model.{theirs}."):
            rest = key.removeprefix(f"model.{theirs}.")
            return f"{DECODER}{own}.{_predictor_from_published(rest, images=own == 'image_predictor')}"
    if key.startswith(("model.embed_tokens.", "model.layers.", "model.norm.")):
        return DECODER + key.removeprefix("model.")
    return key


def own_name(key: str) -> str:
    """Our name of a parameter in any layout."""
    return from_hugging_face(from_published(key))


def to_published(key: str, projector_layers: int) -> str:
    """The inverse of `from_published`."""
    if key.startswith(TOWER):
        return PUBLISHED_TOWER + key.removeprefix(TOWER)
    if key.startswith(PROJECTOR):
        number, name = key.removeprefix(f"{PROJECTOR}linear_").split(".", 1)
        return (
            f"model.mm_projector.{name}"
            if projector_layers == 1
            else f"model.mm_projector.{2 * int(number) - 2}.{name}"
        )
    for theirs, own in _PREDICTORS.items():
        if key.startswith(f"{DECODER}{own}."):
            rest = key.removeprefix(f"{DECODER}{own}.")
            return f"model.{theirs}.{_predictor_to_published(rest, images=own == 'image_predictor')}"
    return "model." + key.removeprefix(DECODER) if key.startswith(DECODER) else key


def to_hugging_face(key: str, tower_prefix: str) -> str:
    """`saved` names with `tower_prefix="vision_tower."`, `llava-hf` with `vision_tower.vision_model.`."""
    for own, theirs in (
        (DECODER, "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        (TOWER, tower_prefix),
        (PROJECTOR, "multi_modal_projector."),
    ):
        if key.startswith(own):
            return theirs + key.removeprefix(own)
    return key


def _predictor_from_published(key: str, images: bool) -> str:
    if key.startswith("output_mlp.") and not images:
        index, _, name = key.removeprefix("output_mlp.").partition(".")
        if not re.fullmatch(r"\d{1,3}", index):
            return key
        down = int(index) < _DOWN_LAYERS
        return f"down.{index}.{name}" if down else f"head.{int(index) - _DOWN_LAYERS}.{name}"
    if key.startswith("down_mlp."):
        return "down." + key.removeprefix("down_mlp.")
    if key.startswith("transformer."):
        key = "blocks." + key.removeprefix("transformer.")
        for theirs, own in _BLOCK_NAMES:
            key = key.replace(theirs, own)
        return key
    if key.startswith("output_mlp."):
        return "head." + key.removeprefix("output_mlp.")
    return key


def _predictor_to_published(key: str, images: bool) -> str:
    part, rest = key.split(".", 1)
    if part == "blocks":
        key = f"transformer.{rest}"
        for theirs, own in _BLOCK_NAMES:
            key = key.replace(own, theirs)
        return key
    if images:
        return f"{'down_mlp' if part == 'down' else 'output_mlp'}.{rest}"
    index, name = rest.split(".", 1)
    return f"output_mlp.{int(index) + (_DOWN_LAYERS if part == 'head' else 0)}.{name}"
