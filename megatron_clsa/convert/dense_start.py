"""From a dense folder and the user's choices to everything that a CLSA start checkpoint needs.

Owns the order: architecture, calibration, memory, losses. The parts are `dense.py` (names and copies),
`calibrate.py` (activations) and `memory_start.py` (closed forms).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.calibrate import Calibration, calibration_tokens
from megatron_clsa.convert.dense import DenseChoices, DenseStart, dense_architecture, with_vocabulary_of
from megatron_clsa.convert.export import hf_config
from megatron_clsa.convert.imports import tokenizer_fields
from megatron_clsa.convert.memory_start import MemoryStart
from megatron_clsa.convert.names import entries
from megatron_clsa.convert.tokenizer import load_tokenizer
from megatron_clsa.convert.weights import WeightFolder


@dataclass(frozen=True)
class StartChoices:
    """Every switch of a conversion (docs/convert.md).

    Attributes:
        family: of the dense model.
        dense: what its config does not say.
        memory, position: `memory_start.METHODS` and `POSITIONS`.
        position_span: distances that "average" averages over, in tokens.
        seed: of the indexer, and of a random memory.
        text: file or folder that "aligned" reads; None for the standard library's sources.
        tokens, length: how much of it, in rows of `length`.
        device: where the dense model runs.
    """

    family: str
    dense: DenseChoices
    memory: str
    position: str
    position_span: int
    seed: int
    text: Path | None
    tokens: int
    length: int
    device: str


def make_start(
    folder: WeightFolder, tokenizer: Path | None, choices: StartChoices
) -> tuple[DenseStart, Architecture, dict]:
    """The tensors, the architecture and a record of the choices, losses and what had to be done otherwise."""
    arch = dense_architecture(folder, choices.family, choices.dense)
    tokens = _vocabulary(tokenizer)
    notes = _notes(arch, tokens, choices)
    arch = with_vocabulary_of(arch, tokens, **tokenizer_fields(tokenizer))
    calibration = None
    if choices.memory == "aligned":
        rows = calibration_tokens(tokenizer, choices.text, choices.tokens, choices.length)
        calibration = Calibration(folder.folder, arch, rows, choices.device)
    memory = MemoryStart(
        folder.read,
        arch,
        choices.memory,
        choices.position,
        choices.position_span,
        choices.seed,
        calibration.moments() if calibration else None,
    )
    source = DenseStart(folder, arch, memory.make())
    report = {
        "choices": asdict(choices) | {"text": str(choices.text) if choices.text else None},
        "notes": notes,
        "energy_kept": memory.kept,
        "loss": calibration.losses(_dense_reading_model(source, arch)) if calibration else {},
    }
    return source, arch, report


def _vocabulary(tokenizer: Path | None) -> int | None:
    if tokenizer is None or not tokenizer.is_dir():
        return None
    return len(load_tokenizer(tokenizer))


def _notes(arch: Architecture, tokens: int | None, choices: StartChoices) -> list[str]:
    notes = []
    if choices.memory == "aligned" and arch.qk_layernorm:
        notes.append(
            "keys: the mean, not aligned: a norm after the projection cannot absorb a layer's mixing"
        )
    if tokens is not None and tokens < arch.vocab_size:
        notes.append(f"vocabulary: {arch.vocab_size} rows cut to the tokenizer's {tokens} tokens")
    return notes


def _dense_reading_model(source: DenseStart, arch: Architecture) -> nn.Module:
    """The start as transformers' model; its cross layers read the whole memory, as the first phase's do."""
    from megatron_clsa.hf import CLSAConfig, CLSAForCausalLM

    model = CLSAForCausalLM(CLSAConfig(**hf_config(arch, torch.float32, {})))
    weights = {name: source.read(name).float() for entry in entries(arch) for name in entry.hf}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()
