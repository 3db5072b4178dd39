"""A store, writer or reader as a process of its own, to be killed by the tests. Settings are JSON on standard input."""

import asyncio
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import TandemError
from cluster.identity import Identity
from cluster.messages import Handoff
from cluster.rpc import Client
from cluster.store_messages import Fetch
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.layout import Layout
from kvstore.part import Part
from kvstore.reader import HandoffReader
from kvstore.server import StoreServer
from kvstore.slab_writer import SlabWriter
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import LAYOUT, block_of, hashes_for, keep


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def serve(settings: dict[str, Any]) -> None:
    identity = Identity("ns", settings["redis_url"], settings["secret"], "127.0.0.1")
    layout, disk = Layout(**settings["layout"]), settings.get("disk")
    folder = Path(disk) if disk else None
    store = StoreServer(
        settings["store_id"], layout, settings["memory"], identity, folder, settings.get("disk_memory", 0)
    )
    info = await store.start(settings["port"])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    say(f"{info.address} {info.epoch}")
    await stop.wait()
    await store.stop()


async def write(settings: dict[str, Any]) -> None:
    """Reserve, seal a part, then hang until killed."""
    client = StoreClient(settings["address"], settings["secret"], "writer", LAYOUT)
    writer = HandoffWriter(client, LAYOUT, SlabWriter(Part(LAYOUT), block_of))
    await writer.connect()
    tokens = settings["tokens"]
    handoff = await writer.reserve(settings["transfer"], hashes_for(tokens), tokens, settings["hold_ms"])
    await writer.send(settings["transfer"], [(position, position) for position in range(settings["sealed"])])
    say(f"{handoff.epoch}")
    await asyncio.Event().wait()


async def read(settings: dict[str, Any]) -> None:
    """Follow a transfer that never ends, until killed."""
    reader = HandoffReader(Connections(settings["secret"], LAYOUT))

    def target(position: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        say(f"{position}")
        return np.zeros(LAYOUT.block_bytes, np.uint8)

    handoff = Handoff(settings["address"], settings["epoch"], settings["transfer"])
    await reader.receive(handoff, 0, settings["tokens"], target, 60.0)


async def churn(settings: dict[str, Any]) -> None:
    """Write blocks into the store for ever, chain after chain, until killed."""
    for chain in itertools.count(settings["first_chain"]):
        await keep(settings["address"], chain, settings["blocks"])
        say(f"{chain}")


async def oversleep(settings: dict[str, Any]) -> None:
    """Reserve, be stopped until somebody continues it, and only then write."""
    client = StoreClient(settings["address"], settings["secret"], "writer", LAYOUT)
    writer = HandoffWriter(client, LAYOUT, SlabWriter(Part(LAYOUT), block_of))
    await writer.connect()
    tokens, transfer = settings["tokens"], settings["transfer"]
    await writer.reserve(transfer, hashes_for(tokens), tokens, settings["hold_ms"])
    say("reserved")
    os.kill(os.getpid(), signal.SIGSTOP)
    try:
        await writer.send(transfer, [(position, position) for position in range(tokens // LAYOUT.tokens)])
        say("sealed")
    except TandemError as error:
        say(type(error).__name__)
    await asyncio.Event().wait()


async def stall(settings: dict[str, Any]) -> None:
    """Fetch a chain, take one message of it, and hang until killed or for the stream's time."""
    client = Client(settings["address"], settings["secret"])
    names = tuple(hashes_for(settings["tokens"]))
    async for _ in client.stream("Fetch", Fetch(names, settings["epoch"], inline=True), settings["timeout_s"]):
        say("one")
        await asyncio.Event().wait()


MAINS = {"serve": serve, "write": write, "read": read, "churn": churn, "stall": stall, "oversleep": oversleep}

if __name__ == "__main__":
    asyncio.run(MAINS[sys.argv[1]](json.loads(sys.stdin.readline())))
