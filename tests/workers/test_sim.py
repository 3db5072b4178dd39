"""The sim in shards: the same tokens as in one, as long as every byte of every shard is what it should be."""

from functools import partial

import numpy as np
import pytest

from kvstore.layout import Layout, runs
from tests.workers.engine_run import prompt, sequence
from tests.workers.local_links import links, together
from workers.runner import Chunk
from workers.sequence import Sequence
from workers.shard import Sizes, shards
from workers.sim import SimRunner, Timings

BLOCKS, VOCAB = 12, 50_000
LAYOUT = Layout(heads=3, layers=4, tokens=4, dim=2, dtype="float32", itemsize=4)
SIZES = Sizes(heads=9, kv_heads=3, layers=4, intermediate=8, vocabulary=VOCAB)
GRIDS = [(tp, pp) for tp in (1, 2, 3, 4, 7, 8) for pp in (1, 2, 3, 4) if (tp, pp) != (1, 1)]  # heads shared beyond 3
SAMPLE = [(2, 1), (1, 3), (3, 2), (7, 2), (4, 4)]


def sharded(tp: int, pp: int, timings: Timings | None = None, slept: list[float] | None = None) -> list[SimRunner]:
    sleep = (lambda _: None) if slept is None else slept.append
    return [
        SimRunner(LAYOUT, BLOCKS, VOCAB, timings, sleep, shard, link)
        for shard, link in zip(shards(SIZES, tp, pp), links(tp, pp), strict=True)
    ]


def batch() -> list[Sequence]:
    made = [sequence("a", prompt(10)), sequence("b", prompt(7, seed=2)), sequence("c", prompt(3, seed=3))]
    for index, one in enumerate(made):
        one.block_table = [8 - index, 3 + index, index]
    return made


def run(stages: list[SimRunner], chunks: list[Chunk]) -> list[int | None]:
    """One step; what the last stage says, on which its ranks agree, and of which the others know nothing."""
    results = together([partial(stage.run, chunks) for stage in stages])
    tp = stages[0].shard.tp
    assert results[:-tp] == [[None] * len(chunks)] * (len(stages) - tp)
    assert results[-tp:] == [results[-1]] * tp
    tokens: list[int | None] = results[-1]
    return tokens


def generate(stages: list[SimRunner]) -> list[list[int | None]]:
    """Chunked prefills, a step in which nothing is sampled, and decodes of all."""
    a, b, c = batch()
    steps = [run(stages, [Chunk(a, 0, 6)]), run(stages, [Chunk(b, 0, 7), Chunk(a, 6, 4), Chunk(c, 0, 2)])]
    computed = {b: 7, a: 10, c: 2}
    for sequence_, token in zip((b, a, c), steps[-1], strict=True):
        sequence_.tokens += [] if token is None else [token]
    steps.append(run(stages, [Chunk(s, first, len(s.tokens) - first) for s, first in computed.items()]))
    return steps


@pytest.fixture(scope="module")
def whole() -> tuple[SimRunner, list[list[int | None]]]:
    runner = SimRunner(LAYOUT, BLOCKS, VOCAB)
    return runner, generate([runner])


def test_one_shard_samples_what_it_always_did() -> None:
    """Tokens that were written down before there were shards."""
    runner = SimRunner(Layout(2, 2, 4, 2, "float32", 4), 4, VOCAB)
    one = sequence("s", [5, 6, 7, 8, 9])
    one.block_table = [2, 0]
    (token,) = runner.run([Chunk(one, 0, 5)])
    assert token == 2973


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_every_grid_samples_what_one_shard_does(
    tp: int, pp: int, whole: tuple[SimRunner, list[list[int | None]]]
) -> None:
    runner, tokens = whole
    assert tokens[0] == [None]
    assert tokens[1][2] is None
    stages = sharded(tp, pp)
    assert generate(stages) == tokens
    for stage in stages:  # and has its part of every block
        parts = runs(LAYOUT, stage.shard.rectangle)
        for block in range(BLOCKS):
            expected = np.concatenate([runner.block(block)[first : first + size] for first, size in parts])
            assert np.array_equal(stage.block(block), expected)


@pytest.mark.parametrize(("tp", "pp"), SAMPLE)
def test_every_byte_of_every_shard_matters(tp: int, pp: int) -> None:
    """The lowest and the highest byte of a word, in the first and the last plane."""
    stages = sharded(tp, pp)
    one = batch()[0]
    run(stages, [Chunk(one, 0, 9)])
    last = [Chunk(one, 9, 1)]
    (token,) = run(stages, last)
    for stage in stages:
        for byte in (0, 3, stage.block(8).size - 4, stage.block(8).size - 1):
            block = stage.block(8)
            block[byte] ^= 1
            assert run(stages, last) != [token], (stage.shard.rank, byte)
            block[byte] ^= 1
    assert run(stages, last) == [token]


def test_blocks_exchanged_in_one_shard_matter() -> None:
    stages = sharded(2, 2)
    one = batch()[0]
    run(stages, [Chunk(one, 0, 9)])
    last = [Chunk(one, 9, 1)]
    token = run(stages, last)
    first, second = stages[3].block(8), stages[3].block(3)
    first[:], second[:] = second.copy(), first.copy()
    assert run(stages, last) != token


def test_stages_share_the_time_of_a_step_by_layers_and_tensor_ranks_take_it_together() -> None:
    slept: list[float] = []
    timings = Timings(step_s=8.0, token_s=1.0, context_s=0.5)
    run(sharded(2, 3, timings, slept), [Chunk(batch()[0], 0, 4)])
    assert sorted(slept) == pytest.approx([3.0] * 4 + [6.0] * 2)  # of 12 s: one, one and two layers of four
