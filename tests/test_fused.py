"""What a layer computes between its products, beside PyTorch's own formulas in fp64.

In fp64 the package has PyTorch compute, too; in fp32 and bf16 the functions of kernels.c do.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from helpers import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arithmetic_llm.config import ModelConfig
from arithmetic_llm.model import fused, kernels
from arithmetic_llm.model.fused import (
    BLOCK,
    Sight,
    attend,
    causal_attention,
    heads,
    rms_norm,
    summed_cross_entropy,
    swiglu,
)
from arithmetic_llm.model.kernels import kernels_for
from arithmetic_llm.model.transformer import ArithmeticModel, initialise, rotary_angles

EPS = 1e-6
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """What a function gives, and its inputs' gradients where each output weighs differently."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def draw(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_same(ours, theirs, inputs, **tolerance) -> None:
    """In fp32 as exact as fp32 is, in fp64 as fp64 is; theirs is always in fp64."""
    exact = value_and_gradients(theirs, *(x.double() for x in inputs))
    for dtype in (torch.float32, torch.float64):
        given = [x.to(dtype) for x in inputs]
        for one, other in zip(value_and_gradients(ours, *given), exact, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other.to(dtype), **tolerance)


# ------------------------------------------------------------------------------ PyTorch's own


def their_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def their_heads(x, weight, cos, sin):
    """As in transformers: the halves of a head change places, the second one negated."""
    unit = their_norm(x, weight)
    first, second = unit.chunk(2, dim=-1)
    half = cos.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    return (unit * cos + torch.cat((-second, first), dim=-1) * sin).transpose(1, 2)


