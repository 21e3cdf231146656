"""What the two operators of sparse attention share: their fake tensors, their autograd, their scale.

Owns the torch.library side of an operator pair `attend(query, key, value, tensors, numbers, scale)` and
`attend_backward(dout, dlse, out, lse, query, key, value, tensors, numbers, scale)`, in which a plan's `flat`
travels as `tensors` and `numbers`.
"""

import torch
from torch import Tensor


def check_scale(scale: float) -> None:
    """Refuse what the running maximum cannot be taken under: it is the largest product times the scale."""
    if scale <= 0:
        raise ValueError(f"scale {scale}: sparse attention needs a positive one")


def rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors; those whose last axis is not contiguous are copied."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def register(attend, attend_backward) -> None:
    """Give both operators of a pair fake tensors, and the first the second as its gradient."""

    @attend.register_fake
    def _(query, key, value, *plan):
        b, sq, h, _ = query.shape
        return query.new_empty(query.shape), query.new_empty(b, h, sq, dtype=torch.float32)

    @attend_backward.register_fake
    def _(dout, dlse, out, lse, query, key, value, *plan):
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    def keep(ctx, inputs, output):
        query, key, value, tensors, ctx.numbers, ctx.scale = inputs
        ctx.save_for_backward(*output, query, key, value, *tensors)

    def differentiate(ctx, dout, dlse):
        out, lse, query, key, value, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        gradients = attend_backward(dout, dlse, out, lse, query, key, value, tensors, ctx.numbers, ctx.scale)
        return (*gradients, [None] * len(tensors), None, None)  # torch.library answers a list by a list

    attend.register_autograd(differentiate, setup_context=keep)
