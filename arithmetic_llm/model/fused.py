"""What a layer computes between its matrix products, with gradients written by hand for the CPU.

Left to autograd, each step of a formula keeps its result and passes over memory once more; on a
CPU, half of a small model's training step is such work. Here the functions of kernels.c do it in
one pass, if they could be compiled. Where they are not, on a GPU or in fp64, PyTorch's own
operations do, which are also what the tests compare values and gradients with.

Shape letters: B rows, T positions, H heads, D features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from arithmetic_llm.model.kernels import kernels_for

_MASKS = 1024  # off the CPU masks are made of multiples of this length, and kept
_FEW = 6  # queries of a row
_WHOLE = 2**30  # a window: farther back than any text goes
BLOCK = 128  # queries that attend together, to the keys up to their last; larger wastes products


def _apply(function: type[Function], *inputs: Any) -> Tensor:
    """The value of a function; by way of autograd only where there is something to learn.

    That takes longer than a short row.
    """
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.value(*inputs)[0]


# --------------------------------------------------------------------------------------- norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang & Sennrich, 2019)."""
    if kernels_for(x):
        return _apply(_RMSNorm, x.contiguous(), _exact(weight), eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _RMSNorm(Function):
    @staticmethod
    def value(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm, and 1 / root mean square of each row."""
        out, inverse = torch.empty_like(x), _numbers(x.shape[:-1])
        kernels_for(x).rms_norm(x, weight, out, inverse, inverse.numel(), x.shape[-1], eps)
        return out, inverse

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = _RMSNorm.value(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        kernels_for(x).rms_norm_backward(
            grad.contiguous(), x, weight, inverse, grad_x, grad_weight, inverse.numel(), x.shape[-1]
        )
        return grad_x, grad_weight, None


def _exact(weights: Tensor) -> Tensor:
    """Weights as the functions of kernels.c take them."""
    return weights.float().contiguous()


def _numbers(shape: torch.Size) -> Tensor:
    """Room for fp32 numbers."""
    return torch.empty(shape, dtype=torch.float32)


# --------------------------------------------------------------------------------------- heads


def heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Queries or keys as attention takes them: each head's norm, its rotation, and heads first.

    Args:
        x: (B, T, H, D).
        weight: of the norm, (D,).
        cos, sin: (B or 1, T, 1, D), see `rotary_angles`.

    Returns:
        (B, H, T, D).
    """
    if kernels_for(x):
        angles = (each.to(x.dtype).contiguous() for each in (cos, sin))
        return _apply(_Heads, x.contiguous(), _exact(weight), *angles, eps)
    return rotate(rms_norm(x, weight, eps), cos, sin).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair ``(x[i], x[i + D/2])`` by its position's angle (`rotary_angles`)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((second, first), dim=-1), sin)


class _Heads(Function):
    @staticmethod
    def value(
        x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, length, count, features = x.shape
        out, inverse = x.new_empty(rows, count, length, features), _numbers(x.shape[:-1])
        kernels_for(x).heads(x, weight, cos, sin, out, inverse, *x.shape, len(cos) > 1, eps)
        return out, inverse

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        out, inverse = _Heads.value(x, weight, cos, sin, eps)
        ctx.save_for_backward(x, weight, cos, sin, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, *others = ctx.saved_tensors
        weight, cos = others[:2]
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        kernels_for(x).heads_backward(
            grad.contiguous(), x, *others, grad_x, grad_weight, *x.shape, len(cos) > 1
        )
        return grad_x, grad_weight, None, None, None


# ----------------------------------------------------------------------------------- attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` where no position sees a later one.

    Args:
        q, k, v: (B, H, T, D).
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
            block, seen = slice(start, end), slice(first, end)
            weights.append(_weights(q[:, block], k[:, seen], start - first, window))
            out[:, block] = weights[-1] @ v[:, seen]
        ctx.save_for_backward(q, k, v, *weights)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        blocks = _blocks(q.shape[1], ctx.window)
        for (first, start, end), weight in zip(blocks, weights, strict=True):
            block, seen, grad_out = slice(start, end), slice(first, end), grad[:, start:end]
            grad_weight = grad_out @ v[:, seen].mT
            grad_scores = _softmax_backward(grad_weight, weight, q.shape[-1] ** -0.5)
            grad_q[:, block] = grad_scores @ k[:, seen]
            grad_k[:, seen].baddbmm_(grad_scores.mT, q[:, block])
            grad_v[:, seen].baddbmm_(weight.mT, grad_out)
        return grad_q, grad_k, grad_v, None


def _blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """First key, first query and end of each block."""
    starts = range(0, length, BLOCK)
    return [(max(0, at - window + 1), at, min(at + BLOCK, length)) for at in starts]


def _weights(q: Tensor, k: Tensor, ahead: int, window: int) -> Tensor:
    """The attention weights of a block, (N, queries, keys).

    Args:
        ahead: keys before that of the first query.
    """
    scale = q.shape[-1] ** -0.5
    if not kernels_for(q):
        mask = _mask(q, (q.shape[1], k.shape[1]), ahead, window)
        return torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)
    scores = q @ k.mT
    kernels_for(scores).causal_softmax(scores, *scores.shape, ahead, window, scale)
    return scores


def _softmax_backward(grad: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Gradients of scores from those of the weights, whose place they may take."""
    if (kernels := kernels_for(grad)) and grad.dtype == weights.dtype:
        keys = grad.shape[-1]
        kernels.softmax_backward(grad, weights, grad.numel() // keys, keys, scale)
        return grad
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype) * scale


@lru_cache(maxsize=8)
def _square_mask(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`_mask` of whole rows, (length, length); kept, since all layers of all passes need it."""
    return _mask(torch.empty(0, dtype=dtype, device=device), (length, length), 0, window)


def _mask(like: Tensor, shape: tuple[int, int], ahead: int, window: int) -> Tensor:
    """What is added to scores, (queries, keys): ``-inf`` where a query does not look."""
    hidden = like.new_full(shape, -torch.inf)
    later = hidden.triu(ahead + 1)
    return later if shape[1] <= window else later + hidden.tril(ahead - window)


@dataclass(frozen=True)
class Sight:
    """What new positions see of a cache: what stands up to their own, as far as a window goes."""

    positions: Tensor  # (B, T) long
    held: Tensor  # (B, S) long; the position of the token in each slot, below 0 if there is none
    window: int  # positions that each one sees, itself included; 0 = all before it

    @cached_property
    def mask(self) -> Tensor:
        """What is added to scores, (B, 1, T, S) fp32: ``-inf`` where a position does not look."""
        own, held = self.positions[:, None, :, None], self.held[:, None, None]
        hidden = (held > own) | (held < 0)
        if self.window:
            hidden |= held <= own - self.window
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Softmax attention to the slots of a cache, in the dtype of ``q``; nothing learns from it.

    On a GPU it is written out: autocast would do the softmax between two casts, and that adds in
    fp32 anyway.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D).

    Returns:
        (B, H, T, D).
    """
    if _may_be_compiled(q, k, v):
        return _attended(q.contiguous(), k, v, sight)
    mask = sight.mask.to(q.dtype)
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask
        return scores.softmax(dim=-1) @ v


def _may_be_compiled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether kernels.c attends to these, no slower: on one thread, and sixteen for a few."""
    if torch.is_grad_enabled() or torch.get_num_threads() > 1 or not kernels_for(q):
        return False
    if q.dtype != torch.float32 or q.shape[2] < _FEW or q.shape[3] % 8:
        return False
    return k.shape == v.shape and k.stride() == v.stride() and k.stride()[2:] == (k.shape[3], 1)


def _attended(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    out = torch.empty_like(q)
    places = sight.held.contiguous(), sight.positions.contiguous()
    sizes = *q.shape, sight.held.shape[1], *k.stride()[:2], sight.window or _WHOLE
    kernels_for(q).cached_attention(q, k, v, *places, out, *sizes, q.shape[-1] ** -0.5)
    return out


# ------------------------------------------------------------------------ feed-forward and loss


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, 2020)."""
    if kernels_for(gate) and (gate.dtype, gate.shape) == (up.dtype, up.shape):
        return _apply(_SwiGLU, gate.contiguous(), up.contiguous())
    return F.silu(gate) * up


class _SwiGLU(Function):
    @staticmethod
    def value(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        out = torch.empty_like(gate)
        kernels_for(gate).swiglu(gate, up, out, gate.numel())
        return (out,)

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _SwiGLU.value(gate, up)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        kernels_for(gate).swiglu_backward(grad.contiguous(), gate, up, *grads, gate.numel())
        return grads


def summed_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight x negative log-likelihood, in nats.

    Args:
        logits: (N, vocabulary).
        targets: (N,) long.
        weights: (N,) fp32.
    """
    if kernels_for(logits):
        counted = targets.long().contiguous(), _exact(weights)
        return _apply(_CrossEntropy, logits.contiguous(), *counted)
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


class _CrossEntropy(Function):
    @staticmethod
    def value(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient: to know one is nearly to know the other."""
        loss, grad = torch.zeros((), dtype=torch.float64), torch.empty_like(logits)
        kernels_for(logits).cross_entropy(logits, targets, weights, grad, loss, *logits.shape)
        return loss.float(), grad

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        loss, grad = _CrossEntropy.value(logits, targets, weights)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None
