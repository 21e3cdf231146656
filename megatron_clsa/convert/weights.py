"""Reads a Hugging Face folder's config and its safetensors, one tensor at a time.

Owns the files and what can be wrong with them; knows no model. Reads no pickled weights (`*.bin`): they would
execute what they hold. Files that a manifest lists, as our exports do, are held to its checksums first.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_clsa.convert import manifest
from megatron_clsa.errors import UserError

_READ = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Hold files to the checksums of the folder's manifest; a folder of another program has none.

    Args:
        names: files of the folder, None for all that the manifest lists.

    Raises:
        UserError: naming the first file that is missing, foreign or not what was written.
    """
    if not (folder / manifest.NAME).is_file():
        return
    records = manifest.read_manifest(folder)
    for name in records if names is None else names:
        if fault := manifest.listed_fault(folder, name, records, "export"):
            raise UserError(f"{fault}; export again, or delete {manifest.NAME} if you changed it yourself")


def check_loaded(found: dict, where: object) -> None:
    """Refuse a model that transformers loaded with random numbers in the place of weights.

    Args:
        found: what `from_pretrained(output_loading_info=True)` tells.
        where: the folder or the flag that names it, for the message.
    """
    if lost := sorted(found["missing_keys"]) or sorted(found["mismatched_keys"]):
        raise UserError(f"{where} lacks weights, {len(lost)} of them, such as {lost[0]}")


class WeightFolder:
    """One model folder, opened.

    Attributes:
        config: the contents of `config.json`.

    Raises:
        UserError: naming the file that is missing, cut or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = self._json("config.json")
        self._files = self._locate()

    def _json(self, name: str) -> dict:
        path = self.folder / name
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no {name}: give the folder of a Hugging Face model") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} is not a JSON object")
        return content

    def _locate(self) -> dict[str, Path]:
        """Every tensor's file, and that the file has it."""
        if (self.folder / INDEX).is_file():
            check_files(self.folder, (INDEX,))
            listed = self._listed()
            names = dict.fromkeys(listed.values())
        elif (self.folder / _SINGLE).is_file():
            names, listed = [_SINGLE], None
        else:
            raise UserError(f"{self.folder} has no {_SINGLE}: save the model with safetensors")
        check_files(self.folder, names)
        found = {}
        for name in names:
            with self._open(self.folder / name) as file:
                found |= dict.fromkeys(file.keys(), self.folder / name)
        lost = sorted(set(listed or ()) - found.keys())
        if lost:
            raise UserError(f"{self.folder / listed[lost[0]]} lacks {lost[0]}, which {INDEX} promises")
        return found

    def _listed(self) -> dict[str, str]:
        """The index: every tensor's file, which lies in the folder."""
        listed = self._json(INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{self.folder / INDEX} is damaged: it has no weight_map")
        for name, file in listed.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{self.folder / INDEX} is damaged: {name} lies in {file!r}")
        return listed

    def _open(self, path: Path):
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or damaged: {error}") from None

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype of the file."""
        path = self._files[name]
        try:
            with self._open(path) as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from None
        if tensor.dtype not in _READ:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name} is {kind}: save the model in fp32, bf16 or fp16")
        return tensor


def _section(config: dict, key: str) -> dict:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"config.json: {key} is {value!r}, not an object")
    return value


def rope_theta(config: dict) -> float:
    """Base of the rotary embedding, where transformers 5 or an older version wrote it."""
    value = _section(config, "rope_parameters").get("rope_theta") or config.get("rope_theta") or 10000.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"config.json: rope_theta is {value!r}, not a number")
    return float(value)


def rope_type(config: dict) -> str:
    """ "default", or the name of a scaling."""
    for key in ("rope_parameters", "rope_scaling"):
        scaling = _section(config, key)
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind and kind != "default":
            return kind
    return "default"
