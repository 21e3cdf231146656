"""CLSA for transformers: windowed self-decoder, one shared memory with one index, cross-decoder.

Owns the models and how they use caches. Not the modules (layers_clsa.py), not the masks (attention_clsa.py).
Axis letters: b batch, s rows, t memory positions.

The cross-decoder runs only for the rows whose logits are kept: `generate` asks for one, so the prefill of
a long prompt runs half of the layers, exactly (no row of the cross-decoder reads another one).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_clsa import Visible, document_starts, gather_selected, select, visible_keys
from .configuration_clsa import MEMORY, WINDOW, CLSAConfig
from .kernels_clsa import NAME, Selected, automatic, check_installed, select_by_kernel
from .layers_clsa import (
    CLSACrossAttention,
    CLSACrossDecoderLayer,
    CLSADecoderLayer,
    CLSAMemory,
    CLSARMSNorm,
    CLSASelfAttention,
    CLSASelfDecoderLayer,
    rotary_tables,
)


class CLSAPreTrainedModel(PreTrainedModel):
    config: CLSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLSASelfDecoderLayer", "CLSACrossDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CLSADecoderLayer,
        "attentions": [CLSASelfAttention, CLSACrossAttention],
    }

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False):
        if requested_attention is None and automatic():
            requested_attention = NAME
        elif requested_attention == NAME:
            check_installed()
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


@dataclass
class CLSAModelOutput(BaseModelOutputWithPast):
    """Adds `indexer_loss`: the index's cross-entropy against the attention it replaces, a mean over rows."""

    indexer_loss: torch.FloatTensor | None = None


@dataclass
class CLSACausalLMOutput(CausalLMOutputWithPast):
    """`loss` includes `indexer_loss_coef * indexer_loss`."""

    indexer_loss: torch.FloatTensor | None = None


class CLSAModel(CLSAPreTrainedModel):
    def __init__(self, config: CLSAConfig):
        super().__init__(config)
        split = config.num_self_decoder_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            (CLSASelfDecoderLayer if i < split else CLSACrossDecoderLayer)(config, i)
            for i in range(config.num_hidden_layers)
        )
        self.memory = CLSAMemory(config)
        self.norm = CLSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_indexer_loss: bool = False,
        **kwargs,
    ) -> CLSAModelOutput:
        """`last_hidden_state` has the last `logits_to_keep` rows; all of them when it is 0."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not hidden.shape[1] or logits_to_keep < 0:
            raise ValueError(f"{hidden.shape[1]} tokens, logits_to_keep {logits_to_keep}: nothing to compute")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        document = None
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
        elif attention_mask is None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            document = document_starts(position_ids)
        window = self._visible(WINDOW, hidden, attention_mask, past_key_values, document)
        memory = self._visible(MEMORY, hidden, attention_mask, past_key_values, document)
        cos, sin = rotary_tables(self.config, position_ids, hidden.dtype)
        for layer in self.layers[: self.config.num_self_decoder_layers]:
            hidden = layer(hidden, cos, sin, seen=window, past_key_values=past_key_values, **kwargs)
        hidden, loss = self._cross_decoder(
            hidden, memory, past_key_values, logits_to_keep, output_indexer_loss, kwargs
        )
        return CLSAModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values if use_cache else None,
            indexer_loss=loss,
        )

    def _visible(self, layer_type: str, hidden: Tensor, attention_mask, cache, document) -> Visible:
        windowed = layer_type == WINDOW
        return visible_keys(
            layer_type,
            0 if windowed else self.config.num_self_decoder_layers,
            hidden.shape[1],
            attention_mask,
            cache,
            document,
            self.config.sliding_window if windowed else None,
            hidden.device,
        )

    def _cross_decoder(self, hidden, seen: Visible, cache, keep: int, want_loss: bool, kwargs: dict):
        """The memory from all rows of `hidden`, then the cross-decoder for the last `keep` of them."""
        split = self.config.num_self_decoder_layers
        source = self.memory.norm(hidden)
        key, value, index_key = self.memory(source)
        if cache is not None:
            key, value = cache.update(key, value, split)
            index_key = cache.update_indexer(index_key, split)
        first_row = max(0, hidden.shape[1] - keep) if keep else 0
        hidden, source = hidden[:, first_row:], source[:, first_row:]
        index_query = self.memory.indexer.query(source)
        mask = None
        if all(layer.input_layernorm.weight.device == hidden.device for layer in self.layers[split:]):
            mask = select_by_kernel(self.config, index_query, index_key, value, seen, first_row)
        if mask is None:  # masks are also what accelerate can carry from device to device
            mask = self._selected(index_query, index_key, seen, first_row)
        index = self.memory.indexer.taught(index_query, index_key, mask) if want_loss else None
        k = self.config.index_topk
        if (
            not want_loss
            and self.config.cross_attention == "sparse"
            and hidden.shape[1] == 1
            and k < key.shape[2]
        ):
            key, value, mask = gather_selected(key, value, mask, k)
        losses = []
        for layer in self.layers[split:]:
            hidden, loss = layer(hidden, key, value, index, mask, **kwargs)
            losses.append(loss)
        return hidden, self._mean_loss(losses, mask, seen) if want_loss else None

    def _selected(self, index_query: Tensor, index_key: Tensor, seen: Visible, first_row: int) -> Tensor:
        """`[b, 1, rows, t]` bool: what the cross-decoder's rows may read."""
        if self.config.cross_attention == "dense":
            rows = slice(first_row, first_row + index_query.shape[1])
            return seen.block(rows).expand(index_query.shape[0], -1, -1, -1)
        return select(index_query, index_key, seen, first_row, self.config.index_topk)

    def _mean_loss(self, losses: list[Tensor], mask: Tensor | Selected, seen: Visible) -> Tensor:
        """Mean over layers, heads and the rows that see any key and are no padding."""
        total = torch.stack(losses).sum(0) / (len(losses) * self.config.num_attention_heads)
        alive = mask.index[..., 0] >= 0 if isinstance(mask, Selected) else mask[:, 0].any(-1)
        if seen.padding is not None and seen.num_rows == seen.num_keys:
            alive = alive & seen.padding[:, -alive.shape[1] :]
        return (total * alive).sum() / alive.sum().clamp(min=1)


class CLSAForCausalLM(CLSAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CLSAConfig):
        super().__init__(config)
        self.model = CLSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CLSACausalLMOutput:
        """An int `logits_to_keep` also skips the cross-decoder for the other rows; labels need every row."""
        if labels is not None:
            logits_to_keep = 0
        coefficient = self.config.indexer_loss_coef if labels is not None else 0.0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            output_indexer_loss=coefficient > 0,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        return CLSACausalLMOutput(
            loss=self._loss(logits, labels, coefficient, outputs.indexer_loss, kwargs),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            indexer_loss=outputs.indexer_loss,
        )

    def _loss(self, logits, labels, coefficient: float, indexer_loss: Tensor | None, kwargs: dict):
        if labels is None:
            return None
        total = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        if indexer_loss is None:
            return total
        items = kwargs.get("num_items_in_batch")
        if items is not None:  # a part of a batch: the losses of all parts are added up, here as there
            indexer_loss = indexer_loss * (labels[:, 1:] != -100).sum() / items
        return total + coefficient * indexer_loss


__all__ = ["CLSAForCausalLM", "CLSAModel", "CLSAPreTrainedModel"]
