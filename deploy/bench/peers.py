"""The other processes of the store's benchmark: a store, a writer with a worker's blocks, and a plain socket's sender.

Real processes, as in a deployment: nothing here shares a Python interpreter with the reader that measures.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from cluster.errors import StartupError
from cluster.identity import Identity
from kvstore.client import StoreClient
from kvstore.layout import Layout
from kvstore.part import Part
from kvstore.server import StoreServer
from kvstore.slab_writer import SlabWriter
from kvstore.writer import HandoffWriter

SECRET = "bench"
NAMESPACE = "bench"
ANSWER_S = 120.0
SEND_BYTES = 2**26  # in one `send`: what a chunk of 512 tokens of an 8B model has
HOLD_MS = 60_000
CHUNK = 2**20


class Peer(AbstractContextManager["Peer"]):
    """A spawned process; `main(pipe, *arguments)` answers on the pipe and ends when it is told None."""

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, what: object) -> None:
        self._pipe.send(what)

    def ask(self, question: object) -> Any:
        self.tell(question)
        return self.answer()

    def answer(self) -> Any:
        """Its next answer. Raises StartupError when there is none."""
        try:
            if self._pipe.poll(ANSWER_S):
                return self._pipe.recv()
        except EOFError:
            pass
        raise StartupError("a process of the benchmark ended or hangs; see its output above")

    def cpu_s(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()


def blocks(layout: Layout, count: int) -> npt.NDArray[np.uint8]:
    """[count, block bytes] of random bytes where a worker's KV cache would have them: torch aligns its tensors to 64
    bytes. NumPy's 16 would halve the speed of any copy here (measured: 6 instead of 12 GB/s out of shared memory)."""
    cache: npt.NDArray[np.uint8] = torch.randint(0, 256, (count, layout.block_bytes), dtype=torch.uint8).numpy()
    return cache


def serve(pipe: Connection, layout: Layout, memory: int, redis_url: str) -> None:
    """Answers (address, epoch) of a store."""

    async def main() -> None:
        store = StoreServer("bench", layout, memory, Identity(NAMESPACE, redis_url, SECRET, "127.0.0.1"))
        info = await store.start()
        pipe.send((info.address, info.epoch))
        await asyncio.to_thread(pipe.recv)
        await store.stop()

    asyncio.run(main())


def write(pipe: Connection, layout: Layout, count: int, address: str) -> None:
    """Answers (transfer id, hashes) with the Handoff of a new transfer, and then with the seconds of writing it all."""
    cache = blocks(layout, count)
    step = max(1, SEND_BYTES // layout.block_bytes)

    async def main() -> None:
        source = SlabWriter(Part(layout), lambda block: cache[block])
        writer = HandoffWriter(StoreClient(address, SECRET, "bench", layout), layout, source)
        await writer.connect()
        pipe.send(None)
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            transfer, hashes = asked
            pipe.send(await writer.reserve(transfer, hashes, count * layout.tokens, HOLD_MS))
            began = time.perf_counter()
            for first in range(0, count, step):
                await writer.send(transfer, [(i, i) for i in range(first, min(count, first + step))])
            await writer.finish(transfer, None)
            pipe.send(time.perf_counter() - began)
        await writer.close()

    asyncio.run(main())


def send(pipe: Connection, port: int, total: int) -> None:
    """Sends that many bytes to a loopback port each time it is asked, in the store's frame size."""
    data = bytes(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        pipe.send(None)
        while pipe.recv() is not None:
            for _ in range(total // CHUNK):
                connection.sendall(data)
