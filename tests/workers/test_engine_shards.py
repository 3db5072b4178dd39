"""The engine on sims in shards: a pipeline whose stages really compute at the same time, in threads."""

import dataclasses
import threading
from queue import Queue

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.fetcher import Source
from tests.workers.engine_run import BLOCK, VOCAB, Run, alone, assert_no_leak, engine, prompt, sequence
from tests.workers.local_links import PATIENCE_S, links
from workers.runner import Chunk
from workers.sequence import Sequence
from workers.shard import Sizes, shards
from workers.sim import SimRunner, sim_layout

LAYOUT = sim_layout(BLOCK)
Steps = Queue[list[Chunk] | None]


class Threads:
    """A Runner of tp x pp sims. Rank 0 computes when a step is submitted, as it does in a worker."""

    peers = ()

    def __init__(self, num_blocks: int, tp: int, pp: int) -> None:
        sizes = Sizes(4, LAYOUT.heads, LAYOUT.layers, 4, VOCAB)
        self.stages = [
            SimRunner(LAYOUT, num_blocks, VOCAB, shard=shard, links=link)
            for shard, link in zip(shards(sizes, tp, pp), links(tp, pp), strict=True)
        ]
        self.layout, self.shard, self.num_blocks, self.vocab_size = LAYOUT, self.stages[0].shard, num_blocks, VOCAB
        self.depth, self.ahead = pp, False
        self._steps: list[Steps] = [Queue() for _ in self.stages[1:]]
        self._results: Queue[list[int | None]] = Queue()
        self._tells = tp * (pp - 1)  # the rank whose result counts
        followers = zip(self.stages[1:], self._steps, strict=True)
        self._threads = [threading.Thread(target=self._follow, args=pair, daemon=True) for pair in followers]
        for thread in self._threads:
            thread.start()

    def submit(self, chunks: list[Chunk]) -> None:
        for steps in self._steps:  # copies: the sequences are the engine's, and change
            steps.put([dataclasses.replace(chunk, sequence=_copy(chunk)) for chunk in chunks])
        self._compute(self.stages[0], chunks)

    def collect(self) -> list[int | None]:
        return self._results.get(timeout=PATIENCE_S)

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        return self.stages[0].block(index)

    def close(self) -> None:
        for steps in self._steps:
            steps.put(None)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _follow(self, stage: SimRunner, steps: Steps) -> None:
        while (chunks := steps.get()) is not None:
            self._compute(stage, chunks)

    def _compute(self, stage: SimRunner, chunks: list[Chunk]) -> None:
        tokens = stage.run(chunks)
        if stage.shard.rank == self._tells:
            self._results.put(tokens)


def _copy(chunk: Chunk) -> Sequence:
    made = dataclasses.replace(chunk.sequence)
    made.tokens, made.block_table = list(chunk.sequence.tokens), list(chunk.sequence.block_table)
    return made


class NoStore(Run):
    def sources(self, wanted: Sequence) -> list[Source]:
        return []  # its blocks would have to go to all shards


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("tight", [False, True])
def test_every_grid_serves_the_same_tokens(tp: int, pp: int, tight: bool) -> None:
    """With chunked prefills, an abort in flight and, where there are few blocks, preemptions; else prefix hits."""
    runner = Threads(40 if tight else 256, tp, pp)
    run = NoStore(engine(runner.num_blocks, token_budget=32, runner=runner))
    prompts = {f"s{i}": prompt(20 + i % 6, seed=i % 6) for i in range(9)}
    for name, tokens in prompts.items():
        run.engine.add(sequence(name, tokens, new=40))
    for _ in range(5):
        run.step()
    run.engine.abort(["s2"])
    run.finish_all()
    runner.close()
    del prompts["s2"]
    assert {name: run.tokens[name] for name in prompts} == {n: alone(tokens, 40) for n, tokens in prompts.items()}
    assert run.engine.scheduler.preemptions > 0 if tight else run.engine.counters.cached_tokens_total > 0
    assert_no_leak(run.engine)
