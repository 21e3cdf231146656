"""tools/bench_parallel.py: its rows over gloo, what it refuses, and how it adds up kernels."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_parallel
from multirank import timing

WORDS = "metric value unit peer peer_value ratio shape machine date command ceiling"


def test_both_models_are_timed_and_their_bytes_counted(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = ["--gpus", "2", "--tiny", "--cases", "strong_cp2", "exchange_cp2", "--steps", "1"]
    assert bench_parallel.main([*words, "--out", str(out)]) == 0, capsys.readouterr().out
    rows = {row["metric"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"strong_cp2_32_ms", "gather_cp2_64_us", "halo_cp2_64_us"}
    assert all(field in row for row in rows.values() for field in WORDS.split())
    step = rows["strong_cp2_32_ms"]
    assert step["ratio"] == pytest.approx(step["value"] / step["peer_value"], rel=1e-3)
    assert step["counted_mib"]["CP"] == pytest.approx(step["estimated_mib"]["CP"], rel=0.01)
    # The dense model gathers K and V of all four layers, forward and back; CLSA those of its one memory.
    assert step["peer_counted_mib"]["CP"] > step["counted_mib"]["CP"]


def test_a_case_that_fails_leaves_the_others_their_turn(monkeypatch, capsys):
    monkeypatch.setattr(timing, "timed", planted_failure)
    assert bench_parallel.main(["--gpus", "2", "--tiny", "--cases", "strong_cp2", "exchange_cp2"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL strong_cp2" in printed and "gather_cp2_64_us" in printed


def planted_failure(*arguments):
    raise RuntimeError("planted")


def test_nccl_time_is_added_by_kind_and_its_hidden_part_counted_once():
    ms = 1_000_000
    kernels = [
        ("ncclDevKernel_AllGather_RING_LL", 0, 4 * ms),
        ("ncclDevKernel_SendRecv", 6 * ms, 8 * ms),
        ("gemm", 1 * ms, 3 * ms),
        ("softmax", 2 * ms, 3 * ms),  # on another stream, at the same time
        ("Memcpy DtoD", 6 * ms, 8 * ms),
    ]
    assert timing.nccl_times(kernels) == {"allgather": 4.0, "sendrecv": 2.0, "total": 6.0, "hidden": 2.0}


@pytest.mark.parametrize(
    "words, message",
    [
        ("--gpus 3", "--gpus 3"),
        ("--gpus 2 --tiny --only all", "--only all"),
        ("--gpus 2 --tiny --cases strong_tp8", "--cases strong_tp8"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message, capsys):
    assert bench_parallel.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
