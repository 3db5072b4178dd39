"""A router over HTTP with two real block stores, one of them with a disk, and a way to put prompts' blocks there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.identity import Identity
from cluster.messages import StoreInfo
from cluster.store_messages import StatRequest, StoreStat
from kvstore.client import StoreClient
from kvstore.hashing import ModelKey, block_keys, extend, salt, tenant_tag
from kvstore.layout import Layout
from kvstore.part import Part
from kvstore.server import StoreServer
from kvstore.slab_writer import SlabWriter
from kvstore.writer import HandoffWriter
from tests.router.fakes import MODEL_KEY, NAMESPACE, SECRET
from tests.router.harness import Api

LAYOUT = Layout(heads=2, layers=2, tokens=MODEL_KEY.block_size, dim=4, dtype="float32", itemsize=4)
SLABS = 64
PROMPT = list(range(10, 10 + 5 * 16 + 3))  # five full blocks and a bit


@dataclass
class Site:
    """A router and its stores."""

    api: Api
    servers: list[StoreServer] = field(default_factory=list)
    infos: list[StoreInfo] = field(default_factory=list)

    async def _start(self, name: str, disk: Path | None) -> None:
        memory = 2 * 4096 + SLABS * (LAYOUT.block_bytes + 64)
        identity = Identity(NAMESPACE, "", SECRET, "127.0.0.1")
        server = StoreServer(name, LAYOUT, memory, identity, disk, 2**20 if disk else 0)
        self.infos.append(await server.start())
        self.servers.append(server)

    async def _write(
        self, store: int, tokens: list[int], tenant: str, cache_salt: str, model_key: ModelKey
    ) -> list[str]:
        root = model_key.root(salt(SECRET, tenant, cache_salt))
        hashes: list[bytes] = []
        extend(hashes, root, tokens, 16)
        client = StoreClient(self.infos[store].address, SECRET, "writer", LAYOUT)
        source = SlabWriter(Part(LAYOUT), lambda b: np.full(LAYOUT.block_bytes, b % 251, np.uint8))
        writer = HandoffWriter(client, LAYOUT, source)
        await writer.connect()
        keys = block_keys(hashes, root, tokens, 16, 0, len(hashes))
        await writer.store(keys, range(len(keys)), tenant_tag(SECRET, tenant))
        await writer.close()
        return [name.hex() for name in hashes]

    def write(
        self,
        store: int,
        tokens: list[int] = PROMPT,
        key: str = "",
        cache_salt: str = "",
        model_key: ModelKey = MODEL_KEY,
    ) -> list[str]:
        """Put the full blocks of a prompt of the tenant with that API key into a store; returns their hashes."""
        tenant = hashlib.sha256(key.encode()).hexdigest() if key else ""
        hashes = self.api.run(self._write(store, tokens, tenant, cache_salt, model_key))
        self.api.wait(lambda: self._quiet(self.stat(store)))
        return hashes

    @staticmethod
    def _quiet(stat: StoreStat) -> bool:
        """Whether everything is on disk that will be: a block is in use while it is written there."""
        return stat.held == 0 and (not stat.disk_limit_bytes or stat.disk_blocks >= stat.cached)

    def stat(self, store: int) -> StoreStat:
        async def ask() -> StoreStat:
            client = StoreClient(self.infos[store].address, SECRET, "stat", LAYOUT)
            try:
                return await client.call("Stat", StatRequest())
            finally:
                await client.close()

        return self.api.run(ask())

    def get(self, path: str, **query: Any) -> Any:
        response = self.api.http.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, **body: Any) -> Any:
        response = self.api.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def site(model_directory: Path, disk: Path | None, **config: Any) -> Iterator[Site]:
    with Api(model_directory).serving("b", **config) as api:
        made = Site(api)
        for name, folder in (("s0", disk), ("s1", None)):
            api.run(made._start(name, folder))
        api.membership.stores = made.infos
        api.wait(lambda: len(api.http.get("/status").json()["stores"]) == 2)
        try:
            yield made
        finally:
            for server in made.servers:
                api.run(server.stop())
