"""One head instead of the heads of many layers: the closed forms behind a CLSA start (docs/convert.md).

Owns the linear algebra; knows no names and no files.
Axis letters: H hidden, l layers, h query heads, g groups, d head dim, T = l * d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What the calibration text leaves behind, sums over its tokens.

    x is the memory's source, RMS-normalised, with a 1 appended: `[n, H + 1]`. Targets are the dense layers'
    own keys and values on their own inputs.

    Attributes:
        xx: `x^T x [H + 1, H + 1]`.
        key, value: `x^T target [H + 1, l, g, d]`.
    """

    xx: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Fit:
    """One shared projection and each layer's way back from it.

    Attributes:
        weight: `[g, H + 1, d]`: x to the shared head, the last row a bias.
        mixing: `[l, g, d, d]`: shared head (as a row) times this is layer l's head.
        kept: share of the predicted energy that the shared heads hold.
    """

    weight: Tensor
    mixing: Tensor
    kept: float


def fit_shared_heads(xx: Tensor, xt: Tensor, bias: bool, ridge: float = 1e-4) -> Fit:
    """Ridge regression of every layer's heads on x, then the best d directions for all layers, per group.

    With predictions P = x B `[n, T]` of a group, the top d right singular vectors U of P give the shared head
    P U and its best way back U^T: the Eckart-Young solution. sqrt(l) keeps the size of one layer's head.
    """
    layers, groups, width = xt.shape[1:]
    used = xx.shape[0] if bias else xx.shape[0] - 1
    xx, xt = xx[:used, :used].double(), xt[:used].double()
    damping = ridge * xx.diagonal().mean() * torch.eye(used, dtype=xx.dtype)
    solved = torch.linalg.solve(xx + damping, xt.flatten(1)).view(used, layers, groups, width)
    weights, mixings, kept, total = [], [], 0.0, 0.0
    for group in range(groups):
        to_all = solved[:, :, group].flatten(1)
        energy, directions = torch.linalg.eigh(to_all.T @ xx @ to_all)
        top = directions[:, -width:]
        weights.append(to_all @ top / layers**0.5)
        mixings.append((top * layers**0.5).view(layers, width, width).transpose(1, 2))
        kept, total = kept + energy[-width:].sum().item(), total + energy.sum().item()
    weight = torch.stack(weights)
    if not bias:
        weight = torch.cat([weight, weight.new_zeros(groups, 1, width)], dim=1)
    return Fit(weight, torch.stack(mixings, dim=1), kept / total)


def mean_rotation(width: int, base: float, span: int) -> Tensor:
    """`[d / 2]` complex: mean of exp(i f t) over the distances t = 0 .. span - 1, for each RoPE frequency f.

    The best score without positions is the mean of the score with them: q_t . R(t) k averages to (c q) . k.
    Frequencies that turn often within the span vanish, slow ones stay.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    angle = torch.arange(span, dtype=torch.float64)[:, None] * base**-exponent
    return torch.polar(torch.ones_like(angle), angle).mean(0)


def rotate_heads(weight: Tensor, factor: Tensor) -> Tensor:
    """Multiply the RoPE pairs (i, i + d/2) of `[h, d, ...]`, as complex numbers, by `factor [d / 2]`."""
    first, second = weight.double().chunk(2, dim=1)
    by_pair = factor.view(-1, *[1] * (weight.dim() - 2))
    turned = torch.complex(first, second) * by_pair
    return torch.cat([turned.real, turned.imag], dim=1)
