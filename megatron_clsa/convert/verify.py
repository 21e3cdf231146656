"""Holds an exported folder to the checkpoint it came from: logits of all positions, in fp32.

Builds the Megatron model on this machine's CPU (local spec, one rank). Owns no tolerance but its default:
1e-4 of logits whose fp32 rounding through both models is below 1e-5.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.errors import UserError

TOLERANCE = 1e-4


def verify(reader: TorchDistReader, arch: Architecture, folder: Path, tolerance: float = TOLERANCE) -> float:
    """Largest difference of the logits of `folder` and of the checkpoint, over all positions.

    The sequence is longer than window and k together: a shorter one would hide an index that selects wrongly.

    Raises:
        UserError: if the difference exceeds `tolerance` or a logit is not finite.
    """
    length = 2 * max(arch.sliding_window, arch.index_topk) + 33
    tokens = torch.randint(arch.vocab_size, (1, length), generator=torch.Generator().manual_seed(7))
    expected = megatron_logits(reader, arch, tokens)
    actual = hugging_face_logits(folder, tokens)
    difference = (expected - actual).abs().amax(dim=(0, 2))
    worst = difference.max().item()
    if not worst <= tolerance:
        raise UserError(
            f"{folder.name}: logits differ from the checkpoint's by {worst:.2e}, {tolerance:.0e} is allowed, "
            f"first at position {int((~(difference <= tolerance)).nonzero()[0])} of {length}: the folder was "
            "not made from this checkpoint, or a conversion rule is wrong"
        )
    return worst


def hugging_face_logits(folder: Path, tokens: Tensor) -> Tensor:
    """`[1, s, V]` fp32 logits as a user gets them, through the code inside the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def megatron_logits(reader: TorchDistReader, arch: Architecture, tokens: Tensor) -> Tensor:
    """`[1, s, V]` fp32 logits of the checkpoint's model with sparse cross-attention."""
    with _one_rank():
        model = _build(arch, padded_vocab=reader.shapes()["embedding.word_embeddings.weight"][0])
        for name, parameter in _named_by_checkpoint(model):
            parameter.copy_(reader.read(name).view(parameter.shape))
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            return model.eval()(tokens, positions).float()[..., : arch.vocab_size]


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
        cross_attention="sparse",
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
