"""Runners with steps in flight, on the sim: what an engine may not rely on, and what it must never do.

`Late` computes a step when it is collected, as the last stage of a pipeline does, `Early` when it is submitted, as the
first one does. Both check every step against those in flight.
"""

from collections import deque
from collections.abc import Iterator

from tests.workers.engine_run import BLOCK, VOCAB
from workers.runner import Chunk
from workers.sequence import State
from workers.sim import SimRunner, sim_layout

Part = tuple[str, int, int]  # sequence id, first position, positions


class Late(SimRunner):
    def __init__(self, num_blocks: int, depth: int) -> None:
        super().__init__(sim_layout(BLOCK), num_blocks, VOCAB)
        self.depth = depth
        self.flying: deque[list[Chunk]] = deque()
        self.log: list[list[Part]] = []  # every step that was submitted
        self.most = 0  # steps that were in flight at once

    def submit(self, chunks: list[Chunk]) -> None:
        assert chunks
        assert len({chunk.sequence.id for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            self._check(chunk)
        self.flying.append(chunks)
        self.most = max(self.most, len(self.flying))
        assert self.most <= self.depth
        self.log.append([(chunk.sequence.id, chunk.first, chunk.take) for chunk in chunks])

    def _check(self, chunk: Chunk) -> None:
        """It follows what is computed or in flight, and writes to no block that a step in flight writes to as well,
        but for its own."""
        sequence = chunk.sequence
        assert sequence.state is State.RUNNING
        own = [c for step in self.flying for c in step if c.sequence is sequence]
        assert not any(c.samples for c in own), "its token is in flight"
        assert chunk.first == (own[-1].first + own[-1].take if own else sequence.computed)
        assert chunk.first + chunk.take <= len(sequence.tokens)
        assert not set(written([chunk])) & set(written(c for c in self.chunks() if c.sequence is not sequence))

    def chunks(self) -> Iterator[Chunk]:
        """Those in flight."""
        return (chunk for step in self.flying for chunk in step)

    def collect(self) -> list[int | None]:
        return self.run(self.flying.popleft())


class Early(Late):
    def __init__(self, num_blocks: int, depth: int) -> None:
        super().__init__(num_blocks, depth)
        self._results: deque[list[int | None]] = deque()

    def submit(self, chunks: list[Chunk]) -> None:
        super().submit(chunks)
        self._results.append(self.run(chunks))

    def collect(self) -> list[int | None]:
        self.flying.popleft()
        return self._results.popleft()


def written(chunks: Iterator[Chunk] | list[Chunk]) -> list[int]:
    """Ids of the blocks that these write to."""
    return [
        chunk.sequence.block_table[index]
        for chunk in chunks
        for index in range(chunk.first // BLOCK, (chunk.first + chunk.take - 1) // BLOCK + 1)
    ]
