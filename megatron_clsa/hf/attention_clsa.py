"""Which keys a query row may see, the index's top-k as a mask, and attention over either.

Owns no weights. Axis letters: b batch, s query rows, t key columns, h query heads, g key/value heads,
d head dim, k selected. Tensors are in transformers' layout [b, heads, s, d].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROWS_AT_ONCE = 1024  # index scores are made for this many query rows at a time: [b, 1024, t] fp32


@dataclass
class Visible:
    """Visible keys of the rows of one call, as `[b or 1, 1, s, t]` masks made block by block.

    Key column j is position `first_key + j`; query row i is position `first_query + i`.

    Attributes:
        num_rows, num_keys: s and t.
        first_query, first_key: positions of row 0 and column 0 (0-dim tensors with a static cache).
        window: tokens that a row sees, itself included; None for all before it.
        document: `[b, s]` first position of each row's document in a packed batch, or None.
        padding: `[b, t]` bool, false where the key is padding, or None.
        given: a mask `[b or 1, 1, s, t]` bool made by the caller, or None.
        complete: whether `given` already holds causality and window.
    """

    num_rows: int
    num_keys: int
    first_query: int | Tensor
    first_key: int | Tensor
    window: int | None
    device: torch.device
    document: Tensor | None = None
    padding: Tensor | None = None
    given: Tensor | None = None
    complete: bool = False

    def block(self, rows: slice, keys: slice = slice(None)) -> Tensor:
        """`[b or 1, 1, rows, keys]` bool for a block of query rows and key columns."""
        if self.complete:
            return self.given[:, :, rows, keys]
        q = torch.arange(self.num_rows, device=self.device)[rows, None] + self.first_query
        j = torch.arange(self.num_keys, device=self.device)[None, keys] + self.first_key
        seen = j <= q
        if self.window is not None:
            seen = seen & (j > q - self.window)
        seen = seen[None, None]
        if self.document is not None:
            seen = seen & (j >= self.document[:, None, rows, None])
        if self.padding is not None:
            seen = seen & self.padding[:, None, None, keys]
        return seen if self.given is None else seen & self.given[:, :, rows, keys]


def visible_keys(
    layer_type: str,
    layer: int,
    num_rows: int,
    attention_mask: Tensor | dict | None,
    cache: Cache | None,
    document: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Visible:
    """Visible keys of all layers of one type; call it before the cache is updated.

    `attention_mask` is None, `[b, t]` (0 for padding), `[b, 1, s, t]`, or transformers' dict of ready
    4-D masks by layer type, which `generate` makes for static caches.
    """
    if cache is None:
        given_2d = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        first_query, first_key = 0, 0
        num_keys = attention_mask.shape[-1] if given_2d else num_rows
    else:
        num_keys, first_key = cache.get_mask_sizes(num_rows, layer)
        first_query = cache.get_query_offset(layer)
        if isinstance(first_query, Tensor):  # a static cache's own counter, which its update will move
            first_query = first_query.clone()
    seen = Visible(num_rows, num_keys, first_query, first_key, window, device, document)
    complete = isinstance(attention_mask, dict)
    if complete:
        attention_mask = attention_mask.get(layer_type)
    if attention_mask is None:
        return seen
    if attention_mask.ndim == 4:
        seen.given, seen.complete = _as_bool(attention_mask).to(device)[..., -num_keys:], complete
    else:
        seen.padding = _fit_padding(attention_mask.to(device).bool(), first_key, num_keys)
    return seen


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _fit_padding(padding: Tensor, first_key: int, num_keys: int) -> Tensor:
    """The columns of `padding` that the layer's keys have; static caches have more slots than tokens."""
    missing = first_key + num_keys - padding.shape[-1]
    if missing > 0:
        padding = nn.functional.pad(padding, (0, missing), value=False)
    return padding[:, first_key : first_key + num_keys]


