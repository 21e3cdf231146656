"""One fine-tuning run: folder and data in, folder out, by transformers' Trainer, with DeepSpeed or without.

Owns the wiring and its checks. Records and labels are in examples.py, the flags in
examples/finetune_deepspeed.py.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from megatron_clsa.convert.weights import check_files, check_loaded
from megatron_clsa.errors import UserError
from megatron_clsa.finetune.examples import Reader, collate
from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM
from megatron_clsa.places import check_out


class IndexTrainer(Trainer):
    """Also logs the index's loss, which the model adds to the language-model loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and outputs.get("indexer_loss") is not None:
            self.indexer_losses = [*getattr(self, "indexer_losses", []), outputs.indexer_loss.detach()]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and getattr(self, "indexer_losses", None):
            logs["indexer_loss"] = torch.stack(self.indexer_losses).mean().item()
            self.indexer_losses = []
        super().log(logs, *args, **kwargs)


def finetune(args) -> None:
    """Everything that the script does. `args`: its parsed flags."""
    _check(args)
    training = _training_arguments(args)  # before the model: ZeRO-3 shards the weights while they load
    if args.deepspeed:
        _join_ranks(training)
    config, tokenizer = _open(args.model)
    reader = Reader(tokenizer, args.max_length)
    examples = reader.read(args.data)
    _check_length(args, config)
    config.indexer_loss_coef = args.indexer_loss_coef
    model = _load(args.model, config)
    if args.indexer_loss_coef == 0:  # top-k gives it no gradient; weight decay alone would shrink it
        model.model.memory.indexer.requires_grad_(False)
    _make(args.out)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = IndexTrainer(
        model=model,
        args=training,
        train_dataset=examples,
        data_collator=partial(collate, pad=pad),
        processing_class=tokenizer,
    )
    if trainer.is_world_process_zero():
        print(
            f"{len(examples)} sequences; {reader.cut} chats cut at {args.max_length} tokens, "
            f"{reader.empty} records without a token to learn left out",
            flush=True,
        )
    trainer.train(resume_from_checkpoint=str(_newest_checkpoint(args.out)) if args.resume else None)
    trainer.save_model(str(args.out))
    if trainer.is_world_process_zero():
        history = [line for line in trainer.state.log_history if "loss" in line]
        (args.out / "training_log.json").write_text(json.dumps(history, indent=1) + "\n")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from error


def _training_arguments(args) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(args.out),
        deepspeed=str(args.deepspeed) if args.deepspeed else None,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=1.0,
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        logging_steps=args.log_steps,
        seed=args.seed,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not os.isatty(2),
    )


def _join_ranks(training: TrainingArguments) -> None:
    """DeepSpeed's process group; on CPU nobody else makes it before the weights are sharded."""
    import deepspeed

    if training.use_cpu:
        # Its all-reduce for inference: never called here, and it would be compiled now, by a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def _check(args) -> None:
    for flag in ("max_length", "batch_size", "accumulate", "log_steps"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a positive number")
    for flag in ("indexer_loss_coef", "warmup_steps", "weight_decay", "save_steps"):
        if not 0 <= getattr(args, flag) < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give 0 or more")
    for flag in ("lr", "epochs", "steps"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} {value}: give a positive number")
    if args.resume and _newest_checkpoint(args.out) is None:
        raise UserError(
            f"--resume: {args.out} has no complete checkpoint-*; drop the flag and name another --out"
        )
    if not args.resume and args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        raise UserError(f"--out {args.out} is not an empty folder; name another one, or --resume")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: give 0 to {2**32 - 1}")
    check_out(args.out)
    if args.deepspeed:
        _check_deepspeed(args.deepspeed)


def _newest_checkpoint(out: Path) -> Path | None:
    """The newest whose save was not cut short: the Trainer writes its own state last."""
    found = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    whole = [path for path in found if _is_json(path / "trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def _check_deepspeed(path: Path) -> None:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--deepspeed {path}: {error.strerror}; see examples/ds_zero2.json") from error
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not JSON: {error}") from error
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UserError(
            f"--deepspeed {path}: its zero_optimization has no stage 1, 2 or 3; see examples/ds_zero2.json"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError(
            "--deepspeed needs 'pip install deepspeed'; without the flag one device trains"
        ) from None
    if "RANK" not in os.environ:
        raise UserError(f"--deepspeed {path} needs ranks: add --nproc-per-node N, or use torchrun")


def _open(folder: Path) -> tuple[CLSAConfig, object]:
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder} has no config.json; give an exported folder (tools/to_hf.py)")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        if kind != "clsa":
            raise UserError(f"--model {folder} is a {kind} model, not clsa; convert it with tools/from_hf.py")
        config = CLSAConfig.from_pretrained(folder)
        return config, AutoTokenizer.from_pretrained(folder, config=config)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise _unusable(folder, error) from error


def _load(folder: Path, config: CLSAConfig) -> CLSAForCausalLM:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_files(folder)  # the other ranks of a machine read the same files
    try:
        model, found = CLSAForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds
        raise _unusable(folder, error) from error
    check_loaded(found, f"--model {folder}")
    return model


def _unusable(folder: Path, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(f"--model {folder} cannot be loaded: {reason}")


def _check_length(args, config: CLSAConfig) -> None:
    if args.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {args.max_length} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}: lower it"
        )
