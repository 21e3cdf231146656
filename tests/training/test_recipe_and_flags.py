"""Recipes and flags: precedence, and one-line refusals that name key or flag before anything starts."""

from pathlib import Path

import pytest

from megatron_clsa.errors import UserError
from megatron_clsa.training import ranges, validation
from megatron_clsa.training.arguments import build_parser, parse_command
from megatron_clsa.training.plan import make_plan
from megatron_clsa.training.recipe import load_recipe

RECIPE = """
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, sliding_window: 8,
        index_topk: 16, index_head_dim: 8, ffn_hidden_size: 64}
data: {tokenizer_type: NullTokenizer, vocab_size: 127, mock_data: true, num_workers: 0}
optimizer: {lr: 1e-3}
evaluation: {eval_iters: 1}
schedule: {micro_batch_size: 1, train_iters: 4}
phases:
  - {name: short, seq_length: 32, cross_attention: dense, trainable: backbone}
  - {name: sparse, seq_length: 64, lr: 1e-4, minimum_coverage: 0.5, kd_loss: selected, train_iters: 6}
"""


def plan_of(tmp_path: Path, *words: str, text: str = RECIPE, ranks: int | None = None):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    words = ["--config", str(path), "--out", str(tmp_path / "out"), *words]
    command = parse_command(words)
    return make_plan(load_recipe(path), command, words, ranks)


def test_phase_overrides_recipe_and_command_line_overrides_both(tmp_path):
    short, sparse = plan_of(tmp_path, "--clip-grad", "0.5").runs
    assert (short.args.lr, sparse.args.lr) == (1e-3, 1e-4)
    assert short.args.clip_grad == sparse.args.clip_grad == 0.5
    assert {run.args.lr for run in plan_of(tmp_path, "--lr", "0.5").runs} == {0.5}


def test_phases_follow_one_another_in_steps_and_tokens(tmp_path):
    _, sparse = plan_of(tmp_path).runs
    assert sparse.position.at(1) == {
        "step": 5,
        "phase": "sparse",
        "phase_step": 1,
        "consumed_tokens": 4 * 32 + 64,
    }


