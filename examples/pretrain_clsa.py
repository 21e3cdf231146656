"""Pretrain a CLSA model from scratch: every phase of a recipe, from random weights to sparse adaptation.

    python examples/pretrain_clsa.py --nproc-per-node 8 --config examples/recipes/clsa_100m.yaml \
        --data-path PREFIX --tokenizer-model FOLDER --out runs/100m
    python examples/pretrain_clsa.py --config examples/recipes/clsa_7b.yaml --dry-run 64

Owns nothing: the recipe names the phases, megatron_clsa/training runs them. Give --pretrained-checkpoint to
continue from imported weights, and examples/distill.py for some of the phases. Exit codes: 0 done, 2 bad
input, 75 saved and to be run again, 1 anything else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.launch import launch, train

if __name__ == "__main__":
    sys.exit(launch(train, __file__, sys.argv[1:]))
