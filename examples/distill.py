"""Train a CLSA model through the phases of a recipe.

    python examples/distill.py --nproc-per-node 2 --config examples/recipes/quickstart.yaml --out runs/quick
    torchrun --nnodes 2 --nproc-per-node 8 [rendezvous] examples/distill.py --config RECIPE --out runs/big

Owns nothing: the phases are in the recipe, the work is in megatron_clsa/training. Exit codes: 0 done, 2 bad
input, 75 saved and to be run again, 1 anything else. torchrun turns every code but 0 into 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_clsa.launch import launch, train

if __name__ == "__main__":
    sys.exit(launch(train, __file__, sys.argv[1:]))
