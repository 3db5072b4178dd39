"""What a router counts itself: placements, handoffs, tenants, GPU time; and what it says of the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.messages import ControllerInfo, Gpu, Sampling
from router.metrics import FAMILIES
from router.outputs import WorkerLink
from router.request import Request
from router.tenant_metrics import MOST, OTHERS, TenantMetrics, shares
from tests.router.fakes import NAMESPACE
from tests.router.harness import MODEL, Api

GPU = Gpu("GPU-1", "H200", 0.5, 3, 4, 600.0)


@pytest.fixture(scope="module")
def scaled(model_directory: Path) -> Iterator[Api]:
    """A router that may scale to zero, with a prefill and two decode workers."""
    with Api(model_directory).serving("pdd", scale="0..4", ttft_slo=0.5) as one:
        yield one


def samples(api: Api) -> dict[tuple[str, tuple[str, ...]], float]:
    """(sample, label values in the order of the labels' names) -> value."""
    return {
        (s.name, tuple(value for _, value in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(api.http.get("/metrics").text)
        for s in family.samples
    }


def test_placements_and_the_exposed_part_of_handoffs_are_counted(scaled: Api) -> None:
    before = samples(scaled)
    assert scaled.complete(prompt=[9, 9], max_tokens=5).is_success
    after = samples(scaled)
    grown = {kind: after["tandem_placements_total", (kind,)] - before["tandem_placements_total", (kind,)] for kind in
             ("disaggregated", "append", "aggregated")}  # fmt: skip
    assert grown == {"disaggregated": 1, "append": 0, "aggregated": 0}
    assert after["tandem_handoff_exposed_seconds_count", ()] - before["tandem_handoff_exposed_seconds_count", ()] == 1


def test_counters_are_there_before_anything_has_happened(model_directory: Path) -> None:
    with Api(model_directory).serving("b") as api:
        page = samples(api)
        assert page["tandem_requests_total", ("internal_error",)] == page["tandem_refused_total", ("door",)] == 0


def test_everything_on_the_page_is_declared(scaled: Api) -> None:
    page = scaled.http.get("/metrics").text
    names = {line.split()[2].removesuffix("_created") for line in page.splitlines() if line.startswith("# TYPE")}
    declared = {family.name for family in FAMILIES}
    assert {name for name in names if name not in declared and f"{name}_total" not in declared} == set()


def test_roles_are_counted_by_state(scaled: Api) -> None:
    page = samples(scaled)
    assert page["tandem_workers", ("prefill", "serving")] == 1
    assert page["tandem_workers", ("decode", "serving")] == 2
    assert page["tandem_workers", ("both", "serving")] == page["tandem_workers", ("decode", "lost")] == 0
    assert page["tandem_role_ratio", ("decode",)] == pytest.approx(2 / 3)
    assert page["tandem_role_wanted", ("decode",)] == 0  # it may scale to zero
    assert page["tandem_slo_seconds", ("ttft",)] == 0.5


def test_a_worker_that_left_and_still_works_is_draining(scaled: Api) -> None:
    scaled.reset()
    held = scaled.membership.workers
    for worker in scaled.workers.values():
        worker.hold_at = 2
    with scaled.http.stream("POST", "/v1/completions", json={"prompt": [9, 9], "max_tokens": 5, "stream": True}):
        scaled.wait(lambda: scaled.workers["d1"].jobs or scaled.workers["d2"].jobs)
        busy = "d1" if scaled.workers["d1"].jobs else "d2"
        scaled.membership.workers = [worker for worker in held if worker.id != busy]
        scaled.wait(lambda: samples(scaled)["tandem_workers", ("decode", "draining")] == 1)
        assert samples(scaled)["tandem_workers", ("decode", "serving")] == 1
    scaled.membership.workers = held
    scaled.reset()
    scaled.wait(lambda: samples(scaled)["tandem_workers", ("decode", "serving")] == 2)


def test_what_the_controller_did_is_counted(scaled: Api) -> None:
    assert samples(scaled)["tandem_controller_up", ()] == 0
    scaled.membership.controllers = [ControllerInfo("controller", NAMESPACE, 5, 1, 2, 3, 4, 5, 6, 7.5, ())]
    try:
        page = samples(scaled)
    finally:
        scaled.membership.controllers = []
    names = ("role_changes_total", "worker_starts_total", "worker_stops_total", "worker_migrations_total",
             "workers_starting", "workers_draining", "drain_seconds")  # fmt: skip
    assert [page[f"tandem_{name}", ()] for name in names] == [1, 2, 3, 4, 5, 6, 7.5]
    assert page["tandem_controller_up", ()] == 1


def test_gpus_of_a_node_are_shown_once_however_many_workers_tell_of_them(scaled: Api) -> None:
    for worker in scaled.workers.values():
        worker.gpus = (GPU,)
    scaled.wait(lambda: ("tandem_gpu_power_watts", (GPU.id, "node-1")) in samples(scaled))
    page = samples(scaled)
    assert [page[f"tandem_gpu_{name}", (GPU.id, "node-1")] for name in
            ("utilization_ratio", "memory_used_bytes", "memory_bytes", "power_watts")] == [0.5, 3, 4, 600]  # fmt: skip


def test_tokens_and_gpu_time_of_a_tenant_are_counted(scaled: Api) -> None:
    def tokens(kind: str) -> float:
        return sum(v for (name, labels), v in samples(scaled).items() if name == "tandem_tenant_tokens_total"
                   and labels[0] == kind)  # fmt: skip

    before = {kind: tokens(kind) for kind in ("computed", "output")}
    assert scaled.complete(prompt=[9, 9], max_tokens=5).is_success
    assert tokens("computed") - before["computed"] == 2
    assert tokens("output") - before["output"] == 5
    for worker in scaled.workers.values():
        worker.hold_at = 2
    scaled.set(scaled.workers["d1"].go.clear)

    def seconds() -> float:
        return sum(v for (name, labels), v in samples(scaled).items() if name == "tandem_gpu_seconds_total"
                   and labels[0] == MODEL)  # fmt: skip

    began = seconds()
    with scaled.http.stream("POST", "/v1/completions", json={"prompt": [9, 9], "max_tokens": 5, "stream": True}):
        scaled.wait(lambda: seconds() > began)
    scaled.reset()


def request(tenant: str) -> Request:
    return Request("r", (1, 2, 3), Sampling(), b"", tenant)


def test_tenants_after_the_sixteenth_share_a_label() -> None:
    registry = CollectorRegistry()
    tenants = TenantMetrics(registry)
    for number in range(MOST + 4):
        tenants.prompt(request(f"{number:016x}"[::-1]), 1)
    tenants.output(request(f"{0:016x}"), 7)
    labels = {s.labels["tenant"] for family in registry.collect() for s in family.samples if "tenant" in s.labels}
    assert len(labels) == MOST + 1
    others = registry.get_sample_value("tandem_tenant_tokens_total", {"tenant": OTHERS, "kind": "computed"})
    assert others == 4 * 2
    assert registry.get_sample_value("tandem_tenant_tokens_total", {"tenant": "0" * 8, "kind": "output"}) == 7


def link(tenants: list[str], running: int, waiting: int = 0, shards: tuple[int, int] = (1, 1)) -> WorkerLink:
    load = SimpleNamespace(running=running, waiting=waiting)
    info = SimpleNamespace(tp=shards[0], pp=shards[1])
    return cast(WorkerLink, SimpleNamespace(tenants=tenants, load=load, info=info))


def test_a_workers_time_is_divided_among_its_jobs() -> None:
    assert dict(shares([link(["a", "b"], 2, shards=(2, 2))], 3.0)) == {"a": 6.0, "b": 6.0}
    assert list(shares([link(["a", "a"], 1)], 1.0)) == [("a", 0.5), ("a", 0.5)]
    assert list(shares([link([], 3)], 1.0)) == []  # nobody of ours


def test_jobs_of_other_routers_have_their_part() -> None:
    assert list(shares([link(["a"], 3, 1)], 1.0)) == [("a", 0.25)]
