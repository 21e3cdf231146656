"""The fields of config.json, their defaults, and what follows from them (layer types, shared cache layers).

Owns no weights and no computation. Shipped with every exported model: imports transformers only.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

WINDOW = "sliding_attention"
MEMORY = (
    "deepseek_sparse_attention"  # transformers' name for "one K/V and one indexer key a token" in a cache
)

# transformers writes only the class that is saved; without the others AutoModel could not load the folder.
AUTO_MAP = {
    "AutoConfig": "configuration_clsa.CLSAConfig",
    "AutoModel": "modeling_clsa.CLSAModel",
    "AutoModelForCausalLM": "modeling_clsa.CLSAForCausalLM",
}


@strict
class CLSAConfig(PreTrainedConfig):
    r"""
    Cross-layer sparse attention: a windowed self-decoder, one shared memory, a cross-decoder that reads it.

    Args:
        vocab_size (`int`): rows of the embedding.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the SwiGLU MLP.
        num_hidden_layers (`int`): layers of both halves together.
        num_self_decoder_layers (`int`, *optional*): layers of the windowed half; half of all by default.
        num_attention_heads (`int`): query heads.
        num_key_value_heads (`int`): key/value heads, in the window layers and in the shared memory.
        head_dim (`int`, *optional*): size of a head; `hidden_size / num_attention_heads` by default.
        sliding_window (`int`): tokens that a window layer sees, the token itself included.
        attention_bias (`bool`): biases of the query, key and value projections, everywhere (as in Qwen2).
        use_qk_norm (`bool`): RMSNorm of each query and key head in the window layers, before RoPE.
        cross_qk_norm (`bool`): the same for the cross-decoder's queries and the memory's keys.
        index_topk (`int`): positions that the index selects for each token (the paper's k).
        index_head_dim (`int`): size of the one indexer head.
        index_qk_norm (`bool`): RMSNorm of the indexer's query and key.
        cross_attention (`str`): `"sparse"` reads the selected positions, `"dense"` the whole memory.
        indexer_loss_coef (`float`): weight of the index distillation loss when labels are given; 0 leaves
            the indexer without gradient, because top-k has none.
    """

    model_type = "clsa"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 2560
    intermediate_size: int = 7680
    num_hidden_layers: int = 32
    num_self_decoder_layers: int | None = None
    num_attention_heads: int = 20
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    sliding_window: int = 512
    attention_bias: bool = False
    use_qk_norm: bool = True
    cross_qk_norm: bool = False
    index_head_dim: int = 128
    index_topk: int = 2048
    index_qk_norm: bool = False
    cross_attention: str = "sparse"
    indexer_loss_coef: float = 0.0
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    layer_types: list[str] | None = None
    num_kv_shared_layers: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_self_decoder_layers is None:
            self.num_self_decoder_layers = self.num_hidden_layers // 2
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        num_cross = self.num_hidden_layers - self.num_self_decoder_layers
        self._check(num_cross)
        # What transformers' own caches need to know: window layers, then one layer that holds the memory;
        # the other cross-decoder layers keep nothing.
        self.layer_types = [WINDOW] * self.num_self_decoder_layers + [MEMORY] * num_cross
        self.num_kv_shared_layers = num_cross - 1
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        if self.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_parameters: rope_type {self.rope_parameters['rope_type']!r} is not supported"
            )

    def _check(self, num_cross: int) -> None:
        if self.num_self_decoder_layers < 1 or num_cross < 1:
            raise ValueError(
                f"num_self_decoder_layers={self.num_self_decoder_layers} leaves no layer for one of the "
                f"halves of num_hidden_layers={self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.cross_attention not in ("sparse", "dense"):
            raise ValueError(f"cross_attention={self.cross_attention!r} is neither 'sparse' nor 'dense'")
        if self.sliding_window < 1 or self.index_topk < 1:
            raise ValueError("sliding_window and index_topk must be at least 1")


__all__ = ["CLSAConfig"]
