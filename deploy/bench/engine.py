"""The engine in this process, aggregated: decode at several batch sizes, prefill, and time to first token."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

from cluster.config import Config
from cluster.messages import Generation, Sampling
from deploy.bench.machine import Machine
from deploy.bench.report import Figure, median
from workers.architecture import Architecture, load_architecture
from workers.engine import Engine
from workers.model_runner import ModelRunner
from workers.runner import Runner
from workers.sequence import Sequence
from workers.step import Step

BATCHES = (1, 8, 32)
CONTEXT = 200  # tokens of a decode's context
DECODE_STEPS = 24
PREFILL = 1024
MAX_CONTEXT = 2048
REPETITIONS = 5


def measure(model: Path, config: Config, machine: Machine) -> list[Figure]:
    architecture = load_architecture(model)
    runner = ModelRunner.load(
        model,
        dtype=config.dtype,
        block_size=config.block_size,
        kv_memory_bytes=config.kv_memory,
        max_context=MAX_CONTEXT,
    )
    cost = Cost(architecture, runner.layout.itemsize, runner.layout.token_bytes)
    figures = [_decode(runner, config, machine, cost, batch) for batch in BATCHES]
    return figures + _prefill(runner, config, machine, cost)


class Cost:
    """What one step must compute and read at least."""

    def __init__(self, architecture: Architecture, itemsize: int, token_bytes: int) -> None:
        a = architecture
        attention = (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim * a.hidden_size  # q, k, v, output
        self.layers = a.num_layers * (attention + 3 * a.hidden_size * a.intermediate_size)
        self.head = a.vocab_size * a.hidden_size
        self.attention = 4 * a.num_layers * a.num_heads * a.head_dim  # FLOP per (query, key)
        self.weight_bytes = (self.layers + self.head) * itemsize
        self.token_bytes = token_bytes

    def flop(self, tokens: int, sampled: int, pairs: float) -> float:
        return 2.0 * (tokens * self.layers + sampled * self.head) + self.attention * pairs


def _engine(runner: Runner, config: Config) -> Engine:
    return Engine(runner, token_budget=config.token_budget, max_sequences=config.max_sequences, max_context=MAX_CONTEXT)


def step(engine: Engine) -> Step:
    """One step of an engine that has no store: what it would write there is given back at once."""
    done = engine.step(0.0)
    engine.offloaded(done.offloads)
    return done


def decoding(runner: Runner, config: Config, batch: int, context: int, new: int) -> Engine:
    """An engine whose sequences have all had their first of `new` tokens."""
    engine = _engine(runner, config)
    for index in range(batch):
        engine.add(_sequence(f"d{index}", context, new, runner.vocab_size))
    while not all(sequence.emitted for sequence in engine.sequences.values()):
        step(engine)
    return engine


def drain(engine: Engine) -> None:
    """End what is left of it, and the steps that are in flight."""
    engine.abort(list(engine.sequences))
    while step(engine).computed:
        pass


def _sequence(name: str, length: int, new: int, vocab_size: int) -> Sequence:
    prompt = tuple(random.choices(range(100, min(vocab_size, 30_000)), k=length))
    generation = Generation(name, prompt, (), Sampling(max_tokens=new, temperature=0.0), b"", 0)
    return Sequence(generation, router_id="bench", root=random.randbytes(32), deadline=math.inf)


def _decode(runner: ModelRunner, config: Config, machine: Machine, cost: Cost, batch: int) -> Figure:
    engine = decoding(runner, config, batch, CONTEXT, DECODE_STEPS * (REPETITIONS + 2))
    rates = []
    for repetition in range(REPETITIONS + 1):
        start = time.perf_counter()
        for _ in range(DECODE_STEPS):
            step(engine)
        if repetition:  # the first warms up
            rates.append(batch * DECODE_STEPS / (time.perf_counter() - start))
    value, spread = median(rates)
    context = batch * (CONTEXT + DECODE_STEPS * REPETITIONS / 2)
    limit = machine.roofline_s(cost.flop(batch, batch, context), cost.weight_bytes + context * cost.token_bytes)
    return Figure("engine", f"decode, batch {batch}, context {CONTEXT}", value, "tokens/s", batch / limit, spread)


def _prefill(runner: ModelRunner, config: Config, machine: Machine, cost: Cost) -> list[Figure]:
    times = []
    for repetition in range(REPETITIONS + 1):
        engine = _engine(runner, config)
        engine.add(_sequence("p", PREFILL, 2, runner.vocab_size))
        start = time.perf_counter()
        while not engine.counters.output_tokens_total:
            step(engine)
        if repetition:
            times.append(time.perf_counter() - start)
    value, spread = median(times)
    limit = machine.roofline_s(cost.flop(PREFILL, 1, PREFILL**2 / 2), cost.weight_bytes)
    return [
        Figure("engine", f"prefill, {PREFILL} tokens", PREFILL / value, "tokens/s", PREFILL / limit, spread),
        Figure("engine", f"time to first token, {PREFILL} tokens", 1e3 * value, "ms", 1e3 * limit, spread, True),
    ]
