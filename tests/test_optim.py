"""Optimizers against torch's own, orthogonalisation against the SVD, the schedule by hand."""

import pytest
import torch
from helpers import random_model

from arithmetic_llm.config import FoundationalConfig
from arithmetic_llm.training.optim import (
    MuonAdamW,
    build_optimizer,
    learning_rate_factor,
    orthogonalise,
)


def configured(**values):
    return FoundationalConfig(tokenizer_path="t", corpus_path="c", **values)


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def compare_steps(ours, theirs, step_ours, step_theirs, atol):
    """Ten steps on the same gradients, compared after each."""
    for step in range(10):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        step_ours()
        step_theirs()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0)


# ------------------------------------------------------------------------------------ AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_takes_the_steps_of_torch(weight_decay):
    ours, theirs = parameters((4, 3), (5,)), parameters((4, 3), (5,))
    optimizer = MuonAdamW([{"params": ours, "lr": 0.01, "weight_decay": weight_decay}])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=weight_decay)
    compare_steps(ours, theirs, optimizer.step, reference.step, atol=1e-6)


def test_scale_multiplies_the_learning_rate():
    ours, theirs = parameters((4, 3)), parameters((4, 3))
    optimizer = MuonAdamW([{"params": ours, "lr": 0.04, "weight_decay": 0.3}])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    compare_steps(ours, theirs, lambda: optimizer.step(0.25), reference.step, atol=1e-6)


def test_a_parameter_without_a_gradient_stays():
    moved, still = parameters((3, 3), (3, 3))
    before = still.detach().clone()
    set_gradients([moved], seed=0)
    MuonAdamW([{"params": [moved, still], "lr": 0.1, "weight_decay": 0.5}]).step()
    assert torch.equal(still, before)


# ------------------------------------------------------------------------------------- Muon


def with_singular_values(rows, columns, values):
    """Random singular vectors U (4, rows, N) and V (4, columns, N), and U diag(values) V^T."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(4, rows, len(values), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(4, columns, len(values), generator=generator))
    return left, right, left * values @ right.mT


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 16), (16, 48)])
def test_orthogonalise_keeps_directions_and_levels_singular_values(rows, columns, precision):
    left, right, given = with_singular_values(rows, columns, torch.logspace(-1.5, 0, 16))
    result = orthogonalise(given, precision)
    inner = left.mT @ result @ right  # diagonal, if the directions are kept
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.2
    assert (inner - torch.diag_embed(values)).abs().max() < (
        0.05 if precision == torch.bfloat16 else 1e-4
    )


def test_muon_multiplies_in_the_precision_that_is_asked_for():
    steps = []
    for precision in (torch.float32, torch.bfloat16):
        model = random_model(30)
        before = model.model.layers[0].self_attn.q_proj.weight.clone()
        set_gradients([*model.parameters()], seed=0)
        build_optimizer(model, configured(optimizer="muon"), precision).step()
        steps.append(model.model.layers[0].self_attn.q_proj.weight - before)
    exact, rounded = steps
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05


def test_orthogonalise_does_not_care_about_scale():
    *_, given = with_singular_values(8, 12, torch.linspace(0.2, 1, 8))
    torch.testing.assert_close(orthogonalise(given), orthogonalise(1e4 * given), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_muon_takes_its_authors_steps(shape):
    """Jordan et al., 2024, written out in fp32."""
    (ours,), (theirs,) = parameters(shape), parameters(shape)
    group = {"params": [ours], "lr": 0.02, "weight_decay": 0.1, "muon": True}
    optimizer, momentum = MuonAdamW([group]), torch.zeros(shape)

    @torch.no_grad()
    def step():
        nonlocal momentum
        momentum = 0.95 * momentum + 0.05 * theirs.grad
        x = 0.95 * momentum + 0.05 * theirs.grad  # Nesterov
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        theirs.mul_(1 - 0.02 * 0.1)
        theirs.sub_(0.02 * max(1, shape[0] / shape[1]) ** 0.5 * x)

    compare_steps([ours], [theirs], optimizer.step, step, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_muon_takes_the_steps_of_torch(shape):
    (ours,), (theirs,) = parameters(shape), parameters(shape)
    group = {"params": [ours], "lr": 0.02, "weight_decay": 0.1, "muon": True}
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    # torch always orthogonalises in bf16: 10 steps of 0.02, each known to about 1 %
    compare_steps([ours], [theirs], MuonAdamW([group]).step, reference.step, atol=4e-3)


def test_muon_gets_the_layers_matrices_and_adamw_the_rest():
    model = random_model(30)
    config = configured(optimizer="muon", muon_learning_rate=0.5, learning_rate=0.25)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in build_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["muon"] == (".layers." in name and name.endswith("proj.weight")), name
            assert group["lr"] == (0.5 if group["muon"] else 0.25)
            assert (group["weight_decay"] > 0) == (parameter.ndim == 2), name
    assert not names  # each parameter is in one group


def test_frozen_parameters_are_left_out():
    model = random_model(30)
    model.model.requires_grad_(False)
    optimizer = build_optimizer(model, configured())
    assert [p for group in optimizer.param_groups for p in group["params"]] == [
        model.lm_head.weight
    ]


# -------------------------------------------------------------------------------- the state


def mixed_optimizer(values):
    return MuonAdamW(
        [
            {"params": values[:2], "lr": 0.02, "muon": True, "weight_decay": 0.1},
            {"params": values[2:], "lr": 0.01},
        ]
    )


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    shapes = ((4, 6), (6, 4), (3,), (5, 2))
    straight, broken_off = parameters(*shapes), parameters(*shapes)
    optimizer, first = mixed_optimizer(straight), mixed_optimizer(broken_off)
    for step in range(3):
        for values, each in ((straight, optimizer), (broken_off, first)):
            set_gradients(values, step)
            each.step()
    torch.save(first.state_dict(), tmp_path / "state")
    second = mixed_optimizer(broken_off)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(3, 6):
        for values, each in ((straight, optimizer), (broken_off, second)):
            set_gradients(values, step)
            each.step()
    assert all(map(torch.equal, straight, broken_off))


# ----------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 of 100 steps of warm-up; then at 10, at half of the rest, and at the last step
        ("constant", [0.1, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.1, 0.5, 1.0, 1.0, 0.5, 1 / 90]),
        ("cosine", [0.1, 0.5, 1.0, 1.0, 0.5, 0.000305]),
    ],
)
def test_the_schedule_by_hand(schedule, expected):
    config = configured(schedule=schedule, warmup_steps=10)
    steps = [0, 4, 9, 10, 55, 99]
    factors = [learning_rate_factor(config, step, 100) for step in steps]
    assert factors == pytest.approx(expected, abs=1e-6)


def test_the_schedule_ends_at_the_final_ratio():
    config = configured(schedule="linear", warmup_steps=0, final_lr_ratio=0.2)
    assert learning_rate_factor(config, 50, 100) == pytest.approx(0.6)
    assert learning_rate_factor(config, 100, 100) == pytest.approx(0.2)


def test_the_warm_up_is_at_most_a_tenth_of_a_short_run():
    config = configured(warmup_steps=1000, schedule="constant")
    factors = [learning_rate_factor(config, step, 50) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert learning_rate_factor(config, 0, 3) == 1.0