def their_attention(window):
    def attention(q, k, v):
        back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (back >= 0) & (back < (window or q.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return attention


def their_swiglu(gate, up):
    return F.silu(gate) * up


def their_cross_entropy(targets, weights):
    def loss(logits):
        each = F.cross_entropy(logits, targets, reduction="none")
        return (each * weights.to(each.dtype)).sum()

    return loss


# ----------------------------------------------------------------------------------- each of them


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(1, 70))
def test_the_norm_is_pytorchs(rows, features):
    inputs = draw(*rows, features), draw(features) + 1
    assert_same(lambda x, w: rms_norm(x, w, EPS), their_norm, inputs, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(*[st.integers(1, 4)] * 3, st.integers(1, 20), st.booleans())
def test_heads_are_normalised_rotated_and_come_first(rows, length, count, half, alike):
    """With positions of each row, or the same in all."""
    positions = torch.arange(length)[None] + 10 * torch.arange(1 if alike else rows)[:, None]
    angles = rotary_angles(positions[..., None], 2 * half, 100.0)
    inputs = draw(rows, length, count, 2 * half), draw(2 * half) + 1

    def ours(x, weight):
        return heads(x, weight, *(each.to(x.dtype) for each in angles), EPS)

    def theirs(x, weight):
        return their_heads(x, weight, *(each.double() for each in angles))

    assert ours(*inputs).shape == (rows, count, length, 2 * half)
    assert_same(ours, theirs, inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 45])
@pytest.mark.parametrize("window", [0, 1, 50, BLOCK, BLOCK + 60, 1000])
def test_causal_attention_is_pytorchs(length, window):
    inputs = draw(3, 2, 3, length, 8).unbind()
    ours = lambda *qkv: causal_attention(*qkv, window)  # noqa: E731
    assert_same(ours, their_attention(window), inputs, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_swiglu_is_pytorchs(shape):
    assert_same(swiglu, their_swiglu, (5 * draw(*shape), draw(*shape) + 1), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 70))
def test_the_loss_is_pytorchs(tokens, classes):
    targets = torch.arange(tokens) * 7 % classes
    weights = draw(tokens).abs()
    ours = lambda logits: summed_cross_entropy(logits, targets, weights)  # noqa: E731
    logits = 5 * draw(tokens, classes)
    exact = value_and_gradients(their_cross_entropy(targets, weights), logits.double())
    for one, other in zip(value_and_gradients(ours, logits), exact, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


def test_logits_far_apart_have_the_loss_that_they_have():
    logits = torch.tensor([[3e4, -3e4, 0.0], [-200.0, 0.0, 200.0]])
    loss = summed_cross_entropy(logits, torch.tensor([1, 2]), torch.tensor([1.0, 1.0]))
    assert loss.item() == 6e4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible(bad):
    """A loss that is none stops a run; a kernel that made a number of it would hide it."""
    row = torch.tensor([[1.0, bad, 2.0, 0.5]]).repeat(3, 8)
    for dtype in (torch.float32, torch.bfloat16):
        x = row.to(dtype)
        loss = summed_cross_entropy(x, torch.tensor([0, 1, 2]), torch.ones(3))
        assert loss.isnan()
        assert rms_norm(x, torch.ones(32), EPS).isnan().any()
        assert not swiglu(x, x).isfinite().all()
        q = x.view(1, 3, 1, 32)
        assert causal_attention(q, q, q).isnan().any()


def test_a_nan_of_any_bits_stays_one_in_bf16():
    weight = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32).repeat(8)
    assert rms_norm(torch.ones(2, 16).bfloat16(), weight, EPS).isnan().all()


@pytest.mark.parametrize("target", [-100, -1, 8, 2**40])
def test_a_target_that_is_no_class_has_no_loss(target):
    """It is not looked for beyond the row."""
    logits = draw(3, 8)
    targets = torch.tensor([1, target, 2])
    assert summed_cross_entropy(logits, targets, torch.ones(3)).isnan()


def test_the_loss_of_a_sure_model_is_small_and_right():
    logits = draw(50, 30)
    logits[:, 3] += 15
    targets, weights = torch.full((50,), 3), torch.ones(50)
    exact = their_cross_entropy(targets, weights)(logits.double())
    assert summed_cross_entropy(logits, targets, weights).item() == pytest.approx(
        exact.item(), rel=0.01
    )


def cases(dtype):
    """Each function with inputs for it, by name."""
    cos, sin = (x.to(dtype) for x in rotary_angles(torch.arange(20)[None, :, None], 8, 100.0))
    targets, weights = torch.arange(6) * 5, draw(6).abs()
    q, k, v = draw(3, 2, 3, BLOCK + 30, 8).unbind()
    found = {
        "norm": (lambda x, w: rms_norm(x, w, EPS), (draw(4, 64), draw(64) + 1)),
        "heads": (lambda x, w: heads(x, w, cos, sin, EPS), (draw(2, 20, 3, 8), draw(8) + 1)),
        "attention": (causal_attention, (q, k, v)),
        "windowed": (lambda *qkv: causal_attention(*qkv, 40), (q, k, v)),
        "swiglu": (swiglu, (draw(5, 40), draw(5, 40) + 1)),
        "loss": (lambda x: summed_cross_entropy(x, targets, weights), (4 * draw(6, 33),)),
    }
    return {name: (of, [x.to(dtype) for x in inputs]) for name, (of, inputs) in found.items()}


NAMES = list(cases(torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_all_stay_within_its_rounding(name):
    function, inputs = cases(torch.bfloat16)[name]
    of_fp64, _ = cases(torch.float64)[name]
    exact = value_and_gradients(of_fp64, *(x.double() for x in inputs))
    found = value_and_gradients(function, *inputs)
    for low, high in zip(found, exact, strict=True):
        assert low.dtype == (torch.float32 if low.ndim == 0 else torch.bfloat16)
        assert (low - high).norm() < 0.01 * high.norm()


def test_bf16_rounds_to_the_nearest_as_pytorch_does():
    gate, up = 3 * draw(4000).bfloat16(), draw(4000).bfloat16() + 1
    assert torch.equal(swiglu(gate, up), swiglu(gate.float(), up.float()).bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_values_are_the_same(name):
    function, inputs = cases(torch.float32)[name]
    with torch.no_grad():
        plain = function(*inputs)
    assert torch.equal(function(*(x.requires_grad_() for x in inputs)), plain)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_contiguous_has_the_same_values_and_gradients(name):
    function, inputs = cases(torch.float32)[name]
    apart = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in apart)
    expected = value_and_gradients(function, *inputs)
    for one, other in zip(value_and_gradients(function, *apart), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_other_types_of_number_beside_the_first_are_no_trap():
    """C reads what it is given as what it expects."""
    x, weight = draw(2, 20, 3, 8).bfloat16(), draw(8).double()
    cos, sin = rotary_angles(torch.arange(20)[None, :, None], 8, 100.0)
    expected = heads(x.double(), weight, cos.double(), sin.double(), EPS)
    torch.testing.assert_close(
        heads(x, weight, cos, sin, EPS).double(), expected, rtol=0.02, atol=0.05
    )
    gate, up = draw(5, 40).bfloat16(), draw(5, 40)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    logits, targets, weights = draw(6, 33), torch.arange(6), draw(6).abs()
    torch.testing.assert_close(
        summed_cross_entropy(logits, targets, weights.double()),
        summed_cross_entropy(logits, targets, weights),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_not_wrong(name):
    function, inputs = cases(torch.float32)[name]
    first = inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(function(*inputs).sum(), first, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), first)


# --------------------------------------------------------------------------- attention to a cache


def seen_from(lengths: list[int], queries: int, slots: int, window: int) -> Sight:
    """What the last positions of rows see of slots that go round, some never filled."""
    ends = torch.tensor(lengths)[:, None] + queries
    back = (ends - 1 - torch.arange(slots)) % slots  # from the last position, the nearest first
    return Sight(ends - queries + torch.arange(queries), ends - 1 - back, window)


def their_cached_attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    own, held = sight.positions[:, None, :, None], sight.held[:, None, None]
    seen = (held >= 0) & (held <= own) & (own - held < (sight.window or 10**6))
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)


def with_a_cache(rows=2, heads=3, queries=20, slots=150, features=8) -> list[Tensor]:
    """Queries, keys and values, these as a part of larger ones."""
    k, v = draw(2, rows, heads, slots + 5, features)[..., :slots, :]
    return [3 * draw(rows, heads, queries, features), k, v]


@torch.no_grad()
@settings(deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
    *[st.integers(1, n) for n in (3, 40, 160)],
    st.sampled_from([6, 8, 16, 40]),
    st.sampled_from([0, 1, 5, 64, 1000]),
)
def test_attention_to_a_cache_is_pytorchs(lengths, heads, queries, more, features, window):
    """By kernels.c, by PyTorch's fused kernel, and as it is written out for a GPU."""
    sight = seen_from(lengths, queries, queries + more, window)
    q, k, v = with_a_cache(len(lengths), heads, queries, queries + more, features)
    expected = their_cached_attention(q, k, v, sight).float()
    with on_threads(1):
        results = [attend(q, k, v, sight)]
    results.append(attend(Elsewhere.of(q), k, v, sight).as_subclass(Tensor))
    with patch.object(fused, "kernels_for", lambda tensor: None):
        results.append(attend(q, k, v, sight))
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("compiled", [True, False])
def test_many_queries_attend_by_the_compiled_function_and_few_by_pytorchs(compiled):
    q, k, v = with_a_cache(queries=20 if compiled else 3)
    sight = seen_from([70, 90], q.shape[2], k.shape[2], 50)
    refused = patch.object(F, "scaled_dot_product_attention", side_effect=ZeroDivisionError)
    with refused, on_threads(1):
        if compiled:
            attend(q, k, v, sight)
        else:
            with pytest.raises(ZeroDivisionError):
                attend(q, k, v, sight)


@torch.no_grad()
def test_a_row_attends_alike_whatever_stands_beside_and_behind_it():
    """To the last bit: other rows, other queries, slots that it does not see."""
    q, k, v = with_a_cache()
    with on_threads(1):
        whole = attend(q, k, v, seen_from([70, 90], 20, 150, 50))
    some = seen_from([90], 20, 150, 50)
    some = replace(some, positions=some.positions[:, :7])
    k[1, :, some.held[0] < 30], v[1, :, some.held[0] < 30] = 1e30, -1e30
    with on_threads(1):
        alone = attend(q[1:, :, :7], k[1:], v[1:], some)
    assert torch.equal(alone, whole[1:, :, :7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_than_fp32_attend_by_pytorchs_operations(dtype):
    sight = seen_from([70, 90], 20, 150, 50)
    given = [x.to(dtype) for x in with_a_cache()]
    result = attend(*given, sight)
    assert result.dtype == dtype
    expected = their_cached_attention(*given, sight).to(dtype)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------------------------- elsewhere


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


def loss_and_gradients(precision: torch.dtype) -> list[Tensor]:
    """Of a small model, drawn anew."""
    torch.manual_seed(0)
    shape = ModelConfig(d_model=32, nhead=2, num_layers=2, dim_feedforward=48, attention_window=50)
    model = initialise(ArithmeticModel(shape, 40))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # which start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(40, (3, BLOCK + 20))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        hidden = model.hidden_states(ids).flatten(0, 1)
        weights = draw(ids.numel()).abs()
        loss = summed_cross_entropy(model.lm_head(hidden), ids.flatten(), weights)
    return [loss.detach(), *torch.autograd.grad(loss / ids.numel(), model.parameters())]


def test_a_model_without_compiled_functions_learns_the_same(monkeypatch):
    compiled = {each: loss_and_gradients(each) for each in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(fused, "kernels_for", lambda tensor: None)
    plain = loss_and_gradients(torch.float32)
    for one, other in zip(compiled[torch.float32], plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for one, other in zip(compiled[torch.bfloat16], plain, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


# ------------------------------------------------------------------------------ how they are made


def said(**environment: str) -> list[str]:
    """What a process with these variables computes with, and why not with compiled functions."""
    code = "import torch; from arithmetic_llm.model import kernels, fused\n"
    code += "fused.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)\n"
    code += "cpu = torch.device('cpu'); print(kernels.in_use(cpu)); print(kernels.failure(cpu))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(kernels.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@needs_compiler
def test_compiled_functions_are_used_unless_the_environment_says_otherwise():
    assert said() == ["compiled", ""]
    assert said(CC="cc -O2") == ["compiled", ""]
    assert said(ARITHMETIC_LLM_KERNELS="torch") == ["torch", ""]
    assert kernels.in_use(torch.device("cuda")) == "torch"
    assert kernels.failure(torch.device("cuda")) == ""


def test_a_compiler_that_fails_or_none_leaves_the_work_to_pytorch_and_is_named(tmp_path):
    bad = tmp_path / "mycc"
    bad.write_text("#!/bin/sh\necho first >&2; echo no such header >&2\nexit 1\n")
    bad.chmod(0o755)
    assert said(CC=str(bad)) == ["torch", f"{bad}: no such header"]
    none = said(PATH=str(tmp_path / "nowhere"), CC="nothing")
    assert none == ["torch", "there is no C compiler (gcc or clang)"]


@needs_compiler
def test_each_type_of_number_has_a_library_of_its_own_that_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_SOURCE", tmp_path / "kernels.c")
    (tmp_path / "kernels.c").write_bytes(
        (Path(kernels.__file__).with_name("kernels.c")).read_bytes()
    )
    kernels._library.cache_clear()
    try:
        assert kernels_for(draw(2))
        assert kernels_for(draw(2).bfloat16())
        assert kernels_for(draw(2).double()) is None
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "__pycache__").iterdir()}
        kernels._library.cache_clear()
        assert kernels_for(draw(2))
        assert kernels_for(draw(2).bfloat16())
    finally:
        kernels._library.cache_clear()
    assert len(made) == 2
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "__pycache__").iterdir()} == made
