"""Which GPU a tensor is on, where a kernel is for one kind alone."""

import torch
from torch import Tensor


def on_hopper(tensor: Tensor) -> bool:
    """Whether the tensor is on a Hopper GPU (H100, H200): tensor cores and copies of its own."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9
