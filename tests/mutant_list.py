"""The wrong edits of `mutants`, by what they break."""

from mutants import Mutant

GRPO, STAGE = "test_wiring_grpo.py", "test_wiring_supervised.py"

MUTANTS = [
    # ------------------------------------------------------------------------------ GRPO's stage
    Mutant(
        "GRPO: loss with its sign flipped",
        "* kl - objective))",
        "* kl + objective))",
        f"{GRPO} -k likelier",
    ),
    Mutant(
        "GRPO: loss without its reference",
        "            reference = self.reference.distribution(batch, self.config.temperature)\n"
        "            terms",
        "            reference = None\n            terms",
        f"{GRPO} -k kl_is_zero",
    ),
    Mutant(
        "GRPO: loss at temperature 1",
        "policy_distribution(model, batch, self.config.temperature)\n            reference",
        "policy_distribution(model, batch, 1.0)\n            reference",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: loss with dropout left on",
        "with evaluating(model):  # dropout would",
        "with torch.enable_grad():  # dropout would",
        f"{GRPO} -k dropout",
    ),
    Mutant(
        "GRPO: old log-probs taken from the rollout",
        "old[batch.mask] = self._logprobs(batch).cpu()",
        "old[batch.mask] = batch.rollout_logprobs[batch.mask]",
        f"{GRPO} -k old_logprobs",
    ),
    Mutant(
        "GRPO: old log-probs with dropout on",
        '"""(M,) from the same forward that trains."""\n'
        "        batch = batch.to(self.model.device)\n"
        "        with evaluating(self.model), ",
        '"""(M,) from the same forward that trains."""\n'
        "        batch = batch.to(self.model.device)\n"
        "        with ",
        f"{GRPO} -k dropout",
    ),
    Mutant(
        "GRPO: replay drawn from the step's own prompts",
        "self.source.others(self.source.prompts_per_step, step, REPLAY, adaptive=False)",
        "self.source.of_step(step)",
        f"{GRPO} -k other_prompts",
    ),
    Mutant(
        "GRPO: replay at full weight",
        "scale = self.config.sft_replay_coef * divisor / own",
        "scale = divisor / own",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: validation sampled instead of greedy",
        "self._roll_out(self.validation, 1, GREEDY)",
        "self._roll_out(self.validation, 1, self._sampling(0, 0))",
        f"{GRPO} -k greedy",
    ),
    Mutant(
        "GRPO: gradient accumulation ignored",
        "self.prompts_per_step = config.batch_size * config.gradient_accumulation_steps",
        "self.prompts_per_step = config.batch_size",
        f"{GRPO} -k accumulated",
    ),
    Mutant(
        "GRPO: support dropped in the loss",
        "    if batch.support is not None:\n        logits = logits.masked_fill",
        "    if False:\n        logits = logits.masked_fill",
        f"{GRPO} -k dropping",
    ),
    Mutant(
        "GRPO: rollouts at temperature 1",
        "return Sampling(config.temperature, config.top_k, config.top_p, seed)",
        "return Sampling(1.0, config.top_k, config.top_p, seed)",
        f"{GRPO} -k sampled",
    ),
    Mutant(
        "GRPO: the same random numbers in every step",
        "seed = self.config, derived_seed(self.config.seed, step, round_)",
        "seed = self.config, derived_seed(self.config.seed, 0, round_)",
        f"{GRPO} -k sampled",
    ),
    Mutant(
        "GRPO: one update instead of several",
        "range(self.config.num_iterations if micro_batches else 0)",
        "range(1 if micro_batches else 0)",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: a reference that moves with the policy",
        "self.model = copy.deepcopy(policy).requires_grad_(False).eval()",
        "self.model = policy",
        f"{GRPO} -k kl_is_zero",
    ),
    Mutant(
        "GRPO: validation on problems of the train split",
        'samples = distinct_samples(spec, config.eval_samples, config.seed, "validation")\n'
        "    return [sample.record.expression",
        'samples = distinct_samples(spec, config.eval_samples, config.seed, "train")\n'
        "    return [sample.record.expression",
        f"{GRPO} -k held_out",
    ),
    Mutant(
        "GRPO: prompts of the test split",
        'return spell(draw_any(spec, "nested", "train", rng))',
        'return spell(draw_any(spec, "nested", "test", rng))',
        f"{GRPO} -k train_split",
    ),
    Mutant(
        "GRPO: cut-off completions are not masked",
        'and not (config.cutoff == "mask" and rollout.outcome.cut_off)',
        "",
        "test_grpo_stage.py -k cut",
    ),
    Mutant(
        "GRPO: cut-off completions cost nothing",
        "reward = -1.0",
        "pass",
        "test_grpo_stage.py -k cut",
    ),
    Mutant(
        "GRPO: the old log-probs never reach the loss",
        "old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs[mask]",
        "old = logprobs.detach()",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: replay is left out of the update",
        "            yield micro_batches\n",
        "            yield batches\n",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: dead groups take part",
        "            if not self._is_dead(group)\n",
        "            if True\n",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: groups are mixed up",
        "[rollouts[start : start + copies] for start in range(0, len(rollouts), copies)]",
        "[rollouts[start :: len(expressions)] for start in range(len(expressions))]",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: the start is not checked",
        "if not (mean <= mean_allowed and largest <= allowed and kl <= LARGEST_START_KL):",
        "if False:",
        f"{GRPO} -k another_temperature",
    ),
    Mutant(
        "GRPO: only the first micro-batch trains",
        "batches = self._batches(self._signal(groups))",
        "batches = self._batches(self._signal(groups))[:1]",
        f"{GRPO} -k that_of_trl",
    ),
    Mutant(
        "GRPO: a line tells of its last step alone",
        "**means(self.figures),",
        "**self.figures[-1],",
        "test_grpo_stage.py -k means",
    ),
    # ------------------------------------------------------------------------- GRPO's mathematics
    Mutant(
        "GRPO: advantages without their baseline",
        "advantages = rewards - rewards.mean(dim=1, keepdim=True)",
        "advantages = rewards - 0 * rewards.mean(dim=1, keepdim=True)",
        "test_grpo.py -k by_hand",
    ),
    Mutant(
        "GRPO: the optimistic bound",
        "return torch.minimum(free, clipped), clipped < free",
        "return torch.maximum(free, clipped), clipped < free",
        "test_grpo.py -k by_hand",
    ),
    Mutant(
        "GRPO: clip range the wrong way round",
        "ratio.clamp(1.0 - low, 1.0 + high)",
        "ratio.clamp(1.0 - high, 1.0 + low)",
        "test_grpo.py -k by_hand",
    ),
    Mutant(
        "GRPO: k3 without its linear term",
        "k3 = gap.exp() - gap - 1.0",
        "k3 = gap.exp() - 1.0",
        "test_grpo.py -k unbiased",
    ),
    Mutant(
        "GRPO: the last token does not count",
        "weights[row, start:end] = token_weight(",
        "weights[row, start : end - 1] = token_weight(",
        "test_grpo.py -k count",
    ),
    Mutant(
        "GRPO: divided by the rows of a micro-batch",
        '{"dapo": length, "grpo": 1',
        '{"dapo": 1, "grpo": 1',
        "test_grpo.py -k count",
    ),
    # -------------------------------------------------------------------------- the training loop
    Mutant(
        "loop: no gradient clipping",
        "model.parameters(), limit or math.inf)",
        "model.parameters(), math.inf)",
        f"{STAGE} -k clipped",
    ),
    Mutant(
        "loop: the schedule is never applied",
        "run.optimizer.step(scale)",
        "run.optimizer.step()",
        f"{STAGE} -k plain_loop",
    ),
    Mutant(
        "loop: gradients are not reset",
        "run.optimizer.zero_grad(set_to_none=True)",
        "pass",
        f"{STAGE} -k plain_loop",
    ),
    Mutant(
        "loop: divided by each micro-batch's own weight",
        "loss = task.loss(run.model, batch.to(run.model.device)) / total",
        "loss = task.loss(run.model, batch.to(run.model.device)) / batch.count",
        f"{STAGE} -k in_parts",
    ),
    Mutant(
        "loop: autocast does nothing",
        "enabled=precision != torch.float32)",
        "enabled=False)",
        f"{STAGE} -k bf16",
    ),
    Mutant(
        "loop: frozen weights are not watched",
        "    if moved & frozen:",
        "    if False:",
        f"{STAGE} -k frozen",
    ),
    Mutant(
        "loop: held-out evaluation with dropout on",
        "    run.model.eval()\n",
        "",
        f"{STAGE} -k judging",
    ),
    Mutant(
        "loop: the worst model is kept as the best",
        "if task.badness(figures) < run.best:",
        "if task.badness(figures) > -run.best:",
        "test_training.py -k best",
    ),
    Mutant(
        "loop: the random state is not restored",
        'torch.set_rng_state(state["rng"])',
        "pass",
        "test_training.py -k damaged",
    ),
    Mutant(
        "loop: the optimizer's state is not restored",
        'self.optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "test_training.py -k damaged",
    ),
    Mutant(
        "loop: no check that anything moved",
        "            witness.check(run, step)\n",
        "",
        f"{STAGE} -k moves_nothing",
    ),
    Mutant(
        "loop: a tensor that stays is not noticed",
        "            if name not in moved and should_move(",
        "            if False and should_move(",
        f"{STAGE} -k moves_one",
    ),
    Mutant(
        "loop: the rate of the next step",
        "learning_rate_factor(run.config, run.step, task.total_steps)",
        "learning_rate_factor(run.config, run.step + 1, task.total_steps)",
        STAGE,
    ),
    Mutant(
        "loop: the logged rates are the peaks",
        "learning_rates(run.optimizer, scale),",
        "learning_rates(run.optimizer, 1.0),",
        STAGE,
    ),
    # -------------------------------------------------------------------------------- optimizers
    Mutant(
        "optimizer: AdamW without bias correction",
        "-rate / (1.0 - beta1**count)",
        "-rate",
        "test_optim.py -k torch",
    ),
    Mutant(
        "optimizer: decay of norms, too",
        "decay = config.weight_decay if parameter.ndim >= 2 else 0.0",
        "decay = config.weight_decay",
        STAGE,
    ),
    Mutant(
        "optimizer: Muon without momentum",
        'torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])',
        "torch._foreach_lerp_(momenta, gradients, 1.0)",
        "test_optim.py -k authors",
    ),
    Mutant(
        "optimizer: Muon for the embedding, too",
        'by_muon = use_muon and parameter.ndim == 2 and ".layers." in name',
        "by_muon = use_muon and parameter.ndim == 2",
        "test_optim.py -k matrices",
    ),
    Mutant(
        "schedule: the warm-up starts at the peak",
        "return (step + 1) / warmup",
        "return 1.0",
        STAGE,
    ),
    # -------------------------------------------------------------------------- supervised stages
    Mutant(
        "supervised: the prompt's weight is ignored",
        "loss = LossWeights(config.prompt_loss_weight, config.result_loss_weight)",
        "loss = LossWeights(1.0, config.result_loss_weight)",
        f"{STAGE} -k plain_loop",
    ),
    Mutant(
        "supervised: the result's weight is ignored",
        "np.where(in_result, loss.result, 1.0)",
        "1.0",
        STAGE,
    ),
    Mutant(
        "supervised: held-out problems from the train split",
        'config.eval_samples, config.seed, "validation")\n    return [sample.record for',
        'config.eval_samples, config.seed, "train")\n    return [sample.record for',
        f"{STAGE} -k held_out_problems",
    ),
    Mutant(
        "supervised: weights left out of the loss",
        'return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()',
        'return F.cross_entropy(logits, targets, reduction="none").sum()',
        STAGE,
    ),
    Mutant(
        "supervised: every epoch in the same order",
        "rng = np.random.default_rng((config.seed, epoch))",
        "rng = np.random.default_rng(config.seed)",
        "test_data.py -k epoch",
    ),
    # --------------------------------------------------------------------------------------- data
    Mutant(
        "data: targets are the inputs",
        "Batch(tokens[:, :-1], tokens[:, 1:], ",
        "Batch(tokens[:, :-1], tokens[:, :-1], ",
        "test_data.py -k predicts",
    ),
    Mutant(
        "data: no end of text",
        "np.array([BOS, *ids, EOS], dtype=np.int32)",
        "np.array([BOS, *ids], dtype=np.int32)",
        "test_data.py",
    ),
    Mutant(
        "data: the token behind a result does not count as one",
        "in_result[1:] |= in_result[:-1]",
        "pass",
        "test_data.py",
    ),
    Mutant(
        "data: a sample of just the context is dropped",
        "if len(ids) + 2 > max_seq_length:",
        "if len(ids) + 2 >= max_seq_length:",
        "test_data.py",
    ),
    # -------------------------------------------------------------------------------------- model
    Mutant(
        "model: attention without its scale",
        "scores = (q * q.shape[-1] ** -0.5) @",
        "scores = q @",
        "test_model.py -k transformers",
    ),
    Mutant(
        "model: a position sees the next one",
        "hidden = slots > positions[:, None, :, None]",
        "hidden = slots > positions[:, None, :, None] + 1",
        "test_model.py -k later",
    ),
    Mutant(
        "model: rotation the other way",
        "torch.cat((-second, first), dim=-1)",
        "torch.cat((second, -first), dim=-1)",
        "test_model.py -k transformers",
    ),
    # -------------------------------------------------------------------------------------- decoder
    Mutant(
        "decoder: a draft is believed one token too far",
        "counts = 1 + (tokens[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)",
        "counts = 2 + (tokens[:, 1:-1] == drafts[:, 1:]).cumprod(dim=1).sum(dim=1)",
        "test_generate.py -k batch_size",
    ),
    Mutant(
        "decoder: what follows the end of a text counts",
        "counts = torch.minimum(counts, (ends.cumsum(dim=1) == ends).sum(dim=1))",
        "pass",
        "test_generate.py -k guesses",
    ),
    Mutant(
        "decoder: a guess is followed after it has failed",
        "self.on_guess[rows[missed]] = False",
        "pass",
        "test_generate.py -k passes",
    ),
    Mutant(
        "decoder: the shorter match is looked up",
        "best = (matched * width + place).argmax",
        "best = ((matched > 0) * width + place).argmax",
        "test_generate.py -k looking_up",
    ),
    Mutant(
        "decoder: the cache keeps all that a pass has read",
        "cache.lengths = cache.lengths + counts.to(model.device)",
        "cache.lengths = cache.lengths + logits.shape[1]",
        "test_generate.py -k greedy",
    ),
    Mutant(
        "decoder: random numbers by place in the batch",
        "np.random.default_rng((sampling.seed, row)).random(steps) for row in rows",
        "np.random.default_rng((sampling.seed, row)).random(steps) for row in range(len(rows))",
        "test_generate.py -k batch_size",
    ),
    Mutant(
        "decoder: the nucleus leaves out the token that crosses it",
        "before = probs.cumsum(dim=-1) - probs",
        "before = probs.cumsum(dim=-1)",
        "test_generate.py -k distribution",
    ),
    Mutant(
        "decoder: temperature multiplies",
        "logits = logits / sampling.temperature",
        "logits = logits * sampling.temperature",
        "test_generate.py -k distribution",
    ),
    Mutant(
        "decoder: dropout on while writing",
        "    with evaluating(model):\n        _read_prompts",
        "    with torch.enable_grad():\n        _read_prompts",
        f"{GRPO} -k dropout",
    ),
    Mutant(
        "decoder: the wrong rows leave the cache",
        "cache.keep(texts.drop_finished().to(model.device))",
        "cache.keep(torch.arange(len(texts.drop_finished())))",
        "test_generate.py -k batch_size",
    ),
    # ------------------------------------------------------------------------------- the task
    Mutant(
        "task: subtraction the other way round",
        'return left + right if operator == "+" else left - right',
        'return left + right if operator == "+" else right - left',
        "test_expression.py -k million",
    ),
    Mutant(
        "task: the deeper side does not count",
        "1 + max(left_depth, right_depth)",
        "1 + left_depth",
        "test_sampling.py",
    ),
    Mutant(
        "task: leading zeros are fine",
        'if digits[0] == "0" and digits != "0":',
        "if False:",
        "test_expression.py -k malformed",
    ),
    Mutant(
        "solution: the rightmost operation first",
        "match = _READY.search(expression)",
        "match = [*_READY.finditer(expression), None][-2 if _READY.search(expression) else -1]",
        "test_solution.py",
    ),
    Mutant(
        "verifier: any step number is right",
        "if stated is None or (number is not None and stated[1] != str(number)):",
        "if stated is None:",
        "test_verifier.py",
    ),
    Mutant(
        "verifier: any next operation is right",
        "if expected is None or stated[2] != expected.operation:",
        "if expected is None:",
        "test_verifier.py",
    ),
    Mutant(
        "verifier: a wrong copy is right",
        "if error is None and written != expected.expression:",
        "if False:",
        "test_verifier.py",
    ),
    Mutant(
        "verifier: steps after the first wrong one count",
        "next((n for n, step in enumerate(self.steps) if not step.ok), len(self.steps))",
        "sum(step.ok for step in self.steps)",
        "test_verifier.py test_rewards.py",
    ),
    # ----------------------------------------------------------------------------- corpus, splits
    Mutant(
        "corpus: the split looks at the spelling",
        'key = problem if isinstance(problem, str) else " ".join(map(str, problem))',
        'key = problem if isinstance(problem, str) else "".join(map(str, problem))',
        "test_corpus.py -k split",
    ),
    Mutant(
        "corpus: test problems of any split",
        "stratum.every() if split_of_drawn(problem) == split]",
        "stratum.every()]",
        "test_corpus.py",
    ),
    Mutant(
        "corpus: train problems of any split",
        "        if split_of_drawn(problem) == split:\n            return problem",
        "        if problem:\n            return problem",
        "test_corpus.py",
    ),
    Mutant(
        "sampler: depth is only a bound",
        "sides = [exact_tree(depth - 1, num_range, rng), ",
        "sides = [_free_tree(depth - 1, num_range, rng), ",
        "test_sampling.py -k depth",
    ),
    Mutant(
        "sampler: the largest number never occurs",
        "rng.randrange(num_range[0], num_range[1] + 1)",
        "rng.randrange(num_range[0], max(num_range[1], num_range[0] + 1))",
        "test_sampling.py -k range",
    ),
    # ----------------------------------------------------------------------------------- LoRA
    Mutant(
        "LoRA: an adapter that is not scaled",
        "self.lora_B(self.lora_A(self.dropout(x))) * self.scale",
        "self.lora_B(self.lora_A(self.dropout(x)))",
        "test_lora.py -k peft",
    ),
    Mutant(
        "LoRA: merged without its scale",
        "weight = base.weight.float() + self.scale * delta",
        "weight = base.weight.float() + delta",
        "test_lora.py -k merged",
    ),
    Mutant(
        "LoRA: the base is not frozen",
        "model.requires_grad_(False)\n    for layer",
        "for layer",
        f"{STAGE} -k peft",
    ),
    Mutant(
        "LoRA: dropout on the output",
        "self.lora_B(self.lora_A(self.dropout(x)))",
        "self.dropout(self.lora_B(self.lora_A(x)))",
        "test_lora.py -k dropout",
    ),
    Mutant(
        "LoRA: any base will do",
        "if weights_hash(base.model) != base_hash:",
        "if False:",
        "test_lora.py -k another_base",
    ),
    # --------------------------------------------------------------------------------- checkpoint
    Mutant(
        "checkpoint: changed bytes are not noticed",
        "if part := archive.testzip():",
        "if part := None:",
        "test_checkpoint.py -k flipped",
    ),
    Mutant(
        "checkpoint: code is executed",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        "test_checkpoint.py -k executed",
    ),
    Mutant(
        "checkpoint: NaN is loaded",
        "if not tensor.isfinite().all():",
        "if False:",
        "test_checkpoint.py -k finite",
    ),
    Mutant(
        "checkpoint: another tokenizer is fine",
        "if path and ArithmeticTokenizer.load(path).hash != checkpoint.tokenizer.hash:",
        "if False:",
        "test_checkpoint.py -k tokenizer",
    ),
    Mutant(
        "files: written in place",
        "os.replace(temporary, path)",
        "path.write_bytes(temporary.read_bytes())\n        os.fsync(0)",
        "test_checkpoint.py",
    ),
    # --------------------------------------------------------------------------------- evaluation
    Mutant(
        "evaluation: the normal interval for Wilson's",
        "center = (share + spread / 2) / (1 + spread)",
        "center = share",
        "test_evaluate.py -k wilson",
    ),
    Mutant(
        "evaluation: sampled although greedy was asked for",
        "return self.temperature == 0.0",
        "return False",
        "test_generate.py -k greedy",
    ),
    Mutant(
        "evaluation: every row counts as trained",
        "    return in_row and low <= problem.low and problem.high <= high",
        "    return True",
        "test_evaluate.py -k covered",
    ),
    Mutant(
        "evaluation: the length limit leaves no room",
        "return min(longest + max(32, longest // 4), CONTEXTS_TO_WRITE * context)",
        "return min(longest // 2, CONTEXTS_TO_WRITE * context)",
        "test_evaluate.py -k limit",
    ),
    Mutant(
        "rewards: step validity pays beyond what is needed",
        "return min(verdict.valid_steps, verdict.needed_steps) / verdict.needed_steps",
        "return verdict.valid_steps / verdict.needed_steps",
        "test_rewards.py",
    ),
    Mutant(
        "rewards: the parts are not weighted",
        "return sum(weights[name] * value for name, value in parts.items()), parts",
        "return sum(parts.values()), parts",
        "test_rewards.py",
    ),
]
