"""What a GPU has and a CPU has not: pinned memory, a stream for copies, graphs, memory that only it can use.

`Device` is the CPU, where each of these is nothing: whatever is written against it runs there as it would on a GPU,
which is how it is tested. It decides nothing, and no tensor is made here but for staging memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from torch import Tensor

WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries make their workspaces in the first
E4M3_CAPABILITY = (8, 9)  # compute capability from which Triton compiles e4m3: Ada, Hopper and later
T = TypeVar("T")


class Device:
    """The CPU."""

    def __init__(self, name: str = "cpu") -> None:
        self.place = torch.device(name)
        self.e4m3 = True  # kernels can read and write it

    def staging(self, size: int) -> Tensor:  # [size] bytes
        """Host memory that the device copies from and to at full speed. It belongs to whoever holds it."""
        return torch.empty(size, dtype=torch.uint8)

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        """`run` as something to repeat: with the same tensors, read and written where they lie. It must read nothing
        back and take no other path the next time."""
        return run

    def synchronize(self) -> None:
        """Everything that this thread has begun has ended."""

    def mark(self) -> Callable[[], None]:
        """Waits for everything that this thread has begun so far, and for nothing that it begins later."""
        return lambda: None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What is begun inside runs beside the steps, and has ended when this returns."""
        yield

    def memory(self, run: Callable[[], None]) -> tuple[int, int]:
        """(bytes of memory, bytes of them in use at the worst moment of `run`, by whomever)."""
        run()
        memory = psutil.virtual_memory()
        return memory.total, memory.total - memory.available


class Cuda(Device):
    def __init__(self, name: str = "cuda") -> None:
        super().__init__(name)
        self.e4m3 = torch.cuda.get_device_capability(self.place) >= E4M3_CAPABILITY
        self._copies = torch.cuda.Stream(self.place, priority=0)  # steps run in the default stream
        self._pool = torch.cuda.graph_pool_handle()  # of all graphs: only one of them runs at a time

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        """Raises RuntimeError when something in it cannot be captured."""
        warm = torch.cuda.Stream(self.place)
        warm.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(warm):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.synchronize(self.place)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog and the threads that copy blocks may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.place).synchronize()

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.place))
        return event.synchronize

    @contextmanager
    def copying(self) -> Iterator[None]:
        """The stream is shared by all who copy: the copies of one wait for those of another, never for a step."""
        with torch.cuda.stream(self._copies):
            try:
                yield
            finally:
                self._copies.synchronize()

    def memory(self, run: Callable[[], None]) -> tuple[int, int]:
        torch.cuda.synchronize(self.place)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.place)
        run()
        torch.cuda.synchronize(self.place)
        free, total = torch.cuda.mem_get_info(self.place)
        outside = total - free - torch.cuda.memory_reserved(self.place)  # the context, libraries, other processes
        peak = outside + torch.cuda.max_memory_allocated(self.place)
        torch.cuda.empty_cache()
        return total, peak


@dataclass(frozen=True, slots=True)
class DeviceCache:
    """A shard's KV cache where the host has no view of it."""

    blocks: Tensor  # [blocks, kv heads, layers, 2, block size, D]
    device: Device
