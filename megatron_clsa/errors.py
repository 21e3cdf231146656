"""Bad user input: one exception, told as one line and exit code 2. Also how lines of many ranks stay whole.

Owns one check, of text that JSON brings, which enters in many places; the others live where the value enters.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import TextIO

EXIT_BAD_INPUT = 2
OTHERS_WAIT = 10.0  # seconds for rank 0 to refuse the same; launch.py and torchrun then end the other ranks


class UserError(ValueError):
    """A value that the user gave cannot be used. The message names the flag or file and the remedy."""


def half_character(text: str) -> int | None:
    """Where a text has half of a surrogate pair, "\\ud800" or so: JSON can hold it, no tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def check_text(text: str, where: str) -> None:
    """Refuse a text with half of a character, naming its place."""
    if (at := half_character(text)) is not None:
        raise UserError(
            f"{where}: character {at + 1} is {text[at]!r}, half of a pair, which UTF-8 "
            "cannot write; take it out"
        )


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line, on stderr by default, in one write, so that it stays whole in a log that ranks share.

    print() writes the line and its end apart under PYTHONUNBUFFERED, which slurm/lib.sh sets.
    """
    stream = stream or sys.stderr
    stream.write(line + "\n")
    stream.flush()


class OneLineParser(argparse.ArgumentParser):
    """Refuses a bad command line as everything else is refused: one line, without the usage."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap an entry point: a `UserError` prints `error: <message>` on one line and exits with code 2.

    Ctrl-C is told in one line, too.
    """

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            _refuse(" ".join(str(error).split()), os.environ.get("RANK", "0"))
            return EXIT_BAD_INPUT
        except KeyboardInterrupt:
            return _end_by_ctrl_c()

    return run


def _end_by_ctrl_c() -> int:
    """One line, then the signal's own end, by which a shell knows that its script or loop is to stop too."""
    if "RANK" not in os.environ:  # who started the ranks says so
        say("error: stopped by Ctrl-C; what was complete is kept")
    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    return 128 + signal.SIGINT


def _refuse(line: str, rank: str) -> None:
    """Most refusals are every rank's and rank 0 says so; one that a rank meets alone must be heard too."""
    if rank != "0":
        time.sleep(OTHERS_WAIT)
        line = f"rank {rank} on {os.uname().nodename}: {line}"
    say(f"error: {line}")
