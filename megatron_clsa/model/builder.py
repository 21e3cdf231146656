"""megatron.training's extension point: a ModelConfig and a ModelBuilder that make CLSA models.

Owns construction and which parameters train; wrapping (DDP, mixed precision) is megatron.training's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.module import Float16Module
from megatron.training.models import (
    ModelBuilder,
    ModelConfig,
    compose_hooks,
    unimodal_build_distributed_models,
)

from megatron_clsa.config import CLSAConfig
from megatron_clsa.model.clsa_model import CLSAModel
from megatron_clsa.model.initialize import initialize_weights
from megatron_clsa.model.layer_specs import local_spec, transformer_engine_spec


@dataclass(kw_only=True)
class CLSAModelConfig(ModelConfig):
    """What it takes to build a CLSA model.

    Attributes:
        transformer: the architecture and its parallel layout.
        vocab_size: padded vocabulary, in tokens.
        seq_length: longest sequence, in tokens.
        tie_embeddings: share the embedding with the output layer.
        transformer_impl: "local" (plain torch) or "transformer_engine".
        seed: of the initial weights; the same seed gives the same model at every parallel layout.
    """

    builder: ClassVar[str] = "megatron_clsa.model.builder.CLSAModelBuilder"
    transformer: CLSAConfig
    vocab_size: int
    seq_length: int
    tie_embeddings: bool = False
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    seed: int = 1234


def freeze(model: CLSAModel) -> CLSAModel:
    """Leave gradients on what the phase trains (`config.trainable`) and on nothing else."""
    trainable = model.config.trainable
    for name, parameter in model.named_parameters():
        in_indexer = ".indexer." in f".{name}"
        parameter.requires_grad_(trainable == "all" or (trainable == "indexer") == in_indexer)
    return model


class CLSAModelBuilder(ModelBuilder):
    """Builds one stage, or all chunks of a rank wrapped for training."""

    def build_model(self, pg_collection, pre_process=None, post_process=None, vp_stage=None) -> CLSAModel:
        """One pipeline stage, with frozen parameters as the phase asks."""
        settings, config = self._model_config, self._model_config.transformer
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(pg_collection.pp)
        make_spec = local_spec if settings.transformer_impl == "local" else transformer_engine_spec
        model = CLSAModel(
            config,
            make_spec(config),
            settings.vocab_size,
            settings.seq_length,
            pg_collection,
            pre_process,
            post_process,
            vp_stage,
            settings.tie_embeddings,
        )
        if config.perform_initialization:
            initialize_weights(model, settings.seed)
        return freeze(model)

    def build_distributed_models(
        self,
        pg_collection,
        ddp_config=None,
        overlap_param_gather_with_optimizer_step=False,
        use_megatron_fsdp=False,
        use_torch_fsdp2=False,
        wrap_with_ddp=True,
        data_parallel_random_init=False,
        mixed_precision_wrapper=Float16Module,
        model_type=ModelType.encoder_or_decoder,
    ) -> list:
        """All model chunks of this rank, wrapped as megatron.training wraps any model."""
        return unimodal_build_distributed_models(
            self.build_model,
            self._model_config.transformer,
            pg_collection,
            ddp_config,
            overlap_param_gather_with_optimizer_step,
            use_megatron_fsdp,
            use_torch_fsdp2,
            wrap_with_ddp,
            data_parallel_random_init,
            mixed_precision_wrapper,
            compose_hooks(self._model_config.pre_wrap_hooks),
            model_type,
        )
