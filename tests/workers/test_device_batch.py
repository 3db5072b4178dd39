"""A step's words for a GPU: what they say of the chunks, and that padding says nothing."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from cluster.messages import Sampling
from kernels.paged_attention import CHUNK
from kernels.sampling import key
from tests.workers.tiny_models import sequence
from workers.decode_graphs import buckets
from workers.device_batch import BlockTables, DeviceBatch, Plan, Shape, fields, fill, plan
from workers.runner import Chunk
from workers.sequence import Sequence

BLOCK = 16
GROUP = 3
GREEDY = Sampling(temperature=0.0)


def made(length: int, blocks: list[int], sampling: Sampling = GREEDY) -> Sequence:
    return sequence(str(blocks), [1000 * blocks[0] + i for i in range(length)], blocks, sampling)


def chunk(length: int, first: int, take: int, sampling: Sampling = GREEDY) -> Chunk:
    """Of a sequence of that length in random blocks."""
    blocks = random.Random(length * 7 + first).sample(range(1, 5000), -(-length // BLOCK))
    return Chunk(made(length, blocks, sampling), first, take)


def words(step: Plan | None, shape: Shape) -> DeviceBatch:
    buffer = np.full(fields(shape)[1], 77, np.int32)
    fill(buffer, shape, step, BLOCK)
    return DeviceBatch.over(torch.from_numpy(buffer), shape)


def planned(chunks: list[Chunk]) -> Plan:
    return plan(chunks, BlockTables(), BLOCK, GROUP, {})


def test_rows_are_decodes_first_and_say_where_each_token_goes() -> None:
    chunks = [chunk(50, 10, 40), chunk(33, 32, 1), chunk(70, 3, 20), chunk(600, 599, 1), chunk(18, 16, 1)]
    step = planned(chunks)
    batch = words(step, step.shape)
    order = [chunks[1], chunks[3], chunks[4], chunks[0], chunks[2]]
    assert [c.sequence for c in step.chunks] == [c.sequence for c in order]
    row = 0
    for index, c in enumerate(order):
        assert batch.step.query_starts[index] == row
        assert batch.step.lengths[index] == c.first + c.take
        for position in range(c.first, c.first + c.take):
            assert batch.token_ids[row] == c.sequence.tokens[position]
            assert batch.positions[row] == position
            assert batch.slots[row] == c.sequence.block_table[position // BLOCK] * BLOCK + position % BLOCK
            row += 1
        table = c.sequence.block_table[: -(-(c.first + c.take) // BLOCK)]
        assert batch.step.block_tables[index, : len(table)].tolist() == table
    assert batch.step.query_starts[-1] == row == step.shape.rows
    # position 599 ends a block that was begun before; all others end in one that they began
    assert batch.fresh_blocks.tolist() == [
        order[i].sequence.block_table[at] for i, at in ((0, 2), (2, 1), (3, 3), (4, 1))
    ]
    assert batch.step.decodes == 3


def test_every_key_of_a_decode_and_every_query_of_a_prefill_is_some_programs_work() -> None:
    step = planned([chunk(1300, 1299, 1), chunk(40, 39, 1), chunk(300, 20, 200), chunk(30, 0, 30)])
    batch = words(step, step.shape).step
    starts = batch.decode_item_starts.tolist()
    items = batch.decode_items.tolist()
    assert [items[a:b] for a, b in itertools.pairwise(starts)] == [[[0, 0], [0, 1], [0, 2]], [[1, 0]]]
    tiles = sorted(batch.prefill_tiles.tolist())
    for place, take in ((2, 200), (3, 30)):
        firsts = [first for sequence_, first in tiles if sequence_ == place]
        assert firsts[0] == 0
        assert firsts[-1] < take
        assert len(set(np.diff(firsts))) <= 1


def test_logits_are_taken_of_all_decodes_and_of_prefills_that_end_their_sequence() -> None:
    chunks = [chunk(50, 10, 40), chunk(40, 20, 1), chunk(70, 3, 20), chunk(18, 17, 1)]
    step = planned(chunks)
    batch = words(step, step.shape)
    assert batch.sample_rows.tolist() == [0, 1, 41]
    assert step.answers == (1, 3, 0)
    assert [draw is not None for draw in step.draws] == [False, True, True]


def test_sampling_parameters_are_those_of_the_row_to_the_last_bit() -> None:
    drawn = Sampling(temperature=0.7, top_p=0.9, top_k=7, min_p=0.1, seed=2**63 - 5)
    step = planned([chunk(9, 8, 1), chunk(40, 39, 1, drawn), chunk(30, 0, 30, Sampling(temperature=0.8, top_k=1))])
    batch = words(step, step.shape)
    assert batch.temperature.tolist() == [0.0, 0.7, 0.0]
    assert batch.top_p.tolist() == [1.0, 0.9, 1.0]
    assert (batch.top_k[1], batch.min_p[1]) == (7, 0.1)
    assert tuple(int(word) & 0xFFFFFFFF for word in batch.words[1]) == key(2**63 - 5, 40)


def test_padding_writes_nothing_has_no_keys_and_no_work() -> None:
    step = planned([chunk(33, 32, 1), chunk(600, 599, 1), chunk(18, 17, 1)])
    shape = Shape(8, 8, 128, 8, 32, 0, 8, 8)
    assert shape.holds(step.shape)
    exact, padded = words(step, step.shape), words(step, shape)
    for field in ("token_ids", "positions", "slots", "sample_rows", "temperature"):
        assert getattr(padded, field)[:3].tolist() == getattr(exact, field).tolist()
    assert padded.slots[3:].tolist() == [-1] * 5
    assert padded.step.lengths.tolist() == [33, 600, 18, 0, 0, 0, 0, 0]
    assert padded.step.query_starts.tolist() == list(range(9))
    assert padded.step.decode_items[4:, 0].tolist() == [-1] * 28
    assert padded.step.decode_item_starts.tolist() == [0, 1, 3, 4, 4, 4, 4, 4, 4]
    nothing = words(None, shape)
    assert nothing.step.lengths.tolist() == [0] * 8
    assert nothing.slots.tolist() == [-1] * 8
    assert nothing.sample_rows.tolist() == list(range(8))


def test_a_buffer_keeps_nothing_of_the_step_before() -> None:
    shape = Shape(4, 4, 40, 4, 8, 0, 4, 4)
    buffer = np.zeros(fields(shape)[1], np.int32)
    fill(buffer, shape, planned([chunk(600, 599, 1, Sampling(top_k=5)) for _ in range(4)]), BLOCK)
    fill(buffer, shape, None, BLOCK)
    fresh = np.zeros_like(buffer)
    fill(fresh, shape, None, BLOCK)
    batch = DeviceBatch.over(torch.from_numpy(buffer), shape)
    assert batch.step.lengths.tolist() == [0] * 4
    for field, found in fields(shape)[0].items():
        assert (buffer[found.words] == fresh[found.words]).all(), field


def test_fields_are_aligned_and_do_not_overlap() -> None:
    for shape in (Shape(5, 3, 7, 2, 9, 3, 3, 5), Shape(1, 1, 1, 1, 1, 0, 1, 1), Shape(3, 1, 1, 0, 0, 1, 0, 0)):
        found, size = fields(shape)
        spans = sorted((field.words.start, field.words.stop) for field in found.values())
        assert all(start % 4 == 0 for start, _ in spans)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= size


def test_block_tables_follow_a_sequence_that_grows_and_one_that_was_preempted() -> None:
    tables, a, b = BlockTables(), made(40, [3, 1, 2]), made(20, [9, 8])
    assert [table.tolist() for table in tables.of([a, b])] == [[3, 1, 2], [9, 8]]
    a.block_table += [7]
    assert [table.tolist() for table in tables.of([b, a])] == [[9, 8], [3, 1, 2, 7]]
    a.block_table = [5, 6, 4, 11]
    assert [table.tolist() for table in tables.of([a])] == [[5, 6, 4, 11]]
    b.block_table = [12, 13]
    assert [table.tolist() for table in tables.of([b])] == [[12, 13]]


@pytest.mark.parametrize(("rows", "context"), [(1, 100), (4, 512), (6, 513), (64, 131_072), (256, 5000)])
def test_buckets_hold_every_step_of_decodes(rows: int, context: int) -> None:
    shapes = buckets(rows, context, BLOCK)
    assert shapes[0].rows == rows
    assert shapes == sorted(shapes, key=lambda shape: (shape.rows, shape.width), reverse=True)
    for count in {1, 2, 3, 5, rows // 2, rows - 1, rows} & set(range(1, rows + 1)):
        for length in {1, CHUNK - 1, CHUNK, CHUNK + 1, context // 2, context - 1, context} & set(range(1, context + 1)):
            width, items = -(-length // BLOCK), count * -(-length // CHUNK)
            fitting = [s for s in shapes if s.holds(Shape(count, count, width, count, items, 0, count, 0))]
            assert fitting, (count, length)
            assert fitting[-1].rows < max(2 * count, count + 8), "padded to more rows than need be"
            assert fitting[-1].width <= max(CHUNK // BLOCK, 4 * math.ceil(length / CHUNK) * CHUNK // BLOCK)
    assert not any(s.holds(Shape(2, 2, 1, 1, 1, 1, 2, 0)) for s in shapes), "a step with a prefill"
