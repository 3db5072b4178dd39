"""The engine and approximate sequences: which stores their blocks are for, when, and how large they are there."""

import dataclasses

import pytest

from cluster.perfmodel import Path, PerfModel
from kvstore.fetcher import Source
from tests.workers.engine_run import BLOCK, Run, assert_no_leak, engine, prompt, sequence
from workers.sim import sim_layout

LAYOUT = sim_layout(BLOCK)
STORED = dataclasses.replace(LAYOUT, dtype="int8", itemsize=1)


class Sizes(PerfModel):
    """Keeps the sizes it is asked and told about."""

    def __init__(self) -> None:
        super().__init__(64)
        self.asked: list[int] = []
        self.told: list[int] = []

    def fetch_ms(self, size: int, path: Path) -> float:
        self.asked.append(size)
        return super().fetch_ms(size, path)

    def observe_fetch(self, size: int, path: Path, ms: float) -> None:
        self.told.append(size)
        super().observe_fetch(size, path, ms)


@pytest.mark.parametrize("exact", [True, False])
def test_the_sizes_of_fetches_are_those_in_the_stores(exact: bool) -> None:
    run = Run(engine(stored=STORED))
    run.engine.model = sizes = Sizes()
    added = sequence("s", prompt(40), exact=exact)
    run.engine.add(added)
    run.engine.located(added, [Source("store", 1, 0, 10, "memory")])
    (order,) = run.step().fetches
    run.engine.fetched(added, 5, [(order.sources[0], 5, 0.001)])
    size = LAYOUT.block_bytes if exact else STORED.block_bytes
    assert sizes.asked == [9 * size]  # the last token is always computed
    assert sizes.told == [5 * size]


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_handed_off_is_written_once_more_only_when_it_is_approximate(exact: bool) -> None:
    """A handoff is exact, so it leaves nothing in the stores that approximate sequences ask."""
    run = Run(engine(token_budget=16, stored=STORED))
    for name in ("p", "again"):
        run.add(sequence(name, prompt(33), transfer_id=name, exact=exact))
        run.finish_all()
        assert [position for send in run.sends for position, _ in send.blocks] == list(range(9))
        run.sends.clear()
    assert len(run.offloads) == (0 if exact else 8)
    assert not any(offload.name.exact for offload in run.offloads)
    assert_no_leak(run.engine)


def test_evicted_blocks_go_to_the_stores_they_are_for() -> None:
    run = Run(engine(num_blocks=128, stored=STORED))
    for seed in range(30):
        run.add(sequence(f"s{seed}", prompt(40, seed), new=1, exact=seed % 3 > 0))
        run.finish_all()
        for _ in range(30):  # what an engine that idles does
            run.step()
    kinds = {offload.name.key.parent: offload.name.exact for offload in run.offloads}
    assert set(kinds.values()) == {True, False}
    asked = sequence("x", prompt(40, seed=0))
    run.engine.add(asked)
    assert kinds[asked.hashes[0]] is False
    run.engine.abort(["x"])
    assert_no_leak(run.finish_all().engine)
