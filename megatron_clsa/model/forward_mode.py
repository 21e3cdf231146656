"""What one forward pass is asked to compute, and what it reports beside its output.

Owns no computation. A mode is passed explicitly down the model; nothing of it outlives the forward.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_clsa.config import CLSAConfig, CrossAttentionKind, KDLossKind

if TYPE_CHECKING:
    from megatron_clsa.distill.hidden_match import HiddenMatch
    from megatron_clsa.distill.logit_kd import TeacherTargets
    from megatron_clsa.distill.probe import AttentionProbe


@dataclass
class ForwardReport:
    """Filled on the last pipeline stage.

    Attributes:
        kd_loss_sum: fp32 scalar, sum over this rank's unmasked rows of the distillation cross-entropy,
            averaged over all cross-decoder layers and heads. Divide by the token count to report it.
        teacher_kl: `[b, s/cp]` fp32 KL to the teacher, to be differentiated.
    """

    kd_loss_sum: Tensor | None = None
    teacher_kl: Tensor | None = None


@dataclass(frozen=True)
class ForwardMode:
    """Switches of one forward pass.

    Attributes:
        cross_attention: dense or sparse reading of the memory.
        kd_loss: support of the distillation loss, or off.
        probe: collects attention mass on sampled rows, for evaluation.
        teacher: a dense teacher's targets for these rows, on the last stage.
        hidden: its states to match at layers of this stage.
        report: where the last stage writes its values.
    """

    cross_attention: CrossAttentionKind
    kd_loss: KDLossKind = "off"
    probe: "AttentionProbe | None" = None
    teacher: "TeacherTargets | None" = None
    hidden: "HiddenMatch | None" = None
    report: ForwardReport = field(default_factory=ForwardReport)

    @staticmethod
    def from_config(
        config: CLSAConfig,
        training: bool,
        teacher: "TeacherTargets | None" = None,
        hidden: "HiddenMatch | None" = None,
    ) -> "ForwardMode":
        """The phase's own mode; evaluation does not pay for the distillation loss."""
        kd_loss = config.kd_loss if training else "off"
        return ForwardMode(config.cross_attention, kd_loss, teacher=teacher, hidden=hidden)

    @property
    def needs_projection(self) -> bool:
        """Whether Q_idx and K_idx are computed."""
        return self.needs_index or self.kd_loss != "off"

    @property
    def needs_index(self) -> bool:
        """Whether the top-k selection is computed."""
        return self.cross_attention == "sparse" or self.kd_loss == "selected" or self.probe is not None
