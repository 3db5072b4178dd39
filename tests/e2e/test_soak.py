"""Requests, one in twenty of which meets a fault: every answer is right and nothing is left behind.

Real processes, real Redis, real blocks; only the model is the simulated one, whose output depends on every KV byte it
reads back. The faults come from a seed. SOAK_REQUESTS sets how many requests there are; `make soak` asks for 5,000.
"""

import contextlib
import os
import queue
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from kvstore.redis_server import EmbeddedRedis
from tests.e2e.sim_oracle import Oracle
from tests.serving import Served, serving, wait_until
from workers.architecture import load_architecture

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "120"))
FAULTS = 0.05
USERS = 8
HEALTHY_S = 90


class Prompts:
    """Conversations that share beginnings, as real traffic does."""

    def __init__(self, rng: random.Random, vocab_size: int) -> None:
        self._rng, self._vocab = rng, vocab_size
        self._roots = [self._tokens(rng.randrange(8, 400)) for _ in range(20)]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(10, self._vocab) for _ in range(count)]

    def next(self) -> tuple[list[int], int]:
        root = self._rng.choice(self._roots)
        prompt = root[: self._rng.randrange(1, len(root) + 1)] if self._rng.random() < 0.2 else root
        prompt = prompt + self._tokens(self._rng.choice((0, 1, 16, 40, 200)))
        if self._rng.random() < 0.2 and len(prompt) < 1200:
            self._roots[self._rng.randrange(len(self._roots))] = prompt
        return prompt, self._rng.choice((1, 2, 16, 40))


class Chaos:
    """One fault at a time, each when the cluster is whole: what is tested is a failure, not the lack of machines."""

    def __init__(self, served: Served, redis_server: EmbeddedRedis, rng: random.Random) -> None:
        self._served, self._redis, self._rng = served, redis_server, rng
        self._orders: queue.Queue[str | None] = queue.Queue()
        self.done: Counter[str] = Counter()
        self._kinds: dict[str, Callable[[], None]] = {
            "kill worker": lambda: self._signal(self._worker(), signal.SIGKILL),
            "stop worker": lambda: self._pause(self._worker()),
            "kill store": lambda: self._signal(self._store(), signal.SIGKILL),
            "stop store": lambda: self._pause(self._store()),
            "flush Redis": self._flush,
            "lying index": self._lie,
        }

    def order(self, kind: str) -> None:
        self._orders.put(kind)

    def keep_pace(self) -> None:
        """Traffic waits for the faults, or most of them would come when it is over."""
        wait_until(lambda: self._orders.qsize() < 2, 3 * HEALTHY_S)

    @property
    def kinds(self) -> list[str]:
        return list(self._kinds)

    def run(self) -> None:
        while (kind := self._orders.get()) is not None:
            wait_until(self.healthy, HEALTHY_S, lambda: str(self._served.status()))
            self._kinds[kind]()
            self.done[kind] += 1
        wait_until(self.healthy, HEALTHY_S, lambda: str(self._served.status()))

    def end(self) -> None:
        self._orders.put(None)

    def healthy(self) -> bool:
        try:
            state = self._served.status()
        except (OSError, ValueError):
            return False
        workers, stores = state["workers"], state["stores"]
        return (
            len(workers) == 4
            and all(w["connected"] for w in workers)
            and len(stores) == 2
            and all(s["answers"] for s in stores)
        )

    def _worker(self) -> int:
        """Any of its shards."""
        return self._rng.choice(self._rng.choice(self._served.status()["workers"])["shard_pids"])

    def _store(self) -> int:
        return self._rng.choice(self._served.status()["stores"])["pid"]

    def _signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the status was older than its restart
            os.kill(pid, number)

    def _pause(self, pid: int) -> None:
        self._signal(pid, signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.1, 3.0))  # the fault itself, not a wait for something
        self._signal(pid, signal.SIGCONT)

    def _flush(self) -> None:
        with redis.Redis.from_url(self._redis.url) as client:
            client.flushall()

    def _lie(self) -> None:
        """Redirect what the index says to owners, epochs and generations that are made up."""
        with redis.Redis.from_url(self._redis.url) as client:
            keys = list(client.scan_iter("tandem:*:b:*", count=500))[:200]
            for key in keys:
                for store in client.hkeys(key):
                    lie = f"{self._rng.randrange(2**52)} {self._rng.randrange(100)}"
                    client.hset(key, self._rng.choice((store, b"nobody")), lie)


def request(served: Served, prompt: list[int], new: int, leave_after: int | None) -> list[int] | None:
    """The tokens, or None of a client that left."""
    if leave_after is None:
        return served.complete(prompt, new, stream=True, ignore_eos=True).tokens
    body = {"prompt": prompt, "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number >= leave_after:
                break
    return None


@pytest.mark.timeout(300 + REQUESTS)
def test_a_long_run_with_faults_is_exact_and_leaks_nothing(tiny: Path, tmp_path: Path) -> None:
    rng = random.Random(20_26)
    vocab_size = load_architecture(tiny).vocab_size
    oracle, prompts = Oracle(vocab_size), Prompts(rng, vocab_size)
    with contextlib.closing(EmbeddedRedis()) as redis_server:
        settings = {
            "TANDEM_REDIS_URL": redis_server.url,
            "TANDEM_DISK": str(tmp_path / "tier"),
            "TANDEM_DISK_MEMORY": str(2**20),
            "TANDEM_STORE_MEMORY": str(1_500_000),  # about 1,400 blocks: evicted all the time
            "TANDEM_MAX_SEQUENCES": "8",
            "TANDEM_STORES": "2",
            "TANDEM_SIM_MS": "2,0.2,0",  # or computing would always be predicted to be faster than fetching
        }
        cut = ("--prefill", "2", "--decode", "2", "--prefill-tp", "2", "--decode-pp", "2")
        with serving(str(tiny), "--runner", "sim", *cut, **settings) as served:
            chaos = Chaos(served, redis_server, rng)
            cases = []
            for _ in range(REQUESTS):
                prompt, new = prompts.next()
                faulty = rng.random() < FAULTS
                leaves = rng.randrange(6) if faulty and rng.random() < 0.75 else None
                cases.append((prompt, new, leaves, rng.choice(chaos.kinds) if faulty and leaves is None else None))

            def one(case: tuple[list[int], int, int | None, str | None]) -> list[int] | None:
                prompt, new, leaves, fault = case
                chaos.keep_pace()
                if fault is not None:
                    chaos.order(fault)
                return request(served, prompt, new, leaves)

            with ThreadPoolExecutor(USERS + 1) as pool:
                faults = pool.submit(chaos.run)
                answers = list(pool.map(one, cases))
                chaos.end()
                faults.result(timeout=4 * HEALTHY_S)
            assert served.metric("tandem_fetched_tokens_total") > 0
            served.assert_no_leaks(within=60)
    wrong = [
        index
        for index, ((prompt, new, leaves, _), tokens) in enumerate(zip(cases, answers, strict=True))
        if leaves is None and tokens != oracle(prompt, new)
    ]
    assert wrong == []
    assert sum(chaos.done.values()) == sum(fault is not None for *_, fault in cases)
