"""Step plans: what a mirror rebuilds is what rank 0 has, whatever happens to sequences in between.

The runner here computes every step from the mirror's chunks alone, when it is collected: as late as a shard may.
"""

from collections import deque

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.codec import decode, encode
from cluster.errors import ProtocolError
from cluster.messages import Sampling
from tests.workers.engine_run import BLOCK, VOCAB, Run, Unimpressed, alone, assert_no_leak, crowded, prompt, sequence
from workers.engine import Engine
from workers.runner import Chunk
from workers.sim import SimRunner, sim_layout
from workers.step_plan import Mirror, PlanEncoder, pack_tokens, unpack_tokens

Seen = tuple[int, int, bool, list[int], list[int], Sampling, int]


def seen(chunk: Chunk) -> Seen:
    """Everything that stages read."""
    s = chunk.sequence
    return chunk.first, chunk.take, chunk.samples, [*s.tokens], [*s.block_table], s.generation.sampling, s.prompt_length


class MirrorRunner:
    """A pipeline of `depth` whose stages know only step plans."""

    peers: tuple[str, ...] = ()
    ahead = False

    def __init__(self, num_blocks: int, depth: int) -> None:
        self._sim = SimRunner(sim_layout(BLOCK), num_blocks, VOCAB)
        self.layout, self.shard, self.vocab_size = self._sim.layout, self._sim.shard, VOCAB
        self.num_blocks, self.depth = num_blocks, depth
        self.encoder, self.mirror = PlanEncoder(), Mirror()
        self.admissions: list[str] = []
        self.highest_slot = self.most_slots = -1
        self._flight: deque[tuple[bytes, list[Seen]]] = deque()

    def submit(self, chunks: list[Chunk]) -> None:
        plan = self.encoder.plan(chunks)
        self.admissions += [new.generation.id for new in plan.admitted]
        self.highest_slot = max([self.highest_slot, *(new.slot for new in plan.admitted)])
        self.most_slots = max(self.most_slots, self.encoder.slots)
        self._flight.append((encode(plan), [seen(chunk) for chunk in chunks]))
        assert len(self._flight) <= self.depth

    def collect(self) -> list[int | None]:
        plan, expected = self._flight.popleft()
        chunks = self.mirror.chunks(decode(plan))
        assert [seen(chunk) for chunk in chunks] == expected
        return unpack_tokens(pack_tokens(self._sim.run(chunks)))

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        return self._sim.block(index)


def mirrored(num_blocks: int = 256, depth: int = 1, token_budget: int = 32) -> tuple[Run, MirrorRunner]:
    runner = MirrorRunner(num_blocks, depth)
    made = Engine(runner, token_budget=token_budget, max_sequences=8, max_context=min(512, num_blocks * BLOCK))
    made.model = Unimpressed(token_budget)
    return Run(made), runner


@settings(max_examples=50, deadline=None)
@given(
    depth=st.integers(1, 3),
    num_blocks=st.sampled_from([24, 40, 200]),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 60), st.integers(1, 3)),  # length, which prompt: prefixes are hit
            st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
            st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
        ),
        max_size=40,
    ),
)
def test_the_mirror_has_what_rank_0_has(depth: int, num_blocks: int, events: list[tuple[str, int, int]]) -> None:
    run, runner = mirrored(num_blocks, depth)
    added: dict[str, list[int]] = {}
    aborted = set()
    for what, number, which in events:
        if what == "add":
            name = f"s{len(added)}"
            added[name] = prompt(number, which)
            run.add(sequence(name, added[name], new=20))
        elif what == "abort" and f"s{number}" in added:
            run.engine.abort([f"s{number}"])
            aborted.add(f"s{number}")
        elif what == "step":
            for _ in range(number):
                for order in run.step().fetches:
                    run.deliver(order)
    run.finish_all()
    for name in added.keys() - aborted:
        assert run.tokens[name] == alone(added[name], 20)
    assert_no_leak(run.engine)
    run.add(sequence("last", prompt(3), new=1))
    run.finish_all()
    assert runner.encoder.slots == runner.mirror.slots == 1
    assert runner.highest_slot < runner.most_slots


def test_a_preempted_sequence_is_admitted_again_and_computes_the_same() -> None:
    run, runner = mirrored(num_blocks=40, depth=2)
    crowded(run)
    assert len(runner.admissions) > len(run.tokens)


def test_a_decoding_sequence_costs_its_new_token_and_few_numbers() -> None:
    encoder = PlanEncoder()
    one = sequence("x", prompt(40))
    one.block_table = list(range(10))
    first = encoder.plan([Chunk(one, 0, 40)])
    one.tokens.append(7)
    one.block_table.append(99)
    second = encoder.plan([Chunk(one, 40, 1)])
    assert len(first.admitted) == 1
    assert first.tokens == b""  # they are the generation's
    assert second.admitted == ()
    assert (len(second.chunks), len(second.tokens), len(second.blocks)) == (5 * 4, 4, 4)


def test_a_lost_plan_is_noticed() -> None:
    encoder, mirror = PlanEncoder(), Mirror()
    one = sequence("x", prompt(4))
    one.block_table = [0]
    encoder.plan([Chunk(one, 0, 2)])
    with pytest.raises(ProtocolError, match="step 2 follows step 0"):
        mirror.chunks(encoder.plan([Chunk(one, 2, 2)]))
