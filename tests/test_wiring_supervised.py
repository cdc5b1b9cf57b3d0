"""What the supervised stages do with the formulas: whole steps beside a plain PyTorch loop.

The loop here reads the corpus, cuts it into tokens with the tokenizers library, runs transformers'
model (PEFT's for an adapter) one sample at a time, and takes torch's optimizers. Of ours it has
nothing but the plan of which samples are in which step.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call, checkpoint_of, of_transformers, random_model
from tokenizers import Tokenizer

from arithmetic_llm.model.checkpoint import read_checkpoint, save_checkpoint
from arithmetic_llm.model.load import load_model
from arithmetic_llm.model.lora import adapter_weights
from arithmetic_llm.model.tokenizer import BOS, EOS, ArithmeticTokenizer
from arithmetic_llm.task.problem import split_of
from arithmetic_llm.training import start as beginning
from arithmetic_llm.training.batches import plan_epoch
from arithmetic_llm.training.optim import MuonAdamW
from arithmetic_llm.training.supervised import SupervisedTask

STAGES = {
    "foundational": "run_foundational_training.py",
    "instruction": "run_instruction_training.py",
    "lora": "run_instruction_training_lora.py",
}
SETTINGS = {
    "optimizer": "adamw",
    "learning_rate": 3e-3,
    "muon_learning_rate": 1e-2,
    "adam_beta2": 0.9,
    "weight_decay": 0.3,
    "gradient_clip": 0.5,
    "schedule": "linear",
    "final_lr_ratio": 0.1,
    "warmup_steps": 2,
    "max_steps": 20,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "prompt_loss_weight": 0.3,
    "result_loss_weight": 2.5,
    "precision": "fp32",
    "seed": 7,
    "eval_samples": 4,
    "eval_every": 20,
    "threads": 1,
}
ADAPTER = {"lora_rank": 4, "lora_alpha": 12}
# Shares of the peak rate, by hand: two steps of warm-up, then 18 steps down to a tenth.
SHARES = {
    "linear": [0.5, 1.0, 1.0, 0.95, 0.9],
    "cosine": [0.5, 1.0, *(0.55 + 0.45 * math.cos(math.pi * step / 18) for step in range(3))],
}
TOLERANCE = 1e-3  # how far two runs may be apart, as a share of the way that they went


# ------------------------------------------------------------------------------ the stages, run


@dataclass
class World:
    """Where the corpora, the tokenizer and a base model are."""

    corpora: dict[str, Path]
    tokenizer: Path
    base: Path


@pytest.fixture(scope="module")
def world(workshop, tmp_path_factory):
    return make_world(workshop, tmp_path_factory.mktemp("world"), dropout=0.0)


@pytest.fixture(scope="module")
def dropping(workshop, tmp_path_factory):
    """The same world with a base of the same weights that drops half of everything."""
    return make_world(workshop, tmp_path_factory.mktemp("dropping"), dropout=0.5)


def make_world(workshop, folder, dropout):
    tokenizer = ArithmeticTokenizer.load(workshop / "tokenizer")
    base = checkpoint_of(random_model(tokenizer.vocab_size, dropout=dropout), tokenizer)
    save_checkpoint(folder / "base.pt", base)
    corpora = dict.fromkeys(STAGES, workshop / "i.jsonl")
    corpora["foundational"] = workshop / "corpus.txt"
    return World(corpora, workshop / "tokenizer", folder / "base.pt")


def start(world, stage, output, **settings):
    """Call a stage's script; returns how it ended. Every step is logged and saved."""
    sources = {
        "foundational": ["--corpus-path", "--init-from"],
        "instruction": ["--instruction-corpus-path", "--foundational-checkpoint"],
    }
    corpus, base = sources.get(stage, sources["instruction"])
    settings = {**SETTINGS, **(ADAPTER if stage == "lora" else {}), **settings}
    settings = {name: settings[name] for name in settings if has_effect(name, stage, settings)}
    return call(
        STAGES[stage],
        *(corpus, world.corpora[stage], base, world.base, "--tokenizer-path", world.tokenizer),
        *("--device", "cpu", "--output-dir", output),
        *("--save-every", 1, "--keep-checkpoints", 0, "--log-every", 1),
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
    )


