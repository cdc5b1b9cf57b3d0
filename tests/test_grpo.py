"""The mathematics of GRPO: by hand, and against TRL's own loss on identical tensors."""

from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from helpers import of_transformers, random_model
from torch import nn
from trl_reference import assert_same_gradients, their_loss

from arithmetic_llm.config import GRPOConfig, LoRAConfig
from arithmetic_llm.grpo.loss import (
    Episode,
    clipped_objective,
    collate,
    entropy,
    group_advantages,
    grpo_loss,
    kl_divergence,
    token_logprobs,
)
from arithmetic_llm.grpo.policy import policy_logprobs
from arithmetic_llm.grpo.prompts import PassRates, PromptSource
from arithmetic_llm.grpo.reference import Reference
from arithmetic_llm.grpo.task import GRPOTask, loss_settings
from arithmetic_llm.model.decode import SamplingParams, generate
from arithmetic_llm.model.lora import add_lora
from arithmetic_llm.model.tokenizer import EOS, PAD
from arithmetic_llm.training.step import update

VOCABULARY = 40
LENGTHS = [(4, 1), (3, 7), (6, 12), (2, 5), (5, 9), (3, 3), (7, 2), (4, 11)]  # prompt, completion
ADVANTAGES = [0.875, -0.125, 1.5, -2.0, 0.3, -0.7, -0.125, 0.6]


def settings(**options):
    return GRPOConfig(**{"data_mode": "generated", "max_gen_length": 12, **options})


def batch_of(made, config=None):
    """Episodes as one batch, as a config says."""
    config = config or settings()
    return collate(made, config.loss_type, config.max_gen_length)


def loss_of(logprobs, reference, batch, config):
    """The loss as a config says."""
    return grpo_loss(logprobs, reference, batch, loss_settings(config))


def policy(seed=0):
    return random_model(VOCABULARY, seed=seed)


def ids(count, generator):
    return torch.randint(6, VOCABULARY, (count,), generator=generator).tolist()


def episodes():
    """Ragged; in the middle of some, ids that elsewhere mean padding and the end of a text."""
    generator = torch.Generator().manual_seed(5)
    made = [
        Episode(ids(p, generator), ids(c, generator), [0.0] * c, advantage, [])
        for (p, c), advantage in zip(LENGTHS, ADVANTAGES, strict=True)
    ]
    made[2].completion[4:6] = [PAD, EOS]
    made[0].completion[-1] = made[3].completion[-1] = EOS
    return made


# -------------------------------------------------------------------------------- advantages

ONE_IN_EIGHT = [1.0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        ([ONE_IN_EIGHT], "none", [[0.875] + [-0.125] * 7]),
        # Its variance with n - 1 is (0.875^2 + 7 * 0.125^2) / 7 = 1/8.
        ([ONE_IN_EIGHT], "group", [[2.4749] + [-0.35355] * 7]),
        ([[1.0, 0.0], [0.5, 0.0]], "none", [[0.5, -0.5], [0.25, -0.25]]),
        ([[1.0, 0.0], [0.5, 0.0]], "group", [[0.7071, -0.7071], [0.7071, -0.7071]]),
        # All four: mean 3/8, variance (25 + 9 + 1 + 9) / 64 / 3, standard deviation 0.47871.
        ([[1.0, 0.0], [0.5, 0.0]], "batch", [[1.04446, -1.04446], [0.52223, -0.52223]]),
        ([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], "none", [[0.0] * 3] * 2),
        ([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], "group", [[0.0] * 3] * 2),
        ([[-1.0, 2.0, 2.0]], "none", [[-2.0, 1.0, 1.0]]),
    ],
)
def test_advantages_by_hand(rewards, scale, expected):
    advantages = group_advantages(torch.tensor(rewards), scale)
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-3, rtol=1e-4)


def test_without_a_baseline_the_reward_is_the_advantage():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert torch.equal(group_advantages(rewards, "group", baseline="none"), rewards)


