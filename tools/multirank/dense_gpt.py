"""Megatron-Core's own dense GPT of the same width, to hold CLSA's speed against.

Owns how it is built. With Transformer Engine it is Megatron's layer and Megatron's context parallelism (a
ring of K, V blocks). Megatron's local layer has no context parallelism and no fused attention, and neither
has Transformer Engine where it finds no fused backend (a cuDNN that it cannot load, say): there the layer
gets this repository's dense attention and an all-gather of K, V, and the peer's name says so.
"""

from dataclasses import fields
from functools import lru_cache, partial

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models import unimodal_build_distributed_models

from megatron_clsa.kernels import dispatch
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.model.layer_specs import local_spec
from megatron_clsa.model.norm import RMSNorm
from megatron_clsa.parallel.context import gather_sequence, local_positions
from multirank.layouts import Case, Layout, ddp_config, hold_sync, make_config


def peer_name(impl: str) -> str:
    """What the row of a comparison calls it."""
    layers = {"transformer_engine": "Transformer Engine", "local": "local layers"}[impl]
    own = "" if impl == "transformer_engine" and has_fused_attention() else " with our dense attention"
    return f"megatron-core GPT, dense, {layers}{own}"


@lru_cache(maxsize=1)
def has_fused_attention() -> bool:
    """Whether Transformer Engine's attention would run fused here; it takes a slow N x N one silently."""
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    query, key = (torch.ones(128, 1, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    with torch.no_grad():
        DotProductAttention(4, 128, num_gqa_groups=2, attn_mask_type="causal")(query, key, key)
    return _attention_backends["use_fused_attention"] or _attention_backends["use_flash_attention"]


class GatheredAttention(MegatronModule):
    """Causal attention over the keys of all context-parallel ranks, gathered in every layer."""

    def __init__(self, config, pg_collection=None, **unused):
        super().__init__(config)
        self.cp_group = pg_collection.cp

    def forward(self, query, key, value, attention_mask=None, **unused):
        """`[s/cp, b, h/tp, d]` and `[s/cp, b, g/tp, d]` -> `[s/cp, b, h/tp * d]`."""
        key, value = gather_sequence(torch.cat([key, value], dim=2), self.cp_group).chunk(2, dim=2)
        rows = _whole_sequence(query.size(0), query.size(1), self.cp_group, query.device)
        scale = self.config.kv_channels**-0.5
        tensors = (x.transpose(0, 1) for x in (query, key, value))
        return dispatch.dense_attention(*tensors, rows, scale)[0].transpose(0, 1).flatten(2)


@lru_cache(maxsize=2)
def _whole_sequence(seq_local: int, batch: int, cp_group, device) -> RowRange:
    end = local_positions(seq_local, cp_group, device).to(torch.int32).expand(batch, -1)
    return RowRange(torch.zeros_like(end), end)


def _config(layout: Layout, case: Case) -> TransformerConfig:
    """The same widths and layout without what CLSA adds."""
    ours = make_config(layout, case)
    same = {field.name: getattr(ours, field.name) for field in fields(TransformerConfig) if field.init}
    own = dict(window_size=None, variable_seq_lengths=False, moe_token_dispatcher_type="allgather")
    return TransformerConfig(**same | own)


def _layers(config: TransformerConfig, clsa_config, impl: str, vp_stage):
    if impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if not has_fused_attention():
            layer.submodules.self_attention.submodules.core_attention = GatheredAttention
        return layer
    layer = local_spec(clsa_config).self_layer
    layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def build_gpt(layout: Layout, case: Case) -> list:
    """Model chunks of this rank in DDP with the distributed optimizer, whose exchange overlaps."""
    config, work = _config(layout, case), case.work

    def one_stage(pg_collection, pre_process=None, post_process=None, vp_stage=None):
        pp = pg_collection.pp
        return GPTModel(
            config,
            _layers(config, make_config(layout, case), work.impl, vp_stage),
            work.vocab,
            work.seq,
            pre_process=pp.rank() == 0 if pre_process is None else pre_process,
            post_process=pp.rank() == pp.size() - 1 if post_process is None else post_process,
            position_embedding_type="rope",
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    models = unimodal_build_distributed_models(
        one_stage,
        config,
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config(True, True),
        mixed_precision_wrapper=Float16Module if config.bf16 else None,
    )
    config.finalize_model_grads_func = finalize_model_grads
    hold_sync(config, models)
    return models


def gpt_step(iterator, model):
    """Megatron's `forward_step_func` of this model."""
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask, output):
    loss, count = (output.float() * mask).sum(), mask.sum().int()
    return loss, count, {"lm": loss.detach(), "count": count}
