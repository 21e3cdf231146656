"""Writes a `torch_dist` checkpoint of weights, tensor by tensor, that every parallel layout can load.

Owns the file format, as `checkpoint.py` does for reading; knows no model. Needs no megatron and no process
group: one file holds whole tensors, and megatron-core cuts them to its layout when it loads. Peak memory: the
largest tensor.
"""

import json
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_clsa.convert import manifest
from megatron_clsa.convert.checkpoint import TRACKER

STEP_FOLDER = "release"  # Megatron's name for weights that belong to no step
_SLICES = "__0_0.distcp"
# What megatron.training reads from a checkpoint beside its tensors; optimizer and run start anew.
_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False},
}


class TorchDistWriter:
    """One checkpoint, filled by `add` and made readable by `finish`; until then it has no index.

    Args:
        folder: of the whole checkpoint; tensors go into its folder `release`.
    """

    def __init__(self, folder: Path):
        self.folder = folder / STEP_FOLDER
        self.folder.mkdir(parents=True)
        self._tracker = folder / TRACKER
        self._file = (self.folder / _SLICES).open("wb")
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one whole tensor."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a view would be saved with all it looks into
        start = torch.Size([0] * tensor.dim())
        self._entries[name] = TensorStorageMetadata(
            TensorProperties.create_from_tensor(tensor),
            tensor.shape,
            [ChunkStorageMetadata(start, tensor.shape)],
        )
        self._append(MetadataIndex(name, start), tensor)

    def _append(self, index: MetadataIndex, content) -> None:
        offset = self._file.tell()
        torch.save(content, self._file)
        place = _StorageInfo(_SLICES, offset, self._file.tell() - offset)
        self._places[index] = place

    def finish(self) -> None:
        """Write what makes the files a checkpoint."""
        common = "common_state/shard_0_1"
        self._entries[common] = BytesStorageMetadata()
        self._append(MetadataIndex(common), [_COMMON])
        os.fsync(self._file.fileno())
        self._file.close()
        index = Metadata(self._entries, storage_data=self._places)
        (self.folder / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )
        (self.folder / ".metadata").write_bytes(pickle.dumps(index))
        names = (_SLICES, "metadata.json", ".metadata")
        manifest.seal(self.folder, {name: manifest.describe(self.folder / name) for name in names}, {})
        self._tracker.write_text(f"{STEP_FOLDER}\n")

    def close(self) -> None:
        """Give the file back, finished or not."""
        self._file.close()
