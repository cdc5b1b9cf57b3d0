"""The numbered scripts as kinds of stages: what each reads, writes, and needs of the others."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from arithmetic_llm import config
from arithmetic_llm.folders import STAMP
from arithmetic_llm.study.spec import Settings

ROOT = Path(__file__).resolve().parents[2]  # where the scripts are
CORPUS = "corpus.txt"


class Kind(NamedTuple):
    """One of the numbered scripts as a stage of a study."""

    script: str
    configs: tuple[type, ...]
    inputs: Settings  # flags whose value is what another stage has made: "{tokenizer}"
    output: str  # the flag that says where to write
    product: str  # what that is, in the stage's folder; a run's has a time stamp
    recipe: dict[str, str] = {}  # noqa: RUF012  the flag that reads a file of the recipe: the file
    fixed: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether it makes a run folder, takes a seed for its model, and can be resumed."""
        return self.product.endswith(".pt")

    @property
    def runs(self) -> str:
        """A pattern for the names of its run folders."""
        return str(Path(self.product).parent).replace(STAMP, "*")


CORPORA = {"instruction_corpus_path": "{instruction_corpus}", "tokenizer_path": "{tokenizer}"}
KINDS = {
    "foundational_corpus": Kind(
        "generate_foundational_plaintext.py",
        (config.PlainTextCorpusConfig,),
        {},
        "output_txt",
        CORPUS,
        {"config": "foundational_corpus.json"},
    ),
    "instruction_corpus": Kind(
        "generate_instruction_corpus_mixed.py",
        (config.MixedCorpusConfig,),
        {},
        "output_mixed",
        CORPUS,
        {"config": "instruction_corpus.json"},
    ),
    "test_corpus": Kind(
        "generate_corpus.py",
        (config.BothCorporaConfig,),
        {},
        "output_instruction",
        CORPUS,
        {"config": "test_corpus.json"},
        ("--instruction-only", "--split", "test"),
    ),
    "tokenizer": Kind(
        "train_tokenizer.py",
        (config.TokenizerConfig,),
        {"corpus_path": "{foundational_corpus}"},
        "output_dir",
        "tokenizer.json",
        {"config": "tokenizer.json"},
    ),
    "foundational": Kind(
        "run_foundational_training.py",
        (config.FoundationalConfig, config.ModelConfig),
        {"corpus_path": "{foundational_corpus}", "tokenizer_path": "{tokenizer}"},
        "output_dir",
        f"foundational_{STAMP}/best_model.pt",
        {"config": "foundational.json", "model_config": "model.json"},
    ),
    "instruction": Kind(
        "run_instruction_training.py",
        (config.InstructionConfig,),
        {**CORPORA, "foundational_checkpoint": "{foundational}"},
        "output_dir",
        f"instruction_{STAMP}/best_model.pt",
        {"config": "instruction.json"},
    ),
    "lora": Kind(
        "run_instruction_training_lora.py",
        (config.LoRAInstructionConfig,),
        {**CORPORA, "foundational_checkpoint": "{foundational}"},
        "output_dir",
        f"instruction_lora_{STAMP}/lora_adapter.pt",
        {"config": "lora.json"},
    ),
    "grpo": Kind(
        "run_grpo_training.py",
        (config.GRPOConfig,),
        {"tokenizer": "{tokenizer}", "sft_checkpoint": "{instruction}"},
        "output_dir",
        f"grpo_{STAMP}/final_model.pt",
        {"config": "grpo.json"},
    ),
    "evaluation": Kind(
        "run_evaluation.py",
        (config.EvaluationConfig,),
        {"model_path": "{instruction}", "test_file": "{test_corpus}"},
        "output_dir",
        f"evaluation_metrics_{STAMP}.json",
    ),
}
TRAINED = [name for name, kind in KINDS.items() if kind.trains]
STAGE_OF = {  # the kind of what a checkpoint calls so
    "foundational": "foundational",
    "instruction": "instruction",
    "instruction_lora": "lora",
    "grpo": "grpo",
}
