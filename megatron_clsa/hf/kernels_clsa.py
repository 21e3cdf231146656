"""The attention implementation "megatron_clsa": cross-attention by that package's kernels, the rest by sdpa.

Owns when they serve and what they are given; no arithmetic, and no import of them before they are used: the
folder works without the package. Axis letters: b batch, s rows, t memory positions, k selected, d head dim.

The kernels take visible keys as one range of positions a row. Masks with gaps, single rows (decoding) and
memories of at most k tokens keep the masked path.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention_clsa import Visible
from .configuration_clsa import CLSAConfig

NAME = "megatron_clsa"


@dataclass
class Selected:
    """The index of one call, in place of a mask.

    Attributes:
        index: `[b, s, k]` int32 ascending positions, -1 after the last.
        rows: the kernels' `RowRange`: first and last visible position of each row.
        plan: what attention derives from both, once for all layers; None where nothing is needed.
    """

    index: Tensor
    rows: object
    plan: object


def _kernel(module: str):
    return import_module(f"{NAME}.kernels.{module}")


@cache
def automatic() -> bool:
    """Whether the kernels are what a model gets that asks for no implementation."""
    if not torch.cuda.is_available() or torch.version.hip:
        return False
    try:
        _kernel("dispatch")
    except ImportError:
        return False
    return True


def check_installed() -> None:
    """Fail while the model is made, not in its first long prompt."""
    try:
        _kernel("dispatch")
    except ImportError as error:
        raise ImportError(
            f'attn_implementation="{NAME}" needs the package {NAME} and triton: {error}'
        ) from None


def select_by_kernel(
    config: CLSAConfig, query: Tensor, key: Tensor, memory: Tensor, seen: Visible, first_row: int
) -> Selected | None:
    """The index of rows first_row.. of `seen`, or None where the masked path serves.

    query `[b, s, di]` and key `[b, t, di]` of the indexer, `memory` `[b, g, t, d]` as it will be read.
    """
    chosen = config._attn_implementation == NAME and config.cross_attention == "sparse"
    if not chosen or query.shape[1] == 1 or config.index_topk >= key.shape[1]:
        return None
    if query.is_cuda and not _fits(config, query, memory):
        return None
    bounds = visible_range(seen, slice(first_row, first_row + query.shape[1]), query.shape[0])
    if bounds is None:
        return None
    dispatch, rows = _kernel("dispatch"), _kernel("rows").RowRange(*bounds)
    group = config.num_attention_heads // config.num_key_value_heads
    with torch.cuda.device_of(query):  # Triton launches on the current device
        index = dispatch.topk_index(query.detach(), key.detach(), rows, config.index_topk)
        return Selected(index, rows, dispatch.build_plan(index, rows, key.shape[1], group))


def _fits(config: CLSAConfig, query: Tensor, memory: Tensor) -> bool:
    """Whether Triton serves these sizes; plain torch on the GPU would be slower than a mask."""
    heads = memory.new_empty(1, 1, config.num_attention_heads, memory.shape[-1])
    attends = _kernel("union_attention").supported(heads, memory.transpose(1, 2))
    return attends and _kernel("indexer_topk").supported(query, config.index_topk)


def visible_range(seen: Visible, rows: slice, batch: int) -> tuple[Tensor, Tensor] | None:
    """First and last visible key column of each row, `[b, s]` int32; None if a row sees keys with gaps."""
    masked = seen.given is not None
    bounds = _range_of_mask(seen.block(rows)[:, 0]) if masked else _causal_range(seen, rows)
    if bounds is None:
        return None
    first, last = (x.int().expand(batch, -1).contiguous() for x in bounds)
    return first, last


def _causal_range(seen: Visible, rows: slice) -> tuple[Tensor, Tensor] | None:
    end = torch.arange(seen.num_rows, device=seen.device)[None, rows] + (seen.first_query - seen.first_key)
    start = torch.zeros_like(end)
    if seen.window is not None:
        start = (end - seen.window + 1).clamp(min=0)
    end = end.clamp(max=seen.num_keys - 1)
    if seen.document is not None:
        start = torch.maximum(start, seen.document[:, rows])
    if seen.padding is None:
        return start, end
    tokens = _range_of_mask(seen.padding)
    if tokens is None:
        return None
    return torch.maximum(start, tokens[0][:, None]), torch.minimum(end, tokens[1][:, None])


def _range_of_mask(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and last true column of the last axis, last < first where there is none; None if one has gaps."""
    found = mask.to(torch.int8)
    count = mask.sum(-1)
    first = found.argmax(-1)
    last = torch.where(count > 0, mask.shape[-1] - 1 - found.flip(-1).argmax(-1), first - 1)
    return None if (count != last - first + 1).any() else (first, last)


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """transformers' attention interface; `attention_mask` is a `Selected` or a mask for sdpa.

    With a `Selected`, the second result is the rows' log-sum-exp `[b, h, s]`, which `index_loss` needs.

    The last copy of this file that was loaded serves the models of every copy, hence no isinstance(Selected).
    """
    if attention_mask is None or isinstance(attention_mask, Tensor):
        run = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return run(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    chosen = attention_mask
    query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))  # differ in autocast
    with torch.cuda.device_of(query):
        return _kernel("dispatch").sparse_attention(
            query, key, value, chosen.index, chosen.rows, scaling, chosen.plan
        )


def index_loss(module, query: Tensor, key: Tensor, lse: Tensor, indexer: Tensor, chosen: Selected) -> Tensor:
    """`[b, s]`: what `attention_clsa.index_cross_entropy` is, over the selected positions.

    indexer `[b, s + t, di]`: the indexer's queries, then its keys; only they get a gradient.
    """
    index_query, index_key = indexer.split([query.shape[2], key.shape[2]], dim=1)
    query, key, scale = query.transpose(1, 2), key.to(query.dtype).transpose(1, 2), indexer.shape[-1] ** -0.5
    with torch.cuda.device_of(query):
        return _kernel("dispatch").attention_kd(
            query, key, lse, index_query, index_key, chosen.rows, chosen.index, module.scaling, scale,
            chosen.plan,
        )  # fmt: skip


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
