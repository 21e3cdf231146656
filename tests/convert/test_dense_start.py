"""The start made from a dense Transformer: exact where it can be, and a choice that helps where it cannot.

Whole runs from such a start are in test_init_from.py.
"""

import json
import re

import pytest
import torch
from checkpoints import error_line
from dense_models import byte_tokenizer, dense_model
from safetensors.torch import load_file, save_file
from tools_here import from_hf

from megatron_clsa.convert.dense import DenseChoices
from megatron_clsa.convert.dense_start import StartChoices, _dense_reading_model, make_start
from megatron_clsa.convert.shared_heads import fit_shared_heads, mean_rotation, rotate_heads
from megatron_clsa.convert.weights import WeightFolder
from megatron_clsa.errors import UserError

FAMILIES = {  # family -> key/value heads, tied
    "llama": (2, False),
    "mistral": (1, False),
    "qwen2": (4, True),
    "qwen3": (2, True),
}


def _choices(family: str, memory: str, position: str = "drop", **dense) -> StartChoices:
    fields = {"sliding_window": 256, "index_topk": 16, "index_head_dim": 8} | dense
    return StartChoices(
        family,
        DenseChoices(**fields),
        memory,
        position,
        64,
        1,
        text=None,
        tokens=2048,
        length=128,
        device="cpu",
    )


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory):
    groups, tied = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = dense_model(request.param, groups, tied)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return request.param, model, folder


