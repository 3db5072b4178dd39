"""Rows come and go in the order of ids; columns are what was put."""

import dataclasses
import math

import numpy as np

from router.placement import Ask, place
from tests.router.workers import RATES, table_of, view

NOTHING = np.zeros(0, dtype=np.int32)


def test_rows_are_in_the_order_of_ids_whatever_order_they_came_in() -> None:
    table = table_of(view("d2", running=2), view("b1", running=1), view("p3", running=3))
    assert table.ids() == ("b1", "d2", "p3")
    assert table.batch.tolist() == [1, 2, 3]
    assert (table.prefillers.tolist(), table.decoders.tolist()) == ([2], [0, 1])
    table.remove("d2")
    table.remove("d2")
    assert table.ids() == ("b1", "p3")
    assert table.batch.tolist() == [1, 3]
    assert [table.row("p3"), table.row("d2")] == [1, None]
    assert len(table) == 2


def test_a_view_replaces_the_one_before() -> None:
    table = table_of(view("d1", running=9, waiting_tokens=700))
    table.put(view("p1", running=1))
    table.put(view("d1", role="prefill", running=4, waiting_tokens=0))
    assert len(table) == 2
    assert (table.prefillers.tolist(), table.decoders.tolist()) == ([0, 1], [])
    assert table.batch.tolist() == [4, 1]
    assert table.queue_ms.tolist() == [0, 0]


def test_what_was_sent_counts_like_what_was_reported() -> None:
    reported = view("d1", running=3, waiting_tokens=600, context_tokens=1_000, blocks_free=90)
    sent = view("d2", running=2, waiting_tokens=100, context_tokens=200, blocks_free=140)
    table = table_of(reported, dataclasses.replace(sent, sent_tokens=500, sent_sequences=1, sent_context=800))
    for column in (table.queue_ms, table.batch, table.itl_ms, table.blocks_free):
        assert column[0] == column[1]
    assert table.queue_ms[0] == 2 * 1.0 + 600 * 0.1  # two steps
    assert table.itl_ms[0] == 10 + 3 * 0.1 + 1_000 * 1e-3


def test_the_backlog_is_that_of_the_first_who_could_start() -> None:
    table = table_of()
    assert table.backlog_ms() == math.inf
    table.put(view("d1", waiting_tokens=0))
    table.put(view("p1", waiting_tokens=5_120))
    assert table.backlog_ms() == 10 + 512, "decode workers do not count where there are others"
    table.put(view("p2", waiting_tokens=512))
    assert table.backlog_ms() == 1 + 51.2
    table.remove("p1")
    table.remove("p2")
    assert table.backlog_ms() == 0


def test_stores_count_on_their_node() -> None:
    table = table_of(view("p1", node="n1"), view("p2", node="n2"), view("p3", node="n3"))
    table.set_store(4, "n1")
    table.set_store(5, "n1")
    table.set_store(6, "n2")
    depths = np.array([0, 0, 0, 0, 3, 7, 5], dtype=np.int32)
    near, best = table.store_depths(depths)
    assert (near.tolist(), best) == ([7, 5, 0], 7)
    table.remove_store(5)
    near, best = table.store_depths(depths)
    assert (near.tolist(), best) == ([3, 5, 0], 5)
    near, best = table.store_depths(depths[:4])
    assert (near.tolist(), best) == ([0, 0, 0], 0), "an owner that the lookup does not know has nothing"


def test_who_was_used_last() -> None:
    table = table_of(view("p1"), view("p2"), view("d1", rates=dataclasses.replace(RATES, prefill=(1e6, 1.0, 0.0))))
    used = table.last_used(table.rows)
    assert len(set(used.tolist())) == 3
    decision = place(table, Ask(600, 10), NOTHING)
    assert decision.route.prefill is not None
    table.placed(decision)
    assert table.last_used(table.rows)[[1, 2]].argmax() == table.ids()[1:].index(decision.route.prefill)
    assert place(table, Ask(600, 10), NOTHING).route.prefill != decision.route.prefill