def document_starts(position_ids: Tensor) -> Tensor | None:
    """`[b, s]` first row of each token's document; None when position_ids never jump."""
    jump = torch.ones_like(position_ids, dtype=torch.bool)
    jump[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not jump[:, 1:].any():
        return None
    rows = torch.arange(position_ids.shape[1], device=position_ids.device)
    return torch.where(jump, rows, 0).cummax(dim=1).values


@torch.no_grad()
def select(query: Tensor, key: Tensor, seen: Visible, first_row: int, k: int) -> Tensor:
    """The index as a mask `[b, 1, s, t]`: each row's k visible keys with the largest fp32 scores.

    query `[b, s, d]` holds rows first_row.. of `seen`; key `[b, t, d]`. Ties go to the smaller position;
    a row with at most k visible keys keeps them all.
    """
    key = key.float().transpose(1, 2)
    blocks = []
    for start in range(0, query.shape[1], ROWS_AT_ONCE):
        rows = query[:, start : start + ROWS_AT_ONCE]
        mask = seen.block(slice(first_row + start, first_row + start + rows.shape[1]))[:, 0]
        if k < key.shape[-1]:
            mask = _largest((rows.float() @ key).masked_fill(~mask, float("-inf")), k) & mask
        blocks.append(mask.expand(query.shape[0], -1, -1))
    return torch.cat(blocks, dim=1)[:, None]


def _largest(score: Tensor, k: int) -> Tensor:
    """Mask of the k largest entries of the last axis; of equal ones, the first."""
    least = score.topk(k, dim=-1).values[..., -1:]
    above, equal = score > least, score == least
    left = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= left))


def gather_selected(key: Tensor, value: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Selected keys and values of a single query row, once for all layers: `[b, g, k, d]` twice, mask."""
    chosen = mask[:, 0, 0].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :k]
    at = chosen[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
    return key.gather(2, at), value.gather(2, at), mask.gather(3, chosen[:, None, None])


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T scale) v with a bool mask; returns `[b, s, h, d]` and the weights `[b, h, s, t]`."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    score = (query @ key.transpose(2, 3)) * scaling
    score = score.masked_fill(~attention_mask, torch.finfo(score.dtype).min)
    weight = score.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weight @ value).transpose(1, 2).contiguous(), weight


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs):
    """Attention by the implementation that the config names; `[b, s, h, d]` and weights (eager only)."""
    run: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    return run(module, query, key, value, mask, dropout=0.0, scaling=module.scaling, **kwargs)


def attend_window(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, seen: Visible, **kwargs):
    """Windowed attention in O(s * window) time and memory: a block of rows reads only the keys near it."""
    num_rows, num_keys, window = query.shape[2], seen.num_keys, module.sliding_window
    # A cache that records its past for a rollback (assisted generation) returns more keys than the mask has.
    key, value = key[:, :, -num_keys:], value[:, :, -num_keys:]
    block = max(window, 128)
    if num_rows <= block or module.config._attn_implementation == "eager":
        return attend(module, query, key, value, seen.block(slice(None)), **kwargs)
    before = num_keys - num_rows  # a call longer than the window: its rows are the last keys
    outputs = []
    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        keys = slice(max(0, before + start - window + 1), before + rows.stop)
        out, _ = attend(
            module, query[:, :, rows], key[:, :, keys], value[:, :, keys], seen.block(rows, keys), **kwargs
        )
        outputs.append(out)
    return torch.cat(outputs, dim=1), None


def index_cross_entropy(query: Tensor, key: Tensor, log_index: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[b, s]`: -sum over heads and keys of P log softmax(I), P = softmax(q k^T scale) over `mask`.

    query `[b, h, s, d]`, key `[b, g, t, d]`; only `log_index` `[b, s, t]` gets a gradient.
    """
    with torch.no_grad():
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        score = (query.float() @ key.float().transpose(2, 3)) * scale
        share = score.masked_fill(~mask, float("-inf")).softmax(dim=-1).sum(dim=1).nan_to_num_(0.0)
    return -(share * log_index).sum(dim=-1)
