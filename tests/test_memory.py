"""Batches are cut to fit into memory: the cut itself, and the peaks of the documented commands."""

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, command, make_tokenizer, one_thread, random_model, records
from hypothesis import given
from hypothesis import strategies as st

from arithmetic_llm.cli import build, read_json
from arithmetic_llm.config import FoundationalConfig, GRPOConfig, ModelConfig
from arithmetic_llm.corpus.files import plain_lines
from arithmetic_llm.grpo.loss import Episode
from arithmetic_llm.grpo.prompts import PassRates, PromptSource
from arithmetic_llm.grpo.task import GRPOTask
from arithmetic_llm.model import fused, kernels
from arithmetic_llm.model.tokenizer import ArithmeticTokenizer
from arithmetic_llm.runtime import multiplies_bf16
from arithmetic_llm.training import batches as data
from arithmetic_llm.training.batches import (
    LossWeights,
    TokenisedSamples,
    micro_batches,
    working_memory,
)
from arithmetic_llm.training.supervised import SupervisedTask

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # one of 8 GiB, or of what `card` says
DEFAULT = ModelConfig()
MIB, GIB = 2**20, 2**30


@pytest.fixture(autouse=True, scope="module")
def card():
    """A GPU of 8 GiB, whether there is one or not; its memory can be changed."""
    told = SimpleNamespace(total_memory=8 * GIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: told)
        yield told


# ------------------------------------------------------------------------------------ the cut

SHAPES = st.builds(
    ModelConfig,
    d_model=st.sampled_from([32, 256, 1024]),
    nhead=st.sampled_from([1, 8]),
    num_layers=st.integers(1, 12),
    dim_feedforward=st.integers(1, 4096),
)
LENGTHS = st.lists(st.integers(2, 3000), min_size=1, max_size=200).map(np.array)


