"""Fetch or recompute: how much of what the stores have of a sequence is worth waiting for. Pure; all in milliseconds.

    blocks   [ hits on the device )[ source )[ source )[ ... )        only whole runs, from the hits on
    cost     fetch(run) + fetch(run) + ... + prefill(all that is left)

The deadline of a fetch is what computing its tokens is predicted to cost: a store that is slower than that is not worth
waiting for. It has a floor, because a prediction of a few ms says nothing about a busy machine, and a ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.perfmodel import PerfModel
from kvstore.fetcher import Source
from kvstore.layout import Layout

MIN_TIMEOUT_S = 0.5
MAX_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Choice:
    sources: tuple[Source, ...]  # consecutive, from the first missing block on; empty: compute everything
    passed_over: tuple[Source, ...]  # what stores have as well, but computing is predicted to be faster
    timeout_s: float


NOTHING = Choice((), (), 0.0)


def choose(sources: Sequence[Source], hits: int, tokens: int, model: PerfModel, layout: Layout) -> Choice:
    """For a sequence of that many tokens whose first `hits` blocks are on the device. The last token is never fetched:
    its logits are needed."""
    offered = _clip(sources, hits, (tokens - 1) // layout.tokens)
    if not offered:
        return NOTHING

    def rest_ms(blocks: int) -> float:
        return model.prefill_ms(tokens - blocks * layout.tokens, blocks * layout.tokens)

    best, best_ms, fetch_ms = 0, rest_ms(hits), 0.0
    for count, source in enumerate(offered, start=1):
        fetch_ms += model.fetch_ms((source.stop - source.start) * layout.block_bytes, source.path)
        if (total_ms := fetch_ms + rest_ms(source.stop)) < best_ms:
            best, best_ms = count, total_ms
    if best == 0:
        return Choice((), offered, 0.0)
    fetched = (offered[best - 1].stop - hits) * layout.tokens
    worth_ms = model.prefill_ms(fetched, hits * layout.tokens)
    timeout_s = min(max(worth_ms / 1000, MIN_TIMEOUT_S), MAX_TIMEOUT_S)
    return Choice(offered[:best], offered[best:], timeout_s)


def _clip(sources: Sequence[Source], start: int, stop: int) -> tuple[Source, ...]:
    """Their parts within [start, stop), as far as they are consecutive."""
    parts: list[Source] = []
    for source in sources:
        first, last = max(source.start, start), min(source.stop, stop)
        if first >= last:
            continue
        if first != (parts[-1].stop if parts else start):
            break
        parts.append(replace(source, start=first, stop=last))
    return tuple(parts)
