"""examples/distill.py whose rank 1 dawdles in every forward pass; ranks are compared every second step."""

import os
import sys
import time

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.launch import launch, train
from megatron_clsa.training import step, straggler

straggler.WINDOW = 2
original = step.run_stage


def dawdling(*args):
    time.sleep(0.2 * (os.environ["RANK"] == "1"))
    return original(*args)


step.run_stage = dawdling
if __name__ == "__main__":
    sys.exit(launch(train, __file__, sys.argv[1:]))
