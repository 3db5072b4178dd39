"""What a placement costs the router: the lookup of the prompt's prefix and the choice of workers, as fleets grow.

Half of the workers prefill, half decode, eight to a node with a store. Everybody has the first blocks of the prompt (a
system prompt), one worker in four and every store more of it, each as far as chance has it. One core, no network: the
best of many repetitions, because what else the machine does is not the router's.
"""

from __future__ import annotations

import random
import time

from cluster.perfmodel import PRIOR
from deploy.bench.report import Figure, median
from kvstore.prefix_map import PrefixMap
from router.placement import Ask, place
from router.table import FleetTable, WorkerView

WORKERS = (8, 64, 256, 1_000)
BLOCKS = (16, 256, 2_000)
LIMITS_US = {(64, 256): 150.0, (1_000, 256): 600.0}  # (workers, blocks) -> microseconds
BLOCK_SIZE, BLOCK_BYTES = 16, 2**21  # of a model of 8 billion parameters
SHARED = 1 / 8  # of the prompt is the system prompt
NEW_TOKENS = 200
ROUNDS, REPETITIONS = 5, 40


def measure() -> list[Figure]:
    return [_figure(workers, blocks) for workers in WORKERS for blocks in BLOCKS]


def _figure(workers: int, blocks: int) -> Figure:
    table, prefix_map, chain = _fleet(workers, blocks, random.Random(0))
    ask = Ask(blocks * BLOCK_SIZE + BLOCK_SIZE // 2, NEW_TOKENS)
    rounds = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            table.placed(place(table, ask, prefix_map.lookup(chain)))
            times.append(time.perf_counter() - start)
        rounds.append(1e6 * min(times))
    name = f"lookup and placement, {blocks:,} blocks, {workers:,} workers"
    limit = LIMITS_US.get((workers, blocks))
    return Figure("placement", name, min(rounds), "us", limit, median(rounds)[1], lower_is_better=True)


def _fleet(workers: int, blocks: int, rng: random.Random) -> tuple[FleetTable, PrefixMap, list[bytes]]:
    table, prefix_map = FleetTable(BLOCK_SIZE, BLOCK_BYTES), PrefixMap()
    chain = [rng.randbytes(32) for _ in range(blocks)]
    for number in range(workers):
        owner = prefix_map.join()
        prefix_map.put(owner, chain[: rng.randrange(blocks) if number % 4 == 0 else int(SHARED * blocks)])
        view = WorkerView(
            id=f"worker-{number:04}",
            role="prefill" if number % 2 else "decode",
            node=_node(number),
            owner=owner,
            running=rng.randrange(40),
            waiting_tokens=rng.randrange(4_000),
            context_tokens=rng.randrange(60_000),
            blocks_free=rng.randrange(8_000),
            blocks_total=8_000,
            rates=PRIOR,
        )
        table.put(view)
        if number % 8 == 0:
            store = prefix_map.join()
            prefix_map.put(store, chain[: rng.randrange(blocks)])
            table.set_store(store, _node(number))
    return table, prefix_map, chain


def _node(number: int) -> str:
    return f"node-{number // 8}"
