"""Fingerprints of a small run of every stage: what must not change when code is only moved.

    python benchmarks/fingerprint.py > before.txt           a hash for each file that a run leaves
    python benchmarks/fingerprint.py | diff before.txt -    after the change

Corpora, tokenizer, weights, training metrics and evaluations, seed 42, on one thread. The hashes
depend on the machine and on the version of torch: compare runs of one machine.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--d-model 32 --nhead 2 --num-layers 2 --dim-feedforward 48 --max-seq-length 512"
FOUNDATIONAL = "models/foundational_YYYYMMDD_HHMMSS/best_model.pt"
INSTRUCTION = "models/instruction_YYYYMMDD_HHMMSS/best_model.pt"
SMALL = "--max-depth 2 --num-range 1 9"
TUNING = (
    f"--instruction-corpus-path instruction.txt --tokenizer-path tokenizer "
    f"--foundational-checkpoint {FOUNDATIONAL} --max-steps 40 --eval-samples 40 --threads 1"
)
STAGES = (
    f"generate_foundational_plaintext.py --num-samples 2000 {SMALL} --output-txt corpus.txt",
    f"generate_instruction_corpus_mixed.py --num-samples 500 {SMALL} --padded-rate 0.1 "
    "--flat-rate 0.1 --output-mixed instruction.txt",
    f"generate_corpus.py --instruction-only --split test --num-samples 60 {SMALL} "
    "--output-instruction test.txt",
    "train_tokenizer.py --corpus-path corpus.txt --output-dir tokenizer",
    f"run_foundational_training.py --corpus-path corpus.txt --tokenizer-path tokenizer {SHAPE} "
    "--max-steps 150 --batch-tokens 2048 --optimizer muon --muon-learning-rate 0.01 "
    "--learning-rate 5e-3 --prompt-loss-weight 0.05 --result-loss-weight 3 --dropout 0.1 "
    "--eval-every 50 --eval-samples 40 --log-every 10 --threads 1",
    f"run_instruction_training.py {TUNING} --learning-rate 1e-3 --gradient-accumulation-steps 2",
    f"run_instruction_training_lora.py {TUNING} --learning-rate 5e-3 --lora-rank 4 "
    "--lora-target-modules attention,feedforward --lora-dropout 0.1 --save-merged-model",
    f"run_grpo_training.py --tokenizer tokenizer --sft-checkpoint {INSTRUCTION} --output-dir "
    f"models/grpo --data-mode generated {SMALL} --max-steps 4 --batch-size 8 --num-candidates 4 "
    "--rewards correct=1,step_validity=0.5 --num-iterations 2 --sft-replay-coef 0.1 "
    "--refill-rounds 1 --eval-every 2 --eval-samples 30 --threads 1",
    f"run_evaluation.py --model-path {INSTRUCTION} --test-file test.txt --output-dir results",
    "run_evaluation.py --model-path models/grpo/grpo_YYYYMMDD_HHMMSS/final_model.pt "
    f"{SMALL} --num-samples 60 --temperature 0.8 --top-p 0.9 --output-dir results",
)
TIMES = {"seconds", "tokens_per_second", "seconds_generating", "seconds_training", "versions"}


def main():
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            script, *flags = stage.split()
            command = [sys.executable, str(ROOT / script), *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name not in ("run.json", "training_config.json"):
                print(digest(path)[:16], named(path.relative_to(folder)))


def named(path):
    """A path without its time stamp."""
    return "".join("#" if character.isdigit() else character for character in str(path))


def digest(path):
    """SHA-256 of a file's content, times and paths left out."""
    if path.suffix == ".pt":
        return sha256(torch.load(path, weights_only=True))
    if path.suffix == ".jsonl":
        return sha256([json.loads(line) for line in path.read_text().splitlines()])
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return sha256(json.loads(path.read_text()))
    if path.name.startswith("evaluation_summary"):  # it tells the time; the metrics have the rest
        return sha256(None)
    return sha256(path.read_bytes())


def sha256(value):
    """SHA-256 of plain values and tensors, nested in lists and dicts."""
    found = hashlib.sha256()
    for piece in pieces(value):
        found.update(piece)
    return found.hexdigest()


def pieces(value):
    """The bytes of a nested value, one leaf at a time."""
    if isinstance(value, dict):
        for key in sorted(value.keys() - TIMES, key=str):
            yield str(key).encode()
            yield from pieces(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from pieces(item)
    elif isinstance(value, torch.Tensor):
        yield value.contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, bytes):
        yield value
    elif not (isinstance(value, str) and "models" in value):  # a path has a time stamp in it
        yield repr(value).encode()


if __name__ == "__main__":
    main()
