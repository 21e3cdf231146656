"""What a CLSA model is: the fields that CLSA adds to megatron-core's TransformerConfig, and their checks.

Owns no module and no flag parsing: `training/arguments.py` makes one flag a field, under the same name.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_clsa.errors import UserError

CrossAttentionKind = Literal["dense", "sparse"]
SparseAttentionKernel = Literal["auto", "union", "masked"]
KDLossKind = Literal["off", "full", "selected"]
Trainable = Literal["all", "backbone", "indexer"]


@dataclass
class CLSAConfig(TransformerConfig):
    """A decoder-decoder Transformer with one shared memory and one index (symbols: the paper's)."""

    num_self_decoder_layers: int | None = None
    """Layers of the windowed half; the rest read the shared memory (paper: L/2). Default: num_layers / 2."""

    sliding_window: int = 512
    """Tokens that a self-decoder layer sees, the query's own included (paper: W1)."""

    rotary_base: int = 10000
    """Base of the rotary embedding, applied in the self-decoder only (RNoPE)."""

    index_topk: int = 2048
    """Positions of the memory that a token attends to (paper: k)."""

    index_head_dim: int = 128
    """Width of the indexer's single head."""

    index_qk_norm: bool = False
    """RMSNorm on the indexer's query and key."""

    cross_qk_norm: bool = False
    """RMSNorm per head on the memory's keys and on every cross-decoder query."""

    indexer_detach_input: bool = False
    """Stop the distillation gradient at the indexer's input (DeepSeek-V3.2's variant)."""

    cross_attention: CrossAttentionKind = "sparse"
    """Whether the cross-decoder reads the whole memory or the selected positions."""

    sparse_attention_kernel: SparseAttentionKernel = "auto"
    """Sparse attention on GPUs: union tiles gather keys, masked ones skip blocks; auto takes the faster."""

    kd_loss: KDLossKind = "off"
    """Support of the distillation loss: every visible position, or the selected ones renormalised."""

    kd_loss_coeff: float = 1.0
    """Weight of the distillation loss beside the language-model loss (paper: 0.1 in sparse adaptation)."""

    trainable: Trainable = "all"
    """Which parameters train: everything, all but the indexer, or the indexer alone."""

    def __post_init__(self):
        if self.num_self_decoder_layers is None:
            self._require_even_layers()
            self.num_self_decoder_layers = self.num_layers // 2
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        check_clsa_fields(self)
        # Megatron counts the keys before the query; the field counts the query as well.
        self.window_size = (self.sliding_window - 1, 0)
        # Packets differ in width from link to link, so stages exchange shapes.
        self.variable_seq_lengths = self.pipeline_model_parallel_size > 1
        self.moe_token_dispatcher_type = "alltoall"  # no experts here, but shape exchange insists on it
        # One division by the batch's token count makes loss and gradients independent of the layout.
        self.calculate_per_token_loss = True
        super().__post_init__()

    def _require_even_layers(self):
        if self.num_layers % 2:
            raise UserError(
                f"--num-layers {self.num_layers} is odd: the two halves are equal by default; "
                "give an even number or set --num-self-decoder-layers"
            )

    @property
    def num_cross_decoder_layers(self) -> int:
        """Layers that read the shared memory (paper: L')."""
        return self.num_layers - self.num_self_decoder_layers

    @property
    def needs_index_projection(self) -> bool:
        """Whether Q_idx and K_idx take part in the training step."""
        return self.cross_attention == "sparse" or self.kd_loss != "off"


def check_clsa_fields(config) -> None:
    """Refuse values that no layout can run. `config`: anything with CLSAConfig's fields.

    Raises:
        UserError: naming the flag, the value and the remedy.
    """
    _check_sizes(config)
    _check_divisibility(config)
    _check_choices(config)


def _check_sizes(config) -> None:
    half, total = config.num_self_decoder_layers, config.num_layers
    if not 0 < half < total:
        raise UserError(
            f"--num-self-decoder-layers {half} leaves one half empty: "
            f"give 1 to {total - 1} (--num-layers {total})"
        )
    for flag in ("sliding_window", "index_topk", "index_head_dim"):
        if getattr(config, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(config, flag)}: give a positive number")
    if not config.rotary_base > 1:
        raise UserError(f"--rotary-base {config.rotary_base}: give a number above 1, such as 10000")
    if config.kv_channels is not None and config.kv_channels % 2:
        raise UserError(
            f"--kv-channels {config.kv_channels} is odd: rotary embeddings turn pairs, make it even"
        )
    if not (math.isfinite(config.kd_loss_coeff) and config.kd_loss_coeff >= 0):
        raise UserError(f"--kd-loss-coeff {config.kd_loss_coeff}: give zero or a positive number")


def _check_divisibility(config) -> None:
    heads, groups, tp = (
        config.num_attention_heads,
        config.num_query_groups,
        config.tensor_model_parallel_size,
    )
    if heads % groups:
        raise UserError(f"--num-query-groups {groups} does not divide --num-attention-heads {heads}")
    if heads % tp or groups % tp:
        raise UserError(
            f"--tensor-model-parallel-size {tp} must divide --num-attention-heads {heads} and "
            f"--num-query-groups {groups}: lower it"
        )
    if tp > 1 and not config.sequence_parallel:
        raise UserError(f"--tensor-model-parallel-size {tp} needs --sequence-parallel: add the flag")


def _check_choices(config) -> None:
    for name, choices in (
        ("cross_attention", ("dense", "sparse")),
        ("sparse_attention_kernel", ("auto", "union", "masked")),
        ("kd_loss", ("off", "full", "selected")),
        ("trainable", ("all", "backbone", "indexer")),
    ):
        if getattr(config, name) not in choices:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: choose from {choices}")
    if config.kd_loss == "selected" and config.cross_attention == "dense":
        raise UserError("--kd-loss selected needs --cross-attention sparse: dense attention has no selection")
    if config.trainable == "indexer" and config.kd_loss == "off":
        raise UserError(
            "--trainable indexer needs --kd-loss full or selected: no other loss reaches the indexer"
        )
    if config.num_moe_experts:
        raise UserError("--num-experts: CLSA layers here have dense MLPs; drop the flag")
