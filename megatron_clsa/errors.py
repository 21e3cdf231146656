"""The one exception for bad user input; entry scripts turn it into one line and exit code 2.

Owns no checks: each check lives where the value enters.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps

EXIT_BAD_INPUT = 2


class UserError(ValueError):
    """A value that the user gave cannot be used. The message names the flag or file and the remedy."""


class OneLineParser(argparse.ArgumentParser):
    """Refuses a bad command line as everything else is refused: one line, without the usage."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap an entry point: a `UserError` prints `error: <message>` on one line and exits with code 2."""

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":  # every rank refuses alike; one says so
                print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT

    return run
