"""Owns pooling, the single and the pair head, and the whole classifier: token ids [B, S, L] -> logits [B, C]."""

from typing import Literal

import torch
from torch import Tensor, nn

from attention.base import AttentionFactory, HeadShape
from models.encoder import Encoder

Pooling = Literal["mean", "mean_over_padded_length"]
_POOLINGS = ("mean", "mean_over_padded_length")


class SequenceClassifier(nn.Module):
    """S sequences are folded into the batch, encoded, pooled, and handed to the head as [B, S, dim]: one sequence goes
    through Linear-ReLU-Linear, a pair first becomes [a, b, a*b, a-b] (Skyformer's model_LRA.py, arXiv 2111.00035)."""

    def __init__(
        self,
        attention: AttentionFactory,
        *,
        seed: int,
        vocab_size: int,
        num_classes: int,
        num_sequences: int,
        max_len: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        pooling: Pooling,
        full_precision_attention: bool,
        activation_checkpointing: bool,
    ) -> None:
        """`seed` fixes every initial weight. The attention draws from a stream of its own, so that two mechanisms
        under one seed start from the same backbone."""
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"model.dim={dim} is not divisible by model.num_heads={num_heads}; change one of them")
        if pooling not in _POOLINGS:
            raise ValueError(f"unknown model.pooling={pooling!r}; choose one of {', '.join(_POOLINGS)}")
        self.pooling = pooling
        shape = HeadShape(num_heads=num_heads, head_dim=dim // num_heads, max_len=1 << (max_len - 1).bit_length())
        with torch.random.fork_rng(devices=[]):
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)  # for nn.Linear and the like inside a mechanism
            attentions = [attention(shape, generator) for _ in range(num_layers)]
            torch.manual_seed(seed)
            self.encoder = Encoder(
                attentions,
                vocab_size=vocab_size,
                max_len=max_len,
                dim=dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                dropout=dropout,
                full_precision=full_precision_attention,
                activation_checkpointing=activation_checkpointing,
            )
            features = dim if num_sequences == 1 else 4 * dim
            self.head = nn.Sequential(nn.Linear(features, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, num_classes))

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """tokens [B, S, L], key_padding_mask [B, S, L] or None -> logits [B, C]."""
        batch, sequences, _ = tokens.shape
        mask = None if key_padding_mask is None else key_padding_mask.flatten(0, 1)
        hidden = self.encoder(tokens.flatten(0, 1), mask)  # [B*S, L, dim]
        pooled = self._pool(hidden, mask).unflatten(0, (batch, sequences))  # [B, S, dim]
        if sequences == 1:
            return self.head(pooled[:, 0])
        a, b = pooled.unbind(dim=1)
        return self.head(torch.cat([a, b, a * b, a - b], dim=-1))

    def _pool(self, hidden: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if key_padding_mask is None:
            return hidden.mean(dim=1)
        total = hidden.masked_fill(key_padding_mask[..., None], 0.0).sum(dim=1)
        if self.pooling == "mean_over_padded_length":  # published quirk: short documents get small vectors
            return total / hidden.shape[1]
        return total / (~key_padding_mask).sum(dim=1, keepdim=True).clamp_min(1)
