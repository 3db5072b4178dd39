"""Links between shards that are processes, over torch.distributed: gloo between CPUs, NCCL between GPUs.

Rank 0 opens a rendezvous, every rank joins there and gets groups of its own; none of them is process-wide. Nothing
waits longer than the timeout and nothing is repaired: whoever misses a peer raises WorkerLost, and the worker ends as
one. Only numbers of known shape travel, no objects. Nobody is authenticated here: the sockets are bound to the address
by which a shard reaches rank 0's, so that has to be in a network that only the cluster uses.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, Work  # type: ignore[attr-defined]

from cluster.errors import WorkerLost
from workers.shard import Shard

TAG = 0  # messages between two ranks arrive in the order in which they were sent


class Rendezvous:
    """Where the ranks of one worker find each other: a server in this process, for as long as they are linked."""

    def __init__(self, host: str) -> None:
        # by itself the server would listen on all interfaces; it takes any listener over, and closes it
        listener = socket.create_server((host, 0))
        self.address = f"{host}:{listener.getsockname()[1]}"
        self._server: Any = TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def close(self) -> None:
        self._server = None


class Group(Protocol):
    """What of a torch.distributed backend is used. Each `wait` raises RuntimeError after the group's timeout."""

    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work: ...
    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...
    def abort(self) -> None: ...


class ProcessLinks:
    """Of the rank that joined. There is no group for what has one member."""

    def __init__(self, shard: Shard, stage: Group | None, worker: Group | None, device: str) -> None:
        self._shard, self._device = shard, device
        self._stage = stage  # the tensor ranks of this stage
        self._worker = worker  # all ranks, for what goes from stage to stage
        self._sent: deque[tuple[Work, Tensor]] = deque()  # what the next stage may not have taken, oldest first

    @classmethod
    def join(cls, address: str, shard: Shard, timeout: float, device: str = "cpu") -> ProcessLinks:
        """`address` is the rendezvous'; `timeout` seconds is the limit of joining and of each call later. Returns when
        all ranks have joined. Raises WorkerLost when one does not."""
        host, _, port = address.rpartition(":")
        limit, tp, pp = timedelta(seconds=timeout), shard.tp, shard.pp
        make = _nccl if torch.device(device).type == "cuda" else _gloo
        own = _own_address(host, int(port))
        with _peers("join"):
            store = TCPStore(host, int(port), timeout=limit, wait_for_workers=False)
            stage = (
                make(PrefixStore(f"stage {shard.stage}", store), shard.tensor_rank, tp, own, limit) if tp > 1 else None
            )
            worker = make(PrefixStore("worker", store), shard.rank, tp * pp, own, limit) if pp > 1 else None
        return cls(shard, stage, worker, device)

    def sum_inplace(self, x: Tensor) -> None:
        if self._stage is None:
            return
        if x.device.type != "cpu":
            with _peers("add up"):
                self._stage.allreduce([x]).wait()
            return
        first, second, *rest = self._exchange(self._stage, x)
        torch.add(first, second, out=x)
        for part in rest:
            x += part

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [tp, ...]
        if self._stage is None:
            return x[None]
        if x.device.type == "cpu":
            return torch.stack(self._exchange(self._stage, x))
        parts = [torch.empty_like(x) for _ in range(self._shard.tp)]
        with _peers("gather"):
            self._stage.allgather([parts], [x]).wait()
        return torch.stack(parts)

    def _exchange(self, group: Group, x: Tensor) -> list[Tensor]:
        """x of all tensor ranks, in rank order: everybody sends to everybody. A sum in this order has the same bits
        everywhere, and for the few ranks of a CPU and the sizes of a step it takes less time than gloo's own
        collectives (2 processes, [32, 576] fp32: 0.17 ms instead of 0.38 ms, of which most is waking threads)."""
        me = self._shard.tensor_rank
        parts = [x.clone() if rank == me else torch.empty_like(x) for rank in range(self._shard.tp)]
        others = [rank for rank in range(self._shard.tp) if rank != me]
        with _peers("exchange"):
            works = [group.send([parts[me]], rank, TAG) for rank in others]
            works += [group.recv([parts[rank]], rank, TAG) for rank in others]
            for work in works:
                work.wait()
        return parts

    def send(self, x: Tensor) -> None:
        assert self._worker is not None, "there is no next stage"
        with _peers("send activations"):
            if len(self._sent) == self._shard.pp:  # as many steps are in flight as there are stages
                self._sent.popleft()[0].wait()
            self._sent.append((self._worker.send([x], self._shard.rank + self._shard.tp, TAG), x))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self._worker is not None, "there is no previous stage"
        x = torch.empty(shape, dtype=dtype, device=self._device)
        with _peers("receive activations"):
            self._worker.recv([x], self._shard.rank - self._shard.tp, TAG).wait()
        return x

    def close(self) -> None:
        """Ends the groups; peers that still wait for this rank get an error."""
        for group in (self._stage, self._worker):
            if group is not None:
                group.abort()
        self._sent.clear()
        self._stage = self._worker = None


def _own_address(host: str, port: int) -> str:
    """Of the interface by which this machine reaches that address. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _gloo(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Group:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    # else gloo listens on whatever address the machine's name resolves to
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    group: Group = gloo(store, rank, size, options)
    return group


def _nccl(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Group:
    """NCCL picks its interfaces itself (NCCL_SOCKET_IFNAME). A wait only orders the stream; if the GPU does not get
    there within the timeout, NCCL's watchdog ends the process, which is what a shard without its peers has to do."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    group: Group = nccl(store, rank, size, options)
    return group


@contextmanager
def _peers(what: str) -> Iterator[None]:
    """torch.distributed has a RuntimeError for everything that peers and networks do."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorkerLost(f"the shards of this worker cannot {what} ({reason}); it has to start again") from error
