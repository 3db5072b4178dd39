"""What a step of a sharded worker costs besides its model, and what a pipeline gains.

overhead   the served model on two tensor ranks, decoding: the step's time on rank 0 by what it is spent on, and what a
           follower needs to turn a plan into chunks
pipeline   two stages of the simulator with a step's time as measured for the served model on one core: tokens per
           second with two steps in flight against the same engine with one, in turns

Real processes and messages in both.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cluster.codec import decode
from cluster.config import Config
from cluster.identity import Identity
from deploy.bench.engine import decoding, drain, step
from deploy.bench.report import Figure, median
from deploy.shards import assemble, follow
from kvstore.hashing import ModelKey
from workers import model_runner
from workers.engine import Engine
from workers.lead import Lead
from workers.model_runner import ModelRunner
from workers.runner import Runner
from workers.step_plan import Mirror
from workers.worker import WorkerSettings

BATCHES = (1, 32, 128)
CONTEXT, STEPS = 200, 40  # tokens of a decode's context; steps that are measured
STEP_MS, TOKEN_MS = 21.0, 2.2  # a step of SmolLM2 in bfloat16 on one core: 23, 37 and 93 ms at batches of 1, 8 and 32
FULL_BATCH, PIPELINE_STEPS, PAIRS = 64, 20, 5
MAX_CONTEXT = 2048
KV_MEMORY = 2**30


def measure(model: Path, config: Config) -> list[Figure]:
    torch.set_num_threads(1)  # every shard has one
    base = config.model_copy(update={"threads": 1, "prefill": 0, "kv_memory": KV_MEMORY})
    return _overhead(model, base) + _pipeline(model, base)


def _overhead(model: Path, config: Config) -> list[Figure]:
    config = config.model_copy(update={"max_sequences": max(BATCHES)})
    with _worker(config, model) as runner:
        figures = [_alone(runner, config, batch) for batch in BATCHES]
    config = config.model_copy(update={"decode_tp": 2})
    mirror = Mirror()
    plans: list[bytes] = []
    with _worker(config, model) as runner, _stopwatch() as spent:
        assert isinstance(runner, Lead)
        runner.send = _recorded(runner.send, plans)  # type: ignore[method-assign, assignment]
        for batch in BATCHES:
            engine = decoding(runner, config, batch, CONTEXT, STEPS + 2)
            _mirror_ms(mirror, plans)  # a follower has seen all plans
            spent.clear()
            for _ in range(STEPS):
                step(engine)
            figures += [*_spent(spent, batch), _mirror(mirror, plans, batch)]
            drain(engine)
    return figures


def _alone(runner: Runner, config: Config, batch: int) -> Figure:
    engine = decoding(runner, config, batch, CONTEXT, STEPS + 2)
    began = time.perf_counter()
    for _ in range(STEPS):
        step(engine)
    value = 1000 * (time.perf_counter() - began) / STEPS
    drain(engine)
    return Figure("shards", f"the whole step of one shard, one thread, batch {batch}", value, "ms")


def _recorded(send: Callable[[bytes], None], plans: list[bytes]) -> Callable[[bytes], None]:
    def both(plan: bytes) -> None:
        plans.append(plan)
        send(plan)

    return both


def _spent(spent: dict[str, float], batch: int) -> list[Figure]:
    """A step's milliseconds on rank 0, by what they are spent on."""
    parts = {
        "schedule and commit": spent["step"] - spent["submit"] - spent["collect"],
        "plan and encode": spent["submit"] - spent["send"] - spent["run"],
        "send": spent["send"],
        "gather and sample": spent["sample"],
    }
    each = {name: 1000 * seconds / STEPS for name, seconds in parts.items()}
    return [
        Figure("shards", f"step besides the model, tp=2, batch {batch}", sum(each.values()), "ms"),
        *(Figure("shards", f"  {part}, batch {batch}", value, "ms") for part, value in each.items()),
        Figure("shards", f"  the whole step, batch {batch}", 1000 * spent["step"] / STEPS, "ms"),
    ]


