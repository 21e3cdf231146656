"""examples/distill.py with one loss that is no number: NAN_RANK's in its NAN_CALL-th training microbatch."""

import os
import sys

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.launch import launch, train
from megatron_clsa.training import step

original, calls = step.loss_parts, 0


def poisoned(loss_mask, report, losses):
    global calls
    calls += 1
    if os.environ["RANK"] == os.environ["NAN_RANK"] and calls == int(os.environ["NAN_CALL"]):
        losses = losses * float(os.environ.get("NAN_FACTOR", "nan"))
    return original(loss_mask, report, losses)


step.loss_parts = poisoned
if __name__ == "__main__":
    sys.exit(launch(train, __file__, sys.argv[1:]))
