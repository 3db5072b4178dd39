"""Every metric of docs/metrics.md moves in the scenario that is said to move it: a walk through the list.

One deployment, with everything real but the model and the driver of the GPUs, through which the scenarios go one after
the other. Each waits for what it needs before it goes on, and what it is about goes on until it was seen: on a slow
machine pages are few and far between.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import redis

from kvstore.redis_server import EmbeddedRedis
from router.metrics import FAMILIES
from tests.e2e.fake_driver import pynvml
from tests.e2e.policies import DRAIN, WANTED
from tests.e2e.scrapes import SETTLE_S, Watch, page
from tests.kvstore import rig
from tests.serving import Served, serving, wait_until
from workers.sim import sim_layout

BLOCK = 16
LAYOUT = sim_layout(BLOCK)
SLABS = 240  # of the store: more than a handoff needs, fewer than a worker's 256 blocks
SAID_S = 2.0  # in which a worker has said what became of a request that has ended
REFUSED_S = 0.2  # until a client that was refused asks again
FOLLOWED_S = 1.5  # a decode of two tokens takes less, a worker that is silent for so long is not lost yet
TENANT, OPERATOR = "key-of-a-tenant", "key-of-the-operator"
POLICY = "tests.e2e.policies:as_the_file_says"
SETTINGS = {
    "TANDEM_SIM_MS": "10,0.03,0", "TANDEM_THREADS": "1", "TANDEM_MAX_SEQUENCES": "8", "TANDEM_MAX_QUEUE": "8",
    "TANDEM_STORE_MEMORY": str(rig.memory_for(SLABS, LAYOUT)), "TANDEM_SECRET": rig.SECRET,
    "TANDEM_API_KEYS": TENANT, "TANDEM_OPERATOR_KEY": OPERATOR,
}  # fmt: skip
# not by time: prompts as short as these would be computed where they are decoded
LONG, SHORT = range(30, 34), range(40, 44)  # seeds of prompts that come again
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

    def ask_and_keep(self, length: int, seed: int) -> None:
        """Returns when the disk has it: what is evicted from memory before that is nowhere."""
        kept = self.value("tandem_store_disk_blocks") + length // BLOCK
        assert self.ask(length, 2, seed) == 200
        self.until("tandem_store_disk_blocks", kept)

    @contextmanager
    def asking(self, users: int, length: int, new: int) -> Iterator[set[int]]:
        """So many, each of them one thing after the other, until the block is left. Yields what they were answered."""
        answers: set[int] = set()
        over = threading.Event()

        def user() -> None:
            while not over.is_set():
                status = self.ask(length, new)
                answers.add(status)
                over.wait(REFUSED_S if status == 429 else 0)

        with ThreadPoolExecutor(users) as pool:
            asking = [pool.submit(user) for _ in range(users)]
            try:
                yield answers
            finally:
                over.set()
            for each in asking:
                each.result(60)

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

    def ask_again(self, seeds: Iterable[int], length: int, name: str) -> None:
        """Prompts that came before, one after the other, until that metric has grown. A store that takes longer than 50
        ms to say what it has is not waited for, so not every prompt finds what there is; and each that does changes
        what the worker predicts, so there are no more of them than needed."""
        least = self.value(name) + 1
        for seed in seeds:
            assert self.ask(length, 2, seed) == 200
            over = time.monotonic() + SAID_S
            while time.monotonic() < over:
                if self.value(name) >= least:
                    return
        raise AssertionError(f"{name} is not {least}")

    def until_still(self, name: str, for_s: float = 1.0) -> None:
        """Until it has not changed for that long."""
        seen, since = self.value(name), time.monotonic()

        def still() -> bool:
            nonlocal seen, since
            if (now := self.value(name)) != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > for_s

        wait_until(still, SETTLE_S, lambda: f"{name} goes on changing")

    def grown(self, name: str) -> Callable[[], None]:
        """Returns what waits until it is larger than now by one."""
        least = self.value(name) + 1
        return lambda: self.until(name, least)

    def close(self) -> None:
        self._http.close()

    def _body(self, length: int, new: int, seed: int | None = None) -> dict[str, object]:
        prompt = _prompt(next(self._seeds) if seed is None else seed, length)
        return {"prompt": prompt, "max_tokens": new, "ignore_eos": True, "temperature": 0}


def _prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 400) for _ in range(length)]


@pytest.mark.timeout(600)
def test_every_metric_moves_in_its_scenario(tiny: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "workers"
    wanted.write_text("2")
    with closing(EmbeddedRedis()) as index:
        places = {"TANDEM_REDIS_URL": index.url, "TANDEM_DISK": str(tmp_path / "disk")}
        places |= pynvml.environment(tmp_path / "gpus")
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
            gpus(watch, clients, tmp_path / "gpus")
            listed = {family.name: family.moved_by for family in FAMILIES}
            assert listed == {family.name: family.moved_by for family in FAMILIES if watch.moved(family)}
            for secret in (TENANT, OPERATOR, rig.SECRET):
                assert secret not in watch.text()


def requests(watch: Watch, clients: Clients) -> None:
    with watch.scenario("served", "written") as moved:
        assert clients.ask(480, 40, seed=1) == clients.ask(480, 40, seed=1) == clients.ask(20, 2, seed=2) == 200
        clients.leave()
        clients.until("tandem_requests_total", 1, outcome="cancelled")
        clients.until("tandem_store_disk_blocks", 30)
        clients.until("tandem_offloaded_blocks_total", 1)
        moved()
    with watch.scenario("waiting") as moved, clients.asking(40, 1_000, 2) as answers:
        moved()
        wait_until(lambda: len(answers) == 2, SETTLE_S)
    assert answers == {200, 429}
    with watch.scenario("preempted") as moved, clients.asking(8, 400, 300) as answers:
        moved()  # on average they have 4,400 tokens, and a worker room for 4,096
    assert answers == {200}


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
    clients.until_still("tandem_store_disk_blocks")  # what is written from here on is what is asked for
    # from store and worker, so that the first come back from disk
    with watch.scenario("evicted") as moved:
        for seed in range(10, 22):
            clients.ask_and_keep(480, seed)
        clients.ask_again(range(10, 13), 480, "tandem_store_disk_reads_total")
        moved()
    with watch.scenario("corrupt") as moved:
        for file in disk.rglob("*"):
            if file.is_file() and file.stat().st_size > LAYOUT.block_bytes:
                _flip_the_last_byte(file)
        clients.ask_again(range(13, 18), 480, "tandem_fetch_failures_total")
        moved()


async def _abandon_a_handoff(store: str) -> None:
    async with rig.writer(store, LAYOUT) as writer:
        await writer.reserve("abandoned", [b"h" * 32], BLOCK, 2_000)
        await writer.send("abandoned", [(0, 0)])
        await writer.finish("abandoned", 7)


def _flip_the_last_byte(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


def faults(watch: Watch, served: Served, clients: Clients, index: EmbeddedRedis) -> None:
    clients.until_still("tandem_store_disk_blocks")
    for seed in LONG:
        clients.ask_and_keep(480, seed)
    for seed in SHORT:
        clients.ask_and_keep(20, seed)
    with watch.scenario("worker lost") as moved, clients.asking(6, 700, 2) as answers:
        victim = served.pid("prefill-0")
        wait_until(lambda: _stopped_while_followed(clients, victim), SETTLE_S)
        os.kill(victim, signal.SIGKILL)
        clients.until("tandem_workers", 1, role="prefill", state="lost")
        moved()
    assert answers == {200}
    clients.until("tandem_workers", 1, role="prefill", state="serving")
    # by which the new worker learns how fast it is: what a step costs, and apart from that what a token does
    assert [clients.ask(length, 2) for _ in range(6) for length in (400, 40)] == [200] * 12
    with watch.scenario("fetched") as moved:
        clients.ask_again(LONG, 480, "tandem_fetch_bytes_total")
        moved()
    with watch.scenario("computed") as moved:
        clients.ask_again(SHORT, 20, "tandem_recomputed_tokens_total")
        moved()
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
    with watch.scenario("store lost") as moved, clients.asking(4, 100, 150) as answers:
        os.kill(served.status()["stores"][0]["pid"], signal.SIGKILL)
        moved()
    assert answers == {200}
    clients.until("tandem_store_up", 1)


def _stopped_while_followed(clients: Clients, prefill: int) -> bool:
    """Stop that process for now, and see whether the decode worker waits for what it was about to send: then it has
    something that does not end by itself. If not, let it go on."""
    os.kill(prefill, signal.SIGSTOP)
    over = time.monotonic() + FOLLOWED_S
    while clients.value("tandem_worker_running", worker="decode-0") > 0:
        if time.monotonic() > over:
            return True
    os.kill(prefill, signal.SIGCONT)
    return False


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


def gpus(watch: Watch, clients: Clients, driver: Path) -> None:
    with watch.scenario("gpu"):
        pynvml.write(driver, [pynvml.H200])
        clients.until("tandem_gpu_power_watts", 150, gpu="GPU-1")
        pynvml.write(driver, [pynvml.H200 | {"busy_percent": 90, "power_mw": 655_500}])
        clients.until("tandem_gpu_power_watts", 655.5, gpu="GPU-1")
    shown = ("utilization_ratio", "memory_used_bytes", "memory_bytes", "power_watts")
    assert [clients.value(f"tandem_gpu_{name}", gpu="GPU-1") for name in shown] == [0.9, 2**36, 2**37, 655.5]
