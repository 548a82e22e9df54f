"""Owns the iterative (pseudo-)inverse that Nystromformer and Skyformer share."""

import torch
from torch import Tensor


def hyper_power_inverse(a: Tensor, num_iterations: int) -> Tensor:
    """a [..., m, m] -> approximate (pseudo-)inverse [..., m, m], differentiable, by products alone (2102.03902).

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf), with the norms of each matrix
    itself: a maximum over the batch, as in the released codes, would make an example depend on its batch mates.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    magnitude = a.abs()
    column_norm = magnitude.sum(dim=-2).amax(dim=-1)[..., None, None]
    row_norm = magnitude.sum(dim=-1).amax(dim=-1)[..., None, None]
    z = a.transpose(-2, -1) / (column_norm * row_norm)
    for _ in range(num_iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z
