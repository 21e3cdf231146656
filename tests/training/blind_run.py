"""examples/distill.py that believes every disk to be empty, so that a save fails while it is written."""

import sys

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.launch import launch, train
from megatron_clsa.training import durable

durable._free = lambda folder: 1 << 60
if __name__ == "__main__":
    sys.exit(launch(train, __file__, sys.argv[1:]))