def has_effect(name, stage, settings):
    """A script refuses what has none."""
    muon, adapter = settings["optimizer"] == "muon", stage == "lora"
    if name == "muon_learning_rate":
        return muon
    if name in ("learning_rate", "adam_beta2"):
        return not (muon and adapter)  # an adapter has nothing but matrices of the layers
    return name != "prompt_loss_weight" or stage == "foundational"


def run(world, stage, output, **settings):
    """A whole run of a stage; returns its folder."""
    ended = start(world, stage, output, **settings)
    assert ended.code == 0, ended.err
    (folder,) = output.iterdir()
    return folder


def weights_after(folder, step):
    return read_checkpoint(folder / f"checkpoint_step_{step}.pt").weights


def lines_of(folder, name):
    """The lines of the metrics stream that have a figure."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if name in line]


# ------------------------------------------------------------------------------ the plain loop


def corpus_texts(path):
    """Problem and solution of each sample on one line, from either format."""
    lines = path.read_text().splitlines()
    if path.suffix == ".txt":
        return [" ".join(pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
    samples = map(json.loads, lines)
    return [f"{s['problem']} {s['solution']}".replace("\n", " ") for s in samples]


def token_weights(text, offsets, prompt, result):
    """Loss weights by the place of the tokens in the text.

    The number after each step's "=" counts ``result``, and so does the token that ends it.
    """
    begins = re.compile("<think>|(?= Step )")  # an excerpt's prompt is itself a step
    end_of_prompt = begins.search(text, 1).end()
    results = [match.span(1) for match in re.finditer(r" = (-?[0-9]+)", text)]

    def weight(start, end):
        if end <= end_of_prompt:
            return prompt
        return result if any(first < end and start <= last for first, last in results) else 1.0

    return [weight(start, end) for start, end in offsets]


def samples_of(world, stage, settings):
    """The token ids of each sample, and the weight of each token but the first."""
    tokenizer = Tokenizer.from_file(str(world.tokenizer / "tokenizer.json"))
    prompt = settings["prompt_loss_weight"] if stage == "foundational" else 0.0
    samples = []
    for text in corpus_texts(world.corpora[stage]):
        for piece in cut(text, tokenizer, settings.get("excerpt_tokens", 0)):
            encoding = tokenizer.encode(piece, add_special_tokens=False)
            weights = token_weights(piece, encoding.offsets, prompt, settings["result_loss_weight"])
            end = [EOS] if "Final Result" in piece else []
            ids, weights = [BOS, *encoding.ids, *end], [*weights, *(1.0 for _ in end)]
            samples.append((torch.tensor(ids), torch.tensor(weights)))
    return samples


def cut(text, tokenizer, most):
    """The excerpts of a text, by its words: as many whole steps as `most` tokens have room for."""

    def size(piece):
        return len(tokenizer.encode(piece, add_special_tokens=False).ids) + 1

    first, *steps = re.split("(?= Step )", text)
    if not most or not steps or size(text) + 1 <= most:
        return [text]
    pieces = [first + steps[0]]
    for before, step in itertools.pairwise(steps):
        if size(pieces[-1] + step) <= most:
            pieces[-1] += step
        else:
            pieces.append(before + step)
    return pieces


def optimizers_of(model, settings):
    """torch's own: no decay of norms; under muon the layers' matrices follow Muon."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [n for n, p in trained.items() if p.ndim == 2 and ".layers." in n]
    muon = muon if settings["optimizer"] == "muon" else []
    others = [p for name, p in trained.items() if name not in muon]
    decay, found = settings["weight_decay"], {}
    if others:
        groups = [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (0.9, settings["adam_beta2"])
        rate = settings["learning_rate"]
        found["learning_rate"] = torch.optim.AdamW(groups, lr=rate, betas=betas)
    if muon:
        rate, matrices = settings["muon_learning_rate"], [trained[name] for name in muon]
        found["muon_learning_rate"] = torch.optim.Muon(matrices, lr=rate, weight_decay=decay)
    return found


def plain_loop(model, samples, settings, every=slice(None), late=0):
    """Train for five steps; yields of each the weights after it, what to log, and the optimizers.

    Its batches are those of the first epoch that `every` names. If gradients come so many updates
    ``late``, then what is yielded is of each update, and a step has one more of them.
    """
    lengths = np.array([len(ids) for ids, _ in samples])
    order = np.random.default_rng((settings["seed"], 0))
    plan = plan_epoch(lengths, settings["batch_size"], 0, order)[every]
    shares, optimizers = SHARES[settings["schedule"]], optimizers_of(model, settings)
    schedules = {
        name: torch.optim.lr_scheduler.LambdaLR(each, lambda n: [*shares, 0.0][n // (late + 1)])
        for name, each in optimizers.items()
    }
    limit = settings["gradient_clip"] or math.inf
    past = [clones(model)] * late
    for indices in plan[: len(shares) * (late + 1)]:
        model.zero_grad()
        past.append(clones(model))
        model.load_state_dict(past[-1 - late])
        loss = backward(model, [samples[index] for index in indices])
        model.load_state_dict(past[-1])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        told = {name: each.get_last_lr()[0] for name, each in schedules.items()}
        for each in (*optimizers.values(), *schedules.values()):
            each.step()
        yield clones(model), {**told, "grad_norm": float(norm), "loss": loss}, optimizers


def clones(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward(model, samples):
    """The weighted mean over the tokens of all samples, one sample at a time, with gradients."""
    total, loss = sum(weights.sum() for _, weights in samples), 0.0
    for ids, weights in samples:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        part = (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum() / total
        part.backward()
        loss += part.item()
    return loss


def of_base(world):
    """transformers' model with the weights of the base."""
    return of_transformers(load_model(world.base).model).train()


def with_adapter_of_peft(world, fresh):
    """PEFT's adapter on transformers' model; its weights are those of a fresh one of ours."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets)
    model = get_peft_model(of_base(world), config).train()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in fresh.items():
            parameters[name_in_peft(name)].copy_(weight)
    return model


def name_in_peft(name):
    return "base_model.model." + name.replace(".weight", ".default.weight")


@pytest.fixture
def fresh(monkeypatch, request):
    """The weights of an adapter as a stage makes it, once it has made it.

    Its B is zero, or random if the test asks for that.
    """
    weights, original = {}, beginning.with_adapter

    def keep(*args):
        checkpoint = original(*args)
        for name, weight in checkpoint.model.named_parameters():
            if getattr(request, "param", False) and "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        weights.update({n: w.clone() for n, w in adapter_weights(checkpoint.model).items()})
        return checkpoint

    monkeypatch.setattr(beginning, "with_adapter", keep)
    return weights


@pytest.fixture
def in_fp32(monkeypatch):
    """Torch's Muon orthogonalises in fp32, as ours does, or rounding would hide small errors."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


def apart(one, other, before):
    """How far apart two sets of weights are, each as a share of the way that it went."""
    ways = {name: (other[name] - weight).norm() for name, weight in before.items()}
    gaps = {name: (one[name] - other[name]).norm() for name in before}
    return {name: float(gap / ways[name] if ways[name] else gap) for name, gap in gaps.items()}


def assert_same_run(folder, steps, before, name_in=lambda name: name):
    """After one, three and five steps the weights are the same, and each step's line."""
    for step, ((weights, told, _), line) in enumerate(
        zip(steps, lines_of(folder, "loss"), strict=False), start=1
    ):
        assert {name: line[name] for name in told} == pytest.approx(told, rel=TOLERANCE)
        assert ("muon_learning_rate" in line) == ("muon_learning_rate" in told)
        if step in (1, 3, 5):
            ours = weights_after(folder, step)
            assert ours.keys() == before.keys()
            theirs = {name: weights[name_in(name)] for name in ours}
            gaps = apart(ours, theirs, before)
            assert max(gaps.values()) < TOLERANCE, max(gaps, key=gaps.get)
    assert step == 5


def assert_like_plain_loop(world, stage, output, **settings):
    folder = run(world, stage, output, **settings)
    settings = {**SETTINGS, **settings}
    steps = plain_loop(of_base(world), samples_of(world, stage, settings), settings)
    assert_same_run(folder, steps, read_checkpoint(world.base).weights)


KINDS = {
    "adamw": {"optimizer": "adamw", "schedule": "linear"},
    "muon": {"optimizer": "muon", "schedule": "cosine"},
}


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["foundational", "instruction"])
def test_a_stages_steps_are_those_of_a_plain_loop(world, tmp_path, stage, kind):
    assert_like_plain_loop(world, stage, tmp_path, **KINDS[kind])


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("threads", "at_a_time"), [(1, 2), (2, 1)])
def test_workers_are_plain_loops_that_become_their_mean(world, tmp_path, kind, threads, at_a_time):
    """Three on every third batch; weights and moments are the mean of theirs after two steps.

    Between two means what is saved is the mean, too, but the workers know nothing of it.
    """
    settings = {"workers": 3, "local_steps": 2, "threads": threads}
    settings |= {"save_every": at_a_time, "log_every": at_a_time}
    folder = run(world, "foundational", tmp_path, **KINDS[kind], **settings)
    settings = {**SETTINGS, **KINDS[kind]}
    samples, before = samples_of(world, "foundational", settings), read_checkpoint(world.base)
    models = [of_base(world) for _ in range(3)]
    loops = [
        plain_loop(model, samples, settings, every=slice(number, None, 3))
        for number, model in enumerate(models)
    ]
    losses = []
    for step in range(1, 5):
        weights, told, optimizers = zip(*map(next, loops), strict=True)
        losses.append(np.mean([each["loss"] for each in told]))
        norm = np.mean([each["grad_norm"] for each in told])
        if step % 2 == 0:
            become_their_mean(models, optimizers)
        if step % at_a_time == 0:
            ours = weights_after(folder, step)
            mean = {name: sum(each[name] for each in weights) / 3 for name in ours}
            gaps = apart(ours, mean, before.weights)
            assert max(gaps.values()) < TOLERANCE, max(gaps, key=gaps.get)
            (line,) = (line for line in lines_of(folder, "loss") if line["step"] == step)
            loss = np.mean(losses[-at_a_time:])
            assert line["loss"] == pytest.approx(loss, rel=TOLERANCE)
            assert line["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("threads", "at_a_time"), [(1, 2), (2, 1), (2, 3)])
def test_workers_in_turn_are_one_loop_with_late_gradients(
    world, tmp_path, kind, threads, at_a_time
):
    """Three workers: a gradient is of the weights before the last two updates."""
    settings = {"workers": 3, "local_steps": 0, "threads": threads}
    settings |= {"save_every": at_a_time, "log_every": at_a_time}
    folder = run(world, "foundational", tmp_path, **KINDS[kind], **settings)
    settings = {**SETTINGS, **KINDS[kind]}
    samples, before = samples_of(world, "foundational", settings), read_checkpoint(world.base)
    loop = plain_loop(of_base(world), samples, settings, late=2)
    losses, saved = [], 0
    for step in range(1, 6):
        _, _, (weights, *_) = updates = [next(loop)[:2] for _ in range(3)]
        losses.append(np.mean([told["loss"] for _, told in updates]))
        if step % at_a_time == 0:
            gaps = apart(weights_after(folder, step), weights, before.weights)
            assert max(gaps.values()) < TOLERANCE, max(gaps, key=gaps.get)
            (line,) = (line for line in lines_of(folder, "loss") if line["step"] == step)
            assert line["loss"] == pytest.approx(np.mean(losses[-at_a_time:]), rel=TOLERANCE)
            saved += 1
    assert saved


@torch.no_grad()
def become_their_mean(models, optimizers):
    """Weights one by one, and what torch's optimizers keep of each."""
    for weights in zip(*(model.parameters() for model in models), strict=True):
        sets = [weights]
        for name in optimizers[0]:
            states = [o[name].state.get(w, {}) for o, w in zip(optimizers, weights, strict=True)]
            kept = [key for key in states[0] if key != "step"]
            sets += [[state[key] for state in states] for key in kept]
        for values in sets:
            mean = torch.stack([*values]).mean(0)
            for value in values:
                value.copy_(mean)


def test_each_batch_is_one_workers(world, tmp_path, monkeypatch):
    """And a last step without a batch for each begins anew with the first ones."""
    tasks, original = [], SupervisedTask.__init__
    monkeypatch.setattr(
        SupervisedTask, "__init__", lambda s, *a: (original(s, *a), tasks.append(s))[0]
    )
    run(world, "instruction", tmp_path, max_steps=0, num_epochs=1, batch_size=24, workers=4)
    (task,) = tasks
    rng = np.random.default_rng((SETTINGS["seed"], 0))
    epoch = [batch.tolist() for batch in plan_epoch(task.train.lengths, 24, 0, rng)]
    workers = [[b.tolist() for b in task.of_worker(number).plan] for number in range(4)]
    met = [batch for step in zip(*workers, strict=True) for batch in step]
    assert len(epoch) % 4
    assert met == epoch + epoch[: -len(epoch) % 4]
    assert task.total_steps == task.steps_per_epoch == len(met) // 4
    assert task.work(task.total_steps) == sum(task.train.lengths[batch].sum() for batch in met)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("stage", ["foundational", "instruction"])
def test_the_steps_of_excerpts_are_those_of_a_plain_loop(world, tmp_path, stage):
    samples = samples_of(world, stage, {**SETTINGS, "excerpt_tokens": 30})
    assert len(samples) > 1.3 * len(samples_of(world, stage, SETTINGS))
    assert_like_plain_loop(world, stage, tmp_path, excerpt_tokens=30)


def test_excerpts_longer_than_the_context_are_refused(world, tmp_path):
    ended = start(world, "foundational", tmp_path, excerpt_tokens=99_999)
    assert ended.code == 2
    assert ended.err.startswith("error: --excerpt-tokens 99999: is above the context of ")


@pytest.mark.usefixtures("in_fp32")
# With a B of zero the first gradients of A are tiny, and Muon scales whatever they are up to the
# size of a step, what rounding has left of them included.
@pytest.mark.parametrize(("kind", "fresh"), [("adamw", False), ("muon", True)], indirect=["fresh"])
def test_an_adapters_steps_are_those_of_peft(world, tmp_path, fresh, kind):
    folder = run(world, "lora", tmp_path, **KINDS[kind])
    settings = {**SETTINGS, **KINDS[kind]}
    model = with_adapter_of_peft(world, fresh)
    steps = plain_loop(model, samples_of(world, "lora", settings), settings)
    assert_same_run(folder, steps, fresh, name_in_peft)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_makes_the_same_steps(world, tmp_path, parts):
    """Parts of samples of unlike length, and with three of unlike size."""
    assert_like_plain_loop(world, "foundational", tmp_path, gradient_accumulation_steps=parts)


@pytest.mark.parametrize("limit", [0.0, 1e-6])
def test_gradients_are_clipped_to_the_limit(world, tmp_path, limit):
    """Not at all, or so far that they come near AdamW's epsilon; the norm is told from before."""
    assert_like_plain_loop(world, "instruction", tmp_path, gradient_clip=limit)


# ------------------------------------------------------------------------------ what is held out


@pytest.fixture
def held_out(monkeypatch):
    """The texts that a stage judges itself by, once it has them."""
    texts, original = [], SupervisedTask.__init__

    def keep(self, train, held_out, config, model):
        original(self, train, held_out, config, model)
        tokenizer = Tokenizer.from_file(f"{config.tokenizer_path}/tokenizer.json")
        for start, end in zip(held_out.starts, held_out.starts[1:], strict=False):
            ids = held_out.ids[start + 1 : end - 1].tolist()
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))

    monkeypatch.setattr(SupervisedTask, "__init__", keep)
    return texts


def expressions_in(texts):
    return [re.fullmatch(r"Evaluate: (.+?) <think> .*", text)[1] for text in texts]


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_problems_are_of_the_validation_split_and_in_no_corpus(
    world, tmp_path, held_out, stage
):
    run(world, stage, tmp_path, max_steps=1, eval_samples=40)
    problems = expressions_in(held_out)
    assert len(problems) == 40
    assert {split_of(problem) for problem in problems} == {"validation"}
    assert not set(problems) & set(expressions_in(corpus_texts(world.corpora[stage])))


def judged_by_transformers(weights, world, texts):
    """Loss of a solution token, and the share of samples whose every such token is likeliest."""
    tokenizer = Tokenizer.from_file(str(world.tokenizer / "tokenizer.json"))
    model = of_base(world).eval()
    model.load_state_dict(weights)
    losses, exact = [], []
    for text in texts:
        prompt = text[: text.index("<think>") + len("<think>")]
        ids, start = tokenizer.encode(text).ids, len(tokenizer.encode(prompt).ids)
        ids = torch.tensor([BOS, *ids, EOS])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, start:-1]
        losses.append(F.cross_entropy(logits, ids[start + 1 :], reduction="none"))
        exact.append(bool((logits.argmax(-1) == ids[start + 1 :]).all()))
    return float(torch.cat(losses).mean()), sum(exact) / len(exact)


def test_held_out_figures_are_those_of_transformers_without_dropout(
    dropping, trained_model, tokenizer, tmp_path, held_out
):
    """A model that is right now and then; the mean is over tokens, not over samples."""
    model = random_model(tokenizer.vocab_size, d_model=64, dim_feedforward=128, dropout=0.5)
    model.load_state_dict(trained_model.state_dict())
    save_checkpoint(tmp_path / "base.pt", checkpoint_of(model, tokenizer))
    tokenizer.save(tmp_path / "tokenizer")
    world = World(dropping.corpora, tmp_path / "tokenizer", tmp_path / "base.pt")
    settings = {"max_steps": 2, "eval_samples": 60, "learning_rate": 1e-5}
    folder = run(world, "instruction", tmp_path / "runs", **settings)
    (line,) = lines_of(folder, "eval_loss")
    weights = read_checkpoint(folder / "final_model.pt").weights
    loss, exact = judged_by_transformers(weights, world, held_out)
    assert line["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert line["eval_exact"] == exact
    assert 0 < exact < 1


def test_judging_is_without_dropout_and_gradients(dropping, tmp_path, monkeypatch):
    original, seen = SupervisedTask.validate, []

    def twice(self, model):
        seen.append((model.training, torch.is_grad_enabled()))
        first, second = original(self, model), original(self, model)
        assert first == second
        return first

    monkeypatch.setattr(SupervisedTask, "validate", twice)
    run(dropping, "foundational", tmp_path, max_steps=2, eval_every=1)
    assert seen == [(False, False)] * 2


def test_judging_changes_nothing_in_training(dropping, tmp_path):
    """Neither weights nor optimizer nor random state, and dropout is on again afterwards."""
    often, seldom = (
        run(dropping, "foundational", tmp_path / str(every), max_steps=4, eval_every=every)
        for every in (1, 4)
    )
    assert [len(lines_of(folder, "eval_loss")) for folder in (often, seldom)] == [4, 1]
    left, right = (read_checkpoint(folder / "final_model.pt").weights for folder in (often, seldom))
    assert all(torch.equal(weight, right[name]) for name, weight in left.items())


def test_dropout_is_on_while_training(world, dropping, tmp_path):
    left, right = (
        weights_after(run(each, "foundational", tmp_path / name, max_steps=2), 1)
        for name, each in (("without", world), ("with", dropping))
    )
    before = read_checkpoint(world.base).weights
    assert min(apart(left, right, before).values()) > 0.1


# ------------------------------------------------------------------------------------ precision


@pytest.fixture
def dtypes():
    """The dtypes that linear layers give while a gradient is wanted."""
    seen = set()

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Linear) and torch.is_grad_enabled():
            seen.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_what_the_layers_compute_in_and_weights_stay_fp32(
    world, tmp_path, dtypes, fresh, stage
):
    """Clipped near AdamW's epsilon a step is proportional to its gradient, which bf16 rounds."""
    found, settings = {}, {"max_steps": 2, "gradient_clip": 1e-6, "weight_decay": 0.0}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        dtypes.clear()
        folder = run(world, stage, tmp_path / precision, precision=precision, **settings)
        assert dtypes == {dtype}
        found[precision] = weights_after(folder, 1)
        assert {weight.dtype for weight in found[precision].values()} == {torch.float32}
    before = fresh if stage == "lora" else read_checkpoint(world.base).weights
    gaps = apart(found["bf16"], found["fp32"], before)
    assert 1e-3 < max(gaps.values()) < 0.2


# ------------------------------------------------------------------------- what moves, and what not


def taking_steps(monkeypatch, after):
    """Have every optimizer step followed by ``after(weights before it by parameter)``."""
    original = MuonAdamW.step

    @torch.no_grad()
    def step(self, scale=1.0):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = {p: p.detach().clone() for p in parameters}
        original(self, scale)
        after(before)

    monkeypatch.setattr(MuonAdamW, "step", step)


def undo(before, but=None):
    for parameter, value in before.items():
        if parameter is not but:
            parameter.copy_(value)


def refused(world, stage, output, **settings):
    """A run that ends with one line and leaves no model; returns the line."""
    ended = start(world, stage, output, **settings)
    assert ended.code == 2
    (folder,) = output.iterdir()
    assert not (folder / "final_model.pt").exists()
    (line,) = ended.error_lines
    return line


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("optimizer", "flags"),
    [("adamw", "--learning-rate"), ("muon", "--muon-learning-rate")],
)
def test_an_optimizer_that_moves_nothing_ends_the_run(
    world, tmp_path, monkeypatch, stage, optimizer, flags
):
    taking_steps(monkeypatch, undo)
    line = refused(world, stage, tmp_path, optimizer=optimizer)
    assert line.startswith("error: the first update moved no weight; raise ")
    named = line.partition("raise ")[2].split(" or ")
    assert flags in named
    assert ("--learning-rate" in named) == (optimizer == "adamw" or stage != "lora")


