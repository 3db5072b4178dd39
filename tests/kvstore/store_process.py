"""A store, writer or reader as a process of its own, to be killed by the tests. Settings are JSON on standard input."""

import asyncio
import json
import signal
import sys
from typing import Any

import numpy as np

from cluster.identity import Identity
from cluster.messages import Handoff
from kvstore.client import StoreClient
from kvstore.layout import Layout
from kvstore.reader import HandoffReader
from kvstore.server import StoreServer
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import LAYOUT, block_of, hashes_for


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def serve(settings: dict[str, Any]) -> None:
    identity = Identity("ns", settings["redis_url"], settings["secret"], "127.0.0.1")
    store = StoreServer(settings["store_id"], Layout(**settings["layout"]), settings["memory"], identity)
    info = await store.start(settings["port"])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    say(f"{info.address} {info.epoch}")
    await stop.wait()
    await store.stop()


async def write(settings: dict[str, Any]) -> None:
    """Reserve, seal a part, then hang until killed."""
    client = StoreClient(settings["address"], settings["secret"], "writer", LAYOUT)
    writer = HandoffWriter(client, LAYOUT, block_of)
    await writer.connect()
    tokens = settings["tokens"]
    handoff = await writer.reserve(settings["transfer"], hashes_for(tokens), tokens, settings["hold_ms"])
    await writer.send(settings["transfer"], [(position, position) for position in range(settings["sealed"])])
    say(f"{handoff.epoch}")
    await asyncio.Event().wait()


async def read(settings: dict[str, Any]) -> None:
    """Follow a transfer that never ends, until killed."""
    reader = HandoffReader(settings["secret"], LAYOUT)

    def target(position: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        say(f"{position}")
        return np.zeros(LAYOUT.block_bytes, np.uint8)

    handoff = Handoff(settings["address"], settings["epoch"], settings["transfer"])
    await reader.receive(handoff, 0, settings["tokens"], target, 60.0)


if __name__ == "__main__":
    asyncio.run({"serve": serve, "write": write, "read": read}[sys.argv[1]](json.loads(sys.stdin.readline())))
