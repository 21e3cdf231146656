"""Which ranks are called slow: those that are slower than their peers for long, and nobody else."""

import re
from pathlib import Path

import pytest
import torch
from runs import command, distill, run

from megatron_clsa.training import straggler
from megatron_clsa.training.straggler import PATIENCE, Stopwatch, Verdict


def test_a_slow_rank_is_named_with_its_host_once_it_has_been_slow_for_long(tmp_path):
    words = command(tmp_path, "--phases=dense", ranks=2)
    words[1] = str(Path(__file__).parent / "slow_run.py")
    result = run(words)
    assert result.returncode == 0, result.stderr[-3000:]
    said = re.findall(r"^WARNING: step (\d+): slow for 6 steps: (.*)$", result.stderr, re.M)
    assert [step for step, _ in said] == ["6"], result.stderr[-3000:]
    assert re.fullmatch(r"rank 1 on \S+ \d+\.\d\d x its .* \(0\.\d+ s a step, \d+% .*\)", said[0][1])


def _named(verdict: Verdict, *windows: list[float], stages: list[int] | None = None) -> list[list[int]]:
    return [sorted(verdict.judge(seconds, stages or [0] * len(seconds))) for seconds in windows]


def test_one_slow_window_names_nobody():
    slow, even = [1.0, 1.0, 2.0, 1.0], [1.0, 1.1, 1.0, 0.9]
    assert _named(Verdict(1.3), slow, slow, even, slow, slow, even) == [[]] * 6


def test_a_rank_that_stays_slow_is_named_again_now_and_then():
    named = _named(Verdict(1.3), *[[1.0, 1.0, 2.0, 1.2]] * (2 * PATIENCE))
    assert named == [[], [], [2]] * 2


def test_a_group_that_waits_for_one_of_its_ranks_is_named_whole():
    assert _named(Verdict(1.3), *[[1.0, 1.0, 1.5, 1.5, 1.0, 1.0]] * PATIENCE)[-1] == [2, 3]


def test_ranks_are_compared_within_their_pipeline_stage():
    """The last stage has the output layer, and takes twice as long in every run."""
    windows = [[1.0, 1.1, 2.0, 2.1]] * PATIENCE
    assert _named(Verdict(1.3), *windows, stages=[0, 0, 1, 1])[-1] == []
    windows = [[1.0, 1.1, 2.0, 3.0]] * PATIENCE
    assert _named(Verdict(1.3), *windows, stages=[0, 0, 1, 1])[-1] == [3]


def test_a_stopwatch_adds_up_and_starts_again(monkeypatch):
    now = iter([1.0, 1.5, 4.0, 4.25, 9.0, 10.0])
    monkeypatch.setattr(straggler.time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    watch.on_gpu = False
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 0.75
    with watch:
        pass
    assert watch.take() == 1.0


@pytest.mark.gpu
def test_a_stopwatch_counts_the_gpus_time_not_the_hosts():
    """A kernel of some milliseconds is queued in microseconds."""
    watch, a = Stopwatch(), torch.randn(8192, 8192, device="cuda")
    for _ in range(2):  # the first product sets the library up
        watch.take()
        torch.cuda.synchronize()
        with watch:
            for _ in range(4):
                a @ a
    assert watch.take() > 4 * 2 * 8192**3 / 1e15  # no GPU of today does 1 PFLOP/s in fp32


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_timed_and_ends(tmp_path):
    result = distill(tmp_path, "--phases=dense", "--train-iters=25", "--straggler-factor=1.3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "slow for" not in result.stderr
