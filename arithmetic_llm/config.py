"""Every setting of every script: flags, JSON keys and `docs/FLAGS.md` come from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from arithmetic_llm.cli import Above, Below, check_fields, default_of, like, opt
from arithmetic_llm.runtime import UserError

# What settings need; see `opt`.
NO_STEP_LIMIT = {"max_steps": 0}
ADAMW, MUON = {"optimizer": "adamw"}, {"optimizer": "muon"}
ADAPTER, ALL_WEIGHTS = {"lora_rank": Above(0)}, {"lora_rank": 0}
DRAWN = {"test_file": ""}
EXPORTED = {"from_hf": ""}
TREES = {"style": ("nested", "typed", "padded"), "invalid_rate": Above(0)}  # not flat sums alone
SAMPLED = {"temperature": Above(0)}
GENERATED = {"data_mode": "generated"}
ATTEMPTS = {"learn_from": "attempts"}
NOT_FLAT_ALONE = {"flat_rate": Below(1)}  # a flat sum is counted by its terms, not by depth
SEVERAL_UPDATES = {"num_iterations": Above(1)}  # in the first, the ratio to clip is 1


# -------------------------------------------------------------------------------- corpora

SPLITS = ("train", "validation", "test")
TREE_STYLES = ("nested", "typed", "padded")
STYLES = (*TREE_STYLES, "flat", "chain", "drill", "rewrite", "invalid")
# A solution grows with the square of the numbers in its expression. At these limits there are some
# 200 numbers, and solutions of 50,000 to 200,000 tokens: more than any context here. Each level of
# depth doubles that. At depth 20 one solution had 32 million tokens and took 12 GB to encode.
MAX_DEPTH = 10
MAX_FLAT_TERMS = 200
MAX_CHAIN_NUMBERS = 200
LARGEST_NUMBER = 10**100
LEAF_PROBABILITY = 0.3  # that the free side of an operation stops growing, at every level
DRILLS = 0.3  # of the samples of a foundational corpus


def _rate(default: float, help: str) -> float:
    return opt(default, help, at_least=0.0, at_most=1.0)


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Problems to sample; each rate is a fraction of all, nested expressions are the rest."""

    num_range: tuple[int, int] = opt((1, 20), "smallest and largest number in an expression")
    min_depth: int = opt(1, "least depth of an expression tree", at_least=1)
    max_depth: int = opt(5, "greatest depth of an expression tree", at_least=1, at_most=MAX_DEPTH)
    invalid_rate: float = _rate(0.1, "fraction of invalid expressions, rounded to whole samples")
    typed_rate: float = _rate(
        0.1, "fraction written as people type, without needless parentheses: 1 + 2 + 3"
    )
    padded_rate: float = _rate(
        0.0,
        "fraction with 0 to 2 needless pairs of parentheses around each operation, "
        "at least one in all: ((1 + 2)) - 3",
    )
    flat_rate: float = _rate(
        0.0,
        "fraction of flat sums without parentheses, 2 to --flat-terms numbers: 7 - 2 + 9 - 1",
    )
    chain_rate: float = _rate(
        0.0,
        "fraction of long sums of trees shallower than --max-depth, with 3 to --chain-numbers "
        "numbers in all, the last tree kept whole: 7 - ((2 + 9) - 4) + 1 - (3 - 8)",
    )
    drill_rate: float = _rate(
        0.0, "fraction of one-step drills: single steps of trees of --max-depth, as 31 - -12"
    )
    rewrite_rate: float = _rate(
        0.0,
        "fraction of rewritings: --rewrite-steps of the steps of a tree deeper than --max-depth, "
        "up to --rewrite-depth, behind the step before and without an answer; about one in three "
        "has first steps and their problem",
    )
    wide_rate: float = _rate(
        0.0,
        "fraction, of every style but chains, whose numbers come from --wide-range, longer and "
        "shorter ones, in place of --num-range; drills, but for those of --cancel-rate, have a "
        "digit more and either sign",
    )
    cancel_rate: float = _rate(
        0.0,
        "fraction of the drills whose numbers, as long as --wide-rate has them, take away from "
        "each other; the results are of any length and have many zeros: 1203 - 1187, -221 + 120",
    )
    flat_terms: int = opt(20, "most numbers in a flat sum", at_least=2, at_most=MAX_FLAT_TERMS)
    chain_numbers: int = opt(
        64, "most numbers in a chain, about", at_least=3, at_most=MAX_CHAIN_NUMBERS
    )
    rewrite_depth: int = opt(
        6, "greatest depth of the trees of --rewrite-rate", at_least=1, at_most=MAX_DEPTH
    )
    rewrite_steps: int = opt(
        1, "most steps, one after the other, of each of --rewrite-rate", at_least=1
    )
    rewrite_leaf_probability: tuple[float, float] = opt(
        (LEAF_PROBABILITY, LEAF_PROBABILITY),
        "range of the chance, one for each tree of --rewrite-rate, that a side of an operation is "
        f"a number; {LEAF_PROBABILITY:g} for all other trees. 1 makes the fewest numbers for a "
        "depth: cheaper to show, and more begin with first steps; lower ones make longer lines",
        at_least=0.0,
        at_most=1.0,
    )
    wide_range: tuple[int, int] = opt((-999, 999), "smallest and largest number of --wide-rate")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_range", "wide_range", "rewrite_leaf_probability"):
            flag, (low, high) = f"--{name.replace('_', '-')}", getattr(self, name)
            if low > high:
                raise UserError(f"{flag} {low} {high}: the smaller number comes first")
            if max(-low, high) > LARGEST_NUMBER:
                raise UserError(f"{flag}: numbers of up to 100 digits, please")
        if self.min_depth > self.max_depth:
            raise UserError(f"--min-depth {self.min_depth}: is above --max-depth {self.max_depth}")
        if self.rewrite_rate and self.rewrite_depth <= self.max_depth:
            raise UserError(
                f"--rewrite-depth {self.rewrite_depth}: is not above --max-depth {self.max_depth}; "
                "change one of them, or set --rewrite-rate 0"
            )
        rates = {style: self.rate(style) for style in STYLES[1:]}
        if sum(rates.values()) > 1 + 1e-9:
            shown = ", ".join(f"{style} {rate:g}" for style, rate in rates.items() if rate)
            raise UserError(f"the rates add up to more than 1 ({shown}); lower one of them")

    def rate(self, style: str) -> float:
        """The fraction of samples of a style other than nested."""
        return getattr(self, f"{style}_rate")

    def style_counts(self, num_samples: int) -> dict[str, int]:
        """Exact counts that add up to ``num_samples``, each rate rounded to the nearest."""
        counts, left = {}, num_samples
        for style in reversed(STYLES[1:]):  # invalid first: its rate is a promise
            counts[style] = min(left, math.floor(self.rate(style) * num_samples + 0.5))
            left -= counts[style]
        return {"nested": left, **counts}


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(SampleSpec):
    """Corpus."""

    num_samples: int | None = opt(
        None, "samples in each file that is written", required=True, at_least=1
    )
    seed: int = opt(42, "the same seed makes the same file, byte for byte", at_least=0)
    split: str = opt(
        "train",
        "which problems: no two splits share one; test and validation files repeat none either",
        choices=SPLITS,
    )
    min_depth: int = like(SampleSpec, "min_depth", needs=[NOT_FLAT_ALONE])
    max_depth: int = like(SampleSpec, "max_depth", needs=[NOT_FLAT_ALONE])
    flat_terms: int = like(SampleSpec, "flat_terms", needs=[{"flat_rate": Above(0)}])
    chain_numbers: int = like(SampleSpec, "chain_numbers", needs=[{"chain_rate": Above(0)}])
    rewrite_depth: int = like(SampleSpec, "rewrite_depth", needs=[{"rewrite_rate": Above(0)}])
    rewrite_steps: int = like(SampleSpec, "rewrite_steps", needs=[{"rewrite_rate": Above(0)}])
    rewrite_leaf_probability: tuple[float, float] = like(
        SampleSpec, "rewrite_leaf_probability", needs=[{"rewrite_rate": Above(0)}]
    )
    wide_range: tuple[int, int] = like(SampleSpec, "wide_range", needs=[{"wide_rate": Above(0)}])
    cancel_rate: float = like(
        SampleSpec, "cancel_rate", needs=[{"drill_rate": Above(0)}, {"wide_rate": Above(0)}]
    )


