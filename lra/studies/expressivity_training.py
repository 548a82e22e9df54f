"""Owns one trained layer of polynomial attention on the two sets of 2310.20051, degrees 1 to 8.

Legend: S independent models (seeds), B batch, T distinct tokens, d channels, m signs of the readout.
"""

import math
from typing import Literal, get_args

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional

Half = Literal["readout", "projections"]
HALVES: tuple[Half, ...] = get_args(Half)


def distinct_tokens(length: int, features: Tensor, data: DictConfig) -> tuple[Tensor, Tensor]:
    """features [..] -> tokens [.., T, d] and how often each occurs, [T]: the feature's own token first, then one token
    of each block. Equal tokens have equal outputs, so T = copies + 1 of them stand for all n.

    The feature always lies in block 0: the layer's first weights are drawn without regard to the order of blocks.
    """
    copies = math.isqrt(length)
    x = features.new_zeros(*features.shape, copies + 1, copies + 2)
    x[..., 0, 0] = features
    x[..., 0, 1] = data.block
    x[..., 1:, 1:-1] = data.block * torch.eye(copies, dtype=features.dtype)
    x[..., -1] = data.constant
    counts = torch.full((copies + 1,), float(copies), dtype=features.dtype)
    counts[0], counts[1] = 1.0, copies - 1.0
    return x, counts


class PolynomialLayer(nn.Module):
    """One layer w_ij ~ |<q_i, k_j>|^degree, C = w A, and a readout of C; `trains` says which half is trained.

    readout: q and k are the tokens; logit = s mean_i sum_l max(<C_i, y_l> - tau_l, 0) + offset, all of it trained.
    projections: q and k are linear maps of the tokens that start at the identity; the readout is the fixed one of the
    study, random signs and tau: logit = 10 (max_il <C_i, y_l> - tau), positive exactly where the fixed network fires.

    For even degrees this is polynomial attention without a sink; odd ones take absolute values, since signed weights
    have no normaliser.
    """

    def __init__(
        self, seeds: int, dim: int, signs: int, threshold: float, degree: int, trains: Half, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.degree, self.trains, self.threshold = degree, trains, threshold
        identity = torch.eye(dim).expand(seeds, 1, dim, dim)
        self.query, self.key = (nn.Parameter(identity.clone(), trains == "projections") for _ in range(2))
        drawn = torch.randint(0, 2, (seeds, 1, dim, signs), generator=generator).float() * 2 - 1
        readout = trains == "readout"
        self.signs = nn.Parameter(drawn, readout)
        self.bias = nn.Parameter(torch.rand(seeds, 1, 1, signs, generator=generator), readout)
        self.scale = nn.Parameter(torch.ones(seeds, 1), readout)
        self.offset = nn.Parameter(torch.zeros(seeds, 1), readout)

    def attend(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [S, B, T, d], counts [T] -> C [S, B, T, d]."""
        q, k = (x @ self.query, x @ self.key) if self.trains == "projections" else (x, x)
        t = q @ k.transpose(-2, -1)  # [S, B, T, T]
        logits = self.degree * t.abs().clamp_min(1e-12).log() + counts.log()
        return logits.softmax(dim=-1) @ x

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """-> logits [S, B]."""
        response = self.attend(x, counts) @ self.signs  # [S, B, T, m]
        if self.trains == "projections":
            return 10 * (response.amax(dim=(-2, -1)) - self.threshold)
        hidden = (response - self.bias).relu().sum(dim=-1)  # [S, B, T]
        return self.scale * (hidden * counts).sum(dim=-1) / counts.sum() + self.offset


def train_all(study: DictConfig, seed: int) -> pd.DataFrame:
    """Accuracy before and after training; one row per length, trained half, degree and model."""
    part, rows = study.training, []
    for length in part.lengths:
        for trains in HALVES:
            for degree in part.degrees:
                before, after = train(study, length, degree, trains, seed)
                rows += [
                    (length, degree, trains, model, *pair) for model, pair in enumerate(zip(before, after, strict=True))
                ]
    columns = ["length", "degree", "trains", "model", "accuracy_before", "accuracy"]
    return pd.DataFrame(rows, columns=columns).assign(seed=seed, steps=part.steps)


def train(study: DictConfig, length: int, degree: int, trains: Half, seed: int) -> tuple[list[float], list[float]]:
    """Test accuracies, before and after, of models that are trained side by side on batches of their own."""
    part = study.training
    generator = torch.Generator().manual_seed(seed)
    signs = part.hidden if trains == "readout" else num_signs(length, study.readout)
    layer = PolynomialLayer(part.seeds, math.isqrt(length) + 2, signs, study.threshold, degree, trains, generator)
    test = _batch(study, length, part.num_test, generator)
    before = _accuracies(layer, *test)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=part.learning_rate)
    for _ in range(part.steps):
        x, counts, labels = _batch(study, length, part.batch_size, generator)
        # the mean over models times their number: each has the gradient of its own mean loss
        loss = functional.binary_cross_entropy_with_logits(layer(x, counts), labels) * part.seeds
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return before, _accuracies(layer, *test)


@torch.no_grad()
def _accuracies(layer: PolynomialLayer, x: Tensor, counts: Tensor, labels: Tensor) -> list[float]:
    return ((layer(x, counts) > 0) == (labels > 0.5)).double().mean(dim=-1).tolist()


def num_signs(length: int, readout: DictConfig) -> int:
    """m = factor ln(per_token n)."""
    return math.ceil(readout.factor * math.log(readout.per_token * length))


def _batch(study: DictConfig, length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Half of each set, a uniform within its range."""
    part = study.training
    labels = (torch.arange(size) % 2).float().expand(part.seeds, -1)
    uniform = torch.rand(part.seeds, size, generator=generator)
    (low0, high0), (low1, high1) = part.small, part.large
    features = torch.where(labels > 0.5, low1 + (high1 - low1) * uniform, low0 + (high0 - low0) * uniform)
    x, counts = distinct_tokens(length, features, study.data)
    return x, counts, labels
