"""The whole way, over HTTP, disaggregated: time to first token, the handoff's cost, time between tokens.

Starts `tandem serve` as a user would. The exposed part of a handoff is what the second token waits longer than the ones
after it; the rest of the transfer is hidden behind the prefill that produces it.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from cluster.config import Config
from cluster.errors import StartupError
from deploy.bench.engine import PREFILL, Cost
from deploy.bench.machine import Machine
from deploy.bench.report import Figure, median
from workers.architecture import layout as model_layout
from workers.architecture import load_architecture

NEW = 24
REPETITIONS = 5
START_S = 180.0
STOP_S = 60.0


def measure(model: Path, config: Config, machine: Machine) -> list[Figure]:
    architecture = load_architecture(model)
    layout = model_layout(architecture, config.dtype, config.block_size)
    cost = Cost(architecture, layout.itemsize, layout.token_bytes)
    server = Server(model, config.dtype)
    try:
        prompts = [
            random.choices(range(100, min(architecture.vocab_size, 30_000)), k=PREFILL) for _ in range(REPETITIONS + 1)
        ]
        runs = [stream(server.url, prompt, NEW) for prompt in prompts][1:]
    finally:
        server.stop()
    ttft, ttft_spread = median([times[0] for times in runs])
    gaps = [[b - a for a, b in itertools.pairwise(times)] for times in runs]
    between, between_spread = median([median(g[1:])[0] for g in gaps])
    exposed, exposed_spread = median([max(0.0, g[0] - between) for g in gaps])
    prefill_s = machine.roofline_s(cost.flop(PREFILL, 1, PREFILL**2 / 2), cost.weight_bytes)
    decode_s = machine.roofline_s(cost.flop(1, 1, PREFILL), cost.weight_bytes + PREFILL * cost.token_bytes)
    moved = PREFILL * layout.token_bytes
    return [
        Figure("serve", f"time to first token, {PREFILL} tokens", 1e3 * ttft, "ms", 1e3 * prefill_s, ttft_spread, True),
        Figure("serve", "time between tokens", 1e3 * between, "ms", 1e3 * decode_s, between_spread, True),
        # in and out of the arena: each byte is read and written twice
        Figure(
            "serve", f"handoff of {moved / 1e6:.0f} MB, exposed", 1e3 * exposed, "ms", 1e3 * 4 * moved / machine.copy,
            exposed_spread, True,
        ),
    ]  # fmt: skip


class Server:
    """`tandem serve` in a process of its own."""

    def __init__(self, model: Path, dtype: str, *flags: str) -> None:
        command = [sys.executable, "-m", "deploy.cli", "serve", str(model), "--dtype", dtype, "--port", "0", *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        deadline, lines = time.monotonic() + START_S, []
        for line in self._process.stdout:  # ends when the process does
            lines.append(line)
            if found := re.search(r"curl (http://[\d.:]+)/v1", line):
                self.url = found[1]
                return
            if time.monotonic() > deadline:
                break
        self.stop()
        raise StartupError(f"tandem serve did not start: {''.join(lines[-3:])}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def stream(url: str, prompt: list[int], new: int, cache_salt: str = "bench") -> list[float]:
    """Seconds from the request to each of `new` tokens."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_salt": cache_salt}
    body |= {"stream": True, "return_token_ids": True}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=START_S)
    start, times = time.perf_counter(), []
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise StartupError(f"the server answered {response.status}: {response.read()[:200]!r}")
    for line in response:
        if line.startswith(b"data: {"):
            times += [time.perf_counter() - start] * len(json.loads(line[6:])["choices"][0].get("token_ids", []))
    connection.close()
    return times
