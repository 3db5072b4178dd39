"""What prefix-aware placement is worth on a recorded trace, and what a killed router costs, on a real deployment.

Eight sim workers (their time passes, their tokens come out of the KV that they read back) serve the trace: its prompts
with blocks of BLOCK tokens and its rate SPEED times as high, so that two cores can carry the bytes. The default
placement and round robin take turns, each time in a fresh deployment. The block stores are kept too small to hide a bad
choice. Then the router is killed with SIGKILL under load: how long until another answers, how long until that one's
prefix map is level with the old one's, and whether what comes after it is right.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from cluster.config import Config
from cluster.errors import StartupError
from deploy.bench.deployed import deployed, router_pid, status
from deploy.bench.report import Figure, median
from deploy.bench.serve import START_S, Server
from loadtests.replay import Outcome, prompt, replay, summary
from loadtests.simulator.trace import Trace, load
from loadtests.simulator.transform import faster, limit, resized

BLOCK = 32  # tokens that a block of the trace becomes
OUTPUTS = 0.02  # parts of the trace's outputs
SPEED = 4.0
REQUESTS = 800
ROUNDS = 2  # of both policies
PROBES, PROBE_TOKENS = 6, 12  # prompts whose answers are compared
KILLED_AFTER_S, LOAD_S = 2.0, 20.0
LEVEL = 0.95  # part of the blocks that the map had
POLL_S = 0.02
SETTINGS: dict[str, Any] = {
    "runner": "sim",
    "sim_ms": [2.0, 0.3, 0.0],  # 3,300 prompt tokens a second
    "prefill": 4,
    "decode": 4,
    "store_memory": 4 * 2**20,
    "autoscaling": "fixed",
}


def measure(model: Path, config: Config, trace: Path) -> list[Figure]:
    """Raises StartupError when a request of an undisturbed run fails, or one after the router's return."""
    whole = faster(resized(load(trace), BLOCK, OUTPUTS), SPEED)
    replayed = limit(whole, REQUESTS)
    runs: dict[str, list[dict[str, float]]] = {"least_time": [], "round_robin": []}
    for number in range(2 * ROUNDS):
        policy = ("least_time", "round_robin", "round_robin", "least_time")[number % 4]
        with deployed(model, config.dtype, SETTINGS | {"placement": policy}) as server:
            figures = summary(asyncio.run(replay(replayed, server.url)))
            if figures["failures"]:
                raise StartupError(f"{figures['failures']:.0f} requests failed under {policy}; is the machine busy?")
            runs[policy].append(figures)
            if number == 2 * ROUNDS - 1:
                killed = asyncio.run(_kill(server, whole))
    return [*_compared(runs), *killed]


def _compared(runs: dict[str, list[dict[str, float]]]) -> list[Figure]:
    figures = []
    for policy, results in runs.items():
        for key, name, unit, scale in (
            ("hit_ratio", "prompt tokens found in a cache", "%", 100.0),
            ("ttft_mean_ms", "time to first token, mean", "ms", 1.0),
            ("ttft_p90_ms", "time to first token, P90", "ms", 1.0),
            ("late_p99_ms", "requests left the client late, P99", "ms", 1.0),
        ):
            value, spread = median([scale * result[key] for result in results])
            lower = key != "hit_ratio"
            figures.append(Figure("routing", f"{policy}: {name}", value, unit, spread=spread, lower_is_better=lower))
    pairs = zip(runs["round_robin"], runs["least_time"], strict=True)
    gain, spread = median([other["ttft_mean_ms"] / own["ttft_mean_ms"] for other, own in pairs])
    return [*figures, Figure("routing", "mean time to first token, round_robin / least_time", gain, "x", spread=spread)]


async def _kill(server: Server, whole: Trace) -> list[Figure]:
    """The requests after those that were replayed are the load."""
    requests = whole.requests[REQUESTS:]
    start_s = requests[0].arrival_s
    load_ = tuple(r._replace(arrival_s=r.arrival_s - start_s) for r in requests if r.arrival_s < start_s + LOAD_S)
    probes = [prompt(r, BLOCK) for r in whole.requests[:PROBES]]
    async with httpx.AsyncClient(base_url=server.url, timeout=START_S) as client:
        before = [await _answer(client, probe) for probe in probes]
        state = status(server.url)
        old, level = state["router"], LEVEL * state["prefix_map"]["blocks"]
        begun_s = time.perf_counter()
        replaying = asyncio.create_task(replay(dataclasses.replace(whole, requests=load_), server.url))
        await asyncio.sleep(KILLED_AFTER_S)
        os.kill(router_pid(server), signal.SIGKILL)
        killed_s = time.perf_counter()
        back_s = await _await(client, lambda state: state["router"] != old)
        level_s = await _await(client, lambda state: state["prefix_map"]["blocks"] >= level)
        outcomes = await replaying
        after = [await _answer(client, probe) for probe in probes]
    if after != before:
        raise StartupError("prompts were answered differently after the router's return")
    return _disturbed(outcomes, back_s - begun_s, back_s - killed_s, level_s - back_s)


def _disturbed(outcomes: list[Outcome], back_s: float, away_s: float, level_s: float) -> list[Figure]:
    late = [outcome for outcome in outcomes if outcome.sent_s > back_s]
    failed = [outcome for outcome in late if outcome.error]
    if failed or not late:
        raise StartupError(f"{len(failed)} of {len(late)} requests after the router's return failed: {failed[:1]}")
    lost = sum(bool(outcome.error) for outcome in outcomes)
    return [
        Figure("routing", "router killed: another answers after", away_s, "s", lower_is_better=True),
        Figure("routing", "router killed: its map is level after another", level_s, "s", lower_is_better=True),
        Figure("routing", "router killed: requests that failed meanwhile", lost, "", lower_is_better=True),
        Figure("routing", "router killed: requests after its return, all right", len(late), ""),
    ]


async def _await(client: httpx.AsyncClient, condition: Any) -> float:
    """The moment at which the status met it. Raises StartupError."""
    deadline = time.perf_counter() + START_S
    while time.perf_counter() < deadline:
        try:
            response = await client.get("/status", timeout=1.0)
            if response.status_code == 200 and condition(response.json()):
                return time.perf_counter()
        except httpx.HTTPError:
            pass  # nobody answers yet
        await asyncio.sleep(POLL_S)
    raise StartupError(f"the router did not come back within {START_S:.0f} s")


async def _answer(client: httpx.AsyncClient, tokens: list[int]) -> list[int]:
    body = {
        "prompt": tokens,
        "max_tokens": PROBE_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise StartupError(f"the server answered {response.status_code}: {response.text[:200]}")
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids
