"""Our names of parameters, those of the model in memory, and how Hugging Face's layouts of LLaVA map to them."""

from __future__ import annotations

DECODER = "model.language_model."
TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


def from_hugging_face(key: str) -> str:
    """Our name of a parameter in `saved` or `llava-hf` names, old or new."""
    for theirs, own in (
        # Two that transformers reads as older names, and that runs with ZeRO-3 of earlier versions hold.
        ("language_model.model.model.", DECODER),
        ("model.language_model.model.", DECODER),
        ("language_model.model.", DECODER),
        ("language_model.lm_head.", "lm_head."),
        ("language_model.", DECODER),
        ("vision_tower.vision_model.", TOWER),
        ("model.vision_tower.vision_model.", TOWER),
        ("vision_tower.", TOWER),
        ("multi_modal_projector.", PROJECTOR),
    ):
        if key.startswith(theirs):
            return own + key.removeprefix(theirs)
    return key
