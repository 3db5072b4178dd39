"""Whatever happens to an engine, in whatever order and however many steps are in flight: same tokens, no lost block."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import Handoff
from kvstore.hashing import extend
from tests.workers.engine_run import BLOCK, VOCAB, Run, alone, assert_no_leak, engine, prompt, sequence
from tests.workers.sim_pipelines import Early, Late
from workers.runner import Chunk
from workers.sequence import Sequence
from workers.sim import SimRunner, sim_layout
from workers.step import BlockFetch, Step

NEW = 45  # tokens of the longest output


def text(kind: int, length: int) -> list[int]:
    """A few families of prompts with common beginnings, so that there is something to hit."""
    return [*prompt(17, seed=kind % 2), *prompt(60, seed=kind)][:length]


@cache
def expected(kind: int, length: int) -> list[int]:
    return alone(text(kind, length), NEW)


@cache
def stored(kind: int, length: int) -> tuple[dict[bytes, bytes], list[bytes]]:
    """A prompt's KV as a store has it: full blocks by hash, and all of a handoff's blocks."""
    made = sequence("x", text(kind, length))
    extend(made.hashes, made.root, made.tokens, BLOCK)
    made.block_table = list(range(-(-length // BLOCK)))
    runner = SimRunner(sim_layout(BLOCK), len(made.block_table), VOCAB)
    runner.run([Chunk(made, 0, length)])
    blocks = [runner.block(index).tobytes() for index in made.block_table]
    return dict(zip(made.hashes, blocks, strict=False)), blocks


class World(Run):
    """An engine, what surrounds it, and everything that can happen to it."""

    def __init__(self, runner: Late, token_budget: int, max_sequences: int) -> None:
        super().__init__(engine(runner.num_blocks, token_budget, max_sequences, runner=runner))
        self.runner = runner
        self.asked: dict[str, tuple[int, int, int]] = {}  # id -> (kind and length of its prompt, tokens it may have)
        self.given_up: set[str] = set()
        self.orders: list[BlockFetch] = []
        self.arriving: list[tuple[Sequence, list[int]]] = []  # with the block table to write to
        self.leaving: list[list[int]] = []

    def arrive(self, kind: int, length: int, new: int, what: str) -> None:
        name = f"{len(self.asked)}"
        self.asked[name] = (kind, length, 1 if what == "prefill" else new)
        added = sequence(name, text(kind, length), new)
        if what == "prefill":
            added.transfer_id = name
        elif what == "handoff":
            added.handoff = Handoff("store", 1, name)
        elif what == "stored":
            self.store |= stored(kind, length)[0]
        self.add(added)

    def step(self) -> Step:
        step = super().step()
        if self.runner.flying:
            assert step.computed, "it would wait for an event while steps are in flight"
        self.orders += step.fetches
        self.arriving += [(receiving, list(receiving.block_table)) for receiving in step.receives]
        self.leaving += [[block for _, block in send.blocks] for send in step.sends]
        return step

    def give_up(self, index: int, how: str) -> None:
        live = sorted(self.engine.sequences)
        if not live:
            return
        name = live[index % len(live)]
        self.given_up.add(name)
        if how == "abort":
            self.engine.abort([name])
        else:
            self.engine.sequences[name].deadline = self.now - 1

    def transfer(self, part: float) -> None:
        """The oldest transfers end, of which that part of the blocks came."""
        if self.orders:
            order = self.orders.pop(0)
            self.deliver(order, int(part * (order.sources[-1].stop - order.sources[0].start)))
        if self.arriving:
            self.hand_over(*self.arriving.pop(0), part)
        if self.leaving:
            self.engine.sent(self.leaving.pop(0))

    def hand_over(self, receiving: Sequence, table: list[int], part: float) -> None:
        kind, length, _ = self.asked[receiving.id]
        blocks = stored(kind, length)[1]
        valid = int(part * len(blocks))
        for block, content in zip(table, blocks[:valid], strict=False):
            self.runner.block(block)[:] = list(content)
        token = expected(kind, length)[0] if part == 1.0 else None
        self.engine.received(receiving, valid, token)

    def settle(self) -> None:
        for _ in range(3_000):
            self.transfer(1.0)
            step = self.step()
            busy = step.computed or step.outputs or step.lookups
            if not (busy or self.orders or self.arriving or self.leaving):
                return
        raise AssertionError("the engine does not come to rest")

    def check(self) -> None:
        assert_no_leak(self.engine)
        assert not self.runner.flying
        for name, (kind, length, new) in self.asked.items():
            tokens = self.tokens.get(name, [])
            whole = expected(kind, length)[:new]
            assert tokens == (whole[: len(tokens)] if name in self.given_up else whole), name


arrival = st.tuples(
    st.just("arrive"),
    st.integers(0, 3),
    st.sampled_from([1, 4, 11, 15, 16, 17, 18, 33, 46]),
    st.sampled_from([1, 7, 30, NEW]),
    st.sampled_from(["decode", "decode", "decode", "prefill", "handoff", "stored"]),
)
event = st.one_of(
    arrival,
    arrival,
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("give up"), st.integers(0, 9), st.sampled_from(["abort", "expire"])),
    st.tuples(st.just("transfer"), st.sampled_from([0.0, 0.5, 1.0])),
)


@settings(max_examples=200, deadline=None)
@given(
    depth=st.sampled_from([2, 3, 1, 4]),
    kind=st.sampled_from([Early, Late]),
    num_blocks=st.sampled_from([24, 32, 90]),
    token_budget=st.sampled_from([16, 40]),
    max_sequences=st.sampled_from([3, 6, 16]),
    burst=st.sampled_from([8, 4, 0]),
    events=st.lists(event, min_size=25, max_size=50),
)
def test_same_tokens_and_no_lost_block(
    depth: int,
    kind: type[Late],
    num_blocks: int,
    token_budget: int,
    max_sequences: int,
    burst: int,
    events: list[tuple],
) -> None:
    """A burst of short prompts with long outputs needs more blocks than there are."""
    world = World(kind(num_blocks, depth), token_budget, max_sequences)
    for index in range(burst):
        world.arrive(index % 4, 4 + index, NEW, "decode")
    for name, *values in events:
        match name:
            case "arrive":
                world.arrive(*values)
            case "steps":
                for _ in range(values[0]):
                    world.step()
            case "give up":
                world.give_up(*values)
            case "transfer":
                world.transfer(*values)
    world.settle()
    world.check()
