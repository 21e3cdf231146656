"""Writes a safetensors file tensor by tensor: its header needs shapes only, so no shard is ever in memory.

Owns the format for writing (8 bytes of the header's length, the header as JSON, the bytes of the tensors one
after the other); reading is the safetensors library's, which keeps a whole file in memory when it writes one.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {  # that can be written, and their names in the file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_BLOCK = 1 << 24  # bytes that are converted and written at a time


@dataclass(frozen=True)
class Planned:
    """A tensor that a file will hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One file, filled by `add` in the order of its header.

    Args:
        path: of the file, which is written anew.
        tensors: shape and dtype of each, by name.
    """

    def __init__(self, path: Path, tensors: dict[str, Planned]):
        self._left = list(tensors.items())
        header, start = {"__metadata__": {"format": "pt"}}, 0
        for name, plan in tensors.items():
            end = start + plan.nbytes
            offsets = [start, end]
            header[name] = {"dtype": DTYPES[plan.dtype], "shape": list(plan.shape), "data_offsets": offsets}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, converted block by block.

        Raises:
            ValueError: if the header has another tensor here.
        """
        planned, plan = self._left.pop(0) if self._left else (None, None)
        if planned != name or plan.shape != tuple(tensor.shape):
            raise ValueError(f"{name} {list(tensor.shape)} is not what the header has next")
        flat = tensor.flatten() if tensor.is_contiguous() else tensor.contiguous().flatten()
        for block in flat.split(_BLOCK // plan.dtype.itemsize):
            self._file.write(block.to(plan.dtype).view(torch.uint8).numpy())

    def finish(self) -> None:
        """Bring the file to the disk.

        Raises:
            ValueError: if the header has a tensor that was not written.
        """
        if self._left:
            raise ValueError(f"{self._left[0][0]} was not written")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Give the file back, finished or not."""
        self._file.close()
