"""Adam shaped like Transformer Engine's FusedAdam, over torch's own fused kernel.

Owns the optimizer class that `cpu.py` installs where neither TE nor apex is present. Their state layout
(one `step` a group, only the two moments a parameter) is what megatron-core's distributed optimizer can
shard, save and reload; `torch.optim.AdamW` keeps a `step` tensor a parameter and cannot be resumed.
"""

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`) or AdamW with one step count a parameter group."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        adam_w_mode=True,
        bias_correction=True,
        capturable=False,
        **unused,
    ):
        if capturable or not bias_correction:
            raise ValueError("FusedAdam here needs bias_correction=True and capturable=False")
        group = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True)
        super().__init__(params, group)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every group; an empty group still counts the step, as loading expects."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                self._update(params, group)

    def _update(self, params, group):
        for param in params:
            if not self.state[param]:
                self.state[param] = {
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        beta1, beta2 = group["betas"]
        kernel = adamw if self.adam_w_mode else adam
        kernel(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(float(group["step"] - 1), device=p.device) for p in params],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
