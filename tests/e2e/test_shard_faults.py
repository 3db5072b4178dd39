"""Any one shard of a worker dies or stalls under load: the worker fails as one, restarts as one, no request notices.

Real processes, real messages, real blocks; only the model is the simulated one, whose tokens depend on every KV byte of
every shard.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.sim_oracle import Oracle
from tests.serving import Served, serving, wait_until
from workers.architecture import load_architecture

USERS = 6
BACK_S = 90
STALLED_S = 5  # longest step; a step of these workers takes a few milliseconds
SETTINGS = {
    "TANDEM_SIM_MS": "4,0.1,0", "TANDEM_STEP_TIMEOUT": str(STALLED_S),
    "TANDEM_WORKER_TIMEOUT": str(STALLED_S), "TANDEM_STORE_MEMORY": str(2**24), "TANDEM_TOKEN_BUDGET": "64",
}  # fmt: skip
# not by time: steps this short are soonest computed where they are decoded, and nothing would be handed over
GRIDS = ("--prefill-tp", "2", "--decode-tp", "2", "--decode-pp", "2", "--placement", "least_loaded")


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    """A prefill worker of 2 x 1 shards and a decode worker of 2 x 2."""
    with serving(str(tiny), "--runner", "sim", *GRIDS, **SETTINGS) as made:
        yield made


@contextmanager
def load(served: Served, model: Path) -> Iterator[None]:
    """Users who ask one thing after the other, from before the fault until it is over; every answer must be right."""
    oracle, stop, begun = Oracle(load_architecture(model).vocab_size), threading.Event(), threading.Semaphore(0)

    def user(seed: int) -> int:
        rng, asked = random.Random(seed), 0
        while not stop.is_set():
            prompt = [rng.randrange(10, 400) for _ in range(rng.choice((3, 40, 300)))]
            new = rng.choice((1, 20, 120))
            assert served.complete(prompt, new, True, ignore_eos=True).tokens == oracle(prompt, new)
            asked += 1
            begun.release()
        return asked

    with ThreadPoolExecutor(USERS) as pool:
        users: list[Future[int]] = [pool.submit(user, random.randrange(2**32)) for _ in range(USERS)]
        try:
            for _ in range(USERS):
                assert begun.acquire(timeout=60)
            yield
        finally:
            stop.set()
        assert all(user.result(timeout=120) > 0 for user in users)


def worker(served: Served, name: str) -> dict[str, Any] | None:
    """What is known of it, while anything is."""
    return next((w for w in served.status()["workers"] if w["id"] == name), None)


def back(served: Served, before: dict[str, Any]) -> bool:
    """It has restarted as one: a new incarnation of new processes, and none of the old ones is left."""
    now = worker(served, before["id"])
    return (
        now is not None
        and now["connected"]
        and now["incarnation"] != before["incarnation"]
        and not set(now["shard_pids"]) & set(before["shard_pids"])
        and not any(map(runs, before["shard_pids"]))
    )


def unharmed(served: Served, before: dict[str, Any]) -> bool:
    """It serves again as the one it was, with all of its shards."""
    now = worker(served, before["id"])
    same = now is not None and now["connected"] and now["incarnation"] == before["incarnation"]
    return same and all(map(runs, before["shard_pids"]))


def connected(served: Served, name: str) -> bool:
    return bool((worker(served, name) or {}).get("connected"))


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "rank"), [("prefill-0", 1), *(("decode-0", rank) for rank in range(4))])
def test_a_killed_shard_costs_no_request_and_the_worker_comes_back(
    served: Served, tiny: Path, name: str, rank: int
) -> None:
    before = worker(served, name)
    assert before is not None
    with load(served, tiny):
        os.kill(before["shard_pids"][rank], signal.SIGKILL)
        wait_until(lambda: back(served, before), BACK_S, lambda: str((before, served.status())))
    check_serves(served, tiny)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "rank"), [("decode-0", 3), ("decode-0", 0)])
def test_a_stalled_shard_costs_no_request_and_the_worker_comes_back(
    served: Served, tiny: Path, name: str, rank: int
) -> None:
    """SIGSTOP: no connection breaks. A follower is given up by rank 0. Rank 0 is given up by the router, and by its
    followers if one of them waits for it in a step; else all of them are there when it goes on."""
    before = worker(served, name)
    assert before is not None
    stopped = before["shard_pids"][rank]
    with load(served, tiny):
        os.kill(stopped, signal.SIGSTOP)
        try:
            if rank == 0:
                wait_until(lambda: not connected(served, name), BACK_S)
                os.kill(stopped, signal.SIGCONT)
            restarted = lambda: back(served, before) or (rank == 0 and unharmed(served, before))  # noqa: E731
            wait_until(restarted, BACK_S, lambda: str((before, served.status())))
        finally:
            if runs(stopped):
                os.kill(stopped, signal.SIGCONT)
    check_serves(served, tiny)


def check_serves(served: Served, model: Path) -> None:
    """All of it, by both workers, and nobody keeps a block."""
    wait_until(lambda: connected(served, "prefill-0") and connected(served, "decode-0"), BACK_S)
    before = served.metric("tandem_handoff_bytes_total")
    prompt = [random.randrange(10, 400) for _ in range(50)]
    assert served.complete(prompt, 8, ignore_eos=True).tokens == Oracle(load_architecture(model).vocab_size)(prompt, 8)
    assert served.metric("tandem_handoff_bytes_total") > before
    served.assert_no_leaks()
