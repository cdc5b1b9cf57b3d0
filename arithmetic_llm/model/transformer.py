"""The policy: a decoder-only transformer in the layout that the ecosystem calls Qwen3.

Pre-norm RMSNorm, rotary positions, RMSNorm on each head's queries and keys, SwiGLU, no biases, and
the module names of that family, so that a checkpoint's weights run unchanged elsewhere.

Shape letters: B rows, T new positions, S positions attended to, H heads, D features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arithmetic_llm.config import ModelConfig
from arithmetic_llm.model.fused import Sight, attend, causal_attention, heads, rms_norm, swiglu


class RMSNorm(nn.Module):
    """Scale to unit root mean square over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, features: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """PyTorch's own, whose fp32 products oneDNN computes where none has to learn from them.

    PyTorch asks MKL for them, which on AMD's processors does less than half as many a second, but
    begins sooner: a few rows are left to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        few = x.numel() < _MANY_ROWS * x.shape[-1]
        if few or learning or not _onednn or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        return _onednn(x, self.weight, self.bias, "none", [], "")


# What torch's own compiler makes of a linear layer; not part of every build.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_MANY_ROWS = 64


class Embedding(nn.Embedding):
    """PyTorch's own, which draws its first weights only where there is memory for them."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there it would import torch's compiler, two seconds long
            super().reset_parameters()


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `heads` (Su et al., 2021).

    Args:
        positions: whole numbers, any shape.

    Returns:
        Two fp32 tensors ``(*positions.shape, head_dim)``: the cosines twice over; the sines
        negated, then as they are.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[..., None] * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys."""

    attend = staticmethod(attend)  # with a cache; an observer replaces it on one layer

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_model, self.head_dim = config.d_model, config.head_dim
        self.window = config.attention_window
        self.q_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model, bias=False)
        self.o_proj = Linear(d_model, d_model, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q = heads(q, self.q_norm.weight, context.cos, context.sin, self.q_norm.eps)
        k = heads(k, self.k_norm.weight, context.cos, context.sin, self.k_norm.eps)
        v = v.transpose(1, 2)
        if context.cache is None:
            out = causal_attention(q, k, v, self.window)
        else:
            k, v = context.cache.extend(layer, k, v, context.positions)
            out = self.attend(q, k, v, context.sight)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.dim_feedforward, bias=False)
        self.up_proj = Linear(config.d_model, config.dim_feedforward, bias=False)
        self.down_proj = Linear(config.dim_feedforward, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One transformer layer: two normalised residual branches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), context, layer))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class KVCache:
    """Keys and values of every layer for B rows, each row at its own length.

    Token ``i`` of a row lives in slot ``i``, so a row's length is all that masks and positions
    need, and nothing that another row holds, padding included, can matter. The cache grows as it
    fills, with a window to so many slots as one pass can see: from there on the slots go round,
    and token ``i`` takes the place of one that nothing looks back to any more. How many are read
    follows from the longest row and pass, which may change a row's last bits.
    """

    def __init__(self, config: ModelConfig, rows: int, device: torch.device):
        shape = (config.num_layers, rows, config.nhead, 1, config.head_dim)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.window = config.attention_window
        self.longest_pass = 0  # in tokens; the rejected ones of a draft count
        self.held = torch.zeros(rows, 0, dtype=torch.long, device=device)  # see `reserve`

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``k``, ``v`` (B, H, T, D) at ``positions`` (B, T); return those of slots in use."""
        rows, places = torch.arange(len(k), device=k.device)[:, None], positions % self.slots
        self.keys[layer][rows, :, places] = k.transpose(1, 2)
        self.values[layer][rows, :, places] = v.transpose(1, 2)
        used = self.held.shape[1]
        return self.keys[layer, :, :, :used], self.values[layer, :, :, :used]

    def reserve(self, tokens: int) -> Tensor:
        """Make room for ``tokens`` more in each row.

        Returns:
            (B, S) the position of the token that each slot in use holds then; below 0 if none.
        """
        self.longest_pass = max(self.longest_pass, tokens)
        needed = int(self.lengths.max()) + tokens
        # What a pass sees, from the window of its first token on. What one before has left of a
        # draft that was rejected then counts as behind the window.
        most = self.window + self.longest_pass - 1 if self.window else math.inf
        if self.slots < min(needed, most):  # grow by half, so that copying stays a small share
            self._lay_out(min(max(needed, self.slots * 3 // 2), most))
        self.held = self._latest(self.lengths + tokens, min(needed, self.slots), self.slots)
        return self.held

    def _latest(self, lengths: Tensor, used: int, slots: int) -> Tensor:
        """(B, used) the last position in each slot of rows of these lengths; below 0 if none."""
        last = lengths[:, None] - 1
        return last - (last - torch.arange(used, device=last.device)) % slots

    def _lay_out(self, slots: int) -> None:
        """Move what is held to where it belongs among so many slots."""
        before = self._latest(self.lengths, slots, slots) % self.slots
        index = before[None, :, None, :, None].expand(*self.keys.shape[:3], -1, self.keys.shape[4])
        # Not by take_along_dim, which first wraps every index: a tenth of an evaluation's time.
        self.keys, self.values = self.keys.gather(3, index), self.values.gather(3, index)

    def keep(self, rows: Tensor) -> None:
        """Hold the rows of these indices in this order; a row may come several times, or never."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]

    def remove(self, row: int) -> None:
        """Drop one row; the last one moves into its place, so that little is copied."""
        last = len(self.lengths) - 1
        used = self.held.shape[1]
        for tensor in (self.keys, self.values):
            tensor[:, row, :, :used] = tensor[:, last, :, :used]
        self.lengths[row] = self.lengths[last]
        self.keys, self.values = self.keys[:, :last], self.values[:, :last]
        self.lengths = self.lengths[:last]


@dataclass
class Context:
    """Positions, sight and cache that all layers of one forward pass share."""

    positions: Tensor  # (B, T), or (1, T) without a cache
    cos: Tensor  # (B or 1, T, 1, D)
    sin: Tensor
    cache: KVCache | None
    sight: Sight | None  # with a cache


class Transformer(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, cache: KVCache | None) -> Tensor:
        x = self.dropout(self.embed_tokens(input_ids))
        device = input_ids.device.type
        if torch.is_autocast_enabled(device):
            # Once here, or the residual stream would be cast in each layer.
            x = x.to(torch.get_autocast_dtype(device))
        context = self._context(x, cache)
        for index, layer in enumerate(self.layers):
            x = layer(x, context, index)
        return self.norm(x)

    def _context(self, x: Tensor, cache: KVCache | None) -> Context:
        tokens, config = x.shape[1], self.config
        positions = torch.arange(tokens, device=x.device)[None]
        sight = None
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            sight = Sight(positions, cache.reserve(tokens), config.attention_window)
        cos, sin = rotary_angles(positions[..., None], config.head_dim, config.rope_theta)
        return Context(positions, cos.to(x.dtype), sin.to(x.dtype), cache, sight)


class ArithmeticModel(nn.Module):
    """A language model over the arithmetic vocabulary.

    ``model(input_ids)`` gives logits of shape (B, T, vocabulary). Rows may be padded on the right:
    attention is causal, so no real position ever sees the padding.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.model = Transformer(config, vocab_size)
        self.lm_head = Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def vocab_size(self) -> int:
        return self.lm_head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.lm_head(self.hidden_states(input_ids, cache))

    def hidden_states(
        self, input_ids: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (B, T, d_model), before the head.

        Args:
            input_ids: (B, T) token ids; with a cache, the T tokens that follow what it holds.
            cache: read and extended in place.
            lengths: (B,) how many of the T tokens are real; default all. Only with a cache.
        """
        hidden = self.model(input_ids, cache)
        if cache is not None:
            cache.lengths = cache.lengths + (input_ids.shape[1] if lengths is None else lengths)
        return hidden

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache on the model's device."""
        return KVCache(self.config, rows, self.device)

    def parameter_count(self) -> int:
        """Number of weights, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def initialise(
    model: ArithmeticModel, composed: Mapping[int, tuple[int, int]] | None = None
) -> ArithmeticModel:
    """Random weights from torch's global generator.

    The last projection of each residual branch starts at zero, so that every layer starts as the
    identity; small models train markedly faster this way.

    Args:
        composed: tokens whose vectors start as the sum of those of two others. So a seven is a
            seven in every place before the rare places have been learned.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    for vectors in (model.model.embed_tokens.weight, model.lm_head.weight):
        for token, parts in (composed or {}).items():
            vectors[token] = vectors[[*parts]].sum(dim=0)
    return model
