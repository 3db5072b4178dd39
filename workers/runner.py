"""The seam between the engine, which decides, and the tensors, which compute.

The engine plans in `Chunk`s; a Runner has them computed against a paged KV cache and answers with tokens. It owns no
policy and keeps no sequence. A Stage is one shard's part of that: `workers/model_runner.py` is the one on CPUs,
`workers/gpu_runner.py` the one on GPUs, `workers/sim.py` the one without weights. A worker that is one shard has one
stage for a Runner (`Alone`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout
from workers.sequence import Sequence
from workers.shard import Shard

if TYPE_CHECKING:  # torch takes seconds to import, and only a cache in it needs it
    from workers.device import DeviceCache


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions [first, first + take) of one sequence; its block table covers them."""

    sequence: Sequence
    first: int
    take: int
    ahead: int = 0  # of these, the last so many are tokens that the step before chooses
    samples: bool = field(init=False)  # it ends with the last token there is, so its last logits choose the next one

    def __post_init__(self) -> None:
        last = self.first + self.take == len(self.sequence.tokens) + self.ahead
        object.__setattr__(self, "samples", last)  # for good: the token may be known by the time it is collected


class Stage(Protocol):
    """What one shard computes, against its own part of every block."""

    layout: Layout  # of whole blocks, as stores have them
    shard: Shard
    num_blocks: int
    vocab_size: int
    device_cache: DeviceCache | None  # where blocks are that `block` cannot show

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        """One step: write the chunks' KV, and for each chunk that samples return its next token, else None. Only the
        last stage knows tokens: the others return None for all. All shards of a worker must run the same steps."""
        ...

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """A writable view of this shard's part of one block [shard.part(layout).block_bytes], in the canonical
        order. There is none where there is a `device_cache`."""
        ...


class Runner(Protocol):
    """What the engine drives: all shards of its worker."""

    layout: Layout
    shard: Shard  # the one in this process
    peers: tuple[str, ...]  # rank - 1 -> where the others serve gRPC
    num_blocks: int
    vocab_size: int
    device_cache: DeviceCache | None
    depth: int  # steps that may be in flight
    ahead: bool  # it computes them one by one, so a step may go on from tokens that the one in flight chooses

    def submit(self, chunks: list[Chunk]) -> None:
        """Begin a step. No more than `depth` of them may be without their `collect`."""
        ...

    def collect(self) -> list[int | None]:
        """End the oldest step: for each of its chunks that samples its next token, else None."""
        ...

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """As in Stage, of the shard in this process."""
        ...


class Alone(ABC):
    """A stage that is the whole worker: it computes when it is asked for the result."""

    peers: tuple[str, ...] = ()
    depth = 1
    ahead = False
    device_cache: DeviceCache | None = None

    def submit(self, chunks: list[Chunk]) -> None:
        self._submitted = chunks

    def collect(self) -> list[int | None]:
        return self.run(self._submitted)

    @abstractmethod
    def run(self, chunks: list[Chunk]) -> list[int | None]: ...

    @abstractmethod
    def block(self, index: int) -> npt.NDArray[np.uint8]: ...
