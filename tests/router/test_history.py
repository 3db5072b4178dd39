"""Ten minutes, and only what is new to who asks again."""

from __future__ import annotations

import dataclasses

from router.history import KEPT, History, Sample

SAMPLE = Sample(1, 2, 0, 3, 0, 0.5, 12.34567, None, None, None, None, 123456.789, 0.0, 0.0)


def test_columns_and_figures_belong_together() -> None:
    history = History()
    history.add(SAMPLE)
    told = history.after(0)
    assert list(told["columns"]) == [field.name for field in dataclasses.fields(Sample)]
    assert told["samples"] == [[1, 2, 0, 3, 0, 0.5, 12.35, None, None, None, None, 123500.0, 0.0, 0.0]]


def test_only_what_came_after_is_told() -> None:
    history = History()
    for running in range(5):
        history.add(dataclasses.replace(SAMPLE, running=running))
    assert [sample[3] for sample in history.after(3)["samples"]] == [3, 4]
    assert history.after(5) == {**history.after(99), "last": 5, "samples": []}
    assert len(history.after(0)["samples"]) == 5


def test_what_is_older_than_ten_minutes_is_gone() -> None:
    history = History()
    for running in range(KEPT + 10):
        history.add(dataclasses.replace(SAMPLE, running=running))
    told = history.after(0)
    assert (told["last"], len(told["samples"]), told["samples"][0][3]) == (KEPT + 10, KEPT, 10)