def _mirror(mirror: Mirror, plans: list[bytes], batch: int) -> Figure:
    """What a follower needs until it has a plan's chunks; it does so while rank 0 begins to compute."""
    value, spread = median(_mirror_ms(mirror, plans))
    return Figure("shards", f"  a follower's decode and mirror, batch {batch}", value, "ms", spread=spread)


def _mirror_ms(mirror: Mirror, plans: list[bytes]) -> list[float]:
    """Follow these plans, which are taken out of the list."""
    times = []
    while plans:
        plan = plans.pop(0)
        began = time.perf_counter()
        mirror.chunks(decode(plan))
        times.append(1000 * (time.perf_counter() - began))
    return times


def _pipeline(model: Path, config: Config) -> list[Figure]:
    update = {
        "runner": "sim",
        "decode_tp": 1,
        "decode_pp": 2,
        "sim_ms": (STEP_MS, TOKEN_MS, 0.0),
        "max_sequences": FULL_BATCH,
    }
    config = config.model_copy(update=update)
    rates: dict[int, list[float]] = {1: [], 2: []}  # steps in flight -> tokens per second
    with _worker(config, model) as runner:
        for pair in range(PAIRS):
            for depth in (1, 2) if pair % 2 else (2, 1):
                runner.depth = depth
                rates[depth].append(_rate(runner, config))
    ratio, spread = median([two / one for one, two in zip(rates[1], rates[2], strict=True)])
    name = f"decode, pp=2 simulated, {FULL_BATCH} sequences"
    return [
        Figure("shards", f"{name}, one step in flight", median(rates[1])[0], "tokens/s", spread=median(rates[1])[1]),
        Figure("shards", f"{name}, two", median(rates[2])[0], "tokens/s", spread=median(rates[2])[1]),
        Figure("shards", f"  two / one, median of {PAIRS} pairs", ratio, "x", spread=spread),
    ]


def _rate(runner: Runner, config: Config) -> float:
    engine = decoding(runner, config, FULL_BATCH, 32, PIPELINE_STEPS + 4)
    before, began = engine.counters.output_tokens_total, time.perf_counter()
    while engine.counters.output_tokens_total - before < FULL_BATCH * PIPELINE_STEPS:
        step(engine)
    rate = (engine.counters.output_tokens_total - before) / (time.perf_counter() - began)
    drain(engine)
    return rate


@contextlib.contextmanager
def _worker(config: Config, model: Path) -> Iterator[Runner]:
    """Rank 0 is this process, the others are its children."""
    identity = Identity("bench", "", secrets.token_hex(16), "127.0.0.1")
    key = ModelKey(b"bench", b"bench", config.dtype, config.block_size)
    settings = WorkerSettings("bench", "both", key, MAX_CONTEXT, identity, config)
    processes: list[BaseProcess] = []

    def start(address: str) -> list[int]:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started here
        tp, pp = config.grid("both")
        for rank in range(1, tp * pp):
            arguments = (settings, model, rank, address)
            process = multiprocessing.get_context("spawn").Process(target=follow, args=arguments, daemon=True)
            process.start()
            processes.append(process)
        return [process.pid or 0 for process in processes]

    assembled = assemble(settings, model, start)
    try:
        yield assembled.runner
    finally:
        if isinstance(assembled.runner, Lead):
            assembled.runner.close()
        for process in processes:
            process.join(10.0)


@contextlib.contextmanager
def _stopwatch() -> Iterator[dict[str, float]]:
    """Seconds spent in what a step consists of, while it is open. Calls are timed from outside: the product has no
    instrument for this."""
    timed: tuple[tuple[Any, str, str], ...] = (
        (Engine, "step", "step"),
        (Lead, "submit", "submit"),
        (Lead, "send", "send"),
        (Lead, "collect", "collect"),
        (ModelRunner, "run", "run"),
        (model_runner, "sample_slice", "sample"),
    )
    spent: dict[str, float] = defaultdict(float)
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in timed]
    for owner, name, label in timed:
        setattr(owner, name, _timed(getattr(owner, name), label, spent))
    try:
        yield spent
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(function: Callable[..., Any], label: str, spent: dict[str, float]) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spent[label] += time.perf_counter() - began

    return call
