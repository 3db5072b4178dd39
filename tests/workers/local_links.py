"""Links between shards that are threads of this process: what `workers.links.Links` promises, without a network."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from workers.links import Links

PATIENCE_S = 30.0


class Wires:
    """Of one worker of tp x pp shards."""

    def __init__(self, tp: int, pp: int) -> None:
        self.tp = tp
        self.barriers = [threading.Barrier(tp, timeout=PATIENCE_S) for _ in range(pp)]
        self.tables: list[list[Tensor | None]] = [[None] * tp for _ in range(pp)]  # [stage][tensor rank] what it gives
        self.queues: list[Queue[Tensor]] = [Queue() for _ in range(tp * pp)]  # rank -> what it is to receive


@dataclass
class LocalLinks:
    wires: Wires
    rank: int

    def gather(self, x: Tensor) -> Tensor:
        stage, tensor_rank = divmod(self.rank, self.wires.tp)
        table, barrier = self.wires.tables[stage], self.wires.barriers[stage]
        table[tensor_rank] = x.clone()
        barrier.wait()
        found = torch.stack([given for given in table if given is not None])
        barrier.wait()  # or somebody would give the next one before all have read this one
        return found

    def sum_inplace(self, x: Tensor) -> None:
        x.copy_(self.gather(x).sum(0))

    def send(self, x: Tensor) -> None:
        self.wires.queues[self.rank + self.wires.tp].put(x)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = self.wires.queues[self.rank].get(timeout=PATIENCE_S)
        assert (tuple(x.shape), x.dtype) == (shape, dtype)
        return x

    def close(self) -> None:
        pass


def links(tp: int, pp: int) -> list[Links]:
    """By rank."""
    wires = Wires(tp, pp)
    return [LocalLinks(wires, rank) for rank in range(tp * pp)]


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that wait for each other."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE_S) for future in [pool.submit(call) for call in calls]]