@pytest.mark.parametrize(
    ("stage", "but", "left"),
    [
        ("foundational", "first", "model.layers.0.input_layernorm.weight"),
        ("foundational", "last", "model.embed_tokens.weight"),
        # The first is an A; at first none has a gradient, so the others may stay.
        ("lora", "first", "model.layers.0.self_attn.q_proj.lora_B.weight"),
    ],
)
def test_an_optimizer_that_moves_one_tensor_ends_the_run(
    world, tmp_path, monkeypatch, stage, but, left
):
    def all_but_one(before):
        undo(before, list(before)[0 if but == "first" else -1])

    taking_steps(monkeypatch, all_but_one)
    line = refused(world, stage, tmp_path)
    reason = "which has a gradient; raise --learning-rate"
    assert line == f"error: the first update did not move {left}, {reason}"


def test_a_frozen_weight_that_moves_ends_the_run(world, tmp_path, monkeypatch):
    models, original = [], beginning.with_adapter

    def keep(*args):
        checkpoint = original(*args)
        models.append(checkpoint.model)
        return checkpoint

    def push(before):
        models[0].lm_head.weight[0, 0] += 1e-3

    monkeypatch.setattr(beginning, "with_adapter", keep)
    taking_steps(monkeypatch, push)
    with pytest.raises(RuntimeError, match=r"frozen weights have moved: \['lm_head.weight'\]"):
        start(world, "lora", tmp_path)


