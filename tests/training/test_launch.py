"""Starting the ranks of one machine: who they are told to be, which exit code comes back, who ends whom."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_clsa import launch
from megatron_clsa.errors import UserError

RANK = "import os, sys, time, signal; rank = int(os.environ['RANK'])\n"


def _ranks(body: str, count: int = 2) -> list[subprocess.Popen]:
    return launch.start_ranks([sys.executable, "-c", RANK + body], count)


def _code(body: str) -> int:
    return launch.wait_for(_ranks(body))


@pytest.fixture(autouse=True)
def own_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "body, code",
    [
        ("sys.exit(0)", 0),
        ("sys.exit(2)", 2),
        ("sys.exit(75)", 75),
        ("sys.exit(rank * 7)", 1),
        ("os.kill(os.getpid(), 9) if rank else sys.exit(0)", 1),
    ],
)
def test_the_exit_code_is_the_ranks_own(body, code):
    assert _code(body) == code


def test_each_rank_knows_its_place(tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    body = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))"
    assert _code(body) == 0
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert (first[:4], second[:4]) == (["0", "0", "2", "2"], ["1", "1", "2", "2"])
    assert first[4:] == second[4:]


def test_a_failed_rank_ends_those_that_wait_for_it(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    started = time.monotonic()
    assert _code("sys.exit(3) if rank else time.sleep(20)") == 1
    assert time.monotonic() - started < 10


REFUSING = (
    "from megatron_clsa.errors import UserError, one_line_errors\n"
    "@one_line_errors\n"
    "def main():\n"
    "    if rank in {ranks}: raise UserError('data.idx is missing')\n"
    "    time.sleep(20)\n"
    "sys.exit(main())"
)


@pytest.mark.parametrize(
    "ranks, line",
    [("(0, 1)", "error: data.idx is missing"), ("(1,)", f"error: rank 1 on {os.uname().nodename}: data.idx")],
)
def test_a_refusal_is_told_once_also_by_a_rank_that_meets_it_alone(capfd, monkeypatch, ranks, line):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    assert _code(REFUSING.format(ranks=ranks)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(line), lines


def test_ctrl_c_is_one_line_however_many_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from megatron_clsa.errors import say\n"
        "from megatron_clsa.launch import launch\n"
        "def main(words):\n"
        "    say('up', sys.stdout)\n"
        "    time.sleep(20)\n"
        "sys.exit(launch(main, __file__, sys.argv[1:]))\n"
    )
    default = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, str(script), "--nproc-per-node", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=default,
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1].splitlines() == ["error: stopped by Ctrl-C; what was complete is kept"]
    assert process.returncode == -signal.SIGINT


def test_a_signal_reaches_every_rank(tmp_path):
    ranks = _ranks(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').close(); time.sleep(20)"
    )

    before = signal.getsignal(signal.SIGTERM)

    def stop_once_all_are_up():
        while len(list(tmp_path.iterdir())) < 2 or signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_all_are_up, daemon=True).start()
    assert launch.wait_for(ranks) == 75
    assert [rank.returncode for rank in ranks] == [75, 75]


@pytest.mark.parametrize(
    "words", [["--nproc-per-node", "3", "--lr", "1"], ["--lr", "1", "--nproc-per-node=3"]]
)
def test_the_flag_is_taken_out_of_the_command_line(words):
    assert launch.take_ranks(words) == (3, ["--lr", "1"])


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_number_of_ranks_that_is_none_is_refused(value):
    with pytest.raises(UserError, match="--nproc-per-node"):
        launch.take_ranks(["--nproc-per-node", value])
