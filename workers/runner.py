"""The seam between the engine, which decides, and the tensors, which compute.

The engine plans in `Chunk`s; a Runner computes them against its own paged KV cache and answers with tokens. It owns no
policy and keeps no sequence. `workers/model_runner.py` is the real one, `workers/sim.py` the one without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout
from workers.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute positions [sequence.computed, sequence.computed + take) of one sequence; its block table covers them."""

    sequence: Sequence
    take: int

    @property
    def samples(self) -> bool:
        """The chunk closes the gap, so its last logits choose the next token."""
        return self.take == self.sequence.gap


class Runner(Protocol):
    layout: Layout
    num_blocks: int
    vocab_size: int

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        """One step: write the chunks' KV, and for each chunk that samples return its next token, else None."""
        ...

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        """A writable view of one block's bytes [layout.block_bytes], in the canonical order."""
        ...