# ---------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (1.5, 1.0, 1.28, True),  # better already: no more of it
        (0.5, 1.0, 0.5, False),  # on the wrong side: back without a limit
        (1.5, -1.0, -1.5, False),
        (0.5, -1.0, -0.8, True),
        (1.25, 1.0, 1.25, False),  # between 1 + low and 1 + high
        (0.85, -1.0, -0.85, False),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, objective, clipped):
    logprobs = torch.tensor([-1.0]).requires_grad_()
    old = logprobs.detach() - torch.tensor(ratio).log()
    value, active = clipped_objective(logprobs, old, torch.tensor([advantage]), 0.2, 0.28)
    assert value.item() == pytest.approx(objective)
    assert active.item() == clipped
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert gradient.item() == pytest.approx(0.0 if clipped else ratio * advantage)


# ------------------------------------------------------------------------- divergence, entropy


def distributions(cut=False):
    """Two (6, V) distributions, and which tokens they have in common."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(2, 6, VOCABULARY, generator=generator) * 2
    if cut:
        support = torch.rand(6, VOCABULARY, generator=generator) < 0.4
        logits = logits.masked_fill(~support, -torch.inf)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("cut", [False, True], ids=["full", "truncated"])
def test_the_exact_kl_is_the_sum_of_its_definition(cut):
    p, q = distributions(cut)
    expected = [
        sum(float(a.exp() * (a - b)) for a, b in zip(*row, strict=True) if a > -torch.inf)
        for row in zip(p, q, strict=True)
    ]
    p.requires_grad_()
    kl = kl_divergence(p, q, None, None, "exact")
    assert kl.tolist() == pytest.approx(expected, rel=1e-5)
    kl.sum().backward()
    assert p.grad.isfinite().all()


def gradients_of_kl(estimator):
    """Of the estimator, averaged over all tokens by their probability; and of the exact KL."""
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4)).requires_grad_()
    reference = distributions()[1][:1]
    logprobs = logits.log_softmax(-1)
    tokens = torch.arange(VOCABULARY)
    every = logprobs.expand(VOCABULARY, -1)
    ratio = (logprobs[0] - logprobs[0].detach()).exp()
    estimates = kl_divergence(every, reference.expand_as(every), tokens, ratio, estimator)
    mean = (logprobs[0].detach().exp() * estimates).sum()
    exact = kl_divergence(logprobs, reference, None, None, "exact").sum()
    torch.testing.assert_close(mean, exact)
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact)]


def test_k3_times_the_ratio_is_unbiased_in_value_and_gradient():
    torch.testing.assert_close(*gradients_of_kl("k3"))


def test_plain_k3_is_unbiased_in_value_alone():
    estimated, exact = gradients_of_kl("k3_plain")
    assert (estimated - exact).abs().max() > 0.01


def test_entropy_by_hand():
    certain, even = torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log()
    assert entropy(torch.stack([certain, even])).tolist() == pytest.approx([0.0, 0.693147])


# ------------------------------------------------------------------------------------- masks


def test_a_completions_tokens_count_its_eos_included_and_nothing_else():
    batch = batch_of(episodes())
    for row, episode in enumerate(episodes()):
        start = len(episode.prompt) - 1
        counted = batch.mask[row].nonzero()[:, 0].tolist()
        assert counted == list(range(start, start + len(episode.completion)))
        assert batch.targets[row, batch.mask[row]].tolist() == episode.completion
    assert batch.loss_denominator == sum(length for _, length in LENGTHS)


@pytest.mark.parametrize(
    ("loss_type", "inside", "count"), [("dapo", 1.0, 3), ("grpo", 0.5, 2), ("dr_grpo", 1.0, 40)]
)
def test_the_weights_of_two_ragged_episodes_by_hand(loss_type, inside, count):
    """The example of `collate`, with a = 11 to g = 17."""
    made = [
        Episode(*ids, [0.0] * len(ids[1]), 1.0, []) for ids in (([11, 12], [13, 14]), ([16], [17]))
    ]
    batch = collate(made, loss_type, 20)
    assert batch.input_ids.tolist() == [[11, 12, 13], [16, 17, PAD]]
    assert batch.targets.tolist() == [[12, 13, 14], [17, PAD, PAD]]
    assert batch.weights.tolist() == [[0.0, inside, inside], [1.0, 0.0, 0.0]]
    assert batch.loss_denominator == count


def test_what_ids_stand_in_a_text_makes_no_difference_to_what_counts():
    """Neither a literal <pad> nor an <eos> in the middle; lengths decide."""
    plain = episodes()
    plain[2].completion[4:6] = [20, 21]
    plain[0].completion[-1] = plain[3].completion[-1] = 22
    assert torch.equal(batch_of(plain).mask, batch_of(episodes()).mask)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_the_other_rows_of_a_batch_do_not_matter(loss_type):
    config, model = settings(loss_type=loss_type), policy()
    together = batch_of(episodes(), config)
    whole = loss_of(policy_logprobs(model, together, 0.8), None, together, config).loss
    alone = [batch_of([episode], config) for episode in episodes()]
    parts = [loss_of(policy_logprobs(model, b, 0.8), None, b, config).loss for b in alone]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    assert sum(b.loss_denominator for b in alone) == together.loss_denominator


def test_logprobs_are_those_of_each_row_by_itself():
    model, batch = policy(), batch_of(episodes())
    logprobs = token_logprobs(policy_logprobs(model, batch, 0.8), batch)
    by_row = []
    for episode in episodes():
        logits = model(torch.tensor([episode.prompt + episode.completion]))[0] / 0.8
        start = len(episode.prompt) - 1
        rows = logits.log_softmax(-1)[start : start + len(episode.completion)]
        by_row.append(rows[range(len(rows)), episode.completion])
    torch.testing.assert_close(logprobs, torch.cat(by_row), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------- beside TRL


def our_loss(model, made, config, old, other):
    """The same of ours; ``other`` is the reference model."""
    batch = batch_of(made, config)
    if old is not None:
        tensor = torch.zeros(batch.weights.shape)
        tensor[batch.mask] = torch.tensor([x for row in old for x in row])
        batch = replace(batch, old_logprobs=tensor)
    reference = None
    if config.kl_penalty_coef:
        reference = policy_logprobs(other, batch, config.temperature).detach()
    logprobs = policy_logprobs(model, batch, config.temperature)
    terms = loss_of(logprobs, reference, batch, config)
    model.zero_grad()
    (terms.loss / batch.loss_denominator).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return (terms.loss / batch.loss_denominator).item(), terms, gradients


def rows_of(model, made, config):
    """The log-probabilities of every completion's tokens, a list for each."""
    batch = batch_of(made, config)
    with torch.no_grad():
        flat = token_logprobs(policy_logprobs(model, batch, config.temperature), batch)
    return [row.tolist() for row in flat.split([len(e.completion) for e in made])]


