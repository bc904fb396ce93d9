"""Reference values of the published implementation: loading its tiny checkpoint and its cases (tests/data/parity)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig

ROOT = Path(__file__).parent / "data" / "parity" / "m1_mha"
IMAGE_TOKEN = 319
PUBLISHED_IMAGE_TOKEN = -200

RENAMING = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_score_predictor.down_mlp.", "model.language_model.image_predictor.down."),
    ("model.image_score_predictor.output_mlp.", "model.language_model.image_predictor.head."),
    ("model.image_score_predictor.transformer.", "model.language_model.image_predictor.blocks."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
)


def our_key(key: str) -> str:
    """Name of a published parameter in this project."""
    if key.startswith("model.output_text_score_predictor.output_mlp."):
        index, rest = key.removeprefix("model.output_text_score_predictor.output_mlp.").split(".", 1)
        part = f"down.{index}" if int(index) < 3 else f"head.{int(index) - 3}"
        return f"model.language_model.output_predictor.{part}.{rest}"
    for old, new in RENAMING:
        if key.startswith(old):
            key = key.replace(old, new, 1)
            break
    return (
        key.replace(".attn.qkv.", ".qkv.").replace(".attn.proj.", ".proj.").replace(".mlp.fc", ".fc")
        if ("image_predictor.blocks" in key)
        else key
    )


@dataclass
class Case:
    """One reference case: inputs, expected tensors, meta, and the sequence with the image expanded."""

    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    meta: dict
    num_image_tokens: int = 16

    def expand(
        self, name: str = "input_ids", fill: int = IMAGE_TOKEN, marker_source: str = "input_ids"
    ) -> torch.Tensor:
        """`(B, N)` with each `-200` of `marker_source` replaced by the run of image positions, filled with `fill`."""
        rows = []
        for marked, values in zip(self.inputs[marker_source], self.inputs[name], strict=True):
            row = []
            for marker, value in zip(marked.tolist(), values.tolist(), strict=True):
                row += [fill] * self.num_image_tokens if marker == PUBLISHED_IMAGE_TOKEN else [value]
            rows.append(row)
        return torch.tensor(rows)


def load_case(name: str) -> Case:
    folder = ROOT / name
    return Case(
        inputs=load_file(folder / "inputs.safetensors"),
        expected=load_file(folder / "expected.safetensors"),
        meta=json.loads((folder / "meta.json").read_text()),
    )


def load_model(override: dict | None = None, **sparsity_changes) -> DynamicLlavaForConditionalGeneration:
    """The published tiny model with `override` entries of its `sparse_config`, eager attention, exact gates."""
    published = json.loads((ROOT / "config.json").read_text())
    sparse = {**published["sparse_config"], **(override or {})}
    text = {
        key: published[key]
        for key in published.keys() & set(LlamaConfig().to_dict()) - {"model_type", "architectures", "rope_scaling"}
    }
    values = {
        "sparse_layer": sparse["sparse_layer"],
        "image_keep_rate": sparse["vision_keep_rate"],
        "output_keep_rate": sparse["output_text_keep_rate"],
        "image_predictor": sparse["use_vision_predictor"],
        "output_predictor": sparse["use_text_predictor"] and sparse["use_output_text_predictor"],
        "predictor_dim": sparse["d_model"],
        "predictor_num_heads": sparse["nhead"],
        "predictor_ffn_dim": sparse["dim_feedforward"],
        "predictor_num_layers": sparse["num_layers"],
        "budget_weight": sparse["mask_loss_weight"],
        "min_output_length": sparse["output_text_len_for_training"],
        "gate_estimator": "exact",
        **sparsity_changes,
    }
    config = DynamicLlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**json.loads((ROOT / "vision_tower" / "config.json").read_text())),
        sparsity=SparsityConfig(**values),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    config._attn_implementation = "eager"
    model = DynamicLlavaForConditionalGeneration(config).eval()
    state = {our_key(key): value for key, value in load_file(ROOT / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    return model
