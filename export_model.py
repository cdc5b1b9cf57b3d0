"""Write a model as the Hugging Face ecosystem loads it, or turn such a folder into a checkpoint.

    python export_model.py --model-path models/instruction_YYYYMMDD_HHMMSS/best_model.pt \\
        --output-dir exported
    python export_model.py --from-hf exported --output-path models/imported.pt
"""

from arithmetic_llm.cli import parse, run_main
from arithmetic_llm.config import ExportConfig


def main(argv=None):
    config = parse(ExportConfig, argv, __doc__)
    from arithmetic_llm.folders import resolve_paths
    from arithmetic_llm.model.checkpoint import save_checkpoint
    from arithmetic_llm.model.hub import read_hub_folder, read_metrics, write_hub_folder
    from arithmetic_llm.model.load import load_model

    config = resolve_paths(config)
    if config.from_hf:
        save_checkpoint(config.output_path, read_hub_folder(config.from_hf))
        print(f"checkpoint in {config.output_path}")
        return
    checkpoint = load_model(config.model_path, base=config.base_checkpoint)
    metrics = read_metrics(config.metrics, checkpoint) if config.metrics else None
    write_hub_folder(config.output_dir, checkpoint, metrics)
    print(f"model for transformers and its kin in {config.output_dir}; its README.md says more")


if __name__ == "__main__":
    run_main(main)
