"""Asynchronous updates, as of the paper's JFT runs: no process waits for the gradients of another.

The first process has a server of the weights.  Every process, the first too, computes gradients of its own batches and
gives them to the server, which applies them at once, to weights that others may have updated since, and hands out what
they have become.  Torch's RPC carries both (``torch.distributed.rpc``).  At the end of an epoch the processes meet.
"""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from itertools import chain
from typing import Any, Sequence

import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
from torch import Tensor, nn

from .averaging import Average
from .loop import Training

_SERVER_NAME = "0"
_served: Server | None = None


class Server:
    """The weights that all processes update, one at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average):
        self.model, self.optimizer, self.average = model, optimizer, average
        self.lock = threading.Lock()
        self.signal = 0

    def update(
        self, gradients: Sequence[Tensor | None], changes: Sequence[Tensor], rate: float, signal: int
    ) -> tuple[list[Tensor], int]:
        """One step of the optimizer at a learning rate.

        ``changes`` are added to the buffers: what a batch did to the running statistics of BatchNorm.  Returns copies
        of the parameters and buffers, and the highest ``signal`` that any process has had.
        """
        with self.lock, torch.no_grad():
            self.signal = max(self.signal, signal)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for parameter, gradient in zip(self.model.parameters(), gradients):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, change in zip(self.model.buffers(), changes):
                buffer += change.to(buffer.device)
            self.average.update_parameters(self.model)
            return [t.detach().to("cpu", copy=True) for t in tensors(self.model)], self.signal


def tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())


def _update(*arguments: Any) -> tuple[list[Tensor], int]:
    """Runs in the first process."""
    assert _served is not None
    return _served.update(*arguments)


class AsynchronousTraining(Training):
    """``self.model`` is the server's in the first process; ``self.parallel`` computes gradients in every process.

    Progress is this process's own: in each step all processes together make about as many updates as there are of them.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if not rpc.is_available():
            raise ValueError("asynchronous: this torch has no torch.distributed.rpc")
        self.server: Server | None = None
        if self.joined.rank == 0:
            self.server = Server(self.model, self.optimizer, self.average)
            self.parallel = copy.deepcopy(self.model)
        self.told = 0  # the signal that the server has heard of

    def run(self) -> int:
        global _served
        _served = self.server
        rpc.init_rpc(
            str(self.joined.rank),
            rank=self.joined.rank,
            world_size=self.joined.world,
            rpc_backend_options=rpc.TensorPipeRpcBackendOptions(rpc_timeout=600),
        )
        try:
            status = super().run()
        except BaseException:
            rpc.shutdown(graceful=False)
            raise
        rpc.shutdown()
        return status

    def _data_parallel(self) -> nn.Module:
        return self.model

    def _update_batch(self) -> int:
        return self.plan.global_batch // self.joined.world

    def _epoch(self) -> int:
        signal = self.joined.highest(max(super()._epoch(), self.stop.signal))
        # All updates have been made: every process evaluates, and goes on with, what they came to.
        with torch.no_grad():
            for t in chain(tensors(self.model), tensors(self.average.module)):
                value = t.detach().cpu().contiguous()
                dist.broadcast(value, 0, group=self.joined.group)
                t.copy_(value)
            for t, value in zip(tensors(self.parallel), tensors(self.model)):
                t.copy_(value)
        return signal

    def _update(self, rate: float) -> None:
        parameters, buffers = list(self.parallel.parameters()), list(self.parallel.buffers())
        gradients = [None if p.grad is None else p.grad.cpu() for p in parameters]
        changes = [(after - before).cpu() for after, before in zip(buffers, self.before)]
        arguments = gradients, changes, rate, self.stop.signal
        if self.server is not None:
            values, self.told = self.server.update(*arguments)
        else:
            values, self.told = rpc.rpc_sync(_SERVER_NAME, _update, arguments)
        with torch.no_grad():
            for t, value in zip(chain(parameters, buffers), values):
                t.copy_(value)

    def _step(self, loaded: Any, rate: float) -> Tensor:
        self.before = [buffer.clone() for buffer in self.parallel.buffers()]
        return super()._step(loaded, rate)

    def _signal(self) -> int:
        return self.told

    def _mean_loss(self, loss: float) -> float:
        return loss

    def _random_states(self) -> list[Any]:
        return []  # the order of updates is not repeated

    def _save(self) -> None:
        with nullcontext() if self.server is None else self.server.lock:
            super()._save()