def drifted(rows):
    """Log-probabilities of an older policy: ratios of 0.45 to 2.2, so that all bounds are met."""
    generator = torch.Generator().manual_seed(9)
    return [[x + (torch.rand(1, generator=generator).item() - 0.5) * 1.6 for x in r] for r in rows]


LOSS_TYPES = [("dapo", "dapo"), ("dapo", "bnpo"), ("grpo", "grpo"), ("dr_grpo", "dr_grpo")]


@pytest.mark.parametrize(("loss_type", "theirs"), LOSS_TYPES)
@pytest.mark.parametrize("several", [False, True], ids=["one update", "several updates"])
@pytest.mark.parametrize(
    "options",
    [
        {"kl_penalty_coef": 0.0},
        {"kl_penalty_coef": 0.05, "kl_estimator": "k3_plain", "temperature": 1.0},
        {"kl_penalty_coef": 0.3, "kl_estimator": "k3", "epsilon_low": 0.1, "epsilon_high": 0.5},
        {"kl_penalty_coef": 0.0, "epsilon_low": 0.3, "epsilon_high": 0.05, "temperature": 1.7},
    ],
    ids=["no KL", "k3_plain", "k3", "other bounds"],
)
def test_loss_and_gradients_are_those_of_trl(loss_type, theirs, several, options):
    config = settings(loss_type=loss_type, **options)
    model, other, made = policy(), policy(seed=1), episodes()
    old = drifted(rows_of(model, made, config)) if several else None
    reference = rows_of(other, made, config) if config.kl_penalty_coef else None
    loss, terms, gradients = our_loss(model, made, config, old, other)
    their_model = of_transformers(model)
    expected, metrics = their_loss(their_model, made, config, theirs, old, reference)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    # The exponential in a large KL penalty makes last bits larger.
    tolerance = 5e-5 if options["kl_penalty_coef"] == 0.3 else 1e-5
    their_gradients = {name: p.grad for name, p in their_model.named_parameters()}
    assert_same_gradients(gradients, their_gradients, tolerance)
    assert terms.entropy / terms.tokens == pytest.approx(metrics["entropy"], rel=1e-4)
    assert terms.clipped / terms.tokens == pytest.approx(metrics["clip_ratio/region_mean"])
    assert (terms.clipped > 0) == several
    if reference:
        assert terms.kl / terms.tokens == pytest.approx(metrics["kl"], rel=1e-4)


