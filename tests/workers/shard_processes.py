"""Processes that are the shards of a worker, for tests: each does what it is told and answers with what came out."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from kvstore.layout import Layout
from tests.workers.tiny_models import BLOCK
from workers.architecture import layout, load_architecture, sizes
from workers.model_runner import ModelRunner
from workers.process_links import ProcessLinks, Rendezvous
from workers.runner import Chunk
from workers.shard import Shard, shards

ANSWER_S = 60.0  # longest wait for any answer
STEP_S = 20.0  # longest wait of shards for each other


class State:
    """What one process keeps from one task to the next."""

    links: ProcessLinks | None = None
    runner: ModelRunner


class ShardProcesses:
    """Processes 0..count-1. Tasks are functions of a module, called with the State of their process first."""

    def __init__(self, count: int) -> None:
        self.processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        for index in range(count):
            self._start(index)

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.processes.insert(index, process)
        self._connections.insert(index, ours)

    def restart(self, index: int) -> None:
        """Put a new process in the place of one that was killed."""
        self._connections.pop(index).close()
        self.processes.pop(index).join(ANSWER_S)
        self._start(index)

    def tell(self, index: int, task: Callable[..., Any], *arguments: Any) -> None:
        self._connections[index].send((task, arguments))

    def answer(self, index: int) -> Any:
        """What its oldest unanswered task returned, or the exception that it raised."""
        assert self._connections[index].poll(ANSWER_S), f"process {index} does not answer"
        return self._connections[index].recv()

    def all(self, task: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Every process up to len(arguments) does the task with its own arguments. Raises what one of them raised."""
        for index, each in enumerate(arguments):
            self.tell(index, task, *each)
        answers = [self.answer(index) for index in range(len(arguments))]
        for found in answers:
            if isinstance(found, BaseException):
                raise found
        return answers

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


class ShardedRunner:
    """A worker of several shards, driven step by step."""

    def __init__(self, processes: ShardProcesses, directory: Path, parts: tuple[Shard, ...], blocks: int) -> None:
        self.layout: Layout = layout(load_architecture(directory), "float32", BLOCK)
        self.num_blocks = blocks
        self._processes, self._parts = processes, parts

    def submit(self, chunks: list[Chunk]) -> None:
        for shard in self._parts:
            self._processes.tell(shard.rank, run, chunks)

    def collect(self) -> list[int | None]:
        answers = [self._processes.answer(shard.rank) for shard in self._parts]
        for found in answers:
            if isinstance(found, BaseException):
                raise found
        for shard, found in zip(self._parts, answers, strict=True):
            assert found == (answers[-1] if shard.last_stage else [None] * len(found))
        last: list[int | None] = answers[-1]
        return last

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        self.submit(chunks)
        return self.collect()


@contextmanager
def worker(
    processes: ShardProcesses, directory: Path, tp: int, pp: int, blocks: int = 96, timeout: float = STEP_S
) -> Iterator[ShardedRunner]:
    """The model, loaded by tp x pp of the processes, with caches full of NaN. They leave when they are next used."""
    parts = shards(sizes(load_architecture(directory)), tp, pp)
    rendezvous = Rendezvous("127.0.0.1")
    try:
        arguments = [(rendezvous.address, shard, directory, blocks, timeout) for shard in parts]
        assert processes.all(load, arguments) == [blocks] * len(parts)
        yield ShardedRunner(processes, directory, parts, blocks)
    finally:
        rendezvous.close()


# ------------------------------------------------------------------------------------------------------ tasks
def join(state: State, address: str, shard: Shard, timeout: float) -> None:
    leave(state)
    state.links = ProcessLinks.join(address, shard, timeout)


def leave(state: State) -> None:
    if state.links is not None:
        state.links.close()
    state.links = None


def load(state: State, address: str, shard: Shard, directory: Path, blocks: int, timeout: float) -> int:
    join(state, address, shard, timeout)
    parts = shards(sizes(load_architecture(directory)), shard.tp, shard.pp)
    whole = layout(load_architecture(directory), "float32", BLOCK)
    memory = blocks * sum(part.part(whole).block_bytes for part in parts)
    state.runner = ModelRunner.load(directory, "float32", BLOCK, memory, 0, shard=shard, links=state.links)
    for index in range(state.runner.num_blocks):
        assert len(state.runner.block(index)) == shard.part(whole).block_bytes
        state.runner.block(index)[:] = 0xFF
    return state.runner.num_blocks


def run(state: State, chunks: list[Chunk]) -> list[int | None]:
    return state.runner.run(chunks)


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    state = State()
    while True:
        try:
            task, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = task(state, *arguments)
        except Exception as error:  # the test's to judge
            answer = error
        connection.send(answer)
