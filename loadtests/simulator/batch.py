"""The sequences of a worker that decode together, so that many steps at once cost as much as one.

A step of B sequences with L tokens of context takes d0 + d1 B + d2 L ms and adds B to L, so k steps take k times that
plus d2 B k (k - 1) / 2: exact, not an approximation. What sequences have computed, when they end and when they need
another block is counted in the worker's decode steps, and no step touches a sequence.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from cluster.messages import Rates
from loadtests.simulator.histogram import Histogram
from loadtests.simulator.job import Sequence, State


class Batch:
    def __init__(self, rates: Rates, block_size: int, gaps: Histogram) -> None:
        self.rates = rates
        self.count = 0
        self.context = 0  # tokens whose KV the sequences have
        self.step = 0  # decode steps so far
        self.until_s = 0.0  # when the last of them ended
        self._block_size = block_size
        self._gaps = gaps  # between two tokens of a request, ms
        self._fresh: list[Sequence] = []  # they joined with a token that is older than the last step
        self._finish: list[tuple[int, int, Sequence]] = []  # heap of (finish_step, order, sequence); some are outdated
        self._grow: list[tuple[int, int, Sequence]] = []  # the same with grow_step

    # --------------------------------------------------------------------------------------------------- who decodes
    def join(self, sequence: Sequence, fresh: bool) -> None:
        """A sequence whose last token only lacks KV. `fresh`: that token was not delivered just now."""
        sequence.state = State.DECODING
        sequence.base = sequence.computed - self.step
        sequence.finish_step = self.step + sequence.last - sequence.tokens
        self.count += 1
        self.context += sequence.computed
        heappush(self._finish, (sequence.finish_step, sequence.order, sequence))
        sequence.grow_step = len(sequence.table) * self._block_size - sequence.base
        heappush(self._grow, (sequence.grow_step, sequence.order, sequence))
        if fresh:
            self._fresh.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It decodes no more; its counters are its own again."""
        self.settle(sequence)
        self.count -= 1
        self.context -= sequence.computed
        if sequence in self._fresh:
            self._fresh.remove(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Its counters are to be up to date."""
        sequence.computed = sequence.base + self.step
        sequence.tokens = sequence.computed + 1
        if sequence not in self._fresh:
            sequence.job.last_token_s = self.until_s

    def finished(self) -> list[Sequence]:
        """Those whose last token was delivered, in the order of their admission; they still have to leave."""
        heap, done = self._finish, []
        while heap and heap[0][0] <= self.step:
            step, _, sequence = heappop(heap)
            if sequence.state is State.DECODING and sequence.finish_step == step:
                sequence.finish_step = -1
                done.append(sequence)
        return done

    def growing(self, before: int) -> list[Sequence]:
        """Those that need a block before the step of that number, oldest first; each says `grown` when it has it."""
        heap, due = self._grow, []
        while heap and heap[0][0] <= before:
            step, _, sequence = heappop(heap)
            if sequence.state is State.DECODING and sequence.grow_step == step:
                due.append(sequence)
        if len(due) > 1:
            due.sort(key=lambda s: s.order)
        return due

    def grown(self, sequence: Sequence) -> None:
        sequence.grow_step = len(sequence.table) * self._block_size - sequence.base
        heappush(self._grow, (sequence.grow_step, sequence.order, sequence))

    # ---------------------------------------------------------------------------------------------------------- time
    def step_ms(self) -> float:
        """The next decode step alone."""
        step, sequence, token = self.rates.decode
        return step + sequence * self.count + token * self.context

    def beside_ms(self) -> float:
        """What the decodes add to a step that also prefills."""
        _, sequence, token = self.rates.decode
        return sequence * self.count + token * self.context

    def leap(self, free_blocks: int) -> int:
        """How many steps nothing can happen in, at least 1: until a sequence ends, or the blocks could run out."""
        heap = self._finish
        while heap[0][2].state is not State.DECODING or heap[0][2].finish_step != heap[0][0]:
            heappop(heap)
        steps = heap[0][0] - self.step
        if self.count * (steps // self._block_size + 1) > free_blocks:
            grow = self._grow
            while grow[0][2].state is not State.DECODING or grow[0][2].grow_step != grow[0][0]:
                heappop(grow)
            steps = min(steps, grow[0][0] - self.step)
        return max(1, steps)

    def leap_ms(self, steps: int) -> float:
        return steps * self.step_ms() + self.rates.decode[2] * self.count * steps * (steps - 1) / 2

    def steps_within(self, ms: float) -> int:
        """The first step that ends at or after that time, counted from 1."""
        half = self.rates.decode[2] * self.count / 2
        linear = self.step_ms() - half
        root = ms / linear if half * ms < 1e-12 * linear * linear else _root(half, linear, ms)
        return max(1, math.ceil(root - 1e-9))

    def advance(self, steps: int, began_s: float, first_ms: float, until_s: float) -> None:
        """So many steps were made in that time, the first of which took `first_ms`: every sequence got a token in
        each of them."""
        count, fresh = self.count, self._fresh
        self.until_s = until_s
        if not count:
            return
        if count > len(fresh):
            self._gaps.add_line(first_ms, 0.0, 1, count - len(fresh))
        if fresh:
            for sequence in fresh:
                self._gaps.add(1000 * (began_s - sequence.job.last_token_s) + first_ms)
            fresh.clear()
        if steps > 1:
            slope = self.rates.decode[2] * count
            self._gaps.add_line(self.step_ms() + slope, slope, steps - 1, count)
        self.step += steps
        self.context += count * steps


def _root(a: float, b: float, c: float) -> float:
    """The positive x with a x^2 + b x = c, without cancellation."""
    return 2 * c / (b + math.sqrt(b * b + 4 * a * c))
