"""Owns the depthwise convolution over a sequence: one filter per head, by the convolution theorem.

Legend: B batch, H heads, L length, D head_dim, W width of a filter, odd.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn


class DepthwiseConvolution(nn.Module):
    """out[b, h, i] = sum_j weight[h, j] x[b, h, i + j - (W - 1) / 2], zero outside the sequence; [B, H, L, D].

    Equals `torch.nn.Conv2d(H, H, (W, 1), padding=(W // 2, 0), groups=H, bias=False)`, its weight [H, 1, W, 1] drawn from
    the same law. On a CPU that one takes several times as long, and the gradient of its weights is percents off at
    W = 65 (PyTorch 2.13, fp32). Half precision is transformed in fp32.
    """

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(num_heads, 1, width, 1).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        length, filters = x.shape[2], self.weight[:, 0, :, 0]  # [H, W]
        width = filters.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        size = _fast_length(length + width - 1)  # room for no wrapping around
        spectrum = torch.fft.rfft(x.to(dtype), n=size, dim=2)
        # flipped: the sum over i + j is a correlation
        response = torch.fft.rfft(filters.to(dtype).flip(-1), n=size)
        out = torch.fft.irfft(spectrum * response[:, :, None], n=size, dim=2)
        return out[:, :, width // 2 : width // 2 + length].to(x.dtype)


@lru_cache
def _fast_length(least: int) -> int:
    """The next 2^a 3^b 5^c: a transform of 64 * 257 takes several times as long as one of 2^7 * 3^3 * 5."""
    size = least
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
