"""Polyak averaging of weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """An exponential average of a model's parameters and BatchNorm statistics, in ``module``.

    The decay begins low, as TensorFlow's does, so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        updates = int(self.n_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages, values = [], []
        for average, value in zip(chain(self.module.parameters(), self.module.buffers()), _tensors(model)):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        # One launch for many tensors: hundreds a step would keep a GPU waiting.
        torch._foreach_lerp_(averages, values, 1 - decay)
        self.n_averaged += 1


def _tensors(model: nn.Module):
    return chain((p.detach() for p in model.parameters()), model.buffers())
