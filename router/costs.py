"""What each worker would cost for one prompt, in milliseconds that somebody waits: arrays over the rows of the table.

    prompt of n tokens at a worker that has h of them on its device
      queue     what it has to compute before
      compute   n - h tokens after h others, or less when the store of its node or the best of all is asked first
      fetch     from there: each as far as it has blocks, for computing a token costs more the later it comes and a
                fetched one always the same, so that only the ends of these runs can be best
    its output at a worker that decodes
      decode    the tokens expected, at the time between tokens that this batch will have; twice that when the KV does
                not fit, because a place comes free when somebody else has finished
      others    what its batch waits longer for theirs, meanwhile
    both at the same worker
      others    also what the prompt's steps hold its batch up, and one more: somebody is likely to come meanwhile
    at two workers
      handoff   what of the transfer is not hidden behind the computation: the last step's blocks at least

Linear in `cluster.messages.Rates` throughout. Which of it counts for whom is for `router/policies.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from router.table import Columns, Depths, FleetTable, Floats, Ints


class Terms(NamedTuple):
    """What one route costs."""

    prefill: str | None
    decode: str
    queue_ms: float
    prefill_ms: float
    fetch_ms: float
    handoff_ms: float
    decode_ms: float
    others_ms: float
    device_tokens: int  # of the prompt, on the device of the worker that computes it
    fetched_tokens: int  # that it would fetch from stores

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.prefill_ms + self.fetch_ms + self.handoff_ms + self.decode_ms + self.others_ms


class Costs:
    """Of one prompt of `tokens` with `new_tokens` of output still expected: arrays over workers."""

    def __init__(self, table: FleetTable, tokens: int, new_tokens: int, depths: Depths) -> None:
        self.table = table
        self._tokens = tokens
        self._most = tokens - 1  # at least one token has to be computed to have the next
        self._token_bytes = table.block_bytes / table.block_size
        if depths.size <= table.highest_owner:
            depths = np.pad(depths, (0, table.highest_owner + 1 - depths.size))
        self._blocks = depths.take(table.owner)
        self.device: Floats = np.minimum(self._blocks * float(table.block_size), self._most)
        self.fetched: Floats | None = None  # tokens it would fetch; None: nobody fetches any
        self.fetch: Floats | None = None
        self.compute: Floats
        near, best = table.store_depths(depths)
        if best:
            self._prefix_from_stores(near, best)
        else:
            self.compute = self._compute(self.device)
        self._output(new_tokens)
        self._handoffs: tuple[Ints, Ints, Floats] | None = None  # as last asked for: from, to, milliseconds

    def _prefix_from_stores(self, near: Floats, best: int) -> None:
        """`near` and `best` are blocks that the stores of each worker's node have, and that any store has."""
        table = self.table
        ends = np.empty((3, len(table)))  # tokens there before computing begins: none fetched, near ones, all there are
        ends[0] = self.device
        np.maximum(self.device, np.minimum(near * table.block_size, self._most), out=ends[1])
        np.maximum(ends[1], min(best * table.block_size, self._most), out=ends[2])
        fetches = np.zeros_like(ends)
        _fetch(table.memory_rates, self._token_bytes, ends[1] - ends[0], out=fetches[1])
        _fetch(table.remote_rates, self._token_bytes, ends[2] - ends[1], out=fetches[2])
        fetches[2] += fetches[1]
        computes = self._compute(ends)
        way = (computes + fetches).argmin(axis=0) * len(table) + table.rows
        self.compute, self.fetch = computes.take(way), fetches.take(way)
        self.fetched = ends.take(way) - self.device

    def _compute(self, known: Floats) -> Floats:
        """The prompt's tokens behind the first `known` [..., workers], in as many steps as it takes."""
        per_step, per_token, per_pair, step_tokens = self.table.prefill_rates
        rest = self._tokens - known
        total: Floats = per_step * np.ceil(rest / step_tokens)
        total += (per_token + per_pair * (0.5 * (self._tokens + known))) * rest
        return total

    def _output(self, new_tokens: int) -> None:
        table = self.table
        per_sequence, per_context = table.decode_rates
        longer = per_sequence + per_context * (self._tokens + new_tokens / 2)  # the time between tokens of the batch
        self.decode: Floats = new_tokens * (table.itl_ms + longer)
        self.others: Floats = new_tokens * table.batch * longer
        free, needed = table.blocks_free, -(-(self._tokens + new_tokens) // table.block_size)
        if free.item(free.argmin()) < needed:
            self.decode *= 1.0 + (free < needed)

    @property
    def prompt(self) -> Floats:
        """Until the first token."""
        total = self.table.queue_ms + self.compute
        return total if self.fetch is None else total + self.fetch

    @property
    def output(self) -> Floats:
        """What its tokens take, and what others wait for them."""
        return self.decode + self.others

    @property
    def interference(self) -> Floats:
        return (self.table.batch + 1) * self.compute

    def handoff(self, prefill: Ints, decode: Ints) -> Floats:
        """[prefill, decode]: from the workers of those rows, whose role that is, to those of these, who decode."""
        table = self.table
        lacking = -(-self._tokens // table.block_size) - self._blocks[decode]
        size: Floats = np.multiply(lacking, table.block_bytes, dtype=np.float64)
        step, compute = table.prefill_rates[3][prefill] * self._token_bytes, self.compute[prefill]
        exposed = _exposed(size, step[:, None], compute[:, None], [rates[decode] for rates in table.remote_rates])
        if table.fixed(_neighbours):
            source, target = (table.node[prefill][:, None] == table.node[decode]).nonzero()
            rates = [rates[decode[target]] for rates in table.memory_rates]
            exposed[source, target] = _exposed(size[target], step[source], compute[source], rates)
        self._handoffs = prefill, decode, exposed
        return exposed

    def _handoff(self, prefill: int, decode: int) -> float:
        """The same of two workers."""
        if self._handoffs is not None:
            rows, columns, exposed = self._handoffs
            if prefill in (known := rows.tolist()):
                return exposed.item(known.index(prefill), columns.searchsorted(decode))
        return self.handoff(np.array([prefill]), np.array([decode])).item()

    def known_tokens(self, row: int) -> int:
        """Of the prompt, how many that worker has or would fetch."""
        return self._device_tokens(row) + self._fetched_tokens(row)

    def _device_tokens(self, row: int) -> int:
        return int(self.device.item(row))

    def _fetched_tokens(self, row: int) -> int:
        return 0 if self.fetched is None else int(self.fetched.item(row))

    def terms(self, prefill: int | None, decode: int) -> Terms:
        """Of the route over those rows."""
        at = decode if prefill is None else prefill
        table, compute_ms = self.table, self.compute.item(at)
        return Terms(
            prefill=None if prefill is None else table.id(prefill),
            decode=table.id(decode),
            queue_ms=table.queue_ms.item(at),
            prefill_ms=compute_ms,
            fetch_ms=0.0 if self.fetch is None else self.fetch.item(at),
            handoff_ms=0.0 if prefill is None else self._handoff(prefill, decode),
            decode_ms=self.decode.item(decode),
            others_ms=self.others.item(decode) + ((table.batch.item(at) + 1) * compute_ms if prefill is None else 0.0),
            device_tokens=self._device_tokens(at),
            fetched_tokens=self._fetched_tokens(at),
        )


def _fetch(rates: Columns, token_bytes: float, tokens: Floats, out: Floats) -> None:
    per_fetch, per_byte = rates
    np.multiply(per_byte * token_bytes, tokens, out=out)
    out += per_fetch * (tokens > 0)


def _neighbours(table: FleetTable) -> float:
    """1 where some node has workers of both roles."""
    return float(np.isin(table.node[table.prefillers], table.node[table.decoders]).any())


def _exposed(size: Floats, step: Floats, compute_ms: Floats, rates: Sequence[Floats]) -> Floats:
    """Milliseconds of a transfer of `size` bytes behind a prefill that is done a step's bytes after the others."""
    per_handoff, per_byte = rates
    return per_handoff + np.maximum(per_byte * np.minimum(size, step), per_byte * size - compute_ms)
