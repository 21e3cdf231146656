"""The distillation loss: the index learns the consensus of the cross-decoder's dense attention.

`L_KD = mean_t KL(stopgrad(Abar_t) || softmax(I_t))`, `Abar` the mean over layers and heads. Its gradient
`softmax(I) - Abar` is linear in `Abar`, so every layer, head shard, pipeline stage and context shard adds
its own part. Owns the scaling and how that part joins the backward pass; the kernels are in
`kernels/streaming_kd.py` and `kernels/indexer_kd.py`. Reported is the cross-entropy; the KL's entropy term
does not decompose.
"""

import torch
from torch import Tensor


class _CarryLoss(torch.autograd.Function):
    """`main, loss -> main`; backward hands `scale` to the loss, whatever reaches `main`."""

    @staticmethod
    def forward(ctx, main: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.shape = scale, loss.shape
        return main.view_as(main)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.full(ctx.shape, ctx.scale, dtype=torch.float32, device=grad.device), None


class _Touch(torch.autograd.Function):
    """`main, other -> main`; backward gives `other` a zero gradient, so that its own graph is run."""

    @staticmethod
    def forward(ctx, main: Tensor, other: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = other.shape, other.dtype
        return main.view_as(main)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)


def touch(main: Tensor, other: Tensor) -> Tensor:
    """Make backward through `main` also run the graph of `other`, with a zero gradient."""
    return _Touch.apply(main, other)


def attach_kd_loss(carrier: Tensor, kd_sum: Tensor, config) -> Tensor:
    """Let `kd_sum` join the backward pass that runs through `carrier`.

    The carrier is a zero tensor that travels beside the hidden states; a loss hung on the hidden states
    themselves would force a backward through the frozen backbone when only the indexer trains.

    Args:
        carrier: any float tensor on the way to the loss.
        kd_sum: scalar, this stage's sum over rows of the cross-entropy (mean over layers and heads).
    """
    return carry_loss(carrier, kd_sum, config.kd_loss_coeff, config)


def carry_loss(main: Tensor, loss_sum: Tensor, coefficient: float, config) -> Tensor:
    """`main`; backward through it differentiates `coefficient * loss_sum` too, a sum over own rows."""
    # Schedules divide gradients by the batch's token count, so a sum over rows needs the loss scale only.
    if config.grad_scale_func is not None:
        coefficient *= float(config.grad_scale_func(torch.ones((), device=loss_sum.device)))
    return _CarryLoss.apply(main, loss_sum, coefficient)


def kd_share(layer_sum: Tensor, config) -> Tensor:
    """One layer's part of the mean over layers and heads, summed over rows.

    Args:
        layer_sum: scalar, cross-entropy summed over counted rows and this rank's heads
            (`kernels.dispatch.attention_kd_sum`).
    """
    return layer_sum / (config.num_cross_decoder_layers * config.num_attention_heads)
