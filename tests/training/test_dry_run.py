"""`--dry-run` prints a plan for any number of ranks, and starts and writes nothing."""

import pytest
from runs import ROOT, TINY, command

from megatron_clsa.launch import launch
from megatron_clsa.training.run import main


def _plan(capsys, out, *flags: str) -> tuple[int, str, str]:
    words = command(out, *flags)
    code = launch(main, words[1], words[2:])
    return code, *capsys.readouterr()


def test_every_phase_is_planned_for_the_given_ranks(tmp_path, capsys):
    code, text, _ = _plan(capsys, tmp_path / "run", "--dry-run", "8", "--tensor-model-parallel-size=2")
    assert code == 0
    assert text.count("8 ranks = TP 2 x PP 1 x CP 1 x DP 4") == 3
    for name in ("parameters", "memory of a rank", "FLOPs a step", "received by a rank", "MFU", "days"):
        assert name in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks, warned", [(4, True), (8, False)])
def test_a_plan_that_no_gpu_of_80_gb_holds_says_so(capsys, ranks, warned):
    words = ["--config", str(ROOT / "examples" / "recipes" / "clsa_7b.yaml"), "--dry-run", str(ranks)]
    assert main(words) == 0
    assert ("TOO MUCH" in capsys.readouterr().out) == warned


def test_nproc_per_node_is_planned_and_not_started(tmp_path, capsys):
    code, text, _ = _plan(
        capsys, tmp_path, "--nproc-per-node=4", "--dry-run", "--pipeline-model-parallel-size=2"
    )
    assert code == 0 and "4 ranks = TP 1 x PP 2 x CP 1 x DP 2" in text
    assert "peak by pipeline stage" in text


def test_recompute_and_ranks_change_what_they_should(tmp_path, capsys):
    def line(name: str, *flags: str) -> str:
        text = _plan(capsys, tmp_path, "--phases=dense", "--dry-run", *flags)[1]
        return next(line for line in text.splitlines() if name in line)

    recompute = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
    assert line("memory of a rank") != line("memory of a rank", *recompute)
    assert line("FLOPs a step") == line("FLOPs a step", *recompute)
    assert line("predicted") != line("predicted", *recompute)
    assert line("predicted") != line("predicted", "--peak-tflops=312")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--dry-run", "6", "--tensor-model-parallel-size=4"], "6 ranks"),
        (["--dry-run", "few"], "--dry-run"),
        (["--dry-run", "4", "--index-topk=65"], "--index-topk 65"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_in_one_line(tmp_path, capsys, flags, named):
    code, text, error = _plan(capsys, tmp_path, *flags)
    assert code == 2 and not text
    assert named in error and error.count("\n") == 1


def test_a_plan_needs_no_data_but_the_size_of_the_vocabulary(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    text = TINY.read_text().replace("  mock_data: true\n", "").replace("  vocab_size: 127\n", "")
    recipe.write_text(text.replace("NullTokenizer", "HuggingFaceTokenizer"))
    words = ["--config", str(recipe), "--dry-run", "1"]
    assert launch(main, "", words) == 2
    assert "--vocab-size or --tokenizer-model is missing" in capsys.readouterr().err
    assert launch(main, "", [*words, "--vocab-size", "1000"]) == 0
