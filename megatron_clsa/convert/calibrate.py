"""Runs a dense model over a text: what its layers' keys and values are, and what losing them costs.

Owns the forward passes and the text; the fit is `shared_heads.py`'s. The memory's source is taken from layers
that see their window only, as in the model that comes out; targets are the untouched model's.
"""

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.shared_heads import Moments
from megatron_clsa.convert.tokenizer import load_tokenizer
from megatron_clsa.convert.weights import check_loaded
from megatron_clsa.errors import UserError


def calibration_tokens(tokenizer: Path | None, text: Path | None, count: int, length: int) -> Tensor:
    """`[n, length]` token ids of `text`, or of the Python standard library's sources.

    Raises:
        UserError: if there is no tokenizer or too little text.
    """
    if tokenizer is None or not tokenizer.is_dir():
        raise UserError("--memory-init aligned reads a text: give --tokenizer FOLDER, or --memory-init mean")
    encode = load_tokenizer(tokenizer)
    ids: list[int] = []
    for path in _texts(text):
        ids += encode(path.read_text(errors="ignore"), add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            break
    rows = min(len(ids), count) // length
    if rows < 2:
        raise UserError(f"--calibration-text has {len(ids)} tokens: at least {2 * length} are needed")
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _texts(text: Path | None) -> list[Path]:
    if text is None:
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not text.exists():
        raise UserError(f"--calibration-text {text} does not exist")
    return sorted(path for path in text.rglob("*") if path.is_file()) if text.is_dir() else [text]


class Calibration:
    """A dense model in memory, and the rows of text that it reads: the last eighth is for losses only."""

    def __init__(self, folder: Path, arch: Architecture, tokens: Tensor, device: str = "cpu"):
        from transformers import AutoModelForCausalLM

        try:
            self.model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{folder} cannot be loaded: {error or type(error).__name__}") from None
        check_loaded(found, folder)
        self.model.eval().to(device)
        self.arch, self.device = arch, device
        held_out = max(1, len(tokens) // 8)
        self.fitted, self.held_out = tokens[:-held_out], tokens[-held_out:]

    @torch.no_grad()
    def moments(self) -> Moments:
        """Sums over the fitted rows."""
        arch = self.arch
        heads = (arch.num_layers - arch.num_self_decoder_layers, arch.num_query_groups, arch.kv_channels)
        size = arch.hidden_size + 1
        sums = Moments(torch.zeros(size, size), torch.zeros(size, *heads), torch.zeros(size, *heads))
        for row in self.fitted:
            source, keys, values = (x.cpu() for x in self._observe(row[None].to(self.device)))
            sums.xx.add_(source.T @ source)
            for total, target in ((sums.key, keys), (sums.value, values)):
                total.add_((source.T @ target.flatten(1)).view_as(total))
        return sums

    def _observe(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[s, H + 1]`, keys and values `[s, l, g, d]` of one row."""
        half = self.arch.num_self_decoder_layers
        inputs = self._inputs(row)[half:-1]
        with self._windowed(row.shape[1]):
            source = self._inputs(row)[half][0]
        source = source * torch.rsqrt(source.pow(2).mean(-1, keepdim=True) + self.arch.layernorm_epsilon)
        keys, values = [], []
        for layer, hidden in zip(self.model.model.layers[half:], inputs, strict=True):
            normed = layer.input_layernorm(hidden[0])
            keys.append(layer.self_attn.k_proj(normed))
            values.append(layer.self_attn.v_proj(normed))
        by_head = (self.arch.num_query_groups, self.arch.kv_channels)
        return (
            torch.cat([source, torch.ones_like(source[:, :1])], dim=1),
            torch.stack(keys, dim=1).unflatten(-1, by_head),
            torch.stack(values, dim=1).unflatten(-1, by_head),
        )

    def _inputs(self, row: Tensor) -> tuple[Tensor, ...]:
        return self.model.model(row, use_cache=False, output_hidden_states=True).hidden_states

    @contextmanager
    def _windowed(self, length: int) -> Iterator[None]:
        """Inside, the layers below the memory see `sliding_window` tokens."""
        position = torch.arange(length, device=self.device)
        distance = position[:, None] - position[None, :]
        mask = ((distance >= 0) & (distance < self.arch.sliding_window))[None, None]

        def see_the_window(module, args, kwargs):
            return args, kwargs | {"attention_mask": mask}

        layers = self.model.model.layers[: self.arch.num_self_decoder_layers]
        hooks = [layer.register_forward_pre_hook(see_the_window, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def losses(self, start: nn.Module) -> dict[str, float]:
        """Mean loss a token of the held-out rows: the dense model, with its windows, and the start."""
        found = {"dense": _loss(self.model, self.held_out)}
        with self._windowed(self.held_out.shape[1]):
            found["dense with windows"] = _loss(self.model, self.held_out)
        found["start"] = _loss(start.to(self.device), self.held_out)
        return found


@torch.no_grad()
def _loss(model: nn.Module, tokens: Tensor) -> float:
    rows = [model(row[None].to(model.device), use_cache=False).logits[0, :-1] for row in tokens]
    return nn.functional.cross_entropy(
        torch.cat(rows).float(), tokens[:, 1:].flatten().to(model.device)
    ).item()
