"""The running average of the weights."""

import torch
from ema_pytorch import EMA
from torch import nn


class Average(EMA):
    """ema_pytorch's EMA, with its decay and its state; but it takes all tensors in one call, from
    lists that are made once and not from their names at each step."""

    @torch.no_grad()
    def update_moving_average(
        self, ma_model: nn.Module, current_model: nn.Module, current_decay: float | None = None
    ) -> None:
        """ma + (1 - decay) (current - ma), in place."""
        if not hasattr(self, "tensors"):
            self.tensors = [list(model.parameters()) for model in (ma_model, current_model)]
        decay = self.get_current_decay() if current_decay is None else current_decay
        torch._foreach_lerp_(*self.tensors, 1.0 - decay)
