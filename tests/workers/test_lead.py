"""Rank 0 and its followers, real processes, driven by an engine; and what happens when one of them is lost."""

from __future__ import annotations

import signal
import time
from itertools import pairwise

import pytest

from cluster.errors import WorkerLost
from tests.workers.engine_run import VOCAB, Run, Unimpressed, assert_no_leak, prompt, sequence
from tests.workers.shard_group import (
    LAYOUT,
    PATIENCE_S,
    STALLED_S,
    Grid,
    started,
)
from workers.engine import Engine
from workers.runner import Chunk, Runner
from workers.sim import SimRunner, Timings

GRIDS = [(1, 2), (2, 1), (2, 2), (1, 3)]
BLOCKS = 48  # few enough for preemption


def drive(runner: Runner) -> Run:
    made = Engine(runner, token_budget=32, max_sequences=8, max_context=BLOCKS * LAYOUT.tokens)
    made.model = Unimpressed(32)
    return Run(made)


def alone(tokens: list[int], new: int) -> list[int]:
    run = drive(SimRunner(LAYOUT, BLOCKS, VOCAB))
    run.add(sequence("x", tokens, new))
    return run.finish_all().tokens["x"]


def scenario(run: Run) -> Run:
    """Prefix hits, chunked prefill, preemption and aborts."""
    run.add(sequence("first", prompt(40), new=4))
    run.finish_all()
    run.add(sequence("hit", [*prompt(40), 5, 6], new=4))
    for i in range(8):
        run.add(sequence(f"s{i}", prompt(20 + 5 * i, seed=i), new=20))
    for name in ("s2", "s7"):
        for _ in range(6):
            run.step()
        run.engine.abort([name])
    run.finish_all()
    assert_no_leak(run.engine)
    return run


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    run = scenario(drive(SimRunner(LAYOUT, BLOCKS, VOCAB)))
    assert run.engine.scheduler.preemptions > 0
    assert run.cached["hit"] == 40
    return {name: tokens for name, tokens in run.tokens.items() if run.finish[name]}


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_shards_compute_what_one_does(tp: int, pp: int, expected: dict[str, list[int]]) -> None:
    with started(Grid(tp, pp, blocks=BLOCKS)) as group:
        run = scenario(drive(group.lead))
        assert {name: tokens for name, tokens in run.tokens.items() if run.finish[name]} == expected
        assert run.engine.scheduler.preemptions > 0
        assert len(set(group.lead.peers)) == tp * pp - 1
        assert not group.ended.is_set()
        group.lead.close()
        assert [group.exit_code(rank) for rank in range(1, tp * pp)] == [0] * (tp * pp - 1)


def test_as_many_steps_are_in_flight_as_there_are_stages() -> None:
    """The last stage is stopped: what rank 0 submits meanwhile waits for nobody. Groups of sequences take turns."""
    with started(Grid(1, 2, timings=Timings(step_s=0.002))) as group:
        recorder = Recorder(group.lead)
        run = drive(recorder)
        for name in ("a", "b", "c", "d"):
            run.add(sequence(name, prompt(8, seed=ord(name)), new=16))
        run.finish_all()
        decodes = [step for step in recorder.steps if all(take == 1 for _, take in step)]
        groups = [{name for name, _ in step} for step in decodes[:-4]]
        assert recorder.most == 2
        assert all(not one & other for one, other in pairwise(groups))
        assert all(one == other for one, other in zip(groups, groups[2:], strict=False))

        one, other = sequence("one", prompt(5)), sequence("other", prompt(6))
        one.block_table, other.block_table = [0, 1], [2, 3]
        group.kill(1, signal.SIGSTOP)
        group.lead.submit([Chunk(one, 0, 5)])
        group.lead.submit([Chunk(other, 0, 6)])
        group.kill(1, signal.SIGCONT)
        tokens = [group.lead.collect(), group.lead.collect()]
    assert tokens == [alone(prompt(5), 1), alone(prompt(6), 1)]


class Recorder:
    """The runner it is given, and what the engine asked of it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.layout, self.shard, self.peers = runner.layout, runner.shard, runner.peers
        self.num_blocks, self.vocab_size, self.depth = runner.num_blocks, runner.vocab_size, runner.depth
        self.ahead = runner.ahead
        self.block = runner.block
        self.steps: list[list[tuple[str, int]]] = []  # per step: (sequence, take) of its chunks
        self.in_flight = self.most = 0

    def submit(self, chunks: list[Chunk]) -> None:
        self.steps.append([(chunk.sequence.id, chunk.take) for chunk in chunks])
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self._runner.submit(chunks)

    def collect(self) -> list[int | None]:
        self.in_flight -= 1
        return self._runner.collect()


# --------------------------------------------------------------------------------------------------- shards are lost
def test_an_idle_worker_notices_each_shard_that_dies() -> None:
    for rank in (1, 2, 3):
        with started(Grid(2, 2)) as group:
            group.kill(rank)
            assert group.ended.wait(PATIENCE_S), rank


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_step_ends_when_a_shard_dies_or_stalls(rank: int, how: signal.Signals) -> None:
    with started(Grid(2, 2, step_timeout=STALLED_S)) as group:
        run = drive(group.lead)
        for name in ("a", "b", "c"):
            run.add(sequence(name, prompt(20, seed=ord(name)), new=300))
        for _ in range(10):
            run.step()
        group.kill(rank, how)
        with pytest.raises(WorkerLost):
            step_until(run, time.monotonic() + PATIENCE_S)
        assert group.ended.wait(PATIENCE_S) or how == signal.SIGSTOP


def step_until(run: Run, deadline: float) -> None:
    while time.monotonic() < deadline:
        run.step()
