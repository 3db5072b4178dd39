"""What a user sees of a running deployment: real text, real processes, real bytes, exact under load and failure."""

import itertools
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.oracle import greedy
from tests.serving import (
    MARK,
    START_S,
    Completion,
    Served,
    called,
    command,
    environment,
    marked,
    serving,
    wait_until,
)

BOTH = ("prefill-0", "decode-0")
TOKEN_BYTES = 46_080  # SmolLM2 in fp32: 30 layers x 2 x 3 heads x 64 x 4 bytes


# ------------------------------------------------------------------------------------------------------- tiny model
def mixed(count: int, seed: int) -> list[tuple[tuple[int, ...], int]]:
    """(prompt, new tokens) of mixed lengths, 8 to 1,800 and 1 to 200."""
    rng = random.Random(seed)
    lengths = [int(8 * (1800 / 8) ** (i / (count - 1))) for i in range(count)]
    return [(tuple(rng.randrange(10, 400) for _ in range(n)), rng.choice((1, 2, 17, 60, 200))) for n in lengths]


@pytest.mark.timeout(400)
def test_32_concurrent_streams_of_mixed_lengths_are_all_exact(small: Served, tiny: Path) -> None:
    cases = mixed(32, seed=1)
    with ThreadPoolExecutor(len(cases)) as pool:
        done = list(pool.map(lambda case: small.complete(list(case[0]), case[1], True, ignore_eos=True), cases))
    for (prompt, new), result in zip(cases, done, strict=True):
        assert result.tokens == greedy(tiny, prompt, new), f"{len(prompt)} prompt tokens, {new} new"
    small.assert_no_leaks()


@pytest.mark.parametrize("after_chunks", [0, 1, 20])
def test_a_client_that_leaves_frees_everything(small: Served, after_chunks: int) -> None:
    body = {"prompt": list(range(10, 300)), "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{small.url}/v1/completions", json=body, timeout=60) as response:
        for _ in itertools.islice(response.iter_lines(), after_chunks):
            pass
    small.assert_no_leaks(within=8)  # far less than the hold on a handoff: it must have been given back


@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_killed_worker_loses_no_request_and_comes_back(small: Served, tiny: Path, victim: str) -> None:
    cases = [(tuple(range(10 + i, 400)), 300) for i in range(6)]
    started = threading.Semaphore(0)

    def one(case: tuple[tuple[int, ...], int]) -> Completion:
        started.release()
        return small.complete(list(case[0]), case[1], True, ignore_eos=True)

    before = small.pid(victim)
    with ThreadPoolExecutor(len(cases)) as pool:
        futures = [pool.submit(one, case) for case in cases]
        wait_until(lambda: any(w["running"] for w in small.status()["workers"]), 30)
        os.kill(before, signal.SIGKILL)
        results = [future.result(timeout=120) for future in futures]
    for (prompt, new), result in zip(cases, results, strict=True):
        assert result.tokens == greedy(tiny, prompt, new)
    # its old registration runs out after 10 s, and then it is not listed until the new process registers
    back = lambda: small.connected(*BOTH) and small.pid(victim) != before  # noqa: E731
    wait_until(back, START_S, lambda: str(small.status()))
    assert small.complete([5, 6, 7], 8, ignore_eos=True).tokens == greedy(tiny, (5, 6, 7), 8)
    small.assert_no_leaks()


def test_a_killed_store_costs_time_but_no_token(small: Served, tiny: Path) -> None:
    (store,) = small.status()["stores"]
    os.kill(store["pid"], signal.SIGKILL)
    prompt = tuple(range(20, 150))
    assert small.complete(list(prompt), 40, ignore_eos=True).tokens == greedy(tiny, prompt, 40)

    def handed_over() -> bool:
        before = small.metric("tandem_handoff_bytes_total")
        small.complete([random.randrange(10, 400) for _ in range(40)], 4, ignore_eos=True)
        return small.metric("tandem_handoff_bytes_total") > before

    wait_until(handed_over, 60, lambda: str(small.status()))
    small.assert_no_leaks()


def test_a_killed_redis_stops_nothing_and_comes_back(small: Served, tiny: Path) -> None:
    (redis,) = [p for p in psutil.Process(small.process.pid).children() if p.name() == "redis-server"]
    redis.kill()
    for start in range(3):
        prompt = tuple(range(30 + start, 90))
        assert small.complete(list(prompt), 20, ignore_eos=True).tokens == greedy(tiny, prompt, 20)
    known = {w["id"] for w in small.status()["workers"]}
    assert known == {"prefill-0", "decode-0"}
    wait_until(lambda: small.status()["redis"] == "reachable", 30, lambda: str(small.status()))
    small.assert_no_leaks()


