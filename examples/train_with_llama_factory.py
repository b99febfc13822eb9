"""ASPO inside LLaMA-Factory: its own YAML file (stage: dpo), and rows that `aspo score` has scored.

python examples/train_with_llama_factory.py runs/scored llava_dpo.yaml
"""

import sys

from llamafactory.train.tuner import run_exp

from aspo.data import load_rows
from aspo.integrations import llama_factory


def main() -> None:
    """Train as `llamafactory-cli train` would on one device."""
    llama_factory.install("aspo", alpha=0.5, scored_rows=load_rows(sys.argv.pop(1)))
    run_exp()  # reads the YAML file's name from the command line


if __name__ == "__main__":
    main()
