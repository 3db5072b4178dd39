"""Roles that follow the traffic, and workers that come and go under it: no request is lost and every token is right.

Real processes, Ray actors, Redis and blocks; only the model is simulated.
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.policies import WANTED
from tests.e2e.sim_oracle import Oracle
from tests.serving import Served, serving, wait_until
from workers.architecture import load_architecture

POLICY = "tests.e2e.policies:as_the_file_says"
SIM_MS = "10,0.2,0"  # a step, a token, a token of context
SETTLE_S = 90.0

Kind = tuple[int, int]  # (prompt tokens, new tokens)
PREFILL_HEAVY, DECODE_HEAVY, MIXED = (480, 4), (20, 120), (100, 30)
# slow enough that what a machine has left does not matter: 16 prompts a second fill all four workers, 12 sequences one
SLOW = {"TANDEM_SIM_MS": "10,0.5,0", "TANDEM_ITL_SLO": "0.016"}
HOLD_S = 10.0  # the plan does not move roles back sooner


class Traffic:
    """Users who ask one thing after the other; what they ask changes with `kind`. Every answer is checked."""

    def __init__(self, served: Served, vocab_size: int, users: int, kind: Kind) -> None:
        self.kind = kind
        self.answered = 0
        self._served = served
        self._oracle = Oracle(vocab_size)
        self._vocab_size = vocab_size
        self._over = threading.Event()
        self._answers: list[tuple[list[int], int, list[int]]] = []  # (prompt, new, what came)
        self._pool = ThreadPoolExecutor(users)
        self._users: list[Future[None]] = [self._pool.submit(self._ask, seed) for seed in range(users)]

    def end(self) -> None:
        """Raises what any user met."""
        self._over.set()
        for user in self._users:
            user.result(120)
        self._pool.shutdown()
        wrong = [i for i, (prompt, new, tokens) in enumerate(self._answers) if tokens != self._oracle(prompt, new)]
        assert wrong == []

    def check(self) -> None:
        """Raises what a user has met so far."""
        for user in self._users:
            if user.done():
                user.result()

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._over.is_set():
            length, new = self.kind
            prompt = [rng.randrange(10, self._vocab_size) for _ in range(length)]
            self._answers.append((prompt, new, self._served.complete(prompt, new, stream=True, ignore_eos=True).tokens))
            self.answered += 1


@contextmanager
def traffic(served: Served, tiny: Path, users: int, kind: Kind) -> Iterator[Traffic]:
    made = Traffic(served, load_architecture(tiny).vocab_size, users, kind)
    try:
        yield made
    finally:
        made.end()


def roles(served: Served) -> list[str]:
    """Of the workers that are connected."""
    return sorted(worker["role"] for worker in served.status()["workers"] if worker["connected"])


def controller(served: Served) -> dict[str, Any]:
    info: dict[str, Any] | None = served.status()["controller"]
    assert info is not None, served.status()
    return info


def settle(served: Served, made: Traffic | None, condition: Callable[[], bool], seconds: float = SETTLE_S) -> float:
    """Wait for it, and see what users met meanwhile. Returns the seconds it took."""
    begun = time.monotonic()

    def met() -> bool:
        if made is not None:
            made.check()
        return condition()

    wait_until(met, seconds, lambda: json.dumps(served.status(), indent=1))
    return time.monotonic() - begun


def test_roles_follow_the_mix_of_the_traffic(tiny: Path, record_property: Callable[[str, Any], None]) -> None:
    counts = ("--prefill", "2", "--decode", "2")
    with (
        serving(str(tiny), "--runner", "sim", *counts, TANDEM_THREADS="1", **SLOW) as served,
        traffic(served, tiny, users=20, kind=PREFILL_HEAVY) as made,
    ):
        settle(served, made, lambda: roles(served).count("prefill") == 3)
        moved = time.monotonic()
        settle(served, made, lambda: time.monotonic() - moved > HOLD_S)
        made.kind = DECODE_HEAVY
        took = settle(served, made, lambda: roles(served).count("decode") >= 2)
        record_property("seconds until the ratio followed", took)
        assert controller(served)["moves_total"] == 2


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy") / "workers"


@pytest.fixture(scope="module")
def elastic(tiny: Path, wanted: Path) -> Iterator[Served]:
    """Two workers, none to four, as many as the file says."""
    wanted.write_text("2")
    settings = {
        "TANDEM_SIM_MS": SIM_MS,
        "TANDEM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
        WANTED: str(wanted),
    }
    arguments = ("--prefill", "0", "--decode", "2", "--scale", "0..4", "--autoscaling", POLICY)
    with serving(str(tiny), "--runner", "sim", *arguments, **settings) as served:
        yield served


def test_workers_come_and_go_under_load(elastic: Served, tiny: Path, wanted: Path) -> None:
    """One is killed while it starts and one while it drains."""
    with traffic(elastic, tiny, users=6, kind=MIXED) as made:
        settle(elastic, made, lambda: made.answered > 10)
        wanted.write_text("4")
        kill_one_that_starts(elastic)
        settle(elastic, made, lambda: len(roles(elastic)) == 4)
        assert controller(elastic)["starts_total"] >= 2

        made.kind = DECODE_HEAVY
        wanted.write_text("1")
        settle(elastic, made, lambda: controller(elastic)["draining"] > 0)
        kill_one_that_drains(elastic)
        settle(elastic, made, lambda: len(roles(elastic)) == 1)
        settle(elastic, made, lambda: controller(elastic)["stops_total"] == 3)
        assert controller(elastic)["last_drain_s"] > 0
    elastic.assert_no_leaks()


def kill_one_that_starts(served: Served) -> None:
    def actors() -> set[int]:
        return {p.pid for p in served.processes("ray::WorkerActor")}

    known = {worker["pid"] for worker in served.status()["workers"]}
    wait_until(lambda: bool(actors() - known), SETTLE_S)
    os.kill(min(actors() - known), signal.SIGKILL)


def kill_one_that_drains(served: Served) -> None:
    """By what the controller says of it: it has left the membership, but still answers."""
    event = next(event for event in reversed(controller(served)["events"]) if event.endswith(" drains"))
    os.kill(served.pid(event.split()[1]), signal.SIGKILL)


def test_scaled_to_zero_the_next_request_waits_for_a_worker(elastic: Served, tiny: Path, wanted: Path) -> None:
    wanted.write_text("1")
    wait_until(lambda: roles(elastic) == [], SETTLE_S, lambda: str(elastic.status()))
    prompt = list(range(20, 90))
    tokens = elastic.complete(prompt, 8, ignore_eos=True).tokens
    assert tokens == Oracle(load_architecture(tiny).vocab_size)(prompt, 8)
