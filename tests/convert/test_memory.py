"""An export needs memory for its largest tensor, whatever a shard's size and the number of tensors."""

import subprocess
import sys

import pytest
import torch
from checkpoints import ENVIRONMENT

from megatron_clsa.convert.architecture import Architecture
from megatron_clsa.convert.dist_writer import STEP_FOLDER, TorchDistWriter
from megatron_clsa.convert.names import entries

MIB = 2**20
MEASURE = """
import re, sys
from pathlib import Path
import torch
from megatron_clsa.convert.architecture import read_architecture
from megatron_clsa.convert.checkpoint import TorchDistReader
from megatron_clsa.convert.export import ExportOptions, export

def kilobytes(name):
    return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

folder, out = map(Path, sys.argv[1:3])
reader, arch = TorchDistReader(folder), read_architecture(folder)
reader.read("decoder.final_layernorm.weight")  # what loading imports
Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
before = kilobytes("VmRSS")
export(reader, arch, out, ExportOptions(getattr(torch, sys.argv[3]), int(sys.argv[4])))
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """400 MB in fp32, of which no tensor has more than 64."""
    arch = Architecture(
        vocab_size=16384, hidden_size=1024, ffn_hidden_size=4096, num_layers=6, num_self_decoder_layers=3,
        num_attention_heads=8, num_query_groups=4, kv_channels=128, sliding_window=8, index_topk=8,
        index_head_dim=128, index_qk_norm=False, qk_layernorm=True, cross_qk_norm=False,
        layernorm_epsilon=1e-5, rotary_base=1e4, tie_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    writer = TorchDistWriter(folder)
    for entry in entries(arch):
        writer.add(entry.megatron, torch.full(entry.shape, 0.5))
    writer.finish()
    arch.write(folder)
    assert sum(file.stat().st_size for file in (folder / STEP_FOLDER).iterdir()) > 400 * MIB
    return folder / STEP_FOLDER


@pytest.mark.parametrize(("dtype", "shard"), [("float32", 80), ("bfloat16", 1000)])
def test_an_export_holds_no_more_than_its_largest_tensor_twice(checkpoint, tmp_path, dtype, shard):
    words = [sys.executable, "-c", MEASURE, checkpoint, tmp_path, dtype, shard * MIB]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) <= (2 * 64 + 16) * MIB  # a block that is being written comes on top
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard == 1000)