# ----------------------------------------------------------------------------- whole updates


def task_of(model, tokenizer, **options):
    config = settings(**{"max_depth": 1, "seed": 1, **options})
    return GRPOTask(model, tokenizer, config, PromptSource(config, PassRates()), ["1 + 2"])


class Watcher:
    """In place of an optimizer: keeps the gradients of an update."""

    def __init__(self, model):
        self.model, self.gradients = model, {}

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)

    def step(self, scale):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_micro_batches_of_any_size_give_the_same_gradient(tokenizer, loss_type):
    found = []
    for size in (8, 1, 3):
        model = policy()
        task = task_of(model, tokenizer, loss_type=loss_type, micro_batch_size=size)
        task.reference.model = policy(seed=1)
        watcher = Watcher(model)
        run = SimpleNamespace(
            model=model,
            optimizer=watcher,
            precision=torch.float32,
            config=SimpleNamespace(gradient_clip=0.0),
        )
        batches = task._batches(episodes())
        assert len(batches) == -(-8 // size)
        loss = update(run, task, batches, 1.0)
        found.append((loss, watcher.gradients))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert_same_gradients(gradients, found[0][1])


@pytest.mark.parametrize("adapter", [False, True], ids=["copy", "disabled adapter"])
@pytest.mark.parametrize("estimator", ["k3", "k3_plain", "exact"])
def test_the_kl_to_the_start_is_zero_and_grows_as_the_policy_moves(adapter, estimator):
    model = policy().train()
    model.model.dropout.p = 0.5  # must be off in policy and reference alike
    if adapter:
        add_lora(model, LoRAConfig())
    config = settings(kl_estimator=estimator)
    reference, batch = Reference(model, needed=True), batch_of(episodes(), config)
    assert (reference.model is model) == adapter  # no second copy of the weights
    model.eval()

    def kl():
        logprobs = policy_logprobs(model, batch, 0.8)
        return loss_of(logprobs, reference.logprobs(batch, 0.8), batch, config).kl

    assert kl() == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    assert kl() > 0.01


def test_the_reference_does_not_follow_the_policy():
    model, batch = policy(), batch_of(episodes())
    reference = Reference(model, needed=True)
    before = reference.logprobs(batch, 0.8)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(reference.logprobs(batch, 0.8), before)
    assert not any(p.requires_grad for p in reference.model.parameters())


# ----------------------------------------------------------------- rollout and loss agree


@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.8}], ids=str
)
def test_the_loss_scores_what_the_decoder_sampled_from(tokenizer, truncation):
    model = random_model(tokenizer.vocab_size)
    prompts = [tokenizer.prompt_ids(text) for text in ("1 + 2", "(1 + 2) - (3 + 14)", "5 - 1")] * 3
    written = generate(model, prompts, 20, SamplingParams(temperature=0.8, seed=2, **truncation))
    made = [
        Episode(prompt, c.tokens, c.logprobs, 1.0, c.support)
        for prompt, c in zip(prompts, written, strict=True)
    ]
    batch = batch_of(made)
    with torch.no_grad():
        logprobs = policy_logprobs(model, batch, 0.8)
        untruncated = policy_logprobs(model, replace(batch, support=None), 0.8)
        wrong_temperature = policy_logprobs(model, batch, 1.0)
    sampled = batch.rollout_logprobs[batch.mask]
    torch.testing.assert_close(token_logprobs(logprobs, batch), sampled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(sampled)))
    assert (token_logprobs(wrong_temperature, batch) - sampled).abs().max() > 0.05
    if truncation:  # the mismatch that scoring the full distribution would have
        assert (token_logprobs(untruncated, batch) - sampled).mean().abs() > 0.1
        assert ((logprobs > -torch.inf).sum(-1) < tokenizer.vocab_size / 2).all()


