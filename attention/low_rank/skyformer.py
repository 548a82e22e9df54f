"""Owns Skyformer: Gaussian-kernelised attention through a Nystrom approximation with sampled landmarks.

Legend: B batch, H heads, L length, D head_dim, m num_landmarks.
"""

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape, mask_keys
from attention.kernelized import gaussian_kernel
from attention.low_rank.pinv import hyper_power_inverse
from attention.low_rank.real_keys import RealPositions, draw_integers, gather_rows


class Skyformer(Attention):
    """out = G(x, Z) (G(Z, Z) + gamma I)^-1 G(Z, y) V, G the Gaussian kernel, x = q D^(-1/4), y = k D^(-1/4)
    (2111.00035): an approximation of `GaussianAttention`, not of softmax; rows do not sum to 1.

    Z [m, D] are landmarks drawn uniformly, with replacement, from the stacked rows of x (first half) and y (second
    half), among the real positions of each example; heads share the positions. The draw is made once and kept in a
    buffer, in training and evaluation alike: an output depends on its example alone. (The released code draws anew at
    every forward, also at evaluation, from the first N positions whether they are real or not.)
    """

    description = Description(paper="2111.00035", exact=False, complexity="L m D + m^3")
    exemptions = {
        "U3": "kernelised attention has no row normalisation by definition",
        "U5": "landmarks are sampled by position",
    }

    def __init__(
        self, shape: HeadShape, generator: torch.Generator, *, num_landmarks: int, ridge: float, num_iterations: int
    ) -> None:
        """`num_landmarks`: m, even. `ridge`: gamma, keeps repeated landmarks invertible. `num_iterations`: steps of the
        inverse."""
        super().__init__()
        if num_landmarks % 2 or ridge <= 0:
            raise ValueError(
                f"Skyformer needs an even num_landmarks (half queries, half keys) and ridge > 0; "
                f"got {num_landmarks} and {ridge}"
            )
        self.ridge, self.num_iterations = ridge, num_iterations
        self.register_buffer("draws", draw_integers((2, num_landmarks // 2), generator))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"Skyformer is a self-attention; got {q.shape[2]} queries and {k.shape[2]} keys")
        scale = q.shape[-1] ** -0.25
        x, y = q * scale, k * scale
        positions = RealPositions.of(q, key_padding_mask).drawn(self.draws)  # [B, 2, m / 2]
        landmarks = torch.cat([gather_rows(x, positions[:, 0]), gather_rows(y, positions[:, 1])], dim=2)  # [B, H, m, D]
        summary = gaussian_kernel(landmarks, y) @ mask_keys(v, key_padding_mask)  # [B, H, m, D]
        return gaussian_kernel(x, landmarks) @ (self.inverse(gaussian_kernel(landmarks, landmarks)) @ summary)

    def inverse(self, gram: Tensor) -> Tensor:
        """(gram + gamma I)^-1 for gram [B, H, m, m], by iteration on the matrix scaled by its row sums, whose
        eigenvalues lie in (0, 1]."""
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gram = gram + self.ridge * identity
        root = gram.sum(dim=-1).rsqrt()  # [B, H, m]
        rows, columns = root.unsqueeze(-1), root.unsqueeze(-2)
        return rows * hyper_power_inverse(rows * gram * columns, self.num_iterations) * columns
