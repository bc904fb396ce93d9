"""Reference values of the published implementation: loading its tiny checkpoint and its cases (tests/data/parity)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints import load_published

ROOT = Path(__file__).parent / "data" / "parity" / "m1_mha"
# The first id outside the vocabulary: the checkpoint has no tokenizer.
IMAGE_TOKEN = 320
PUBLISHED_IMAGE_TOKEN = -200


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


def load_model(override: dict | None = None, **sparsity) -> DynamicLlavaForConditionalGeneration:
    """The published tiny model with `override` entries of its `sparse_config`, eager attention."""
    published = json.loads((ROOT / "config.json").read_text())
    published["sparse_config"].update(override or {})
    with TemporaryDirectory() as folder:
        for name in ("model.safetensors", "vision_tower"):
            Path(folder, name).symlink_to(ROOT / name)
        Path(folder, "config.json").write_text(json.dumps(published))
        return load_published(folder, sparsity=sparsity, attn_implementation="eager")
