"""Which GPU a tensor is on, where a kernel is for one kind alone."""

import torch
from torch import Tensor


def on_hopper(tensor: Tensor) -> bool:
    """Whether the tensor is on a Hopper GPU (H100, H200): tensor cores and copies of its own."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def copied_by_16_bytes(*tensors: Tensor) -> bool:
    """Whether every vector along the last axis begins where asynchronous copies of 16 bytes may."""
    return all(x.data_ptr() % 16 == 0 and not any(n % 16 for n in x.stride()[:-1]) for x in tensors)
