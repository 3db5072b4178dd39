"""Links between shards that are processes, over torch.distributed: NCCL between GPUs, gloo between stages on CPUs.

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
from workers.exchange import Exchange
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


class TensorGroup(Protocol):
    """The tensor ranks of a stage; as `workers.links.Links`."""

    def sum_inplace(self, x: Tensor) -> None: ...
    def gather(self, x: Tensor) -> Tensor: ...
    def close(self) -> None: ...


class GpuGroup:
    """Over NCCL."""

    def __init__(self, group: Group, size: int) -> None:
        self._group, self._size = group, size

    def sum_inplace(self, x: Tensor) -> None:
        with _peers("add up"):
            self._group.allreduce([x]).wait()

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [ranks, ...]
        parts = [torch.empty_like(x) for _ in range(self._size)]
        with _peers("gather"):
            self._group.allgather([parts], [x]).wait()
        return torch.stack(parts)

    def close(self) -> None:
        self._group.abort()


class ProcessLinks:
    """Of the rank that joined. There is no group for what has one member."""

    def __init__(self, shard: Shard, stage: TensorGroup | None, worker: Group | None, device: str) -> None:
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
        on_gpu = torch.device(device).type == "cuda"
        own = _own_address(host, int(port))
        stage: TensorGroup | None = None
        with _peers("join"):
            store = TCPStore(host, int(port), timeout=limit, wait_for_workers=False)
            beside = PrefixStore(f"stage {shard.stage}", store)
            if tp > 1 and on_gpu:
                stage = GpuGroup(_nccl(beside, shard.tensor_rank, tp, limit), tp)
            elif tp > 1:
                stage = Exchange.join(beside, shard.tensor_rank, tp, timeout)
            worker: Group | None = None
            if pp > 1:
                everybody = PrefixStore("worker", store)
                rank = (everybody, shard.rank, tp * pp)
                worker = _nccl(*rank, limit) if on_gpu else _gloo(*rank, own, limit)
        return cls(shard, stage, worker, device)

    def sum_inplace(self, x: Tensor) -> None:
        if self._stage is not None:
            self._stage.sum_inplace(x)

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [tp, ...]
        return x[None] if self._stage is None else self._stage.gather(x)

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
        if self._stage is not None:
            self._stage.close()
        if self._worker is not None:
            self._worker.abort()
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


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Group:
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
