"""Owns Nystromformer: softmax attention through m landmarks, the means of segments of the sequence.

Legend: B batch, H heads, L length, D head_dim, m num_landmarks.
"""

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape, mask_keys
from attention.low_rank.depthwise import DepthwiseConvolution
from attention.low_rank.pinv import hyper_power_inverse
from attention.low_rank.real_keys import masked_softmax


class Nystromformer(Attention):
    """out = softmax(q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ K^T) V + conv(V), logits over sqrt(D) (2102.03902).

    Q~, K~ are means over m segments of an example's *real* positions, of sizes that differ by at most one; so padding
    changes nothing, and no length is forbidden. With fewer than m real positions each is its own landmark and the
    surplus landmarks are decoupled, which makes the formula exact up to the iterated inverse. (The released code then
    switches to softmax attention; here it does not, so that a batch of mixed lengths is one function.) With the
    published 6 iterations the inverse is approximate, hence rows need not sum to 1.
    """

    description = Description(paper="2102.03902", exact=False, complexity="L m D + m^3")
    exemptions = {
        "U3": "the iterated pseudo-inverse is approximate, so that rows do not sum to exactly 1",
        "U5": "landmarks are means over consecutive positions",
    }

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        num_landmarks: int,
        num_iterations: int,
        conv_kernel: int | None,
    ) -> None:
        """`num_iterations`: steps of the pseudo-inverse. `conv_kernel`: odd width of the depthwise convolution of the
        values over the sequence, one filter per head; None leaves it out."""
        super().__init__()
        if conv_kernel is not None and conv_kernel % 2 == 0:
            raise ValueError(f"Nystromformer's conv_kernel={conv_kernel} must be odd, or the length would change")
        self.num_landmarks, self.num_iterations = num_landmarks, num_iterations
        self.conv = None if conv_kernel is None else DepthwiseConvolution(shape.num_heads, conv_kernel)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"Nystromformer is a self-attention; got {q.shape[2]} queries and {k.shape[2]} keys")
        scale = q.shape[-1] ** -0.25
        x, y = q * scale, k * scale
        averages, unused = segment_means(x, self.num_landmarks, key_padding_mask)
        landmarks_q, landmarks_k = averages @ x, averages @ y  # [B, H, m, D]
        to_landmarks = masked_softmax(x @ landmarks_k.transpose(-2, -1), unused)  # [B, H, L, m]
        between = masked_softmax(landmarks_q @ landmarks_k.transpose(-2, -1), unused)  # [B, H, m, m]
        # An unused landmark is its own 1 x 1 block, which the inverse leaves alone and no query reaches.
        identity = torch.eye(self.num_landmarks, dtype=between.dtype, device=between.device)
        between = torch.where(unused[:, None, :, None], identity, between)
        from_keys = masked_softmax(landmarks_q @ y.transpose(-2, -1), key_padding_mask)  # [B, H, m, L]
        out = to_landmarks @ (hyper_power_inverse(between, self.num_iterations) @ (from_keys @ v))
        return out if self.conv is None else out + self.conv(mask_keys(v, key_padding_mask))


def segment_means(x: Tensor, num_segments: int, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The matrix that averages x [B, H, L, D] over segments of real positions, [B, 1, m, L], and which segments are
    empty (fewer real positions than segments), [B, m]."""
    batch, length = x.shape[0], x.shape[2]
    if key_padding_mask is None:
        real = torch.ones(batch, length, dtype=torch.int64, device=x.device)
    else:
        real = (~key_padding_mask).to(torch.int64)
    rank = real.cumsum(dim=-1) - 1  # the how-manieth real position
    segment = rank * num_segments // real.sum(dim=-1, keepdim=True)  # [B, L]
    segments = torch.arange(num_segments, device=x.device)
    members = (segment[:, None, :] == segments[:, None]) & real[:, None, :].bool()  # [B, m, L]
    sizes = members.sum(dim=-1)
    averages = members.to(x.dtype) / sizes.clamp_min(1).unsqueeze(-1)
    return averages[:, None], sizes == 0
