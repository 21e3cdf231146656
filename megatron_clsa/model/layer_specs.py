"""The two kinds of layer and the memory as megatron-core specs: local (plain torch) and Transformer Engine.

Owns which module stands where. Parameter names in checkpoints are the same for both: the local spec's
separate norms are saved under the names that Transformer Engine's fused norm-and-linear uses.
"""

from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_clsa.model.cross_attention import CLSACrossAttention, CrossAttentionSubmodules
from megatron_clsa.model.norm import RMSNorm
from megatron_clsa.model.shared_memory import MemorySubmodules
from megatron_clsa.model.window_attention import WindowAttention


@dataclass(frozen=True)
class Backend:
    """The building blocks of one implementation.

    `column_parallel_with_norm` is None where the norm is a module of its own.
    """

    norm: type
    column_parallel: type
    column_parallel_with_norm: type | None
    row_parallel: type
    window_attention: type


@dataclass(frozen=True)
class CLSASpec:
    """Everything that `CLSAModel` builds besides embedding and output layer."""

    self_layer: ModuleSpec
    cross_layer: ModuleSpec
    memory: MemorySubmodules
    final_norm: type


def local_spec(config) -> CLSASpec:
    """Plain torch: runs on CPU, and on GPUs without Transformer Engine."""
    return _spec(Backend(RMSNorm, ColumnParallelLinear, None, RowParallelLinear, WindowAttention), config)


def transformer_engine_spec(config) -> CLSASpec:
    """Transformer Engine's linears and norms, the norm fused into the linear that follows it."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return _spec(
        Backend(
            TENorm,
            TEColumnParallelLinear,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
            WindowAttention,
        ),
        config,
    )


def _spec(backend: Backend, config) -> CLSASpec:
    return CLSASpec(
        self_layer=_self_layer(backend, config),
        cross_layer=_cross_layer(backend),
        memory=MemorySubmodules(backend.norm, backend.column_parallel, backend.norm),
        final_norm=backend.norm,
    )


def _self_layer(backend: Backend, config) -> ModuleSpec:
    qk_norm = backend.norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_with_norm or backend.column_parallel,
            core_attention=backend.window_attention,
            linear_proj=backend.row_parallel,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return _layer(
        backend,
        {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        input_layernorm=_separate_norm(backend),
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
    )


def _cross_layer(backend: Backend) -> ModuleSpec:
    attention = ModuleSpec(
        module=CLSACrossAttention,
        submodules=CrossAttentionSubmodules(
            linear_q=backend.column_parallel_with_norm or backend.column_parallel,
            q_layernorm=backend.norm,
            linear_proj=backend.row_parallel,
        ),
    )
    return _layer(
        backend,
        {"pre_cross_attn_layernorm.": "cross_attention.linear_q.layer_norm_"},
        pre_cross_attn_layernorm=_separate_norm(backend),
        cross_attention=attention,
        cross_attn_bda=get_bias_dropout_add,
    )


def _layer(backend: Backend, norm_names: dict[str, str], **attention) -> ModuleSpec:
    mlp = MLPSubmodules(
        linear_fc1=backend.column_parallel_with_norm or backend.column_parallel,
        linear_fc2=backend.row_parallel,
    )
    separate = {**norm_names, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=_separate_norm(backend),
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if backend.column_parallel_with_norm else separate,
            **attention,
        ),
    )


def _separate_norm(backend: Backend) -> type:
    return IdentityOp if backend.column_parallel_with_norm else backend.norm
