"""examples/distill.py that prints, whenever a phase starts, how many models and optimizers are alive."""

import gc
import sys

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa.launch import launch, train
from megatron_clsa.model.clsa_model import CLSAModel
from megatron_clsa.training import run

original = run._announce


def counted(*args):
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    alive = sum(isinstance(thing, (CLSAModel, MegatronOptimizer)) for thing in gc.get_objects())
    print(f"alive {alive}", flush=True)
    return original(*args)


run._announce = counted
if __name__ == "__main__":
    sys.exit(launch(train, __file__, sys.argv[1:]))
