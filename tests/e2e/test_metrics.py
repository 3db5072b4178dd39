"""Every metric of docs/metrics.md moves in the scenario that is said to move it: a walk through the list.

One deployment, with everything real but the model, through which the scenarios go one after the other. Metrics
of GPUs, which no machine needs to have, are left out, as the list says.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import redis

from kvstore.redis_server import EmbeddedRedis
from router.metrics import FAMILIES
from tests.e2e.policies import DRAIN, WANTED
from tests.e2e.scrapes import Watch, page
from tests.kvstore import rig
from tests.serving import Served, serving, wait_until
from workers.sim import sim_layout

BLOCK = 16
LAYOUT = sim_layout(BLOCK)
SLABS = 240  # of the store: more than a handoff needs, fewer than a worker's 256 blocks
SETTLE_S = 40.0
TENANT, OPERATOR = "key-of-a-tenant", "key-of-the-operator"
POLICY = "tests.e2e.policies:as_the_file_says"
SETTINGS = {
    "TANDEM_SIM_MS": "10,0.03,0", "TANDEM_THREADS": "1", "TANDEM_MAX_SEQUENCES": "8", "TANDEM_MAX_QUEUE": "8",
    "TANDEM_STORE_MEMORY": str(rig.memory_for(SLABS, LAYOUT)), "TANDEM_SECRET": rig.SECRET,
    "TANDEM_API_KEYS": TENANT, "TANDEM_OPERATOR_KEY": OPERATOR,
}  # fmt: skip
# not by time: prompts as short as these would be computed where they are decoded
ARGUMENTS = ("--runner", "sim", "--placement", "least_loaded", "--scale", "1..3", "--autoscaling", POLICY)


class Clients:
    """Those who ask, each thing a prompt of its own unless `seed` says otherwise."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._seeds = iter(range(1_000, 1_000_000))
        self._http = httpx.Client(base_url=served.url, timeout=60, headers={"authorization": f"Bearer {TENANT}"})

    def ask(self, length: int, new: int, seed: int | None = None) -> int:
        """Returns the HTTP status."""
        return self._http.post("/v1/completions", json=self._body(length, new, seed)).status_code

    def ask_at_once(self, count: int, length: int, new: int) -> list[int]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: self.ask(length, new), range(count)))

    def leave(self) -> None:
        """Ask for much, and go when it begins to come."""
        body = self._body(100, 1_000) | {"stream": True}
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())

    def operate(self, path: str, seed: int, length: int) -> None:
        answer = self._http.post(
            path, json={"prompt": _prompt(seed, length)}, headers={"authorization": f"Bearer {OPERATOR}"}
        )
        assert answer.is_success, answer.text

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples that have those labels."""
        wanted = set(labels.items())
        return sum(
            value for (sample, found), value in page(self._served).items() if sample == name and wanted <= {*found}
        )

    def until(self, name: str, least: float, **labels: str) -> None:
        wait_until(lambda: self.value(name, **labels) >= least, SETTLE_S, lambda: f"{name} {labels} is not {least}")

    def grown(self, name: str, by: float = 1) -> Callable[[], None]:
        """Returns what waits until it is larger than now by that much."""
        least = self.value(name) + by
        return lambda: self.until(name, least)

    def close(self) -> None:
        self._http.close()

    def _body(self, length: int, new: int, seed: int | None = None) -> dict[str, object]:
        prompt = _prompt(next(self._seeds) if seed is None else seed, length)
        return {"prompt": prompt, "max_tokens": new, "ignore_eos": True, "temperature": 0}


def _prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 400) for _ in range(length)]


@pytest.mark.timeout(400)
def test_every_metric_moves_in_its_scenario(tiny: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "workers"
    wanted.write_text("2")
    with closing(EmbeddedRedis()) as index:
        places = {"TANDEM_REDIS_URL": index.url, "TANDEM_DISK": str(tmp_path / "disk"), "PYTHONPATH": os.getcwd()}
        policy = {WANTED: str(wanted), DRAIN: "1"}
        with (
            serving(str(tiny), *ARGUMENTS, **SETTINGS, **places, **policy) as served,
            closing(Clients(served)) as clients,
        ):
            watch = Watch(served)
            requests(watch, clients)
            stores(watch, served, clients, tmp_path / "disk")
            faults(watch, served, clients, index)
            sizes(watch, clients, wanted)
            listed = {family.name: family.moved_by for family in FAMILIES if family.moved_by != "gpu"}
            assert listed == {family.name: family.moved_by for family in FAMILIES if watch.moved(family)}
            for secret in (TENANT, OPERATOR, rig.SECRET):
                assert secret not in watch.text()


def requests(watch: Watch, clients: Clients) -> None:
    with watch.scenario("served", "written"):
        assert clients.ask(480, 40, seed=1) == clients.ask(480, 40, seed=1) == clients.ask(20, 2, seed=2) == 200
        clients.leave()
        clients.until("tandem_requests_total", 1, outcome="cancelled")
        clients.until("tandem_store_disk_blocks", 30)
        clients.until("tandem_offloaded_blocks_total", 1)
    with watch.scenario("waiting"):
        statuses = clients.ask_at_once(40, 1_000, 2)
        assert statuses.count(200) + statuses.count(429) == 40
        assert {200, 429} == {*statuses}
    with watch.scenario("preempted"):
        preempted = clients.grown("tandem_preemptions_total")
        assert clients.ask_at_once(8, 400, 150) == [200] * 8
        preempted()


def stores(watch: Watch, served: Served, clients: Clients, disk: Path) -> None:
    store = served.status()["stores"][0]["address"]
    with watch.scenario("pinned"):
        assert clients.ask(480, 2, seed=3) == 200
        clients.operate("/kv/pin", 3, 480)
        clients.until("tandem_store_pinned_blocks", 1)
    clients.operate("/kv/unpin", 3, 480)
    with watch.scenario("expired"):
        asyncio.run(_abandon_a_handoff(store))
        clients.until("tandem_store_expired_total", 1)
    with watch.scenario("evicted"):  # from the store and from the worker, so that the first comes back from disk
        assert [clients.ask(480, 2, seed=seed) for seed in range(10, 22)] == [200] * 12
        read = clients.grown("tandem_store_disk_reads_total")
        assert clients.ask(480, 2, seed=10) == 200
        read()
    with watch.scenario("corrupt"):
        wait_until(lambda: clients.value("tandem_store_disk_blocks") >= 300, SETTLE_S)
        for file in disk.rglob("*"):
            if file.is_file() and file.stat().st_size > LAYOUT.block_bytes:
                _flip_the_last_byte(file)
        failed = clients.grown("tandem_fetch_failures_total")
        assert [clients.ask(480, 2, seed=seed) for seed in (11, 12)] == [200] * 2
        failed()


async def _abandon_a_handoff(store: str) -> None:
    async with rig.writer(store, LAYOUT) as writer:
        await writer.reserve("abandoned", [b"h" * 32], BLOCK, 1_000)
        await writer.send("abandoned", [(0, 0)])
        await writer.finish("abandoned", 7)


def _flip_the_last_byte(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


def faults(watch: Watch, served: Served, clients: Clients, index: EmbeddedRedis) -> None:
    assert [clients.ask(480, 2, seed=30), clients.ask(20, 2, seed=31)] == [200] * 2
    with watch.scenario("worker lost"), ThreadPoolExecutor(6) as pool:
        failed = clients.grown("tandem_handoff_failures_total")
        asked = [pool.submit(clients.ask, 700, 2) for _ in range(24)]  # six at a time
        wait_until(lambda: clients.value("tandem_worker_running", worker="prefill-0") > 0, SETTLE_S)
        os.kill(served.pid("prefill-0"), signal.SIGKILL)
        failed()
        clients.until("tandem_workers", 1, role="prefill", state="lost")
        assert {answer.result(60) for answer in asked} == {200}
        clients.until("tandem_workers", 1, role="prefill", state="serving")
    with watch.scenario("fetched"):
        fetched = clients.grown("tandem_fetch_bytes_total")
        assert clients.ask(480, 2, seed=30) == 200
        fetched()
    with watch.scenario("computed"):
        assert [clients.ask(400, 2) for _ in range(4)] == [200] * 4  # by which the new worker learns how fast it is
        computed = clients.grown("tandem_recomputed_tokens_total")
        assert clients.ask(20, 2, seed=31) == 200
        computed()
    with watch.scenario("redis lost"):
        with closing(redis.Redis.from_url(index.url)) as client:
            gaps = clients.grown("tandem_index_gaps_total")
            client.flushall()
            gaps()
        os.kill(index.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: clients.value("tandem_redis_up") == 0, SETTLE_S)
        finally:
            os.kill(index.pid, signal.SIGCONT)
        clients.until("tandem_controller_up", 1)
    with watch.scenario("store lost"), ThreadPoolExecutor(4) as pool:
        failures = clients.grown("tandem_offload_failures_total")
        os.kill(served.status()["stores"][0]["pid"], signal.SIGKILL)
        asked = [pool.submit(clients.ask, 100, 150) for _ in range(4)]
        failures()
        assert [answer.result(60) for answer in asked] == [200] * 4
        clients.until("tandem_store_up", 1)


def sizes(watch: Watch, clients: Clients, wanted: Path) -> None:
    with watch.scenario("resized", "role changed"), ThreadPoolExecutor(6) as pool:
        wanted.write_text("3")
        clients.until("tandem_workers", 3, state="serving")
        over = time.monotonic() + SETTLE_S

        def talk(_: int) -> None:
            while not clients.value("tandem_role_ratio", role="both") and time.monotonic() < over:
                assert clients.ask(50, 400) == 200

        wanted.write_text("1")
        talking = [pool.submit(talk, user) for user in range(6)]
        clients.until("tandem_worker_migrations_total", 1)
        clients.until("tandem_worker_stops_total", 2)
        clients.until("tandem_role_ratio", 1, role="both")
        for user in talking:
            user.result(60)