def test_the_loss_of_truncated_rollouts_has_finite_gradients(tokenizer):
    model = random_model(tokenizer.vocab_size)
    prompt = tokenizer.prompt_ids("1 + 2")
    written = generate(model, [prompt] * 4, 12, SamplingParams(temperature=0.8, top_k=3, seed=2))
    made = [Episode(prompt, c.tokens, c.logprobs, 1.0, c.support) for c in written]
    for estimator in ("k3", "exact"):
        config = settings(kl_estimator=estimator)
        batch = batch_of(made, config)
        other = random_model(tokenizer.vocab_size, seed=4)
        reference = policy_logprobs(other, batch, 0.8).detach()
        model.zero_grad()
        loss_of(policy_logprobs(model, batch, 0.8), reference, batch, config).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------- what can be learned

ARMS = [6, 7]


class TwoArms(nn.Module):
    """A policy with one parameter: which of two tokens it writes."""

    def __init__(self):
        super().__init__()
        self.preference = nn.Parameter(torch.tensor(0.0))
        self.lm_head = nn.Identity()

    def hidden_states(self, input_ids):
        """(B, T, V) logits."""
        logits = torch.full((*input_ids.shape, VOCABULARY), -50.0)
        logits[..., ARMS[0]] = self.preference
        logits[..., ARMS[1]] = 0.0
        return logits

    @property
    def first(self):
        return self.preference.sigmoid().item()


def pull(arms, payoff, config, updates=100, candidates=64):
    """Learn from groups of one prompt; the second arm pays nothing. How often at last the first."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(arms.parameters(), lr=2.0)
    shares = []
    for _ in range(updates):
        picks = (torch.rand(candidates, generator=generator) > arms.first).long()
        advantages = group_advantages(payoff * (1.0 - picks.float())[None])[0].tolist()
        made = [
            Episode([2], [ARMS[pick]], [0.0], advantage, [])
            for pick, advantage in zip(picks.tolist(), advantages, strict=True)
        ]
        batch = batch_of(made, config)
        logprobs = policy_logprobs(arms, batch, 1.0)
        reference = policy_logprobs(TwoArms(), batch, 1.0).detach()
        optimizer.zero_grad()
        (loss_of(logprobs, reference, batch, config).loss / batch.loss_denominator).backward()
        optimizer.step()
        shares.append(arms.first)
    return fmean(shares[updates // 2 :])  # sampling noise averaged out


@pytest.mark.parametrize("payoff", [1.0, -1.0])
def test_the_arm_that_pays_is_learned(payoff):
    found = pull(TwoArms(), payoff, settings(kl_penalty_coef=0.0))
    assert found > 0.95 if payoff > 0 else found < 0.05


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_under_a_kl_penalty_the_known_optimum_is_learned(estimator):
    """Reward less c x KL is largest where the odds are exp(payoff / c).

    The group's own mean takes 1 / candidates of each reward away.
    """
    coefficient, payoff, candidates = 0.5, 0.6, 64
    optimum = torch.tensor(payoff * (1 - 1 / candidates) / coefficient).sigmoid().item()
    config = settings(kl_penalty_coef=coefficient, kl_estimator=estimator)
    assert 0.75 < optimum < 0.8
    assert pull(TwoArms(), payoff, config) == pytest.approx(optimum, abs=0.015)
