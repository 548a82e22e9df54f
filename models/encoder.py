"""Owns the pre-norm transformer block and the encoder: the architecture of Skyformer's model_transformer.py
(arXiv 2111.00035), which Spectraformer and SchoenbAt use unchanged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.base import Attention
from models.multihead import MultiHeadAttention


class Block(nn.Module):
    """x + dropout(attention(LN x)); x + MLP(LN x), MLP = Linear, GELU, dropout, Linear, dropout."""

    def __init__(
        self, attention: Attention, *, dim: int, num_heads: int, mlp_dim: int, dropout: float, full_precision: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(attention, dim=dim, num_heads=num_heads, full_precision=full_precision)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        x = x + self.dropout1(self.attention(self.norm1(x), key_padding_mask))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Token ids [B, L] -> hidden states [B, L, dim]; padded positions hold finite, meaningless values."""

    def __init__(
        self,
        attentions: Sequence[Attention],
        *,
        vocab_size: int,
        max_len: int,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        full_precision: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.token_embedding = nn.Embedding(vocab_size, dim)
        # As published: the position table is rounded up to a power of two (2000 -> 2048, 4000 -> 4096).
        self.position_embedding = nn.Embedding(1 << (max_len - 1).bit_length(), dim)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(a, dim=dim, num_heads=num_heads, mlp_dim=mlp_dim, dropout=dropout, full_precision=full_precision)
            for a in attentions
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        length = tokens.shape[1]
        if length > self.position_embedding.num_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the model's {self.position_embedding.num_embeddings} "
                "positions; raise task.max_len or truncate the data"
            )
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding.weight[:length])
        for block in self.blocks:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, key_padding_mask, use_reentrant=False)
            else:
                x = block(x, key_padding_mask)
        return self.norm(x)
