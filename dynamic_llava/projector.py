"""The projector from the vision tower to the decoder, of any number of layers (`mm_projector_type` of LLaVA)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .configuration_dynamic_llava import DynamicLlavaConfig


class MultiModalProjector(LlavaMultiModalProjector):
    """`linear_1 .. linear_N` with the activation between them; N = `config.projector_layers`.

    Changes from `LlavaMultiModalProjector`: any number of layers (LLaVA's `linear` is 1, `mlpNx_gelu` is N).
    """

    def __init__(self, config: DynamicLlavaConfig) -> None:
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.num_layers = config.projector_layers
        if self.num_layers == 1:
            del self.linear_2
        for number in range(3, self.num_layers + 1):
            layer = nn.Linear(hidden, hidden, bias=config.multimodal_projector_bias)
            self.add_module(f"linear_{number}", layer)

    def forward(self, image_features: Tensor) -> Tensor:
        """`(..., D_vision)` -> `(..., D)`."""
        hidden = self.linear_1(image_features)
        for number in range(2, self.num_layers + 1):
            hidden = self.get_submodule(f"linear_{number}")(self.act(hidden))
        return hidden