def test_a_killed_router_ends_its_streams_leaks_nothing_and_comes_back(small: Served, tiny: Path) -> None:
    body = {"prompt": list(range(10, 200)), "max_tokens": 1500, "stream": True, "ignore_eos": True}
    (router,) = [p for p in marked(small.mark) if called(p, "ServeReplica")]
    with httpx.stream("POST", f"{small.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        router.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in lines:
                pass

    def serves() -> bool:
        return small.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 8}).status_code == 200

    wait_until(serves, 60)
    small.assert_no_leaks()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_hung_worker_loses_no_request(small: Served, tiny: Path, victim: str) -> None:
    """SIGSTOP: no connection breaks, so only silence gives it away."""
    prompt = tuple(random.Random(victim).randrange(10, 400) for _ in range(1500))
    wait_until(lambda: small.connected(*BOTH), START_S)
    pid = small.pid(victim)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert small.complete(list(prompt), 30, ignore_eos=True).tokens == greedy(tiny, prompt, 30)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: small.connected(*BOTH), START_S)
    assert small.complete([5, 6, 7], 8, ignore_eos=True).tokens == greedy(tiny, (5, 6, 7), 8)
    small.assert_no_leaks()


def test_status_shows_the_workers(small: Served) -> None:
    shown = subprocess.run(
        command("status", "--url", small.url), env=environment(small.mark), capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0
    for word in ("prefill-0", "decode-0", str(small.pid("decode-0")), "Redis is reachable"):
        assert word in shown.stdout


@pytest.fixture(scope="module")
def slow(tiny: Path) -> Iterator[Served]:
    """One worker, one sequence at a time, a tenth of a second per token."""
    slowly = {"TANDEM_SIM_MS": "0,100,0", "TANDEM_TOKEN_BUDGET": "16"}
    narrow = {"TANDEM_MAX_QUEUE": "2", "TANDEM_MAX_SEQUENCES": "1"}
    with serving(str(tiny), "--runner", "sim", "--prefill", "0", **slowly, **narrow) as served:
        yield served


def test_a_full_queue_is_a_429_with_retry_after(slow: Served) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": True}
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda _: slow.post("/v1/completions", body), range(12)))
    assert {r.status_code for r in responses} == {200, 429}
    refused = next(r for r in responses if r.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["type"] == "rate_limit_error"
    slow.assert_no_leaks()


def test_a_request_outlives_the_proxy_that_took_it(slow: Served) -> None:
    """Serve replaces HAProxy whenever its routers change, the last time right after the start: the old process gets
    this signal and has to finish what it has, however long that takes."""
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(slow.complete, list(range(10, 130)), 2, ignore_eos=True)  # 12 s to its first byte
        wait_until(lambda: any(w["running"] for w in slow.status()["workers"]), 20)
        proxies = [p for p in marked(slow.mark) if called(p, "haproxy")]
        assert proxies
        for proxy in proxies:
            proxy.send_signal(signal.SIGUSR1)
        assert len(late.result(timeout=60).tokens) == 2


def test_scarce_memory_preempts_and_recomputes_but_changes_no_token(tiny: Path) -> None:
    """KV caches for little more than one longest sequence, and a store too small for most handoffs."""
    scarce = {"TANDEM_KV_MEMORY": str(1_200_000), "TANDEM_STORE_MEMORY": str(500_000)}  # 2,343 and about 960 tokens
    cases = [(tuple(random.Random(i).randrange(10, 400) for _ in range(300 + 60 * i)), 250) for i in range(8)]
    with serving(str(tiny), "--dtype", "float32", **scarce) as served:
        with ThreadPoolExecutor(len(cases)) as pool:
            done = list(pool.map(lambda case: served.complete(list(case[0]), case[1], True, ignore_eos=True), cases))
        assert served.metric("tandem_preemptions_total") > 0
        served.assert_no_leaks()
    for (prompt, new), result in zip(cases, done, strict=True):
        assert result.tokens == greedy(tiny, prompt, new)


def test_everything_listens_on_loopback_only(small: Served) -> None:
    """But for Ray's own ports, which its token guards."""
    every = psutil.Process(small.process.pid).children(recursive=True)
    own = {p.pid: p for p in [*every, *marked(small.mark)] if p.name() in ("haproxy", "redis-server")}
    listening = [(p.name(), c.laddr) for p in own.values() for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert {name for name, _ in listening} == {"haproxy", "redis-server"}
    assert [place for place in listening if place[1].ip != "127.0.0.1"] == []


def test_the_test_harness_sees_processes(small: Served) -> None:
    """A leak check that finds nothing must be able to find something."""
    assert small.process.pid in {p.pid for p in marked(small.mark)}
    assert len(marked(small.mark)) > 5
    assert MARK in environment("x")
