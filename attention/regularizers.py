"""Owns what stands before and after a dot-product kernel: pre-SBN, temperature, post-SBN, and the frame they form.

Together they are ppSBN, arXiv 2505.12252. Legend: B batch, H heads, L length, D head_dim.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from attention.base import Attention, HeadShape
from attention.fused.blocks import UnitNorm


class InputRegularizer(nn.Module, ABC):
    """x [B, H, L, D] -> x of the same shape. Queries and keys get an instance each."""

    unit_norm: ClassVar[bool]  # True when every output row has norm <= 1, so that |q.k| <= 1
    unit: UnitNorm | None = None  # what a fused op has to do in place of `forward`; None where it cannot
    exemptions: Mapping[str, str] = {}

    @abstractmethod
    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """padding_mask [B, L], True at padding, or None."""


class NoPreSBN(InputRegularizer):
    """x itself."""

    unit_norm = False

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return x


class TokenPreSBN(InputRegularizer):
    """(x - mean(x)) / |x - mean(x)|, the mean over the D channels of each token.

    What the authors' released code does: its division by the token's standard deviation cancels in the norm. Invariant
    to x -> a x + b (a > 0); a constant token, where that code gives NaN, becomes 0.
    """

    unit_norm = True

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, eps: float) -> None:
        """`eps`: floor of the norm."""
        super().__init__()
        self.eps = eps
        self.unit = UnitNorm(eps, centre=True)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return _unit(x - x.mean(dim=-1, keepdim=True), self.eps)


class L2PreSBN(InputRegularizer):
    """x / |x|: the same without centring."""

    unit_norm = True

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.unit = UnitNorm(eps, centre=False)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return _unit(x, self.eps)


class BatchPreSBN(InputRegularizer):
    """Batch normalisation per head and channel over all real tokens, then x / |x|: ppSBN as its name reads.

    Evaluation uses running averages (biased variance, as in training).
    """

    unit_norm = True
    exemptions = {"U7": "batch statistics mix the examples of a training batch by definition"}

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(shape.num_heads, 1, shape.head_dim))
        self.register_buffer("running_var", torch.ones(shape.num_heads, 1, shape.head_dim))

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        mean, var = self._statistics(x, padding_mask) if self.training else (self.running_mean, self.running_var)
        return _unit((x - mean) * (var + self.eps).rsqrt(), self.eps)

    def _statistics(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        real = x.new_ones(x.shape[0], 1, x.shape[2], 1)
        if padding_mask is not None:
            real = (~padding_mask)[:, None, :, None].to(x.dtype)
        count = real.sum()
        mean = (x * real).sum(dim=(0, 2)).unsqueeze(1) / count  # [H, 1, D]
        var = ((x - mean).square() * real).sum(dim=(0, 2)).unsqueeze(1) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        return mean, var


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


class Temperature(nn.Module, ABC):
    """tau in K(tau q.k / sqrt(D)): with unit-norm inputs |argument| <= max_argument."""

    max_argument: float

    @abstractmethod
    def forward(self) -> Tensor | float:
        """tau, [H, 1, 1] or a number."""


class FixedTemperature(Temperature):
    """One number for every head; 1 reproduces the paper, where |argument| <= 1/sqrt(D)."""

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, value: float) -> None:
        super().__init__()
        if value <= 0:
            raise ValueError(f"temperature.value={value} must be positive")
        self.value = value
        self.max_argument = value / math.sqrt(shape.head_dim)

    def forward(self) -> float:
        return self.value


class LearnableTemperature(Temperature):
    """tau = tau_max sigmoid(theta) per head, tau_max = max_argument sqrt(D), and tau = 1 before training.

    The exact form of what post-SBN wants to restore: exp(tau t) = exp(t)^tau.
    """

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, max_argument: float) -> None:
        super().__init__()
        self.max_argument = max_argument
        self.max = max_argument * math.sqrt(shape.head_dim)
        if self.max <= 1:
            raise ValueError(
                f"temperature.max_argument={max_argument} keeps tau below {self.max:.3g} for "
                f"head_dim={shape.head_dim}, so it cannot start at 1; choose more than {shape.head_dim**-0.5:.3g}"
            )
        self.theta = nn.Parameter(torch.full((shape.num_heads, 1, 1), -math.log(self.max - 1)))

    def forward(self) -> Tensor:
        return self.max * torch.sigmoid(self.theta)


class OutputRegularizer(nn.Module, ABC):
    """out [B, H, L, D] -> the same shape."""

    @property
    def gain(self) -> Tensor | None:
        """[D], where that factor per channel is all that `forward` does: a fused op can take it in. Else None."""
        return None

    @abstractmethod
    def forward(self, out: Tensor) -> Tensor: ...


class NoPostSBN(OutputRegularizer):
    """out itself."""

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()

    def forward(self, out: Tensor) -> Tensor:
        return out


class ScaleVec(OutputRegularizer):
    """gamma * out, gamma [D] shared by the heads and 1 before training: post-SBN of the authors' commit 547e87a."""

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape.head_dim))

    @property
    def gain(self) -> Tensor:
        return self.gamma

    def forward(self, out: Tensor) -> Tensor:
        return self.gamma * out


class Power(OutputRegularizer):
    """gamma * sgn(out) (|out| + eps)^beta, gamma a number, beta [D], both 1 before training.

    Post-SBN as the paper writes it, gamma out^beta, made real for negative values and finite in its gradient.
    """

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.ones(shape.head_dim))

    def forward(self, out: Tensor) -> Tensor:
        return self.gamma * out.sign() * (out.abs() + self.eps) ** self.beta


PreFactory = Callable[[HeadShape, torch.Generator], InputRegularizer]
TemperatureFactory = Callable[[HeadShape, torch.Generator], Temperature]
PostFactory = Callable[[HeadShape, torch.Generator], OutputRegularizer]


class RegularizedAttention(Attention):
    """post(core(sqrt(tau) pre(q), sqrt(tau) pre(k), v)): the frame that SchoenbAt and its exact reference share."""

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        pre: PreFactory,
        temperature: TemperatureFactory,
        post: PostFactory,
    ) -> None:
        super().__init__()
        self.pre_q, self.pre_k = pre(shape, generator), pre(shape, generator)
        self.temperature = temperature(shape, generator)
        self.post = post(shape, generator)
        # largest |tau q.k / sqrt(D)| that can occur
        self.max_argument = self.temperature.max_argument if self.pre_q.unit_norm else math.inf

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        x, y = self.regularize(q, k, key_padding_mask)
        return self.post(self.core(x, y, v, key_padding_mask))

    def regularize(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, y [B, H, L, D] with x.y = tau pre(q).pre(k); 1/sqrt(D) is not yet applied."""
        query_mask = key_padding_mask if q.shape[2] == k.shape[2] else None  # self-attention: one mask serves both
        x, y = self.pre_q(q, query_mask), self.pre_k(k, key_padding_mask)
        tau = self.temperature()
        if isinstance(tau, Tensor):
            return x * tau.sqrt(), y * tau.sqrt()
        return (x, y) if tau == 1.0 else (x * math.sqrt(tau), y * math.sqrt(tau))

    @abstractmethod
    def core(self, x: Tensor, y: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Attention with the kernel argument x.y / sqrt(D)."""
