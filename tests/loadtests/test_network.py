import pytest

from loadtests.simulator.events import Events
from loadtests.simulator.network import Network

GB = 1e9


def ends(*transfers: tuple[float, int, int, float], nic: float | None = None) -> list[float]:
    """When each of (start, source, target, bytes) is over; alone one byte takes a nanosecond, and 1 ms goes before."""
    events = Events()
    over: dict[int, float] = {}  # number of the transfer -> when it was over
    network = Network(events, memory=(0.5, 1e-7), remote=(1.0, 1e-6), nic_bytes_s=nic)

    def send(number: int, source: int, target: int, size: float) -> None:
        network.send(source, target, size, lambda: over.__setitem__(number, events.now))

    for number, (start, *rest) in enumerate(transfers):
        events.at(start, send, number, *rest)
    events.run(1e9)
    return [over[number] for number in range(len(transfers))]


def test_alone_it_takes_what_the_rates_say() -> None:
    assert ends((0, 0, 1, GB)) == pytest.approx([1.001])
    assert ends((0, 0, 0, GB)) == pytest.approx([0.1005])


def test_two_share_a_nic_and_neither_knows_of_others_elsewhere() -> None:
    assert ends((0, 0, 1, GB), (0, 0, 2, GB), (0, 3, 4, GB)) == pytest.approx([2.001, 2.001, 1.001])
    assert ends((0, 0, 2, GB), (0, 1, 2, GB)) == pytest.approx([2.001, 2.001])
    assert ends((0, 0, 1, GB), (0, 1, 0, GB)) == pytest.approx([1.001, 1.001])  # there and back


def test_who_comes_later_slows_the_other_down_until_one_is_through() -> None:
    """Half a second alone, a second of half the speed for the rest, then the other is alone with half of its bytes."""
    assert ends((0, 0, 1, GB), (0.5, 0, 2, GB)) == pytest.approx([1.501, 2.001])


def test_a_wide_nic_carries_several_at_full_speed() -> None:
    assert ends((0, 0, 1, GB), (0, 0, 2, GB), nic=2 * GB) == pytest.approx([1.001, 1.001])
    assert ends((0, 0, 1, GB), nic=0.5 * GB) == pytest.approx([2.001])
