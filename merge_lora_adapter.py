"""Merge a LoRA adapter into its base: a checkpoint like any other.

    python merge_lora_adapter.py \\
        --base-checkpoint models/foundational_YYYYMMDD_HHMMSS/best_model.pt \\
        --adapter-path models/instruction_lora_YYYYMMDD_HHMMSS/lora_adapter.pt \\
        --output-path models/instruction_lora_YYYYMMDD_HHMMSS/merged_model.pt
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import MergeConfig


def main(argv=None):
    config = parse(MergeConfig, argv, __doc__)
    from arithmetic_llm.folders import resolve_stamp
    from arithmetic_llm.model.checkpoint import save_checkpoint
    from arithmetic_llm.model.load import load_model

    base, adapter = resolve_stamp(config.base_checkpoint), resolve_stamp(config.adapter_path)
    output = resolve_stamp(config.output_path)
    save_checkpoint(output, load_model(adapter, base=base))
    print(f"merged model in {output}")


if __name__ == "__main__":
    run_main(main)
