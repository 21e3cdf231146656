"""The datasets and batches that `megatron.training.pretrain` asks for, on Megatron's own classes.

Owns the two choices that CLSA makes about documents, and which rank reads what. Files: indexed.py.

Documents in one sequence are kept apart by position ids that restart after every end-of-document token
(`reset_position_ids`): the model reads each row's first visible key from them, so no mask is built. The
end-of-document token is a target, but nothing is asked of it as an input (`eod_mask_loss`): its target
would be the first token of an unrelated document. Megatron leaves both off unless asked; they are one
contract here, because a loss over a boundary that attention may not cross can only learn noise.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_clsa.data.indexed import fingerprint
from megatron_clsa.data.validation import blends_of, prefixes_of
from megatron_clsa.errors import UserError

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
# Megatron's batch helpers read these, of kinds of batch that are not made here.
_UNUSED_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)


def dataset_config(args, tokenizer) -> GPTDatasetConfig:
    """Megatron's data flags as its dataset configuration."""
    blend, blend_per_split = blends_of(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split if blend is not None else None,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=_index_cache(args),
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )


def _index_cache(args) -> str | None:
    """A folder for shuffled indices of exactly this content.

    Megatron names them by path and settings only: data made again under one name would meet stale indices.
    """
    prefixes = prefixes_of(args)
    if not prefixes:
        return None
    base = Path(args.data_cache_path or Path(prefixes[0]).parent / "cache")
    return str(base / fingerprint(prefixes))


def train_valid_test_datasets_provider(num_samples: list[int], vp_stage: int | None = None):
    """(train, valid, test) datasets of `num_samples` sequences each; None where this rank reads no data.

    Every rank must call it: rank 0 builds the indices, the others wait and read them.
    """
    args = get_args()

    def reads_data() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    config = dataset_config(args, get_tokenizer())
    with _unwritable_cache_named(config.path_to_cache):
        return BlendedMegatronDatasetBuilder(kind, num_samples, reads_data, config).build()


@contextlib.contextmanager
def _unwritable_cache_named(folder: str | None) -> Iterator[None]:
    """Rank 0 writes the indices beside the data, which on a cluster few may write."""
    try:
        yield
    except Exception as error:  # Megatron wraps the reason in a bare Exception
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError) or folder is None:
            raise
        raise UserError(
            f"--data-cache-path {folder}: {reason.strerror}; give a folder that you may write to"
        ) from error


train_valid_test_datasets_provider.is_distributed = True  # asks Megatron to call it on every rank


def get_batch(data_iterator, vp_stage: int | None = None) -> dict[str, torch.Tensor | None]:
    """The next microbatch of this rank: `BATCH_KEYS` to `[b, s/cp]` tensors, or to None where not needed.

    TP rank 0 reads and broadcasts; CP ranks keep their two zigzag chunks. The first pipeline stage gets
    tokens, position_ids and loss_mask, the last labels and loss_mask, one stage alone all four, the stages
    between none: they learn document starts and counted rows from the pipeline packet.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS} | dict.fromkeys(_UNUSED_KEYS)
    mask = batch["loss_mask"] if batch else None
    batch = _broadcast(batch, vp_stage)
    if batch["loss_mask"] is None:  # Megatron's first stage has no use for it; the distillation loss does
        batch["loss_mask"] = _broadcast_mask(mask, batch["tokens"])
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {key: batch[key] for key in BATCH_KEYS}


def _broadcast(batch: dict | None, vp_stage: int | None) -> dict:
    """`batch` of TP rank 0 on every TP rank, less what this pipeline stage does not need."""
    args = get_args()
    virtual = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    return get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(**virtual),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(**virtual),
    )


def _broadcast_mask(mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """`[b, s]` loss mask of TP rank 0 on every TP rank of the first pipeline stage."""
    if mask is None:
        mask = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    group = mpu.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.broadcast(mask, mpu.get_tensor_model_parallel_src_rank(), group=group)
    return mask
