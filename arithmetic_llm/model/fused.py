"""Operations of a layer with gradients written by hand, for the CPU.

Left to autograd they keep more and pass over memory more often; on a CPU, half of a small model's
training step is such work between the matrix products. Elsewhere PyTorch's own kernels do it, which
are also what the tests compare values and gradients with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_MASKS = 1024  # off the CPU masks are made of multiples of this length, and kept
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


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` where no position sees a later one.

    Args:
        q, k, v: (B, H, T, D): rows, heads, positions, features of a head.
        window: positions that each one sees, itself included; 0 = all before it.

    Returns:
        (B, H, T, D).
    """
    length = q.shape[2]
    window = min(window or length, length)
    if q.device.type == "cpu":
        return _CausalAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), window).view(q.shape)
    if window == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    longest = -(-length // _MASKS) * _MASKS
    mask = _square_mask(longest, window, q.dtype, q.device)[:length, :length]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _CausalAttention(Function):
    """Blocks of queries, each with the keys that one of them sees: the rest is never made."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out, weights = torch.empty_like(q), []
        for first, start, end in _blocks(q.shape[1], window):
            mask, seen = _mask(q, (first, start, end), window), slice(first, end)
            scores = torch.baddbmm(mask, q[:, start:end], k[:, seen].mT, alpha=q.shape[-1] ** -0.5)
            weights.append(scores.softmax(-1))
            out[:, start:end] = weights[-1] @ v[:, seen]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale, blocks = q.shape[-1] ** -0.5, _blocks(q.shape[1], ctx.window)
        for (first, start, end), weight in zip(blocks, weights, strict=True):
            block, seen, grad_out = slice(start, end), slice(first, end), grad[:, start:end]
            grad_weight = grad_out @ v[:, seen].mT
            grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_q[:, block] = (grad_scores @ k[:, seen]).mul_(scale)
            grad_k[:, seen].baddbmm_(grad_scores.mT, q[:, block], alpha=scale)
            grad_v[:, seen].baddbmm_(weight.mT, grad_out)
        return grad_q, grad_k, grad_v, None


def _blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """First key, first query and end of each block."""
    starts = range(0, length, BLOCK)
    return [(max(0, at - window + 1), at, min(at + BLOCK, length)) for at in starts]


@lru_cache(maxsize=8)
def _square_mask(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`_mask` of whole rows, (length, length); kept, since all layers of all passes need it."""
    return _mask(torch.empty(0, dtype=dtype, device=device), (0, 0, length), window)


def _mask(like: Tensor, block: tuple[int, int, int], window: int) -> Tensor:
    """What is added to a block's scores, (queries, keys): ``-inf`` where a query does not look."""
    first, start, end = block
    hidden = like.new_full((end - start, end - first), -torch.inf)
    later = hidden.triu(start - first + 1)
    return later if end - first <= window else later + hidden.tril(start - first - window)