@dataclass(frozen=True, kw_only=True)
class FoundationalCorpusConfig(CorpusConfig):
    """Foundational corpus.

    It is where arithmetic facts (drills) and the counting of parentheses (padded) are learned. Real
    recipes (configs/) have more kinds of samples.
    """

    typed_rate: float = like(SampleSpec, "typed_rate", 0.1)
    padded_rate: float = like(SampleSpec, "padded_rate", 0.05)
    flat_rate: float = like(SampleSpec, "flat_rate", 0.0)
    drill_rate: float | None = like(
        SampleSpec, "drill_rate", None, unset=f"{DRILLS} to train on, else 0.0"
    )

    def __post_init__(self) -> None:
        if self.drill_rate is None:  # a test of steps would pass for one of problems
            object.__setattr__(self, "drill_rate", DRILLS if self.split == "train" else 0.0)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PlainTextCorpusConfig(FoundationalCorpusConfig):
    """Foundational corpus."""

    output_txt: str = opt("data/foundational_corpus.txt", "the corpus file to write")


@dataclass(frozen=True, kw_only=True)
class MixedCorpusConfig(CorpusConfig):
    """Instruction corpus."""

    output_mixed: str = opt("data/instruction_corpus.txt", "the corpus file to write")


def _of_each(name: str) -> Any:
    """A rate that each corpus has a default of its own for."""
    foundational, instruction = (
        default_of(kind.__dataclass_fields__[name], [kind])
        for kind in (FoundationalCorpusConfig, CorpusConfig)
    )
    same = foundational == instruction
    unset = instruction if same else f"{instruction}; in the foundational corpus {foundational}"
    return like(CorpusConfig, name, None, unset=unset)


