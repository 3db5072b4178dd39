"""What is told of the cluster, and what kind of thing it is."""

from __future__ import annotations

import pytest

from cluster.controller import EVENTS
from router.events import KEPT, EventLog, added, event


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("decode-0 turns to prefill", "role"),
        ("2 to decode: the busier pool is 93% busy", "role"),
        ("decode-0 to both: so that each role has a worker", "role"),
        ("decode-3 is started for decode", "scale"),
        ("decode-3 drains", "scale"),
        ("decode-3 is stopped, 4.1 s after it was told to drain", "scale"),
        ("did not start: no node has 4 CPUs", "failure"),
        ("ChangeRole(id='decode-0', role='prefill') failed: no answer in time", "failure"),
        ("autoscaling: slo failed, the size stays: ValueError: 7", "failure"),
        ("decode-1 is lost", "failure"),
        ("decode-1 is back", "recovery"),
    ],
)
def test_a_line_of_the_controller(words: str, kind: str) -> None:
    found = event(f"12:34:56 {words}")
    assert (found.at, found.kind, found.words) == ("12:34:56", kind, words)


def test_a_line_without_a_time_is_told_all_the_same() -> None:
    assert event("something").words == "something"


def test_what_was_added_to_a_log_that_forgets() -> None:
    assert list(added((), ("a", "b"))) == ["a", "b"]
    assert list(added(("a", "b"), ("a", "b", "c"))) == ["c"]
    assert list(added(("a", "b"), ("b", "c", "d"))) == ["c", "d"]
    assert list(added(("a", "b"), ("c", "d"))) == ["c", "d"]
    assert list(added(("a", "a"), ("a", "a"))) == []
    lines = tuple(str(number) for number in range(EVENTS))
    assert list(added(lines, (*lines[1:], "new"))) == ["new"]


def test_the_controllers_words_are_heard_once() -> None:
    log = EventLog()
    for lines in (("09:00:00 a drains",), ("09:00:00 a drains",), ("09:00:00 a drains", "09:00:01 b drains")):
        log.hear(lines)
    assert [found.words for found in log.latest()] == ["a drains", "b drains"]


def test_workers_that_are_lost_and_come_are_seen() -> None:
    log = EventLog()
    log.look({"a": "serving", "b": "lost"}, True, "10:00:00")  # how it was found is no event
    log.look({"a": "lost", "b": "serving", "c": "lost"}, True, "10:00:01")
    log.look({"a": "serving", "b": "serving", "c": "serving"}, True, "10:00:02")
    said = [(found.at, found.words) for found in log.latest()]
    assert said == [
        ("10:00:01", "a is lost"),
        ("10:00:02", "a is back"),
        ("10:00:02", "c has joined"),
    ]


def test_one_that_drains_goes_without_a_word() -> None:
    log = EventLog()
    log.look({"a": "serving"}, True, "10:00:00")
    log.look({"a": "draining", "new": "serving"}, True, "10:00:01")
    log.look({"a": "lost", "new": "serving"}, True, "10:00:02")
    log.look({"new": "serving"}, True, "10:00:03")
    assert [found.words for found in log.latest()] == ["new has joined"]


def test_redis_going_and_coming_is_seen() -> None:
    log = EventLog()
    for redis in (True, False, False, True):
        log.look({}, redis, "10:00:00")
    kinds = [(found.kind, found.words.split()[1]) for found in log.latest()]
    assert kinds == [("failure", "is"), ("recovery", "answers")]


def test_it_is_bounded() -> None:
    log = EventLog()
    for number in range(5 * KEPT):
        log.look({"a": "lost" if number % 2 else "serving"}, True, "10:00:00")
    assert len(log.latest()) == KEPT