def width(longest):
    """Positions of a batch: next-token prediction drops one, and widths are multiples of 8."""
    return 8 * ((int(longest) - 1 + 7) // 8)


def fits(lengths, shape, device, most_rows, at_once=1):
    tokens = len(lengths) * width(lengths.max())
    most_bytes = (512 * MIB if device.type == "cpu" else 4 * GIB) / at_once
    needed = working_memory(len(lengths), width(lengths.max()), shape)
    most_tokens = 16_384 if device.type == "cpu" else 131_072
    return len(lengths) <= most_rows and tokens <= most_tokens and needed <= most_bytes


@given(LENGTHS, SHAPES, st.sampled_from([CPU, GPU]), st.integers(1, 9), st.integers(1, 300))
def test_a_batch_is_cut_into_few_parts_that_fit_in_order_of_length(
    lengths, shape, device, least, most_rows
):
    indices = np.random.default_rng(0).permutation(len(lengths))[: max(1, len(lengths) // 2)]
    parts = micro_batches(lengths, indices, shape, device, least, most_rows)
    in_order = np.concatenate(parts)
    assert sorted(in_order) == sorted(indices)
    assert (np.diff(lengths[in_order]) >= 0).all()
    assert all(len(part) == 1 or fits(lengths[part], shape, device, most_rows) for part in parts)
    assert len(parts) >= min(least, len(indices))
    # Each part but the last of a piece is as long as can be, so no cut has fewer parts.
    needless = sum(
        fits(lengths[[*part, after[0]]], shape, device, most_rows)
        for part, after in pairwise(parts)
    )
    assert needless < least


@given(LENGTHS, SHAPES, st.integers(1, 9))
def test_parts_computed_side_by_side_share_the_memory(lengths, shape, at_once):
    indices = np.arange(len(lengths))
    parts = micro_batches(lengths, indices, shape, CPU, at_once=at_once)
    assert sorted(np.concatenate(parts)) == list(indices)
    assert all(len(part) == 1 or fits(lengths[part], shape, CPU, 300, at_once) for part in parts)


def test_nothing_is_cut_into_nothing():
    assert micro_batches(np.array([], dtype=int), np.arange(0), DEFAULT, CPU) == []


def test_the_documented_batch_is_cut_as_worked_out_by_hand():
    """A position of 400 takes 4 bytes x 9 x (16 x 256 + 4 x 1,024 + 8 x 264), 3 rows 425 MiB."""
    lengths = np.full(32, 401)
    assert working_memory(3, 400, DEFAULT) == 3 * 400 * 4 * 9 * 10_304
    parts = micro_batches(lengths, np.arange(32), DEFAULT, CPU)
    assert [len(part) for part in parts] == [3] * 10 + [2]
    assert [len(part) for part in micro_batches(lengths, np.arange(32), DEFAULT, GPU)] == [28, 4]


def test_a_small_models_batch_is_cut_by_tokens():
    """157 rows of 104 positions are 16,328; 1,260 are 131,040."""
    for device, most in ((CPU, 157), (GPU, 1260)):
        rows = most + 143
        parts = micro_batches(np.full(rows, 101), np.arange(rows), ModelConfig(**TINY), device)
        assert [len(part) for part in parts] == [most, 143]


@pytest.mark.parametrize(("recipe", "device"), [("cpu", CPU), ("gpu", GPU)])
def test_no_batch_of_a_recipe_is_cut_or_put_in_another_order(card, monkeypatch, recipe, device):
    """The largest batch of every length is whole, in the order that it had."""
    monkeypatch.setattr(card, "total_memory", 32 * GIB)
    shape = build(ModelConfig, read_json(ROOT / "configs" / recipe / "model.json"), {})
    for stage in ("foundational", "instruction", "lora"):
        most = read_json(ROOT / "configs" / recipe / f"{stage}.json")["batch_tokens"]
        for longest in range(20, shape.max_seq_length + 1):  # the shortest sample has some 25
            indices = np.arange(max(1, most // longest))[::-1]
            (part,) = micro_batches(np.full(len(indices), longest), indices, shape, device)
            assert np.array_equal(part, indices)


def kept_for_the_backward_pass(model, ids):
    """Bytes of distinct tensors that autograd keeps, weights aside."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden_states(ids)
    assert hidden.requires_grad
    return sum(size for address, size in kept.items() if address not in weights)


@pytest.mark.parametrize("tokens", [(64, 16), (8, 128), (1, 1024)])
@pytest.mark.parametrize(
    "shape",
    [
        {"d_model": 128, "nhead": 4, "num_layers": 3, "dim_feedforward": 512},
        {"d_model": 64, "nhead": 8, "num_layers": 6, "dim_feedforward": 64},
        {"d_model": 64, "nhead": 2, "num_layers": 2, "dim_feedforward": 1024},
        {"d_model": 64, "nhead": 8, "num_layers": 6, "dim_feedforward": 64, "attention_window": 96},
    ],
    ids=["default-like", "attention", "feed-forward", "window"],
)
def test_the_estimate_is_what_autograd_keeps_and_three_layers(monkeypatch, shape, tokens):
    """Without compiled functions; with them less is kept."""
    model = random_model(100, **shape, dropout=0.1).train()
    compiled = kept_for_the_backward_pass(model, torch.zeros(tokens, dtype=torch.long))
    monkeypatch.setattr(fused, "kernels_for", lambda tensor: None)
    kept = kept_for_the_backward_pass(model, torch.zeros(tokens, dtype=torch.long))
    layers = shape["num_layers"]
    estimate = working_memory(*tokens, model.config)
    assert estimate == pytest.approx(kept * (layers + 3) / layers, rel=0.2)
    assert compiled < kept or kernels.in_use(CPU) == "torch"


# --------------------------------------------------------------------------------- who is cut

TOKENIZER = make_tokenizer()
SAMPLES = TokenisedSamples(records(60, seed=5), TOKENIZER, 1000, LossWeights(0.5, 3.0))


@pytest.fixture
def little_memory(monkeypatch):
    """Room for 4 to 30 of `SAMPLES` at a time."""
    monkeypatch.setattr(data, "_MOST_BYTES", 5 * MIB)


def supervised(model, **settings):
    config = FoundationalConfig(tokenizer_path="t", corpus_path="c", batch_size=60, **settings)
    return SupervisedTask(SAMPLES, SAMPLES, config, model)


def gradient_of(model, job):
    """The gradient as the trainer makes it: summed over the parts, divided once."""
    (batches,) = job.updates(0)
    model.zero_grad()
    total = sum(batch.loss_denominator for batch in batches)
    for batch in batches:
        (job.loss(model, batch) / total).backward()
    return len(batches), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_cut_batch_has_the_gradient_of_the_whole_one_in_plain_torch(little_memory):
    model = random_model(TOKENIZER.vocab_size)
    job = supervised(model)
    parts, in_parts = gradient_of(model, job)
    assert parts > 3
    batch = SAMPLES.batch(job.plan[0])
    losses = torch.nn.functional.cross_entropy(
        model(batch.input_ids).transpose(1, 2), batch.targets, reduction="none"
    )
    model.zero_grad()
    ((losses * batch.weights).sum() / batch.weights.sum()).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(in_parts, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)


def test_accumulation_steps_are_the_least_number_of_parts(little_memory):
    model = random_model(TOKENIZER.vocab_size)
    bounded, _ = gradient_of(model, supervised(model))
    more, _ = gradient_of(model, supervised(model, gradient_accumulation_steps=45))
    assert 3 < bounded < 45 <= more < 60


def test_held_out_evaluation_is_cut_in_the_same_way(little_memory, monkeypatch):
    model = random_model(TOKENIZER.vocab_size)
    forward, shapes = model.model.forward, []

    def watch(input_ids, cache):
        shapes.append(input_ids.shape)
        return forward(input_ids, cache)

    monkeypatch.setattr(model.model, "forward", watch)
    with torch.no_grad():
        supervised(model).validate(model)
    assert sum(rows for rows, _ in shapes) == 60
    assert_within_little_memory(shapes, model)


def assert_within_little_memory(shapes, model):
    assert len(shapes) > 3
    assert all(n == 1 or working_memory(n, t, model.config) <= 5 * MIB for n, t in shapes)


def test_solutions_and_episodes_of_grpo_are_cut_in_the_same_way(little_memory):
    config = GRPOConfig(data_mode="generated", batch_size=30, max_gen_length=300)
    model = random_model(TOKENIZER.vocab_size)
    source = PromptSource(config, PassRates())
    task = GRPOTask(model, TOKENIZER, config, source, ["1 + 2"])
    solutions = task._solutions(source.of_step(0))
    texts = [ids.tolist() for ids in np.split(SAMPLES.ids, SAMPLES.starts[1:-1])]
    episodes = [Episode(ids[:9], ids[9:], [0.0] * len(ids[9:]), 1.0, []) for ids in texts]
    for batches, rows in ((solutions, 30), (task._batches(episodes), 60)):
        shapes = [getattr(batch, "batch", batch).input_ids.shape for batch in batches]
        assert sum(shape[0] for shape in shapes) == rows
        assert max(shape[0] for shape in shapes) <= config.micro_batch_size
        assert_within_little_memory(shapes, model)


# ------------------------------------------------------------------------------------- the peaks

# A process of its own between the tests and the script: what a child reports as its peak begins
# with the memory of the process that started it.
MEASURE = """
import resource, subprocess, sys
ended = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended.returncode)
"""


@pytest.fixture(scope="module")
def depth_4(tmp_path_factory):
    """The arguments of a run on 64 samples of depth 4: the shortest and the longest 32 of 300."""
    folder = tmp_path_factory.mktemp("depth_4")
    drawn = records(300, min_depth=4, max_depth=4, flat_rate=0, drill_rate=0, invalid_rate=0)
    tokenizer = ArithmeticTokenizer.train((record.sequence for record in drawn), 1000)
    tokenizer.save(folder / "tokenizer")
    drawn.sort(key=lambda record: len(record.solution))
    chosen = [*drawn[:32], *drawn[-32:]]
    (folder / "corpus.txt").write_text("".join(map(plain_lines, chosen)))
    return [
        *("--corpus-path", folder / "corpus.txt", "--tokenizer-path", folder / "tokenizer"),
        *("--device", "cpu", "--threads", 1),
    ]


def peak_of_training(*argv):
    """Peak memory in bytes of the foundational script, as the system counted it."""
    script = command("run_foundational_training.py", *argv)
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, *script],
        env=one_thread(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    return int(ended.stdout.splitlines()[-1]) * unit


unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")


@unix
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_documented_step_stays_under_one_and_a_half_gib(depth_4, precision, tmp_path):
    if precision == "bf16" and not multiplies_bf16(CPU):
        pytest.skip("emulated bf16 takes minutes; --precision auto never chooses it")
    settings = ["--batch-size", 32, "--max-steps", 2, "--eval-samples", 2]
    peak = peak_of_training(*depth_4, *settings, "--precision", precision, "--output-dir", tmp_path)
    assert peak < 1.5 * GIB


@unix
def test_held_out_evaluation_stays_under_one_and_a_half_gib(depth_4, tmp_path):
    """40 samples have as many tokens as one part may have, but no more than a fifth fit at once."""
    settings = ["--batch-size", 1, "--max-steps", 1, "--eval-samples", 40, "--precision", "fp32"]
    assert peak_of_training(*depth_4, *settings, "--output-dir", tmp_path) < 1.5 * GIB
