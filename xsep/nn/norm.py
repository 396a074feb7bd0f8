"""BatchNorm as vectors made of a batch's statistics, or of those of all processes; ``SyncBatchNorm2d``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.problem import vector_dtype
from ..ops.residual import apply_vectors


def takes_statistics(norm: Any) -> bool:
    """Whether a BatchNorm uses the statistics of the batch."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def vectors(norm: Any, y: Tensor, mean: Tensor | None, m2: Tensor | None):
    """center, scale and shift with which ``norm(y)`` is scale * (y - center) + shift.

    mean and m2 are those of y, per channel: the mean, and the sum of the squared deviations from it; None for running
    statistics.  In training these are updated as ``norm`` would.
    """
    if mean is not None and m2 is not None:
        count: Any = y.numel() // y.shape[1]
        group = _group(norm)
        if group is not None:
            mean, m2, count = _Merge.apply(mean, m2, count, group)
        elif norm.training and count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
        var = m2 / _at_least_1(count)
        if norm.training:
            _update(norm, mean.detach(), m2.detach(), count)
    else:
        mean, var = norm.running_mean, norm.running_var.to(vector_dtype(y))
    scale = torch.rsqrt(var + norm.eps)
    return mean, scale if norm.weight is None else norm.weight * scale, norm.bias


def _at_least_1(count: int | Tensor):
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


@torch.no_grad()
def _update(norm: Any, mean: Tensor, m2: Tensor, count: int | Tensor) -> None:
    """What a BatchNorm does to its buffers in training."""
    if not norm.track_running_stats:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    empty = isinstance(count, int) and count == 0
    if not empty and norm.running_mean is not None and norm.running_var is not None and momentum is not None:
        norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        norm.running_var.mul_(1 - momentum).add_(m2 / _at_least_1(count - 1), alpha=momentum)


def _group(norm: Any) -> Any:
    """The processes whose batches ``norm`` takes for one, or None: it goes by its own."""
    if not isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm2d)) or not norm.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _Merge(torch.autograd.Function):
    """mean, m2 and count of the batches of all processes from those of each, by Chan's formula, in float64.

    The processes exchange one vector in either direction.
    """

    @staticmethod
    def forward(ctx, mean, m2, count, group):
        channels = mean.numel()
        # float64 for the count too: float32 does not have all integers.
        own = torch.cat((mean.double(), m2.double(), mean.new_full((1,), count, dtype=torch.float64)))
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        means, m2s, counts = torch.stack(gathered).split((channels, channels, 1), 1)
        total = counts.sum()
        merged = (counts * means).sum(0) / total.clamp_min(1)
        ctx.save_for_backward(mean - merged, total)
        ctx.count, ctx.group, ctx.dtype = count, group, mean.dtype
        ctx.mark_non_differentiable(total)
        m2 = (m2s + counts * (means - merged).square()).sum(0)
        return merged.to(ctx.dtype), m2.to(ctx.dtype), total

    @staticmethod
    @once_differentiable
    def backward(ctx, dmean, dm2, _):
        deviation, total = ctx.saved_tensors
        sums = torch.cat((dmean, dm2)).double()
        dist.all_reduce(sums, group=ctx.group)
        dmean, dm2 = sums.chunk(2)
        dmean = dmean * (ctx.count / total.clamp_min(1)) + 2 * ctx.count * deviation * dm2
        return dmean.to(ctx.dtype), dm2.to(ctx.dtype), None, None


class SyncBatchNorm2d(_BatchNorm):
    """BatchNorm over the batches of all processes, as ``nn.SyncBatchNorm``, which torch has for GPUs only.

    Arguments and results are those of ``nn.SyncBatchNorm``; there are first derivatives only.  It is composed of
    torch's operators, unless a ``FusedSequential`` applies it on load, as it does either of the two.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        **options: Any,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        if _group(self) is None:
            return super().forward(input)
        self._check_input_dim(input)
        wide = input.to(vector_dtype(input))
        others = [axis for axis in range(input.dim()) if axis != 1]
        sizes = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        mean = wide.sum(others) / max(1, input.numel() // input.shape[1])
        m2 = (wide - mean.view(sizes)).square().sum(others)
        return apply_vectors(wide, *vectors(self, input, mean, m2)).to(input.dtype)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """``nn.SyncBatchNorm.convert_sync_batchnorm``, with this class: for every BatchNorm of ``module``."""
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        made: list[Any] = [child for child in module.modules() if type(child) is nn.SyncBatchNorm]
        for child in made:
            child.__class__ = cls
        return module


KINDS = nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d  # those that ``vectors`` knows
