"""CLSA as one pipeline stage sees it: embedding, self-decoder, memory, cross-decoder, loss.

Read `forward` to follow a token through the model. Owns the order of things and what enters and leaves a
stage; each step is one file beside this one, what crosses a link is in `parallel/`.
"""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_clsa.config import CLSAConfig
from megatron_clsa.distill.kd_loss import attach_kd_loss, touch
from megatron_clsa.distill.logit_kd import teacher_kl
from megatron_clsa.kernels.rows import RowRange
from megatron_clsa.model.decoder import CLSADecoder
from megatron_clsa.model.forward_mode import ForwardMode
from megatron_clsa.model.layer_specs import CLSASpec
from megatron_clsa.model.shared_memory import MemoryProjection, gather_memory
from megatron_clsa.parallel.context import local_positions
from megatron_clsa.parallel.pipeline import MemoryShard, StageState, pack, unpack


class CLSAModel(LanguageModule):
    """One pipeline stage of a CLSA language model.

    Args:
        config: the architecture and its parallel layout.
        spec: the layers, from `layer_specs`.
        vocab_size: padded to a multiple that tensor parallelism divides.
        max_sequence_length: longest sequence, in tokens.
        pre_process, post_process: whether this stage holds the embedding, the output layer.
        vp_stage: number of this model chunk under interleaved pipelining.
        tie_embeddings: share the embedding with the output layer.
    """

    def __init__(
        self,
        config: CLSAConfig,
        spec: CLSASpec,
        vocab_size: int,
        max_sequence_length: int,
        pg_collection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        tie_embeddings: bool = False,
    ):
        super().__init__(config, pg_collection=pg_collection)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = tie_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.input_tensor = None
        pp_rank = pg_collection.pp.rank()
        first = get_transformer_layer_offset(config, vp_stage, pp_rank)
        count = get_num_layers_to_build(config, vp_stage, pp_rank)
        half = config.num_self_decoder_layers
        self.starts_after_memory = first > half
        self.has_cross_layers = first + count > half
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                max_sequence_length,
                position_embedding_type="rope",
                tp_group=self.tp_group,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.cp_group,
        )
        self.decoder = CLSADecoder(config, spec, first, count, pg_collection, final_norm=post_process)
        if first <= half < first + count:
            self.memory = MemoryProjection(config, spec.memory, pg_collection)
        if post_process:
            self.output_layer = self._build_output_layer(vocab_size)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _build_output_layer(self, vocab_size: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            self.config.hidden_size,
            vocab_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=self.tp_group,
        )

    def set_input_tensor(self, input_tensor) -> None:
        """The packet of the previous stage (called by Megatron's schedules)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        mode: ForwardMode | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens, labels: `[b, s/cp]` int64, zigzag shards under context parallelism.
            position_ids: `[b, s/cp]` int64, restarting at 0 with every document: attention, window and index
                stop there.
            loss_mask: `[b, s/cp]`, rows that the distillation loss counts; None counts all.
            mode: what to compute; by default what the config says.
        Returns:
            The packet for the next stage; on the last, per-token losses `[b, s/cp]` or, without labels,
            logits `[b, s/cp, V/tp]`.
        """
        mode = mode or ForwardMode.from_config(self.config, self.training)
        state = self._enter(tokens, position_ids, loss_mask, mode)
        rows, loss_rows = self._visible_rows(state.documents)
        hidden, shard, kd_sum = state.hidden, state.shard, state.kd_sum

        if self.decoder.num_self_layers:
            rotary = self.rotary_pos_emb(rows.end.size(1) * self.cp_group.size())
            visible = torch.stack([rows.start, rows.end])
            hidden = self.decoder.run_self_layers(hidden, visible, rotary, mode)
        carrier = state.carrier
        if self.has_cross_layers:
            if shard is None:
                shard = self.memory(hidden, mode)
                carrier = hidden.new_zeros(*hidden.shape[:2], 1)
                kd_sum = torch.zeros((), device=hidden.device)
            memory, shard = gather_memory(shard, rows, loss_rows, mode, self.config, self.pg_collection)
            before = kd_sum
            hidden, kd_sum = self.decoder.run_cross_layers(hidden, memory, mode, kd_sum)
            if mode.kd_loss != "off" and torch.is_grad_enabled():
                carrier = attach_kd_loss(carrier, kd_sum - before.detach(), self.config)
        return self._leave(StageState(hidden, state.documents, shard, carrier, kd_sum), labels, mode)

    def _enter(self, tokens, position_ids, loss_mask, mode: ForwardMode) -> StageState:
        """Embed the tokens, or unpack what the previous stage sent."""
        if self.pre_process:
            positions = local_positions(tokens.size(1), self.cp_group, tokens.device)
            documents = (positions - position_ids).to(torch.int32)
            if loss_mask is not None:
                documents = torch.where(loss_mask.bool(), documents, -1 - documents)
            return StageState(self.embedding(tokens, position_ids), documents)
        state = unpack(self.input_tensor, self.config, mode, self.starts_after_memory, self.tp_group)
        return self._cut_frozen_backbone(state) if self.config.trainable == "indexer" else state

    def _cut_frozen_backbone(self, state: StageState) -> StageState:
        """Only Q_idx and K_idx train: nothing else that arrived may start a graph."""
        shard = state.shard
        if shard is not None:
            shard = MemoryShard(shard.kv.detach(), shard.idx, shard.index)
        return StageState(state.hidden.detach(), state.documents, shard, state.carrier, state.kd_sum)

    def _visible_rows(self, documents: Tensor) -> tuple[RowRange, Tensor]:
        """`StageState.documents` as each row's first and last visible position, and the counted rows.

        All are `[b, s/cp]`; positions count over the whole sequence.
        """
        counted = documents >= 0
        end = local_positions(documents.size(1), self.cp_group, documents.device).to(torch.int32)
        start = torch.where(counted, documents, -1 - documents)
        return RowRange(start, end.expand_as(start)), counted

    def _leave(self, state: StageState, labels: Tensor | None, mode: ForwardMode) -> Tensor:
        if not self.post_process:
            packet = pack(state, self.tp_group)
            if self._input_has_no_gradient():
                # A stage that returns no input gradient leaves the previous one waiting for ever.
                packet = touch(packet, self.input_tensor)
            return make_viewless_tensor(packet, requires_grad=packet.requires_grad, keep_graph=True)
        return self._output(state, labels, mode)

    def _input_has_no_gradient(self) -> bool:
        packet = self.input_tensor
        frozen = self.config.trainable == "indexer" and not self.starts_after_memory
        return frozen and packet is not None and packet.requires_grad

    def _output(self, state: StageState, labels: Tensor | None, mode: ForwardMode) -> Tensor:
        """Per-token losses, or logits without labels."""
        hidden = self.decoder.final_layernorm(state.hidden)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=tied)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        if mode.teacher is not None:
            mode.report.teacher_kl = teacher_kl(logits, mode.teacher, self.tp_group)
            logits = logits.clone()  # the loss below overwrites fp32 logits
        loss = self.compute_language_model_loss(labels, logits)
        mode.report.kd_loss_sum = self._sum_over_head_shards(state.kd_sum)
        if state.carrier.requires_grad:
            loss = touch(loss, state.carrier)
        if self._input_has_no_gradient():
            loss = touch(loss, self.input_tensor)
        return loss

    def _sum_over_head_shards(self, kd_sum: Tensor) -> Tensor:
        total = kd_sum.detach().clone()
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_group)
        return total

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Plain tensors only: Transformer Engine's `_extra_state` would be a pickle in the checkpoint."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def load_state_dict(self, state_dict, strict: bool = True, **options):
        """As torch's, but `_extra_state` may be missing: checkpoints do not hold it."""
        result = super().load_state_dict(state_dict, strict=False, **options)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"checkpoint lacks {missing} and holds unknown {result.unexpected_keys}")
        return result
