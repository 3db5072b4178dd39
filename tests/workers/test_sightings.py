"""Which prompts were asked for before."""

from workers.sightings import Sightings

A, B, C, D = (bytes([i]) * 32 for i in range(4))


def test_the_shared_beginning_was_seen_before() -> None:
    sightings = Sightings()
    assert sightings.see([A, B, C]) == 0
    assert sightings.see([A, B, D]) == 2
    assert sightings.see([A, B, C]) == 3
    assert sightings.see([D]) == 1
    assert sightings.see([]) == 0


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    sightings = Sightings(capacity=2)
    sightings.see([A])
    sightings.see([B])
    sightings.see([A])
    sightings.see([C])
    assert sightings.see([A]) == 1
    assert sightings.see([B]) == 0