@dataclass(frozen=True, kw_only=True)
class BothCorporaConfig(CorpusConfig):
    """Corpora."""

    typed_rate: float | None = _of_each("typed_rate")
    padded_rate: float | None = _of_each("padded_rate")
    flat_rate: float | None = _of_each("flat_rate")
    drill_rate: float | None = like(
        CorpusConfig,
        "drill_rate",
        None,
        unset=f"0.0; in the foundational corpus to train on {DRILLS}",
    )
    output_foundational: str = opt(
        "data/foundational_corpus.txt",
        "the plain-text file to write",
        needs=[{"instruction_only": False}],
    )
    output_instruction: str = opt(
        "data/instruction_corpus.txt",
        "the JSON Lines file to write",
        needs=[{"foundational_only": False}],
    )
    foundational_only: bool = opt(False, "write only the foundational corpus")
    instruction_only: bool = opt(False, "write only the instruction corpus")

    def __post_init__(self) -> None:
        if self.foundational_only and self.instruction_only:
            raise UserError("--foundational-only and --instruction-only leave nothing to write")
        both = not (self.foundational_only or self.instruction_only)
        if both and self.output_foundational == self.output_instruction:
            raise UserError(f"{self.output_instruction}: both corpora cannot go to one file")
        if not self.instruction_only:
            self.of(FoundationalCorpusConfig)
        if not self.foundational_only:
            self.of(CorpusConfig)

    def of(self, kind: type[CorpusConfig]) -> Any:
        """The settings of one kind of corpus, with its own defaults for what is not given."""
        values = {field.name: getattr(self, field.name) for field in fields(kind)}
        return kind(**{name: value for name, value in values.items() if value is not None})