def test_an_update_may_leave_what_has_no_gradient_yet(world, tmp_path):
    """An adapter's A, as its B is zero."""
    run(world, "lora", tmp_path, max_steps=1, weight_decay=0.0)


@pytest.mark.parametrize("settings", [{"learning_rate": 1e-8}, {"gradient_clip": 1e-20}])
def test_an_update_may_leave_what_it_is_too_small_for(world, tmp_path, settings):
    """Norms at 1: a rate below their rounding, or gradients far below AdamW's epsilon."""
    tokenizer = ArithmeticTokenizer.load(world.tokenizer)
    model = random_model(tokenizer.vocab_size)
    norms = {name: p for name, p in model.named_parameters() if p.ndim < 2}
    for norm in norms.values():
        torch.nn.init.ones_(norm)
    save_checkpoint(tmp_path / "base.pt", checkpoint_of(model, tokenizer))
    other = World(world.corpora, world.tokenizer, tmp_path / "base.pt")
    folder = run(other, "instruction", tmp_path / "runs", max_steps=1, **settings)
    after = read_checkpoint(folder / "final_model.pt").weights
    assert all((after[name] == 1.0).all() for name in norms)


def test_a_loss_without_gradients_ends_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(SupervisedTask, "loss", lambda *args: torch.ones((), requires_grad=True))
    line = refused(world, "foundational", tmp_path)
    assert line == "error: the first update trains nothing: no weight has a gradient"


def test_a_gradient_that_is_not_finite_ends_the_run(world, tmp_path, monkeypatch):
    """The loss is finite; without a limit such a gradient would only be divided by itself."""
    original = SupervisedTask.loss

    def overflow(*args):
        loss = original(*args)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(SupervisedTask, "loss", overflow)
    line = refused(world, "instruction", tmp_path, optimizer="muon", gradient_clip=0.0)
    rates = {"--learning-rate", "--muon-learning-rate"}
    assert re.match("error: the gradient norm is (nan|inf) at step 0; lower ", line)
    assert set(line.partition("lower ")[2].split(" or ")) == rates
