"""Write docs/FLAGS.md from the configs of all scripts.

    python docs/flags.py
"""

import dataclasses
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arithmetic_llm import config as stages  # noqa: E402
from arithmetic_llm.runtime import atomic_write_text  # noqa: E402

SCRIPTS = {
    "generate_corpus": "FoundationalConfig",
    "generate_foundational_plaintext": "Config",
    "generate_instruction_corpus_mixed": "Config",
    "train_tokenizer": "Config",
    "print_token_table": "Config",
    "check_sequence_lengths": "Config",
    "run_foundational_training": (stages.FoundationalConfig, stages.ModelConfig),
    "run_instruction_training": stages.InstructionConfig,
    "run_instruction_training_lora": stages.LoRAInstructionConfig,
    "merge_lora_adapter": "Config",
    "run_grpo_training": stages.GRPOConfig,
    "run_evaluation": stages.EvaluationConfig,
    "run_interactive": "Config",
    "quickstart": "Config",
}


def reference():
    """The text of docs/FLAGS.md."""
    parts = ["# Every flag of every script\n\nMade by `python docs/flags.py`; do not edit.\n"]
    for script, configs in SCRIPTS.items():
        if isinstance(configs, str):
            configs = getattr(importlib.import_module(script), configs)
        configs = configs if isinstance(configs, tuple) else (configs,)
        rows = [row(field) for cls in configs for field in dataclasses.fields(cls)]
        parts.append(f"## {script}.py\n\n| flag | default | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def row(field):
    """One flag as a line of a Markdown table."""
    flag = "--" + field.name.replace("_", "-")
    help_text = field.metadata["help"].replace("|", "\\|")
    if choices := field.metadata.get("choices"):
        help_text += f" ({', '.join(choices)})"
    return f"| `{flag}` | {default(field)} | {help_text} |"


def default(field):
    """What the flag is without being given."""
    value = field.default
    if field.metadata.get("required"):
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == "":
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    atomic_write_text(ROOT / "docs" / "FLAGS.md", reference())
