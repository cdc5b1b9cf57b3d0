"""Write docs/FLAGS.md from the configs of all scripts.

python docs/flags.py
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arithmetic_llm import config  # noqa: E402
from arithmetic_llm.cli import default_of, needs_of, word_of  # noqa: E402
from arithmetic_llm.runtime import atomic_write_text  # noqa: E402

SCRIPTS = {
    "generate_corpus": (config.BothCorporaConfig,),
    "generate_foundational_plaintext": (config.PlainTextCorpusConfig,),
    "generate_instruction_corpus_mixed": (config.MixedCorpusConfig,),
    "train_tokenizer": (config.TokenizerConfig,),
    "print_token_table": (config.TokenTableConfig,),
    "check_sequence_lengths": (config.SequenceLengthsConfig,),
    "run_foundational_training": (config.FoundationalConfig, config.ModelConfig),
    "run_instruction_training": (config.InstructionConfig,),
    "run_instruction_training_lora": (config.LoRAInstructionConfig,),
    "merge_lora_adapter": (config.MergeConfig,),
    "export_model": (config.ExportConfig,),
    "run_grpo_training": (config.GRPOConfig,),
    "run_evaluation": (config.EvaluationConfig,),
    "run_interactive": (config.InteractiveConfig,),
    "show_trace": (config.ShowTraceConfig,),
    "plot_runs": (config.PlotRunsConfig,),
    "plot_evaluation": (config.PlotEvaluationConfig,),
    "run_study": (config.StudyConfig,),
    "quickstart": (config.QuickstartConfig,),
}


def reference():
    """The text of docs/FLAGS.md."""
    parts = ["# Every flag of every script\n\nMade by `python docs/flags.py`; do not edit.\n"]
    for script, configs in SCRIPTS.items():
        fields = [field for cls in configs for field in dataclasses.fields(cls)]
        rows = [row(field, configs) for field in fields if "never" not in field.metadata]
        parts.append(f"## {script}.py\n\n| flag | default | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def row(field, configs):
    """One flag as a line of a Markdown table."""
    text = field.metadata["help"]
    if choices := field.metadata.get("choices"):
        text += f" ({', '.join(choices)})"
    text = (text + needs_of(field, configs)).replace("|", "\\|")
    return f"| `{word_of(field)}` | {default(field, configs)} | {text} |"


def default(field, configs):
    """What the flag is without being given; a value that could be typed is set as code."""
    text = default_of(field, configs)
    in_words = field.metadata.get("required") or field.default is None
    return text if in_words or isinstance(field.default, bool) or not text else f"`{text}`"


if __name__ == "__main__":
    atomic_write_text(ROOT / "docs" / "FLAGS.md", reference())
