"""The two learnable predictors. Both give keep logits with two channels; index 0 means keep."""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sparsity_config import SparsityConfig


class PredictorLinear(nn.Linear):
    """`nn.Linear` that the decoder's initialisation leaves at PyTorch's own, as the published predictors."""

    def draw(self, name: str) -> None:
        """New weights from PyTorch's distribution, by torch's seed and the `name` of this layer alone: the same on any
        device, in any dtype (but for rounding), and however the model is sharded; loaded ones are left as they are."""
        generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        bound = self.in_features**-0.5
        for parameter in self.parameters():
            drawn = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(drawn)


def _score_head(dim: int) -> nn.Sequential:
    """dim -> dim/2 -> dim/4 -> 2 with GELU between."""
    return nn.Sequential(
        PredictorLinear(dim, dim // 2),
        nn.GELU(),
        PredictorLinear(dim // 2, dim // 4),
        nn.GELU(),
        PredictorLinear(dim // 4, 2),
    )


class PredictorBlock(nn.Module):
    """Pre-norm ViT block over the image tokens of a row; no bias in the qkv projection."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = PredictorLinear(dim, 3 * dim, bias=False)
        self.proj = PredictorLinear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = PredictorLinear(dim, ffn_dim)
        self.fc2 = PredictorLinear(ffn_dim, dim)

    def forward(self, hidden: Tensor, key_mask: Tensor) -> Tensor:
        """`hidden (B, N, P)`, `key_mask (B, 1, 1, N)` bool -> `(B, N, P)`."""
        batch, length, dim = hidden.shape
        qkv = self.qkv(self.norm1(hidden)).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        hidden = hidden + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))


class ImagePredictor(nn.Module):
    """Judges the image tokens of a row together (paper, method: learnable predictors).

    LayerNorm, Linear(D, P), GELU, pre-norm ViT blocks, then each token's first half joined with the mean of the
    second halves, then P -> P/2 -> P/4 -> 2.
    """

    def __init__(self, hidden_size: int, sparsity: SparsityConfig) -> None:
        super().__init__()
        dim = sparsity.predictor_dim
        self.down = nn.Sequential(nn.LayerNorm(hidden_size), PredictorLinear(hidden_size, dim), nn.GELU())
        self.blocks = nn.ModuleList(
            PredictorBlock(dim, sparsity.predictor_num_heads, sparsity.predictor_ffn_dim)
            for _ in range(sparsity.predictor_num_layers)
        )
        self.head = _score_head(dim)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Keep logits of the image tokens.

        Args:
            hidden: `(B, N_image, D)`, rows packed to the left.
            valid: `(B, N_image)` bool; attention and mean see valid tokens only.

        Returns:
            `(B, N_image, 2)`; finite everywhere, meaningful where valid.
        """
        # A row without images would leave its softmax empty; its logits are never read.
        key_mask = valid | ~valid.any(dim=-1, keepdim=True)
        hidden = self.down(hidden)
        for block in self.blocks:
            hidden = block(hidden, key_mask[:, None, None, :])
        local, shared = hidden.chunk(2, dim=-1)
        weights = valid.to(hidden.dtype)[..., None]
        shared = (shared * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return self.head(torch.cat([local, shared.expand_as(local)], dim=-1))


class OutputPredictor(nn.Module):
    """Judges one token from that token alone (paper, method): LayerNorm, Linear(D, P), GELU, P -> P/2 -> P/4 -> 2.

    The optional instruct predictor is another one of these.
    """

    def __init__(self, hidden_size: int, sparsity: SparsityConfig) -> None:
        super().__init__()
        dim = sparsity.predictor_dim
        self.down = nn.Sequential(nn.LayerNorm(hidden_size), PredictorLinear(hidden_size, dim), nn.GELU())
        self.head = _score_head(dim)

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """`hidden (..., D)` -> keep logits `(..., 2)`; `valid` is not looked at, a token's logits are its own."""
        return self.head(self.down(hidden))