def test_phases_flag_chooses_a_subset(tmp_path):
    assert [run.phase.name for run in plan_of(tmp_path, "--phases", "short").runs] == ["short"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--index-topk", "128"], ["--index-topk 128", "--seq-length"]),
        (["--phases", "shor"], ["--phases shor", "short"]),
        (["--num-layer", "4"], ["--num-layer", "did you mean --num-layers"]),
        (["--num-layers", "5"], ["--num-layers 5", "--num-self-decoder-layers"]),
        (["--distributed-backend", "nccl"], ["--distributed-backend nccl", "GPU"]),
        (["--transformer-impl", "transformer_engine"], ["--transformer-impl", "GPU"]),
        (["--tokenizer-type", "SentencePieceTokenizer"], ["--tokenizer-model is missing"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--hang-timeout=-1"], ["--hang-timeout", "-1"]),
        (["--adam-beta2", "1"], ["--adam-beta2 1.0"]),
        (["--ckpt-format", "torch"], ["--ckpt-format torch"]),
        (["--profile", "--profile-step-start=9", "--profile-step-end=3"], ["--profile-step-end 3"]),
        (["--log-straggler"], ["--straggler-factor"]),
        (["--save=elsewhere"], ["--save", "--out"]),
        (["--window-size", "8,0"], ["--window-size 8 0", "--sliding-window"]),
        (["--normalization", "LayerNorm"], ["--normalization LayerNorm", "RMSNorm"]),
        (["--attention-dropout", "0.1"], ["--attention-dropout 0.1"]),
        (["--use-rope-scaling"], ["command line: --use-rope-scaling"]),
        (["--optimizer", "sgd"], ["--optimizer sgd", "adam"]),
        (["--skip-train"], ["--skip-train", "tools/evaluate.py"]),
        (["--use-precision-aware-optimizer"], ["--use-precision-aware-optimizer", "GPU"]),
        (["--recompute-modules", "layernorm"], ["--recompute-modules layernorm", "GPU"]),
        (["--load", "x"], ["--load x", "--pretrained-checkpoint"]),
        (["--rotary-base", "0"], ["--rotary-base 0"]),
        (["--kv-channels", "7"], ["--kv-channels 7", "even"]),
        (["--kd-loss-coeff", "nan"], ["--kd-loss-coeff nan"]),
        (["--hidden-size", "66"], ["--hidden-size 66", "--num-attention-heads 4"]),
        (["--min-lr", "1"], ["--min-lr 1.0", "--lr 0.001"]),
        (["--lr-warmup-iters", "4"], ["--lr-warmup-iters 4", "--train-iters"]),
        (["--fp16", "--bf16"], ["--fp16", "--bf16"]),
        (["--eval-iters", "0"], ["--eval-iters 0"]),
        (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size 0"]),
        (["--keep-last", "0"], ["--keep-last 0"]),
        (["--keep-every", "2"], ["--keep-every 2", "--keep-last"]),
        (["--spike-factor", "1"], ["--spike-factor 1"]),
        (["--straggler-factor", "0.9"], ["--straggler-factor 0.9"]),
        (["--dry-run", "-3"], ["--dry-run -3"]),
        (["--phases", ","], ["--phases", "short, sparse"]),
        (["--seed", "4294967295"], ["--seed 4294967295", "2^31"]),
        (["--norm-epsilon", "-1"], ["--norm-epsilon -1.0"]),
        (["--init-method-std", "nan"], ["--init-method-std nan"]),
        (["--make-vocab-size-divisible-by", "0"], ["--make-vocab-size-divisible-by 0"]),
        (["--hidden-dropout", "-1"], ["--hidden-dropout -1.0"]),
        (["--lr-warmup-fraction", "2"], ["--lr-warmup-fraction 2.0"]),
        (["--lr-warmup-init", "1"], ["--lr-warmup-init 1.0", "--lr 0.001"]),
        (["--lr-decay-iters", "0"], ["--lr-decay-iters 0"]),
        (["--lr-decay-style", "WSD"], ["--lr-decay-style WSD", "--lr-wsd-decay-iters"]),
        (["--distributed-timeout-minutes", "0"], ["--distributed-timeout-minutes 0"]),
        (["--tensorboard-log-interval", "0"], ["--tensorboard-log-interval 0"]),
        (["--tensorboard-dir", "/dev/null/x"], ["--tensorboard-dir /dev/null/x"]),
        (["--dataloader-type", "external"], ["--dataloader-type external", "cyclic"]),
        (["--ckpt-step", "4"], ["--ckpt-step 4"]),
        (["--save-retain-interval", "4"], ["--save-retain-interval 4", "--keep-every"]),
        (["--full-validation"], ["--full-validation", "--eval-iters"]),
        (["--apply-layernorm-1p"], ["--apply-layernorm-1p"]),
        (["--init-method-xavier-uniform"], ["--init-method-xavier-uniform"]),
        (["--data-parallel-random-init"], ["--data-parallel-random-init"]),
        (["--no-save-optim"], ["--no-save-optim"]),
        (["--no-load-optim"], ["--no-load-optim", "--pretrained-checkpoint"]),
        (["--no-save-rng"], ["--no-save-rng"]),
        (["--non-persistent-save-interval", "1"], ["--non-persistent-save-interval 1", "--save-interval"]),
        (["--nccl-communicator-config-path", "x"], ["--nccl-communicator-config-path x"]),
        (["--enable-cuda-graph"], ["--enable-cuda-graph", "GPU"]),
        (["--use-nccl-ub"], ["--use-nccl-ub", "GPU"]),
        (["--use-sharp"], ["--use-sharp", "GPU"]),
        (["--init-model-with-meta-device"], ["--init-model-with-meta-device", "GPU"]),
        (["--attention-backend", "unfused"], ["--attention-backend", "unfused"]),
        (["--use-flash-attn"], ["--use-flash-attn"]),
        (["--reset-attention-mask"], ["--reset-attention-mask"]),
    ],
)
def test_bad_flag_is_refused_by_name(tmp_path, words, named):
    with pytest.raises(UserError) as refusal:
        plan_of(tmp_path, *words)
    assert all(word in str(refusal.value) for word in named), refusal.value


@pytest.mark.parametrize(
    ("words", "ranks", "named"),
    [
        (["--tensor-model-parallel-size", "4"], 4, "--num-query-groups 2"),
        (["--context-parallel-size", "3"], 3, "2 x --context-parallel-size 3"),
        (["--tensor-model-parallel-size", "2"], 3, "3 ranks"),
        (["--pipeline-model-parallel-size", "3"], 3, "--pipeline-model-parallel-size 3"),
        (["--global-batch-size", "3"], 2, "--global-batch-size 3"),
        (
            ["--pipeline-model-parallel-size=2", "--num-virtual-stages-per-pipeline-rank=3"],
            2,
            "3 chunks a stage",
        ),
        (
            ["--pipeline-model-parallel-size=2", "--decoder-first-pipeline-num-layers=5"],
            2,
            r"\[5, -1\] layers",
        ),
    ],
)
def test_layout_that_cannot_hold_the_model_is_refused(tmp_path, words, ranks, named):
    with pytest.raises(UserError, match=named.replace("+", r"\+")):
        plan_of(tmp_path, *words, ranks=ranks)


def test_each_range_is_a_flags():
    tables = (ranges.POSITIVE, ranges.NOT_NEGATIVE, ranges.SHARES, ranges.SEEDS)
    names = sum(tables, ranges.ABOVE_ONE + ranges.ABOVE_ONE_OR_NONE)
    unknown = [name for name in names if ranges.flag_of(name) not in build_parser()._option_string_actions]
    assert not unknown and len(set(names)) == len(names)


def test_a_refused_flag_of_another_field_name_names_its_recipe(tmp_path):
    text = RECIPE.replace("{lr: 1e-3}", "{lr: 1e-3, apply_layernorm_1p: true}")
    with pytest.raises(UserError, match=r"recipe\.yaml: --apply-layernorm-1p"):
        plan_of(tmp_path, text=text)


def test_more_ranks_than_gpus_are_refused():
    validation._check_gpus(8, 8)
    with pytest.raises(UserError, match="--nproc-per-node 8: 4 GPUs are visible"):
        validation._check_gpus(8, 4)


def test_help_is_grouped_and_explains_each_flag_of_ours(capsys):
    with pytest.raises(SystemExit) as left:
        parse_command(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    titles = "run", "guards", "teacher", "CLSA model and loss"
    assert all(f"\n{title}:" in text for title in titles)
    ours = [
        a for group in build_parser()._action_groups if group.title in titles for a in group._group_actions
    ]
    assert ours and all(action.help for action in ours)


def test_tensor_parallelism_turns_sequence_parallelism_on(tmp_path):
    assert plan_of(tmp_path, "--tensor-model-parallel-size", "2", ranks=2).runs[0].args.sequence_parallel


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("hidden_size: 64,", "hiden_size: 64,", "unknown key hiden_size; did you mean hidden_size"),
        ("optimizer:", "optimiser:", "unknown section optimiser; did you mean optimizer"),
        ("lr: 1e-4", "save: x", "save is decided by the run"),
        ("mock_data: true", "mock_data: 1", "mock_data is a switch"),
        ("{eval_iters: 1}", "[1]", "section evaluation must map names"),
        ("{eval_iters: 1}", "{eval_iters: 1, eval_iters: 2}", "eval_iters is set twice"),
        ("model:", "model: {num_layers: 2}\nmodel:", "model is set twice"),
        ("phases:", "layouts: {-1: {lr: 1}}\nphases:", "layouts must map numbers"),
        ("model:", "x: " + "[" * 3000 + "]" * 3000 + "\nmodel:", "is not YAML"),
        ("name: sparse", "name: short", "same name"),
        ("name: sparse", "name: on", "phase 2 needs a `name:`"),
        ("name: sparse", "name:", "phase 2 needs a `name:`"),
        (
            "phases:",
            "layouts: {512: {tensor_model_paralel_size: 2}}\nphases:",
            "did you mean tensor_model_par",
        ),
    ],
)
def test_bad_recipe_names_file_and_key(tmp_path, old, new, named):
    with pytest.raises(UserError) as refusal:
        plan_of(tmp_path, text=RECIPE.replace(old, new))
    assert named in str(refusal.value) and "recipe.yaml" in str(refusal.value)


def test_a_typo_in_a_phase_that_is_not_run_is_found(tmp_path):
    with pytest.raises(UserError, match="unknown key lrr"):
        plan_of(tmp_path, "--phases", "short", text=RECIPE.replace("lr: 1e-4", "lrr: 1e-4"))


def test_yaml_may_say_off_without_quotes_and_merge(tmp_path):
    text = RECIPE.replace("- {name: sparse, ", "- {<<: {clip_grad: 0.25}, name: sparse, ")
    short, sparse = plan_of(tmp_path, text=text.replace("kd_loss: selected", "kd_loss: off")).runs
    assert sparse.args.kd_loss == "off" and (short.args.clip_grad, sparse.args.clip_grad) == (1.0, 0.25)
