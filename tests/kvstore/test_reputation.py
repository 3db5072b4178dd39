from kvstore.reputation import Reputation


def test_a_store_that_cannot_be_reached_is_left_alone_for_a_second() -> None:
    reputation = Reputation()
    reputation.failed("a", 100.0)
    assert reputation.avoided("a", 100.9)
    assert not reputation.avoided("a", 101.0)
    assert not reputation.avoided("b", 100.0)


def test_three_corrupt_blocks_within_a_minute_cost_a_minute() -> None:
    reputation = Reputation()
    for now in (0.0, 30.0, 60.0, 90.0):
        reputation.corrupt("a", now)
        assert not reputation.avoided("a", now), "never three within a minute"
    reputation.corrupt("a", 90.5)
    assert reputation.avoided("a", 150.0)
    assert not reputation.avoided("a", 150.5)
    reputation.corrupt("a", 151.0)
    assert not reputation.avoided("a", 151.0), "a new count"
    assert reputation.corrupt_blocks == 6


def test_a_failure_does_not_shorten_a_longer_absence() -> None:
    reputation = Reputation()
    for _ in range(3):
        reputation.corrupt("a", 0.0)
    reputation.failed("a", 1.0)
    assert reputation.avoided("a", 50.0)


def test_what_is_over_is_forgotten() -> None:
    reputation = Reputation()
    for i in range(1000):
        reputation.failed(f"store {i}", float(i))
    assert len(reputation._until) < 3
