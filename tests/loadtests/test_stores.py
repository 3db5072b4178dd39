from loadtests.simulator.stores import Stores

CHAIN = [bytes([i]) for i in range(6)]


def test_the_longest_run_wins_wherever_it_is() -> None:
    stores = Stores(nodes=3, capacity=10)
    stores.write(0, CHAIN[:2])
    stores.write(1, CHAIN[:5])
    stores.write(2, CHAIN[:3])
    assert stores.local(0, CHAIN, 0) == 2
    assert stores.remote(CHAIN, 0) == (5, 1)
    assert stores.remote(CHAIN, 5) == (5, -1)
    assert stores.local(2, CHAIN, 3) == 3


def test_the_least_recently_used_go_first_and_tails_before_heads() -> None:
    stores = Stores(nodes=1, capacity=4)
    stores.write(0, CHAIN[:3])
    stores.write(0, [b"other", b"another"])
    assert stores.local(0, CHAIN, 0) == 2  # the tail of three had to go
    stores.write(0, CHAIN[:2])
    stores.write(0, [b"third"])
    assert stores.local(0, CHAIN, 0) == 2  # used just now: another one went
    assert stores.local(0, [b"other", b"another"], 0) == 1
    there: set[bytes] = set()
    for names, come in stores.changes[0]:
        (there.update if come else there.difference_update)(names)
    assert there == {CHAIN[0], CHAIN[1], b"other", b"third"}
