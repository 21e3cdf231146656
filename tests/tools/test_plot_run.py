"""The picture of a run: from one or several metrics files, from a run that still writes, and refusals."""

import json
import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "plot_run.py"))
STEP = dict(lm_loss=5.0, kd_loss=0.0, learning_rate=1e-3, tokens_per_second=100.0)
EVALUATION = dict(valid_lm_loss=5.5, attention_coverage=0.6, oracle_coverage=0.7, random_coverage=0.4)


def write_run(path: Path, tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [dict(step=step, phase="dense" if step < 4 else "sparse") | STEP for step in range(1, 7)]
    lines += [dict(step=6, phase="sparse") | EVALUATION]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def draw(*paths: Path, out: Path) -> int:
    return TOOL["main"]([*map(str, paths), "--out", str(out)])


def test_one_run_and_several_become_a_picture(tmp_path):
    first, second = write_run(tmp_path / "a" / "metrics.jsonl"), write_run(tmp_path / "b" / "metrics.jsonl")
    for paths in ([first], [first, second]):
        assert draw(*paths, out=tmp_path / "loss.png") == 0
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tail", ['{"step": 7, "phase": "sp', '{"step": 7, "phase": "caf\udcc3', "{}"])
def test_a_cut_last_line_is_left_out(tmp_path, tail):
    path = write_run(tmp_path / "metrics.jsonl")
    path.write_bytes(path.read_bytes() + tail.encode(errors="surrogateescape"))
    assert len(TOOL["read_metrics"](path)) == 7
    assert draw(path, out=tmp_path / "loss.png") == 0


def test_phases_span_their_steps_and_a_loss_that_is_off_is_not_drawn(tmp_path):
    records = TOOL["read_metrics"](write_run(tmp_path / "metrics.jsonl"))
    assert TOOL["phase_spans"](records) == [("dense", 1, 3), ("sparse", 4, 6)]
    assert TOOL["series"](records, "kd_loss") == ([], [])
    assert TOOL["series"](records, "oracle_coverage") == ([6], [0.7])
    assert TOOL["smooth"]([2.0, 2.0, 2.0]) == pytest.approx([2.0] * 3)


def test_only_a_run_under_a_teacher_has_a_panel_of_its_kl(tmp_path):
    alone = TOOL["read_metrics"](write_run(tmp_path / "metrics.jsonl"))
    taught = [dict(step=7, phase="sparse") | kl for kl in (dict(teacher_kl=0.5), dict(valid_teacher_kl=0.6))]
    panels = TOOL["measured_panels"]
    more = panels([("taught", alone + taught)]).keys() - panels([("alone", alone)]).keys()
    assert more == {"KL to the teacher, nats a token"}
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in taught))
    assert draw(path, out=tmp_path / "loss.png") == 0


def test_refusals_are_one_line_and_exit_2(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"step": 1}\nnot JSON\n{"step": 2}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    whole = write_run(tmp_path / "metrics.jsonl")
    for path, out, said in (
        (tmp_path / "none.jsonl", "a.png", "none.jsonl cannot be read"),
        (broken, "a.png", "line 2"),
        (empty, "a.png", "holds no metrics yet"),
        (whole, "a.word", "--out"),
        (whole, "missing/a.png", "--out"),
    ):
        assert draw(path, out=tmp_path / out) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
