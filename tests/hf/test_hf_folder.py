"""A saved folder holds its own code and loads through the Auto classes; weight names follow the contract.

Owns no conversion: exported folders are tested in tests/convert.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_tiny import LONG, tiny_model, tokens
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
LAYER = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def contract_names(config) -> set[str]:
    names = {"embed_tokens", "norm", "memory.norm", "memory.k_proj", "memory.v_proj"}
    names |= {"memory.indexer.q_proj", "memory.indexer.k_proj"}
    names |= {f"memory.indexer.{n}_norm" for n in "qk" if config.index_qk_norm}
    names |= {"memory.k_norm"} if config.cross_qk_norm else set()
    for i in range(config.num_hidden_layers):
        names |= {f"layers.{i}.{part}" for part in LAYER}
        if i < config.num_self_decoder_layers:
            names |= {f"layers.{i}.self_attn.{n}_proj" for n in "qkvo"}
            names |= {f"layers.{i}.self_attn.{n}_norm" for n in "qk" if config.use_qk_norm}
        else:
            names |= {f"layers.{i}.cross_attn.{n}_proj" for n in "qo"}
            names |= {f"layers.{i}.cross_attn.q_norm"} if config.cross_qk_norm else set()
    names = {f"model.{name}.weight" for name in names}
    return names if config.tie_word_embeddings else names | {"lm_head.weight"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"cross_qk_norm": True, "index_qk_norm": True, "tie_word_embeddings": True}, {"use_qk_norm": False}],
)
def test_weight_names_follow_the_contract(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == contract_names(model.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    tiny_model().save_pretrained(path)
    return path


def test_the_folder_names_all_auto_classes(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clsa" and config["architectures"] == ["CLSAForCausalLM"]
    assert set(config["auto_map"]) == AUTO_CLASSES


@torch.no_grad()
def test_auto_classes_load_the_folder_with_its_own_code(folder, tmp_path):
    ids, expected = tokens(LONG), tiny_model()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers_modules")
    assert torch.equal(model(ids).logits, expected(ids).logits)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(base(ids).last_hidden_state, expected.model(ids).last_hidden_state)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(ids).logits, expected(ids).logits)
    base.save_pretrained(tmp_path / "base")
    for saved in (tmp_path / "again", tmp_path / "base"):  # each by the other class
        assert set(json.loads((saved / "config.json").read_text())["auto_map"]) == AUTO_CLASSES
        loaded = AutoModel.from_pretrained(saved, trust_remote_code=True)
        assert torch.equal(loaded(ids).last_hidden_state, expected.model(ids).last_hidden_state)


def test_the_folder_loads_where_this_package_is_not_installed(folder, tmp_path):
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "assert 'megatron_clsa' not in sys.modules;"
        "print(m(torch.arange(1, 30)[None]).logits.sum().item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_hidden_states_and_attentions_are_recorded():
    model = tiny_model()
    model.set_attn_implementation("eager")
    out = model(tokens(LONG), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 6 and len(out.attentions) == 5
    assert out.attentions[-1].shape == (1, 4, LONG, LONG)
