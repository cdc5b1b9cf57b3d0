"""Merge a LoRA adapter into its base: a checkpoint like any other.

    python merge_lora_adapter.py \\
        --base-checkpoint models/foundational_YYYYMMDD_HHMMSS/best_model.pt \\
        --adapter-path models/instruction_lora_YYYYMMDD_HHMMSS/lora_adapter.pt \\
        --output-path models/instruction_lora_YYYYMMDD_HHMMSS/merged_model.pt
"""

from dataclasses import dataclass

from arithmetic_llm.cli import opt, parse, run_main


@dataclass(frozen=True)
class Config:
    """Merging."""

    base_checkpoint: str = opt("", "the model that the adapter was trained on", required=True)
    adapter_path: str = opt("", "lora_adapter.pt, or a PEFT folder", required=True)
    output_path: str = opt("", "the checkpoint to write", required=True)


def main(argv=None):
    config = parse(Config, argv, __doc__)
    from arithmetic_llm.folders import resolve_stamp
    from arithmetic_llm.model.checkpoint import save_checkpoint
    from arithmetic_llm.model.load import load_model

    base, adapter = resolve_stamp(config.base_checkpoint), resolve_stamp(config.adapter_path)
    output = resolve_stamp(config.output_path)
    save_checkpoint(output, load_model(adapter, base=base))
    print(f"merged model in {output}")


if __name__ == "__main__":
    run_main(main)
