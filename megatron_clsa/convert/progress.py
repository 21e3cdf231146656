"""A progress bar on standard error; a line for every tenth where that is no terminal.

Owns the text. Knows nothing of what is counted.
"""

import sys
import time

_WIDTH = 30


class Bar:
    """Call it with what is done and the whole, both in the unit that is shown after them.

    Args:
        label: what the bar counts, before it.
        unit: after the figures, such as "MB".
        scale: the figures are divided by it.
    """

    def __init__(self, label: str, unit: str, scale: int = 1):
        self.label, self.unit, self.scale = label, unit, scale
        self._start, self._tenth, self._terminal = time.monotonic(), -1, sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        share = done / total if total else 1.0
        if not self._terminal and int(10 * share) == self._tenth:
            return
        self._tenth = int(10 * share)
        # without a line's end, so that the next one, or an error, overwrites it
        end = "\n" if done >= total or not self._terminal else "\r"
        print(self._line(done, total, share), end=end, file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, share: float) -> str:
        filled = int(_WIDTH * share)
        bar = "#" * filled + "." * (_WIDTH - filled)
        figures = f"{done / self.scale:,.0f} of {total / self.scale:,.0f} {self.unit}"
        spent = time.monotonic() - self._start
        left = f", {spent * (1 - share) / share:.0f} s left" if 0 < share < 1 else f", {spent:.0f} s"
        return f"{self.label} [{bar}] {100 * share:3.0f} %  {figures}{left:<14}"
