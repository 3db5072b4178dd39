import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Unavailable
from cluster.messages import Role
from router.placement import Route, WorkerView, place


def worker(worker_id: str, role: Role, load: int = 0, sent: int = 0) -> WorkerView:
    return WorkerView(worker_id, role, running=0, waiting_tokens=load, sent_tokens=sent)


def test_least_loaded_of_each_role() -> None:
    fleet = [
        worker("p1", "prefill", 9),
        worker("p2", "prefill", 3),
        worker("d1", "decode", 2),
        worker("d2", "decode", 5),
    ]
    assert place(fleet) == Route("p2", "d1")


def test_what_was_just_sent_counts() -> None:
    fleet = [worker("p1", "prefill", 10), worker("p2", "prefill", 3, sent=100), worker("d1", "decode")]
    assert place(fleet).prefill == "p1"


def test_running_sequences_count() -> None:
    fleet = [
        WorkerView("d1", "decode", running=5, waiting_tokens=0),
        WorkerView("d2", "decode", running=4, waiting_tokens=0),
    ]
    assert place(fleet) == Route(None, "d2")


def test_workers_that_do_both_need_no_handoff() -> None:
    assert place([worker("b1", "both", 4), worker("b2", "both", 1)]) == Route(None, "b2")


def test_a_prefill_worker_feeds_one_that_does_both() -> None:
    assert place([worker("p1", "prefill"), worker("b1", "both")]) == Route("p1", "b1")


def test_a_prefill_worker_serves_as_last_resort() -> None:
    fleet = [worker("p1", "prefill", 5), worker("p2", "prefill", 1), worker("d1", "decode")]
    assert place(fleet, frozenset({"d1"})) == Route(None, "p2")


def test_excluded_prefill_workers_leave_the_decode_worker_alone() -> None:
    fleet = [worker("p1", "prefill"), worker("d1", "decode")]
    assert place(fleet, frozenset({"p1"})) == Route(None, "d1")


def test_nobody_left() -> None:
    with pytest.raises(Unavailable) as error:
        place([worker("d1", "decode")], frozenset({"d1"}))
    assert error.value.retry_after_s is not None


WORKERS = st.lists(
    st.builds(
        worker,
        st.sampled_from([f"w{i}" for i in range(8)]),
        st.sampled_from(["prefill", "decode", "both"]),
        st.integers(0, 100),
        st.integers(0, 100),
    ),
    unique_by=lambda view: view.id,
)


@given(WORKERS, st.frozensets(st.sampled_from([f"w{i}" for i in range(8)])))
def test_routes_are_sound(fleet: list[WorkerView], excluded: frozenset[str]) -> None:
    usable = {view.id: view for view in fleet if view.id not in excluded}
    if not usable:
        with pytest.raises(Unavailable):
            place(fleet, excluded)
        return
    route = place(fleet, excluded)
    assert route == place(list(reversed(fleet)), excluded)
    assert route.decode in usable
    assert route.prefill != route.decode
    if route.prefill is not None:
        assert usable[route.prefill].role == "prefill"
        assert usable[route.decode].role != "prefill"
    same_role = [
        view for view in usable.values() if (view.role == "prefill") == (usable[route.decode].role == "prefill")
    ]
    assert usable[route.decode].load == min(view.load for view in same_role)
