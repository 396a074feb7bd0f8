"""The processes of one training: this one alone, or those that torchrun started."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Processes(NamedTuple):
    """This process among ``world``.  ``group`` is gloo's: what it carries does not wait for a GPU."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    group: Any = None

    def say(self, message: str) -> None:
        """Prints once for all processes, past a progress bar."""
        if self.rank == 0:
            _write(message)

    def sum(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return total.tolist()

    def highest(self, value: int) -> int:
        found = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """What every process has, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def start(device: str | None = None) -> Processes:
    """Joins the processes that torchrun started, over NCCL where each has a GPU of its own and over gloo on CPUs.

    Raises ``ValueError`` where there is no such device, or no GPU is left for this process.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(name)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU that it can use")
    if "WORLD_SIZE" not in os.environ:
        return Processes(device=kind)
    local = int(os.environ["LOCAL_RANK"])
    if kind.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU: torch finds {torch.cuda.device_count()}; start fewer "
                "with torchrun's --nproc-per-node, or use --device cpu"
            )
        kind = torch.device("cuda", local)
        torch.cuda.set_device(kind)
    dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    group = dist.new_group(backend="gloo") if kind.type == "cuda" else dist.group.WORLD
    return Processes(dist.get_rank(), dist.get_world_size(), kind, group)


def finish() -> None:
    if dist.is_available() and dist.is_initialized():
        # Torch 2.0 joins gloo's threads with the GIL held: one that waits for it, to let go of a result, never ends.
        time.sleep(0.2)
        dist.destroy_process_group()


def _write(message: str) -> None:
    try:
        from tqdm import tqdm
    except ImportError:
        print(message, file=sys.stderr, flush=True)
    else:
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()
