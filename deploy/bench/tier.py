"""What the offload tier is worth: time to first token of a prompt whose worker was killed, against computing it anew.

Two prefill workers and a decode worker. Each repetition sends a new prompt to the first, kills that one with SIGKILL
and sends the same prompt again: the second worker fetches the blocks that outlived the first and computes the rest.
Cold and fetched are one pair, measured within seconds of each other on the same machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.errors import StartupError
from deploy.bench.report import Figure, median
from deploy.bench.serve import START_S, Server, stream
from workers.architecture import load_architecture

PROMPT = 2_007  # 125 full blocks and 7 tokens that only a computation gives
REPETITIONS = 10
VICTIM = "prefill-0"  # of two idle workers the one with the smaller id is placed first
POLL_S = 0.05


def measure(model: Path, config: Config) -> list[Figure]:
    vocab_size = load_architecture(model).vocab_size
    server = Server(model, config.dtype, "--prefill", "2")
    cold, fetched, ratios = [], [], []
    try:
        stream(server.url, _prompt(vocab_size), 2)  # warms up
        for _ in range(REPETITIONS):
            prompt = _prompt(vocab_size)
            cold.append(stream(server.url, prompt, 2)[0])
            os.kill(_worker(server.url)["pid"], signal.SIGKILL)
            _await(server.url, connected=False)
            fetched.append(stream(server.url, prompt, 2)[0])
            ratios.append(fetched[-1] / cold[-1])
            _await(server.url, connected=True)
    finally:
        server.stop()
    (cold_s, cold_spread), (fetched_s, fetched_spread), (ratio, spread) = map(median, (cold, fetched, ratios))
    name = f"time to first token, {PROMPT} tokens"
    return [
        Figure("tier", f"{name}, computed", 1e3 * cold_s, "ms", spread=cold_spread),
        Figure("tier", f"{name}, fetched after SIGKILL", 1e3 * fetched_s, "ms", spread=fetched_spread),
        Figure("tier", f"fetched / computed, median of {REPETITIONS} pairs", ratio, "x", spread=spread),
    ]


def _prompt(vocab_size: int) -> list[int]:
    return random.choices(range(100, min(vocab_size, 30_000)), k=PROMPT)


def _worker(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/status", timeout=10.0) as response:
        workers: list[dict[str, Any]] = json.load(response)["workers"]
    return next((worker for worker in workers if worker["id"] == VICTIM), {"connected": False})


def _await(url: str, connected: bool) -> None:
    deadline = time.monotonic() + START_S
    while _worker(url)["connected"] is not connected:
        if time.monotonic() > deadline:
            raise StartupError(f"{VICTIM} did not {'come back' if connected else 'go'} within {START_S:.0f} s")
        time.sleep(POLL_S)
