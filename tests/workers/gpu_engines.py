"""Engines whose runner is the GPU's, on a CPU: the same programs, with torch or Triton's interpreter for the kernels.

Everything is as on a GPU but for what `workers.device.Device` stands for. Block size and models are such that the
kernels serve them; a cache is full of NaN, so that reading what nobody wrote shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cluster.messages import Generation, Sampling
from tests.workers.engine_run import Run
from tests.workers.tiny_models import prompts
from workers.architecture import layout, load_architecture
from workers.device import Device
from workers.engine import Engine
from workers.gpu_profile import Limits
from workers.gpu_runner import GpuRunner
from workers.links import Links
from workers.model_runner import ModelRunner
from workers.runner import Runner
from workers.sequence import Sequence
from workers.shard import Shard

BLOCK = 16
LIMITS = Limits(token_budget=64, max_sequences=8, max_context=0)
T = TypeVar("T")


class Counting(Device):
    """How often graphs were captured and replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.captured = self.replayed = 0

    def capture(self, run: Callable[[], T]) -> Callable[[], T]:
        run()  # as a GPU does: a capture must leave nothing behind that matters
        self.captured += 1

        def replay() -> T:
            self.replayed += 1
            return run()

        return replay


class Sized(Device):
    """A GPU of that many bytes, on which the largest step uses so many."""

    def __init__(self, total: int, idle: int, peak: int) -> None:
        super().__init__()
        self.total, self.answers = total, [idle, peak]

    def memory(self, run: Callable[[], None]) -> tuple[int, int]:
        run()
        return self.total, self.answers.pop(0)


def gpu_runner(
    directory: Path,
    blocks: int = 200,
    device: Device | None = None,
    shard: Shard | None = None,
    links: Links | None = None,
    limits: Limits = LIMITS,
    kv_dtype: str = "",
) -> GpuRunner:
    """Blocks: of a worker that is one shard."""
    memory, place = blocks * block_bytes(directory, kv_dtype), device or Device()
    made = GpuRunner.load(directory, "float32", BLOCK, memory, limits, None, place, shard, links, kv_dtype)
    return poisoned(made)


def cpu_runner(directory: Path, blocks: int = 200) -> ModelRunner:
    return poisoned(ModelRunner.load(directory, "float32", BLOCK, blocks * block_bytes(directory), 0))


def block_bytes(directory: Path, kv_dtype: str = "") -> int:
    return layout(load_architecture(directory), "float32", BLOCK, kv_dtype).block_bytes


R = TypeVar("R", GpuRunner, ModelRunner)


def poisoned(runner: R) -> R:
    for index in range(runner.num_blocks):
        runner.block(index)[:] = 0xFF
    return runner


def engine(runner: Runner, token_budget: int = 64) -> Engine:
    context = runner.max_context  # type: ignore[attr-defined]
    return Engine(runner, token_budget=token_budget, max_sequences=LIMITS.max_sequences, max_context=context)


def sequence(name: str, prompt: list[int], new: int, sampling: Sampling | None = None) -> Sequence:
    sampling = sampling or Sampling(temperature=0.0)
    generation = Generation(name, tuple(prompt), (), _lasting(sampling, new), b"", 60_000)
    return Sequence(generation, router_id="router", root=b"root", deadline=math.inf)


def _lasting(sampling: Sampling, new: int) -> Sampling:
    return dataclasses.replace(sampling, max_tokens=new)


def crowded(runner: Runner, lengths: list[int], new: int, samplings: list[Sampling] | None = None) -> Run:
    """Sequences that come one by one, two with the same prompt, whose blocks do not all fit: mixed batches, chunks,
    prefix hits and preemption."""
    run = Run(engine(runner, token_budget=32))
    given = prompts(lengths, seed=5)
    given.insert(4, [*given[0], 7, 8])
    for index, prompt in enumerate(given):
        run.add(sequence(f"s{index}", prompt, new, samplings[index % len(samplings)] if samplings else None))
        run.step()
    return run.finish_all()
