"""Operations of a layer with gradients written by hand, for the CPU.

Left to autograd they keep more and pass over memory more often; on a CPU, half of a small model's
training step is such work between the matrix products. Elsewhere PyTorch's own kernels do it, which
are also what the tests compare values and gradients with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries that attend together, to the keys up to their last; larger wastes products


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang & Sennrich, 2019)."""
    weight = weight.to(x.dtype)
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    # Not by way of autograd where there is nothing to learn: that takes longer than a short row.
    unit = _Normalise.apply(x, eps) if torch.is_grad_enabled() else x * _inverse_rms(x, eps)
    return unit * weight


class _Normalise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, scale = ctx.saved_tensors
        along = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(scale), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, which stays as 1; from fp32 sums."""
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` where no position sees a later one.

    Args:
        q, k, v: (B, H, T, D): rows, heads, positions, features of a head.

    Returns:
        (B, H, T, D).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return _CausalAttention.apply(*(x.flatten(0, 1) for x in (q, k, v))).view(q.shape)


class _CausalAttention(Function):
    """Blocks of queries, each with the keys up to its own end: half of the square is never made."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = torch.empty_like(q), []
        for start, end in _blocks(q.shape[1]):
            mask = q.new_full((end - start, end), -torch.inf).triu_(start + 1)
            scores = torch.baddbmm(mask, q[:, start:end], k[:, :end].mT, alpha=q.shape[-1] ** -0.5)
            weights.append(scores.softmax(-1))
            out[:, start:end] = weights[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *weights = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.shape[-1] ** -0.5
        for (start, end), weight in zip(_blocks(q.shape[1]), weights, strict=True):
            block, grad_out = slice(start, end), grad[:, start:end]
            grad_weight = grad_out @ v[:, :end].mT
            grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_q[:, block] = (grad_scores @ k[:, :end]).mul_(scale)
            grad_k[:, :end].baddbmm_(grad_scores.mT, q[:, block], alpha=scale)
            grad_v[:, :end].baddbmm_(weight.mT, grad_out)
        return grad_q, grad_k, grad_v


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
