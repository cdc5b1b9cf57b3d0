"""Hand-written gradients beside autograd's own, of PyTorch's own formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arithmetic_llm.model import fused
from arithmetic_llm.model.fused import BLOCK, causal_attention, rms_norm


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """What a function gives, and its inputs' gradients where each output weighs differently."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def draw(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 40))
def test_the_norm_is_pytorchs(rows, features):
    x, weight = draw(*rows, features), draw(features) + 1
    ours = value_and_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    theirs = value_and_gradients(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), x, weight)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 45])
@pytest.mark.parametrize("window", [0, 1, 50, BLOCK, BLOCK + 60, 1000])
def test_causal_attention_is_pytorchs(length, window):
    q, k, v = draw(3, 2, 3, length, 8).unbind()
    ours = value_and_gradients(lambda *qkv: causal_attention(*qkv, window), q, k, v)
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < (window or length))
    theirs = value_and_gradients(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=seen), q, k, v
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [1, 9, 40, 41, 1000])
def test_elsewhere_pytorchs_own_attention_gets_the_same_mask(monkeypatch, window):
    q, k, v = draw(3, 2, 3, 40, 8).unbind()
    here = causal_attention(q, k, v, window)
    monkeypatch.setattr(fused, "_CausalAttention", None)
    masks, cpu = fused._square_mask, torch.device("cpu")
    monkeypatch.setattr(fused, "_square_mask", lambda *shape, device=cpu: masks(*shape[:3], device))
    elsewhere = causal_attention(*(Elsewhere.of(x) for x in (q, k, v)), window)
    torch.testing.assert_close(elsewhere.as_subclass(Tensor), here)


class Elsewhere(Tensor):
    """A tensor that says that it is on a GPU."""

    @classmethod
    def of(cls, x):
        return x.as_subclass(cls)

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("length", [20, BLOCK + 30])
def test_in_bf16_both_stay_within_its_rounding(length):
    q, k, v = draw(3, 2, 3, length, 8, dtype=torch.bfloat16).unbind()
    x, weight = draw(4, length, dtype=torch.bfloat16), draw(length, dtype=torch.bfloat16) + 1
    for function, inputs in (
        (causal_attention, (q, k, v)),
        (lambda x, w: rms_norm(x, w, 1e-6), (x, weight)),
    ):
        exact = value_and_gradients(function, *(x.double() for x in inputs))
        for low, high in zip(value_and_gradients(function, *inputs), exact, strict=True):
            assert low.dtype == torch.bfloat16
            assert (low - high).norm() < 0.01 * high.norm()


def test_without_gradients_the_norm_has_the_same_values():
    x, weight = draw(5, 16, dtype=torch.float32), draw(16, dtype=torch.float32)
    with torch.no_grad():
        plain = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x.requires_grad_(), weight, 1e-6), plain)


def test_a_second_derivative_is_refused_not_wrong():
    x, weight = draw(2, 4).requires_grad_(), draw(4)
    (gradient,) = torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)
