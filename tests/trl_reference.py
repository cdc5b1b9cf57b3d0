"""TRL's own GRPO loss on transformers' own model: what ours must equal.

TRL is slow to import, so that happens when it is first needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor

from arithmetic_llm.config import GRPOConfig
from arithmetic_llm.grpo.loss import Episode
from arithmetic_llm.model.tokenizer import PAD

Rows = list[list[float]]  # a number for each token of each completion


@cache
def _trl() -> SimpleNamespace:
    """TRL's trainer and the head that it scores tokens with."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    return SimpleNamespace(Trainer=GRPOTrainer, add_head=add_fused_lm_head)


def their_loss(
    theirs,
    made: Sequence[Episode],
    config: GRPOConfig,
    loss_type: str,
    old: Rows | None,
    reference: Rows | None,
) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss of these episodes, with its gradient, and its metrics.

    Args:
        theirs: transformers' model.
        old, reference: log-probabilities of the completions' tokens; None where not needed.
    """
    trainer = _trainer(theirs, made, config, loss_type)
    inputs = _inputs(made)
    for name, rows in (("old_per_token_logps", old), ("ref_per_token_logps", reference)):
        if rows is not None:
            inputs[name] = _padded(rows)
    loss = _trl().Trainer._compute_loss(trainer, theirs, inputs)
    return loss, {name: value for name, (value,) in trainer._metrics["train"].items()}


@torch.no_grad()
def their_logprobs(theirs, made: Sequence[Episode], config: GRPOConfig) -> Rows:
    """What `their_loss` finds as the log-probabilities of the completions' tokens."""
    inputs = _inputs(made)
    ids, mask = (
        torch.cat([inputs[f"{part}_{name}"] for part in ("prompt", "completion")], dim=1)
        for name in ("ids", "mask")
    )
    score = _scorer(theirs, made, config.temperature)
    logprobs, _, _ = score(theirs, ids, mask, inputs["completion_ids"].shape[1])
    return [row[: len(e.completion)].tolist() for row, e in zip(logprobs, made, strict=True)]


def assert_same_gradients(
    one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """To so much of the largest."""
    largest = max(gradient.abs().max() for gradient in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(
            gradient / largest, other[name] / largest, atol=tolerance, rtol=tolerance, msg=name
        )


def _trainer(theirs, made: Sequence[Episode], config: GRPOConfig, loss_type: str):
    """All that TRL's loss asks of its trainer."""
    return SimpleNamespace(
        model=theirs.train(),  # without dropout
        accelerator=_accelerator(),
        args=SimpleNamespace(
            use_bias_correction_kl=config.kl_estimator == "k3",
            delta=None,
            steps_per_generation=1,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=config.kl_penalty_coef,
        loss_type=loss_type,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        max_completion_length=config.max_gen_length,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=_scorer(theirs, made, config.temperature),
    )


def _accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1,
        autocast=nullcontext,
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )


def _scorer(theirs, made: Sequence[Episode], temperature: float) -> Callable:
    """TRL's own scorer; for truncated rollouts, of which it knows nothing, one in its place."""
    if made[0].support:
        return partial(_truncated_score, _padded_support(made), temperature)
    _trl().add_head(theirs, temperature=temperature, outputs=("log_probs", "entropy"))
    score = _trl().Trainer._get_per_token_logps_and_entropies.__wrapped__  # without its profiler
    return partial(score, SimpleNamespace(accelerator=_accelerator()))


def _truncated_score(
    support: Tensor, temperature: float, model, input_ids, attention_mask, logits_to_keep, **_
) -> tuple[Tensor, Tensor, None]:
    """Log-probabilities and entropies (B, T) among the tokens of the support (B, T, V)."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    logits = logits[:, -logits_to_keep - 1 : -1] / temperature
    logprobs = logits.masked_fill(~support, -torch.inf).log_softmax(-1)
    entropies = torch.distributions.Categorical(logits=logprobs.detach()).entropy()
    tokens = input_ids[:, -logits_to_keep:]
    return logprobs.gather(-1, tokens[..., None])[..., 0], entropies, None


def _inputs(made: Sequence[Episode]) -> dict[str, Tensor]:
    """Episodes as TRL has them: prompts padded on the left, completions on the right."""
    width = max(len(e.prompt) for e in made)
    lefts = [width - len(e.prompt) for e in made]
    prompts = [[PAD] * left + e.prompt for left, e in zip(lefts, made, strict=True)]
    return {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor([[0] * n + [1] * (width - n) for n in lefts]),
        "completion_ids": _padded([e.completion for e in made], PAD),
        "completion_mask": _padded([[1] * len(e.completion) for e in made], 0),
        "advantages": torch.tensor([e.advantage for e in made]),
        "num_items_in_batch": torch.tensor(float(sum(len(e.completion) for e in made))),
    }


def _padded(rows: Sequence[Sequence[float]], fill: float = 0.0) -> Tensor:
    width = max(map(len, rows))
    return torch.stack([torch.tensor([*row] + [fill] * (width - len(row))) for row in rows])


def _padded_support(made: Sequence[Episode]) -> Tensor:
    width = max(len(e.completion) for e in made)
    support = torch.ones(len(made), width, len(made[0].support[0]), dtype=torch.bool)
    for row, episode in zip(support, made, strict=True):
        row[: len(episode.support)] = torch.stack(episode.support)
    return support
