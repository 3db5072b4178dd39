"""What the offload tier is worth: time to first token of a prompt whose worker was killed, against computing it anew.

Two prefill workers and a decode worker. Each repetition sends a new prompt to the first, kills that one with SIGKILL
and sends the same prompt again: the second worker fetches the blocks that outlived the first and computes the rest.
Cold and fetched are one pair, measured within seconds of each other on the same machine.

And whether one tenant can tell from the clock what another has cached: the same prompt that the other has sent, and one
that nobody has, in random order.
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
MISS, MISSES = 512, 30  # tokens of a prompt, pairs
POLL_S = 0.05


def measure(model: Path, config: Config) -> list[Figure]:
    vocab_size = load_architecture(model).vocab_size
    # the default would have the decode worker, which has all of it, compute the prompt's end
    server = Server(model, config.dtype, "--prefill", "2", "--placement", "least_loaded")
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
        misses = [_misses(server.url, vocab_size) for _ in range(MISSES)]
    finally:
        server.stop()
    (cold_s, cold_spread), (fetched_s, fetched_spread), (ratio, spread) = map(median, (cold, fetched, ratios))
    miss, miss_spread = median(misses)
    name = f"time to first token, {PROMPT} tokens"
    return [
        Figure("tier", f"{name}, computed", 1e3 * cold_s, "ms", spread=cold_spread),
        Figure("tier", f"{name}, fetched after SIGKILL", 1e3 * fetched_s, "ms", spread=fetched_spread),
        Figure("tier", f"fetched / computed, median of {REPETITIONS} pairs", ratio, "x", spread=spread),
        Figure(
            "tier", f"a miss that another tenant has cached / nobody has, {MISSES} pairs", miss, "x", spread=miss_spread
        ),
    ]


def _misses(url: str, vocab_size: int) -> float:
    """Time to first token of a prompt that another tenant has cached / of one that nobody has."""
    cached, fresh = _prompt(vocab_size, MISS), _prompt(vocab_size, MISS)
    stream(url, cached, 2, "another tenant")
    order = random.sample([cached, fresh], 2)
    times = {id(prompt): stream(url, prompt, 2)[0] for prompt in order}
    return times[id(cached)] / times[id(fresh)]


def _prompt(vocab_size: int, length: int = PROMPT) -> list[int]:
    return random.choices(range(100, min(vocab_size, 30_000)), k=length)


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
