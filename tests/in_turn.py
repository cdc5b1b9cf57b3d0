"""Runs scripts one after the other as one process of several, so that a test launches once.

torchrun --standalone --nproc_per_node 2 tests/in_turn.py JOBS.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import load_script

from arithmetic_llm.cli import run_main


def main(_):
    for script, argv in json.loads(Path(sys.argv[1]).read_text()):
        load_script(script).main(argv)


if __name__ == "__main__":
    run_main(main, parallel=True)