def _without_rope_in_the_last_layer(model):
    def still(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    return model.model.layers[-1].register_forward_pre_hook(still, with_kwargs=True)


@pytest.mark.parametrize("memory", ["aligned", "mean", "first"])
def test_with_one_cross_layer_only_rope_is_lost(dense, memory):
    """Its memory can be that layer's own K and V, whatever way they are arrived at."""
    family, model, folder = dense
    source, arch, _ = make_start(
        WeightFolder(folder), folder, _choices(family, memory, num_self_decoder_layers=3)
    )
    tokens = torch.randint(1, arch.vocab_size, (1, 96), generator=torch.Generator().manual_seed(3))
    hook = _without_rope_in_the_last_layer(model)
    with torch.no_grad():
        expected = model(tokens).logits[..., : arch.vocab_size]
        actual = _dense_reading_model(source, arch)(tokens).logits
    hook.remove()
    # ridge regression from 2,000 tokens is not exact, and loses what it damps
    allowed = 0.05 * expected.std() if memory == "aligned" else 1e-4
    assert (actual - expected).abs().max() < allowed


def test_layers_that_share_their_heads_are_recovered():
    """Targets of 3 layers that are mixtures of one head a group: nothing is lost."""
    torch.manual_seed(0)
    tokens, hidden, layers, groups, width = 400, 24, 3, 2, 4
    x = torch.cat([torch.randn(tokens, hidden), torch.ones(tokens, 1)], dim=1).double()
    shared = torch.randn(groups, hidden + 1, width).double()
    mixing = torch.randn(layers, groups, width, width).double()
    target = torch.einsum("nh,ghi,lgij->nlgj", x, shared, mixing)
    fit = fit_shared_heads(x.T @ x, torch.einsum("nh,nlgj->hlgj", x, target), bias=True, ridge=1e-12)
    back = torch.einsum("nh,ghi,lgij->nlgj", x, fit.weight, fit.mixing)
    assert torch.allclose(back, target, atol=1e-6) and fit.kept == pytest.approx(1)


def test_layers_that_differ_share_the_best_directions():
    """Fewer directions than the layers have: what is kept is what `kept` says."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(400, 24), torch.ones(400, 1)], dim=1).double()
    target = (x @ torch.randn(25, 3 * 4).double()).view(400, 3, 1, 4)
    fit = fit_shared_heads(x.T @ x, torch.einsum("nh,nlgj->hlgj", x, target), bias=True, ridge=1e-12)
    back = torch.einsum("nh,ghi,lgij->nlgj", x, fit.weight, fit.mixing)
    lost = (back - target).pow(2).sum() / target.pow(2).sum()
    assert lost.item() == pytest.approx(1 - fit.kept, abs=1e-6) and 0 < fit.kept < 1


def test_the_mean_rotation_is_the_mean_of_rotated_scores():
    from megatron_clsa.hf.layers_clsa import rotate

    torch.manual_seed(0)
    width, span, base = 8, 37, 10000.0
    query, key = torch.randn(2, width).double()
    angle = torch.arange(span).double()[:, None] * base ** -(torch.arange(0, width, 2).double() / width)
    angle = torch.cat([angle, angle], dim=1)
    at_distance = rotate(query.expand(span, -1), angle.cos(), angle.sin()) @ key
    turned = rotate_heads(query[None], mean_rotation(width, base, span))[0]
    assert torch.allclose(turned @ key, at_distance.mean())


def test_every_choice_gives_a_complete_model(dense):
    family, _, folder = dense
    for memory in ("aligned", "mean", "first", "random"):
        source, _, report = make_start(WeightFolder(folder), folder, _choices(family, memory, "average"))
        assert all(torch.isfinite(source.read(name)).all() for name in source.names())
        assert report["loss"].keys() == (
            {"dense", "dense with windows", "start"} if memory == "aligned" else set()
        )


def test_rows_that_the_tokenizer_does_not_reach_are_cut(dense):
    family, _, folder = dense
    _, arch, report = make_start(WeightFolder(folder), folder, _choices(family, "mean"))
    assert arch.vocab_size < 260 and any("260 rows" in note for note in report["notes"])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "gemma3"}, "model_type gemma3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "--ignore-rope-scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "rope_theta is 10000.5"),
        ({"num_hidden_layers": 1}, "--num-self-decoder-layers"),
    ],
)
def test_what_clsa_has_no_place_for_is_refused(tmp_path, changes, named):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    line = error_line(from_hf("--init-from", "llama", "--memory-init=mean", path.parent, tmp_path / "out"))
    assert named in line and not (tmp_path / "out").exists()


def _lost(name: str):
    def damage(weights, config):
        del weights[name]

    return damage


def _base_model(weights, config):
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)


def _config(**changes):
    def damage(weights, config):
        config.update(changes)

    return damage


def _one_more(weights, config):
    weights["model.layers.3.self_attn.k_proj.bias"] = torch.zeros(16)


@pytest.mark.parametrize("memory", ["aligned", "mean"])
@pytest.mark.parametrize(
    "family, damage, named",
    [
        ("llama", _lost("model.layers.3.self_attn.k_proj.weight"), "layers.3.self_attn.k_proj.weight"),
        ("qwen2", _lost("model.layers.3.self_attn.v_proj.bias"), "layers.3.self_attn.v_proj.bias"),
        ("qwen3", _lost("model.layers.3.self_attn.k_norm.weight"), "layers.3.self_attn.k_norm.weight"),
        ("llama", _lost("lm_head.weight"), "lm_head.weight"),
        ("llama", _base_model, "AutoModelForCausalLM"),
        ("llama", _one_more, "layers.3.self_attn.k_proj.bias"),
        ("llama", _config(num_hidden_layers=6), "model.layers.4."),
        ("llama", _config(num_hidden_layers=3), "model.layers.3."),
        ("llama", _config(head_dim=16), "layers.0.self_attn.q_proj.weight"),
        ("mistral", _config(num_key_value_heads=4), "layers.0.self_attn.k_proj.weight"),
        ("llama", _config(hidden_size=64), "embed_tokens.weight"),
    ],
)
def test_weights_that_are_not_the_configs_are_named(tmp_path, memory, family, damage, named):
    folder = byte_tokenizer(tmp_path)
    dense_model(family).save_pretrained(folder)
    weights, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    damage(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(named)):
        make_start(WeightFolder(folder), folder, _choices(family, memory))


def test_a_size_that_qwen3s_config_leaves_out_is_transformers_default(tmp_path):
    dense_model("qwen3", head_dim=128).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, arch, _ = make_start(WeightFolder(tmp_path), None, _choices("qwen3", "mean"))
    assert arch.kv_channels == 128


def test_a_buffer_that_older_versions_saved_is_no_stranger(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    make_start(WeightFolder(tmp_path), None, _choices("llama", "mean"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    dense_model("llama", vocab_size=200).save_pretrained(tmp_path / "dense")
    words = (
        "--init-from",
        "llama",
        "--memory-init=mean",
        "--tokenizer",
        byte_tokenizer(tmp_path / "tokenizer"),
    )
    line = error_line(from_hf(*words, tmp_path / "dense", tmp_path / "out"))
    assert "257 tokens" in line and "200" in line and not (tmp_path / "out").exists()


def test_aligned_without_a_tokenizer_says_what_to_give(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "dense")
    line = error_line(from_hf("--init-from", "llama", tmp_path / "dense", tmp_path / "out"))
    assert "--tokenizer" in line and "--memory-init mean" in line
