"""Which store of its node a worker writes to."""

from cluster.messages import StoreInfo
from workers.node_store import preference


def stores(*names: str) -> list[StoreInfo]:
    return [StoreInfo(name, f"{name}:1", "node", 1, "ns", 1) for name in names]


def first(worker: str, *names: str) -> str:
    return preference(worker, stores(*names))[0].id


def test_workers_are_spread_and_the_order_of_the_stores_does_not_matter() -> None:
    choices = {f"worker-{i}": first(f"worker-{i}", "s0", "s1", "s2") for i in range(300)}
    assert all(70 <= list(choices.values()).count(name) <= 130 for name in ("s0", "s1", "s2"))
    assert choices == {worker: first(worker, "s2", "s0", "s1") for worker in choices}


def test_when_a_store_goes_only_its_own_workers_move() -> None:
    for number in range(100):
        worker = f"worker-{number}"
        before, after = first(worker, "s0", "s1", "s2"), first(worker, "s0", "s2")
        assert after == before or before == "s1"


def test_a_node_without_stores() -> None:
    assert preference("worker", []) == []
