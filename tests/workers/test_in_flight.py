"""Steps in flight: their order, and what time each is charged."""

import pytest

from tests.workers.engine_run import sequence
from tests.workers.sim_pipelines import Late
from workers.in_flight import Collected, InFlight
from workers.runner import Chunk
from workers.sequence import State


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def chunks(first: int) -> list[Chunk]:
    made = sequence("s", list(range(40)))
    made.block_table, made.computed, made.state = list(range(10)), first, State.RUNNING
    return [Chunk(made, first, 4)]


def at(clock: Clock, now: float, flight: InFlight, steps: list[Chunk] | None = None) -> Collected | None:
    clock.now = now
    return flight.collect() if steps is None else flight.submit(steps)


def test_the_oldest_is_collected_and_no_more_than_the_depth_are_submitted() -> None:
    flight = InFlight(Late(16, 2))
    first, second = chunks(0), chunks(4)
    flight.submit(first)
    assert (len(flight), flight.full) == (1, False)
    flight.submit(second)
    assert (len(flight), flight.full) == (2, True)
    with pytest.raises(AssertionError, match="2 steps are in flight"):
        flight.submit(chunks(8))
    assert flight.collect().chunks is first
    assert flight.collect().chunks is second
    assert len(flight) == 0


def test_the_times_of_steps_that_overlap_add_up_to_what_they_took_together() -> None:
    clock = Clock()
    flight = InFlight(Late(16, 2), clock)
    at(clock, 1.0, flight, chunks(0))
    at(clock, 2.0, flight, chunks(4))
    seconds = [at(clock, 5.0, flight)]
    at(clock, 5.5, flight, chunks(8))
    seconds += [at(clock, 8.0, flight), at(clock, 10.0, flight)]
    assert [done.seconds for done in seconds if done] == [4.0, 3.0, 2.0]


def test_time_with_nothing_in_flight_is_nobodys() -> None:
    clock = Clock()
    flight = InFlight(Late(16, 2), clock)
    for began in (1.0, 100.0):
        at(clock, began, flight, chunks(0))
        done = at(clock, began + 2, flight)
        assert done is not None
        assert done.seconds == 2.0
