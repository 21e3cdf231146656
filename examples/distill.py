"""Train a CLSA model through the phases of a recipe.

    torchrun --nproc-per-node 2 examples/distill.py --config examples/recipes/quickstart.yaml --out runs/quick

Owns nothing: the phases are in the recipe, the work is in megatron_clsa/training. Exit codes: 0 done,
2 bad input, 75 saved and to be run again, 1 anything else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_clsa.parallel.cpu  # noqa: F401  (before megatron is imported)
from megatron_clsa.errors import one_line_errors
from megatron_clsa.training.run import main

if __name__ == "__main__":
    sys.exit(one_line_errors(main)(sys.argv[1:]))
