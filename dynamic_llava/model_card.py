"""The model card that a saved model gets where it has none."""

from __future__ import annotations

from pathlib import Path

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- dynamic-llava
- token-pruning
---

# Dynamic-LLaVA

A LLaVA-1.5 that drops image and output tokens from its decoder layers {sparse_layer} to {last_layer}
([arXiv 2412.00876](https://arxiv.org/abs/2412.00876)).

| | |
|---|---|
| decoder | {layers} layers, hidden size {hidden} |
| vision tower | {vision} |
| image tokens kept | {image} |
| output tokens kept | {output} |

```python
import dynamic_llava  # registers the model with the Auto classes
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER_OR_REPOSITORY)
processor = AutoProcessor.from_pretrained(FOLDER_OR_REPOSITORY)
```
"""


def model_card(config) -> str:
    """The card of a model of `config` (`DynamicLlavaConfig`), as Markdown."""
    sparsity, text, vision = config.sparsity, config.text_config, config.vision_config
    return CARD.format(
        sparse_layer=sparsity.sparse_layer,
        last_layer=text.num_hidden_layers - 1,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vision=f"{vision.num_hidden_layers} layers, {vision.image_size} px in patches of {vision.patch_size}",
        image=f"{sparsity.image_keep_rate:g} of each picture" if sparsity.image_predictor else "all",
        output=f"trained at {sparsity.output_keep_rate:g}" if sparsity.output_predictor else "all",
    )


def write_model_card(folder: str | Path, config) -> None:
    """Write `README.md` into `folder` unless it has one."""
    path = Path(folder) / "README.md"
    if not path.exists():
        path.write_text(model_card(config))
