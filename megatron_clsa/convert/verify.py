"""Holds an exported folder to the checkpoint it came from: logits of all positions and the index, in fp32.

Builds the Megatron model on this machine's CPU (local spec, one rank). Owns no tolerance but its default:
1e-4 of logits whose fp32 rounding through both models is below 1e-5.

Rounding also decides which of two positions with nearly the same score is the k-th, and one other position
moves a logit by more than that. So both models read the checkpoint's index, and the folder's own is compared
apart: it may differ only in positions whose scores are that close to the k-th best. Where a folder reads the
whole memory (`cross_attention: dense`), the logits are of that reading; its index is compared all the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.errors import UserError
from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import causal_rows

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What `verify` found in order.

    Attributes:
        worst: largest difference of a logit.
        ties: selected positions that the two models' rounding decided differently.
    """

    worst: float
    ties: int

    def __str__(self) -> str:
        text = (
            f"verified: logits differ by at most {self.worst:.1e} (limit {TOLERANCE:.0e}) over all positions"
        )
        return text + (f"; {self.ties} near ties of the index fell otherwise" if self.ties else "")


def verify(reader: TorchDistReader, arch: Architecture, folder: Path, config: dict) -> Verdict:
    """Compare `folder` with the checkpoint.

    The sequence is longer than window and k together: a shorter one would hide an index that selects wrongly.

    Args:
        config: what the folder's `config.json` holds, or will hold once the folder is known to be right.
    Raises:
        UserError: if logits differ by more than `TOLERANCE`, are not finite, or the index is another one.
    """
    length = 2 * max(arch.sliding_window, arch.index_topk) + 33
    tokens = torch.randint(arch.vocab_size, (1, length), generator=torch.Generator().manual_seed(7))
    expected, chosen = _megatron(reader, arch, tokens)
    actual, strangers = _hugging_face(folder, config, tokens, chosen)
    difference = (expected - actual).abs().amax(dim=(0, 2))
    worst = difference.max().item()
    reason = "the folder was not made from this checkpoint, or a conversion rule is wrong"
    if not worst <= TOLERANCE:
        raise UserError(
            f"{folder.name}: logits differ from the checkpoint's by {worst:.2e}, {TOLERANCE:.0e} is allowed, "
            f"first at position {int((~(difference <= TOLERANCE)).nonzero()[0])} of {length}: {reason}"
        )
    if not strangers.gap <= TOLERANCE:
        raise UserError(
            f"{folder.name}: the index selects other positions than the checkpoint's, {strangers.gap:.1e} of "
            f"a row's scores away where {TOLERANCE:.0e} is allowed: {reason}"
        )
    return Verdict(worst, strangers.count)


@dataclass(frozen=True)
class _Strangers:
    """Selected by the folder and not by the checkpoint: how many, and how far the worst is from the k-th."""

    count: int
    gap: float


def _strangers(query: Tensor, key: Tensor, own: Tensor, chosen: Tensor) -> _Strangers:
    """query, key `[1, s, di]`; own, chosen `[1, 1, s, s]` bool. Gaps are shares of a row's largest score."""
    other = (own & ~chosen)[0, 0]
    if not own.sum(-1).equal(chosen.sum(-1)):  # another k
        return _Strangers(int(other.sum()), float("inf"))
    if not other.any():
        return _Strangers(0, 0.0)
    score = (query.float() @ key.float().transpose(1, 2))[0]
    largest = score.masked_fill(~(own | chosen)[0, 0], 0.0).abs().amax(-1, keepdim=True)
    kth = score.masked_fill(~chosen[0, 0], float("inf")).amin(-1, keepdim=True)
    gap = ((score - kth).abs() / largest)[other].max().item()
    return _Strangers(int(other.sum()), gap)


def _hugging_face(folder: Path, config: dict, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, _Strangers]:
    """`[1, s, V]` fp32 logits through the code inside the folder, reading the positions `chosen`."""
    model = _load(folder, config)
    own_selection, found = model.model._selected, []

    def given_selection(query, key, seen, first_row):
        found.append(_strangers(query, key, own_selection(query, key, seen, first_row), chosen))
        return chosen

    reads = model.config.cross_attention
    model.config.cross_attention, model.model._selected = "sparse", given_selection
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits
        if reads == "dense":
            model.config.cross_attention, model.model._selected = reads, own_selection
            logits = model(tokens, use_cache=False).logits
    return logits, found[0]


def _load(folder: Path, config: dict):
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        own_config = get_class_from_dynamic_module(config["auto_map"]["AutoConfig"], folder)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=own_config.from_dict(config),
            trust_remote_code=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder} cannot be loaded by its own code for --verify: {error}") from None


def _megatron(reader: TorchDistReader, arch: Architecture, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`[1, s, V]` fp32 logits of the checkpoint's model and its index as a mask `[1, 1, s, s]`."""
    from megatron_clsa.model.forward_mode import ForwardMode

    made = []
    with _one_rank():
        model = _build(arch, padded_vocab=reader.shapes()["embedding.word_embeddings.weight"][0])
        for name, parameter in _named_by_checkpoint(model):
            parameter.copy_(reader.read(name).view(parameter.shape))
        model.memory.indexer.register_forward_hook(lambda _, args, out: made.append(out))
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            logits = model.eval()(tokens, positions, mode=ForwardMode("sparse"))
            if arch.cross_attention == "dense":
                logits = model(tokens, positions, mode=ForwardMode("dense"))
    logits = logits.float()[..., : arch.vocab_size]
    query, key = made[0].transpose(0, 1).split(arch.index_head_dim, dim=-1)
    index = dispatch.topk_index(query, key, causal_rows(*tokens.shape), arch.index_topk).long()
    mask = torch.zeros(*tokens.shape, tokens.shape[1] + 1, dtype=torch.bool)
    mask.scatter_(-1, index.masked_fill(index < 0, tokens.shape[1]), True)
    return logits, mask[..., :-1][:, None]


def _build(arch: Architecture, padded_vocab: int):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_clsa.config import CLSAConfig
    from megatron_clsa.model.builder import CLSAModelBuilder, CLSAModelConfig

    same = {name: getattr(arch, name) for name in Architecture.__annotations__ if hasattr(CLSAConfig, name)}
    config = CLSAConfig(
        **same,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
    )
    settings = CLSAModelConfig(
        transformer=config,
        vocab_size=padded_vocab,
        seq_length=arch.max_position_embeddings,
        tie_embeddings=arch.tie_embeddings,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return CLSAModelBuilder(settings).build_model(groups, pre_process=True, post_process=True)


def _named_by_checkpoint(model) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's own memory under the name that it has in a checkpoint."""
    for entry in model.sharded_state_dict().values():
        if isinstance(getattr(entry, "data", None), Tensor):
            yield entry.key, entry.data.detach()


@contextmanager
def _one_rank():
    """megatron-core's process groups, of this process alone, for as long as the block runs."""
    import megatron_clsa.parallel.cpu  # noqa: F401, I001  (before megatron.core)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