# ------------------------------------------------------------------------- tokens and lengths


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer training."""

    corpus_path: str = opt("", "corpus to learn merges from (either format)", required=True)
    vocab_size: int = opt(1000, "upper bound on the number of tokens", at_least=1)
    digits: str = opt(
        "reversed",
        "places = a token for each digit and place (units, tens, hundreds, ...); reversed = that, "
        "and units come first; alone = a token a digit; merged = frequent numbers become tokens as "
        "words do",
        choices=("reversed", "places", "alone", "merged"),
    )
    output_dir: str = opt("data/tokenizer", "directory for tokenizer.json")


@dataclass(frozen=True)
class TokenTableConfig:
    """Token table."""

    tokenizer_path: str = opt("", "tokenizer directory or file", required=True)
    corpus_path: str = opt("", "count the tokens of this corpus (either format)")


@dataclass(frozen=True)
class SequenceLengthsConfig:
    """Sequence lengths."""

    corpus_path: str = opt("", "corpus to measure (either format)", required=True)
    tokenizer_path: str = opt("", "tokenizer directory or file", required=True)
    max_seq_length: int = opt(512, "context to count the longer samples for", at_least=1)


# -------------------------------------------------------------------------- models and runs

PROCESSES = opt(
    1,
    "processes that share the work on this machine, and its cores; torchrun has its own flags",
    at_least=1,
)


def _shape(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a model that starts from random weights; another brings its own shape."""
    return opt(default, help, needs=[{"init_from": ""}], **metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture."""

    d_model: int = _shape(256, "embedding dimension", at_least=2, at_most=65_536)
    nhead: int = _shape(8, "number of attention heads; must divide d_model", at_least=1)
    num_layers: int = _shape(6, "number of transformer layers", at_least=1, at_most=1000)
    dim_feedforward: int = _shape(
        1024, "width of the SwiGLU feed-forward layer", at_least=1, at_most=1_000_000
    )
    dropout: float = _shape(0.1, "dropout on each residual branch", at_least=0.0, at_most=0.99)
    max_seq_length: int = _shape(
        1536,
        "context in tokens; a longer sample is dropped, counted and reported (unless it is learned "
        "in excerpts)",
        at_least=8,
    )
    attention_window: int = _shape(
        0, "tokens that each one looks back over, itself included; 0 = all", at_least=0
    )
    rope_theta: float = _shape(10000.0, "base of the rotary position frequencies", above=0.0)
    tie_embeddings: bool = _shape(False, "share the input embedding with the output head")

    def __post_init__(self) -> None:
        if self.d_model % self.nhead:
            raise UserError(f"--d-model {self.d_model}: must be a multiple of --nhead {self.nhead}")
        if self.head_dim % 2:
            raise UserError(
                f"--d-model {self.d_model} over --nhead {self.nhead}: heads of {self.head_dim} "
                "features, but rotary positions need an even number"
            )

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.d_model // self.nhead


@dataclass(frozen=True)
class RunConfig:
    """Training, common to every stage."""

    STAGE: ClassVar[str]  # as checkpoints call it
    START_FLAG: ClassVar[str] = "--init-from"  # what a new run from old weights is started with

    output_dir: str = opt("models", "the run folder is made in here")
    num_epochs: int = opt(10, "passes over the data", at_least=1, needs=[NO_STEP_LIMIT])
    max_steps: int = opt(0, "stop after this many steps; 0 = when the epochs are over", at_least=0)
    learning_rate: float = opt(1e-4, "peak learning rate", above=0.0)
    warmup_steps: int = opt(
        1000, "linear warm-up; at most a tenth of the run's steps is used", at_least=0
    )
    schedule: str = opt(
        "cosine", "learning rate after the warm-up", choices=("cosine", "linear", "constant")
    )
    final_lr_ratio: float = opt(
        0.0,
        "share of the peak learning rate that the schedule ends at, one step after the last",
        at_least=0.0,
        at_most=1.0,
        needs=[{"schedule": ("cosine", "linear")}],
    )
    optimizer: str = opt(
        "adamw",
        "muon = Muon for the layers' matrices, AdamW for the rest",
        choices=("adamw", "muon"),
    )
    muon_learning_rate: float = opt(
        0.02, "peak rate of the layers' matrices", above=0.0, needs=[MUON]
    )
    adam_beta2: float = opt(0.95, "memory of AdamW's squared gradients", above=0.0, at_most=0.99999)
    weight_decay: float = opt(0.01, "decoupled weight decay of the matrices", at_least=0.0)
    gradient_clip: float = opt(1.0, "clip the gradient norm to this; 0 = off", at_least=0.0)
    eval_every: int = opt(500, "steps between held-out evaluations", at_least=1)
    eval_samples: int = opt(500, "held-out samples (validation split)", at_least=1)
    save_every: int = opt(1000, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = opt(2, "newest checkpoint_step_N.pt to keep; 0 = all", at_least=0)
    log_every: int = opt(20, "steps between lines of metrics.jsonl", at_least=1)
    device: str = opt("auto", "cpu, cuda, cuda:N, mps or auto")
    precision: str = opt(
        "auto",
        "auto = bf16 where this machine multiplies it faster than fp32, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    threads: int = opt(0, "CPU threads; 0 = torch's choice", at_least=0)
    seed: int = opt(
        42, "seed of weights, batch order, dropout and sampling", at_least=0, at_most=2**63 - 1
    )
    processes: int = PROCESSES
    resume: str = opt("", "continue the run in this folder from its last checkpoint")

    @property
    def rate_flags(self) -> str:
        """The flags of the learning rates that are in use."""
        if self.optimizer != "muon":
            return "--learning-rate"
        adapter = getattr(self, "lora_rank", 0)  # which has nothing but matrices of the layers
        return "--muon-learning-rate" + ("" if adapter else " or --learning-rate")


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """Training, common to every supervised stage."""

    tokenizer_path: str = opt("", "tokenizer directory (or its tokenizer.json)", required=True)
    batch_size: int = opt(
        32, "sequences per optimizer step", at_least=1, needs=[{"batch_tokens": 0}]
    )
    batch_tokens: int = opt(
        0,
        "most tokens per optimizer step, in an even number of sequences, instead of batch_size "
        "of them; 0 = off",
        at_least=0,
    )
    gradient_accumulation_steps: int = opt(
        1,
        "least number of micro-batches that a step's batch is computed in; one that would not fit "
        "into memory is cut further; same result",
        at_least=1,
    )
    workers: int = opt(
        1,
        "so many copies train side by side, a core or process each (with dropout, one after the "
        "other on one core), every one on batches of its own; see --local-steps",
        at_least=1,
    )
    local_steps: int = opt(
        50,
        "steps of each worker after which all become their mean (local SGD); 0 = they have one "
        "set of weights, and update it in turn, each by the gradient of its batch",
        at_least=0,
        needs=[{"workers": Above(1)}],
    )
    prompt_loss_weight: float = opt(1.0, "loss weight of a prompt token", at_least=0.0)
    result_loss_weight: float = opt(
        1.0,
        "loss weight of a step's result: its digits, its sign and the token that ends it",
        above=0.0,
    )
    excerpt_tokens: int = opt(
        0,
        "learn from a longer sample in excerpts of whole steps, of at most so many tokens; 0 = off",
        at_least=0,
    )
    init_from: str = opt("", "start a new run from this checkpoint's weights")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA adapter."""

    lora_rank: int = opt(8, "rank of the adapter", at_least=1)
    lora_alpha: float = opt(
        16.0, "the adapter is scaled by alpha / rank", above=0.0, needs=[ADAPTER]
    )
    lora_target_modules: str = opt(
        "attention",
        "comma-separated: attention, feedforward, or single names such as q_proj",
        needs=[ADAPTER],
    )
    lora_dropout: float = opt(
        0.0, "dropout on the adapter's input", at_least=0.0, at_most=0.99, needs=[ADAPTER]
    )
    use_rslora: bool = opt(
        False, "scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023)", needs=[ADAPTER]
    )

    @property
    def scale(self) -> float:
        """Factor of ``B A x``."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.use_rslora else self.lora_rank)


@dataclass(frozen=True)
class AdapterFilesConfig:
    """Adapter files."""

    save_merged_model: bool = opt(
        False, "also write merged_model.pt, a model like any other", needs=[ADAPTER]
    )
    save_peft_adapter: bool = opt(
        False, "also write peft_adapter/, which PEFT loads as it is", needs=[ADAPTER]
    )


@dataclass(frozen=True)
class FoundationalConfig(TrainingConfig):
    """Foundational training."""

    STAGE = "foundational"
    corpus_path: str = opt("", "training corpus (plain text or JSON Lines)", required=True)


@dataclass(frozen=True)
class InstructionConfig(TrainingConfig):
    """Instruction tuning."""

    STAGE = "instruction"
    instruction_corpus_path: str = opt(
        "", "instruction corpus (JSON Lines or plain text)", required=True
    )
    foundational_checkpoint: str = opt(
        "", "foundational model to start from", required=True, needs=[{"init_from": ""}]
    )
    num_epochs: int = opt(5, "passes over the corpus", at_least=1, needs=[NO_STEP_LIMIT])
    learning_rate: float = opt(5e-5, "peak learning rate", above=0.0)
    warmup_steps: int = opt(
        500, "linear warm-up; at most a tenth of the run's steps is used", at_least=0
    )
    save_every: int = opt(500, "steps between checkpoints", at_least=1)
    max_seq_length: int = opt(0, "context in tokens; 0 = the foundational model's own", at_least=0)
    prompt_loss_weight: float = like(
        TrainingConfig,
        "prompt_loss_weight",
        never="instruction tuning learns from the tokens after the prompt alone",
    )


@dataclass(frozen=True)
class LoRAInstructionConfig(InstructionConfig, LoRAConfig, AdapterFilesConfig):
    """Instruction tuning with LoRA."""

    STAGE = "instruction_lora"
    # Muon takes every matrix of an adapter, and an adapter has nothing else.
    learning_rate: float = like(InstructionConfig, "learning_rate", needs=[ADAMW])
    adam_beta2: float = like(InstructionConfig, "adam_beta2", needs=[ADAMW])


@dataclass(frozen=True)
class GRPOConfig(RunConfig, LoRAConfig, AdapterFilesConfig):
    """Group relative policy optimization."""

    STAGE = "grpo"
    START_FLAG = "--sft-checkpoint"

    tokenizer: str = opt("", "tokenizer directory (or its tokenizer.json)", required=True)
    sft_checkpoint: str = opt("", "the model to start from; an adapter will do", required=True)
    base_checkpoint: str = opt("", "where the base is, if sft_checkpoint is an adapter")
    output_dir: str = opt("models/grpo", "the run folder is made in here")
    # prompts
    data_mode: str = opt(
        "instruction",
        "prompts from an instruction corpus, or generated as they are needed",
        choices=("instruction", "generated"),
    )
    instruction_corpus: str = opt(
        "",
        "instruction corpus (JSON Lines or plain text)",
        required=True,
        needs=[{"data_mode": "instruction"}],
    )
    num_samples: int = opt(
        1024, "prompts an epoch; in instruction mode at most the corpus", at_least=1
    )
    num_epochs: int = opt(3, "passes over the prompts", at_least=1, needs=[NO_STEP_LIMIT])
    batch_size: int = opt(8, "prompts sampled at a time", at_least=1)
    gradient_accumulation_steps: int = opt(
        1, "batches of prompts whose gradients make one optimizer update", at_least=1
    )
    min_depth: int = opt(1, "least depth of a prompt", at_least=1, needs=[GENERATED])
    max_depth: int = opt(4, "greatest depth of a prompt", at_least=1, at_most=10, needs=[GENERATED])
    num_range: tuple[int, int] = opt((1, 20), "numbers in the prompts", needs=[GENERATED])
    adaptive_difficulty: bool = opt(
        False,
        "draw the depths of the prompts in proportion to p (1 - p), p = the pass rate so far",
        needs=[ATTEMPTS, GENERATED],
    )
    # rollouts
    num_candidates: int = opt(
        4, "completions of each prompt: one group", at_least=2, needs=[ATTEMPTS]
    )
    temperature: float = opt(
        0.8, "of the rollouts and of the loss alike", at_least=0.01, needs=[ATTEMPTS]
    )
    top_k: int = opt(
        0, "sample from the k likeliest tokens only; 0 = off", at_least=0, needs=[ATTEMPTS]
    )
    top_p: float = opt(
        1.0,
        "sample from the nucleus of this mass; 1 = off",
        above=0.0,
        at_most=1.0,
        needs=[ATTEMPTS],
    )
    max_gen_length: int = opt(
        0,
        "most new tokens of a completion; 0 = the longest right solution of some prompts and a "
        "quarter more",
        at_least=0,
    )
    rollout_batch_size: int = opt(256, "completions decoded at a time", at_least=1)
    cutoff: str = opt(
        "keep",
        "completions that hit the length limit: keep them as they are, mask them out of the loss, "
        "or penalise them with reward -1",
        choices=("keep", "mask", "penalise"),
    )
    refill_rounds: int = opt(
        0,
        "replace groups whose rewards are all alike by new prompts, so many times",
        at_least=0,
        needs=[ATTEMPTS],
    )
    # reward and loss
    learn_from: str = opt(
        "attempts",
        "attempts = GRPO; solutions = the right solutions of the same prompts, which is supervised "
        "training, to compare with",
        choices=("attempts", "solutions"),
    )
    rewards: str = opt(
        "correct=1",
        "weighted sum of: correct, step_validity, format, length; in JSON also an object",
        weights=True,
    )
    baseline: str = opt(
        "group",
        "what advantages are measured from: the group's mean reward, or none, which for rewards of "
        "0 and 1 is rejection-sampling fine-tuning",
        choices=("group", "none"),
        needs=[ATTEMPTS],
    )
    scale_rewards: str = opt(
        "none",
        "divide the advantages by the standard deviation of the group or the batch; the learning "
        "rate must follow",
        choices=("none", "group", "batch"),
        needs=[ATTEMPTS, {"baseline": "group"}],
    )
    loss_type: str = opt(
        "dapo",
        "how token losses are averaged: dapo = over all tokens, grpo = over each completion and "
        "then over completions, dr_grpo = over completions x length limit",
        choices=("dapo", "grpo", "dr_grpo"),
        needs=[ATTEMPTS],
    )
    epsilon_low: float = opt(
        0.2,
        "clip range of the ratio below 1",
        above=0.0,
        at_most=1.0,
        needs=[ATTEMPTS, SEVERAL_UPDATES],
    )
    epsilon_high: float = opt(
        0.28, "clip range of the ratio above 1", above=0.0, needs=[ATTEMPTS, SEVERAL_UPDATES]
    )
    kl_penalty_coef: float = opt(
        0.05, "weight of the KL divergence to the start", at_least=0.0, needs=[ATTEMPTS]
    )
    kl_estimator: str = opt(
        "k3",
        "k3 = from the sampled token, times the importance ratio; k3_plain = without the ratio; "
        "exact = summed over the vocabulary",
        choices=("k3", "k3_plain", "exact"),
        needs=[ATTEMPTS, {"kl_penalty_coef": Above(0)}],
    )
    num_iterations: int = opt(1, "updates on each batch of rollouts", at_least=1, needs=[ATTEMPTS])
    micro_batch_size: int = opt(
        32,
        "most completions in one forward pass of the loss; of long ones fewer fit into memory",
        at_least=1,
    )
    sft_replay_coef: float = opt(
        0.0,
        "weight of a supervised loss on right solutions of as many new prompts",
        at_least=0.0,
        needs=[ATTEMPTS],
    )
    # the run
    learning_rate: float = opt(1e-4, "peak learning rate", above=0.0, needs=[ADAMW | ALL_WEIGHTS])
    adam_beta2: float = like(RunConfig, "adam_beta2", needs=[ADAMW | ALL_WEIGHTS])
    warmup_steps: int = opt(10, "linear warm-up; at most a tenth of the run's steps", at_least=0)
    schedule: str = opt(
        "constant", "learning rate after the warm-up", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = opt(0.0, "decoupled weight decay of the matrices", at_least=0.0)
    eval_every: int = opt(20, "steps between validations", at_least=1)
    eval_samples: int = opt(200, "validation prompts, spread over the depths", at_least=1)
    save_every: int = opt(50, "steps between checkpoints", at_least=1)
    log_every: int = opt(1, "steps between lines of metrics.jsonl", at_least=1)
    precision: str = opt(
        "fp32",
        "fp32 keeps the log-probs of rollout and loss equal; bf16 is faster and less exact",
        choices=("auto", "fp32", "bf16"),
    )
    lora_rank: int = opt(0, "train a fresh adapter of this rank; 0 = all weights", at_least=0)
    lora_dropout: float = like(
        LoRAConfig, "lora_dropout", never="GRPO computes its loss without dropout"
    )


# ------------------------------------------------------------------------ using what was trained


@dataclass(frozen=True)
class ModelPathConfig:
    """The model that is put to use, common to evaluation and solver."""

    model_path: str = opt("", "checkpoint of any stage, adapters included", required=True)
    base_checkpoint: str = opt("", "where the base is, if model_path is an adapter")
    tokenizer_path: str = opt(
        "", "tokenizer directory; not needed, but if given it must be the checkpoint's own"
    )


@dataclass(frozen=True)
class EvaluationConfig(ModelPathConfig):
    """Evaluation."""

    num_samples: int = opt(
        1000, "test problems, spread evenly over the depths", at_least=1, needs=[DRAWN]
    )
    min_depth: int = opt(1, "least exact depth", at_least=1, needs=[DRAWN, TREES])
    max_depth: int = opt(5, "greatest exact depth", at_least=1, needs=[DRAWN, TREES])
    num_range: tuple[int, int] = opt(
        (1, 20), "smallest and largest number in a problem", needs=[DRAWN]
    )
    style: str = opt(
        "nested",
        "how problems are written: with exactly the parentheses of the tree, as people type, with "
        "needless pairs, or as flat sums",
        choices=("nested", "typed", "padded", "flat"),
        needs=[DRAWN],
    )
    flat_terms: int = opt(
        20, "most numbers in a flat sum", at_least=2, needs=[DRAWN, {"style": "flat"}]
    )
    invalid_rate: float = opt(
        0.0,
        "fraction of invalid expressions; only ERROR is right",
        at_least=0.0,
        at_most=1.0,
        needs=[DRAWN],
    )
    test_file: str = opt("", "evaluate all problems of this corpus file instead of drawing some")
    seed: int = opt(
        42, "seed of the problems drawn, and of sampling", at_least=0, needs=[DRAWN | SAMPLED]
    )
    temperature: float = opt(0.0, "0 = greedy; else 0.01 and above", at_least=0.0)
    top_k: int = opt(0, "sample among the k likeliest tokens; 0 = all", at_least=0, needs=[SAMPLED])
    top_p: float = opt(
        1.0, "sample among the likeliest this much", above=0.0, at_most=1.0, needs=[SAMPLED]
    )
    max_gen_length: int = opt(
        0,
        "most new tokens of an answer; 0 = of each problem's right answer and a quarter more, to a "
        "bound (4 contexts or 16,384 tokens) that cuts off no trained depth",
        at_least=0,
    )
    batch_size: int = opt(64, "problems at a time: speed and memory, not results", at_least=1)
    output_dir: str = opt("evaluation_results", "folder for the three result files")
    device: str = opt("auto", "cpu, cuda, cuda:N or mps; auto = the CPU, where results repeat")
    processes: int = PROCESSES

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:  # logits would overflow
            raise UserError(f"--temperature {self.temperature:g}: give 0, or 0.01 and above")


@dataclass(frozen=True)
class InteractiveConfig(ModelPathConfig):
    """Interactive solver."""

    max_gen_length: int = opt(
        0, "most new tokens of a solution; 0 = enough for a right one and some more", at_least=0
    )
    device: str = opt("auto", "cpu, cuda, cuda:N, mps or auto")


@dataclass(frozen=True)
class ShowTraceConfig(InteractiveConfig):
    """One solution as a page."""

    expression: str = opt("", "what to solve, valid or not", positional="EXPRESSION", required=True)
    output: str = opt("trace.html", "the page to write")


@dataclass(frozen=True)
class MergeConfig:
    """Merging."""

    base_checkpoint: str = opt("", "the model that the adapter was trained on", required=True)
    adapter_path: str = opt("", "lora_adapter.pt, or a PEFT folder", required=True)
    output_path: str = opt("", "the checkpoint to write", required=True)


@dataclass(frozen=True)
class PictureConfig:
    """A picture."""

    output: str = opt("", "the picture to write; its name ends in .png or .svg", required=True)
    width: float = opt(
        12.0, "width in inches; the height follows from the panels", at_least=4.0, at_most=50.0
    )


@dataclass(frozen=True)
class PlotRunsConfig(PictureConfig):
    """Curves of training runs."""

    runs: tuple[str, ...] = opt(
        (),
        "run folders; those that differ only in the seed become one band",
        positional="RUN",
        required=True,
    )


@dataclass(frozen=True)
class PlotEvaluationConfig(PictureConfig):
    """Evaluations side by side."""

    metrics: tuple[str, ...] = opt(
        (), "files evaluation_metrics_*.json", positional="METRICS", required=True
    )


@dataclass(frozen=True)
class ExportConfig:
    """Export, and the way back."""

    model_path: str = opt(
        "", "checkpoint of any stage, adapters included", required=True, needs=[EXPORTED]
    )
    base_checkpoint: str = opt(
        "", "where the base is, if model_path is an adapter", needs=[EXPORTED]
    )
    output_dir: str = opt("", "the folder to write", required=True, needs=[EXPORTED])
    metrics: str = opt(
        "",
        "evaluation_metrics_*.json of this very model, whose figures the model card will show",
        needs=[EXPORTED],
    )
    from_hf: str = opt("", "the way back: turn this folder into a checkpoint")
    output_path: str = opt("", "the checkpoint to write; only with --from-hf")

    def __post_init__(self) -> None:
        if self.from_hf and not self.output_path:
            raise UserError("--output-path is required with --from-hf; see --help")
        if self.output_path and not self.from_hf:
            raise UserError("--output-path has no effect without --from-hf; leave it out")


@dataclass(frozen=True)
class QuickstartConfig:
    """Quickstart."""

    recipe: str = opt(
        "configs/cpu", "folder with the configs of the stages", needs=[{"resume": False}]
    )
    processes: int = opt(
        0,
        "processes that share the work of training and evaluation; 0 = one, or one for each CPU "
        "core (4 at most) if a short trial says that this is faster; stages with workers then have "
        "one for each, where several can be started",
        at_least=0,
        needs=[{"resume": False}],
    )
    resume: bool = opt(False, "go on where the last quickstart in this folder was interrupted")


@dataclass(frozen=True)
class StudyConfig:
    """A study."""

    study: str = opt(
        "", "the study, a JSON file; see studies/README.md", positional="STUDY", required=True
    )
    quick: bool = opt(False, "with the study's quick settings: minutes, and a weaker answer")
    base: str = opt("", "recipe or finished run to start from, in place of the study's own")
    jobs: int = opt(0, "stages at a time, one thread each; 0 = one for each core", at_least=0)
    output_dir: str = opt("results/studies", "each study has a folder of its name in here")
    stages_dir: str = opt("", "folder of the finished stages, if several studies are to share it")
    dry_run: bool = opt(False, "say what there is to do, with every command, and do nothing")
