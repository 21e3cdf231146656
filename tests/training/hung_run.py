"""examples/distill.py that calls a run hung after seconds instead of minutes, once it has taken two steps.

Starting takes as long as it takes on a busy machine; only from then on is the short time a fair one.
"""

import sys

import megatron_clsa.parallel.cpu  # noqa: F401
from megatron_clsa import launch
from megatron_clsa.training import watchdog

launch.GRACE_SECONDS = 1
watchdog._PULSE_SECONDS, watchdog._ANSWER_SECONDS = 0.5, 3.0
original = watchdog.Watchdog.beat


def beat(self, step: int):
    if step == 2:
        self.timeout = 4.0
    original(self, step)


watchdog.Watchdog.beat = beat
if __name__ == "__main__":
    sys.exit(launch.launch(launch.train, __file__, sys.argv[1:]))
