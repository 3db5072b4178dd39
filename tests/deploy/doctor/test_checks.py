"""From facts to findings, for what cannot be planted on any machine: GPUs, memory, versions, other machines' Redis."""

from dataclasses import replace

import pytest

from cluster.config import Config
from deploy.doctor import checks
from deploy.doctor.checks import GIB
from deploy.doctor.machine import Disk, Gpus, Machine
from deploy.doctor.model_files import ModelFiles
from deploy.doctor.services import Ray, Redis

MACHINE = Machine((3, 12, 1), 8, 32 * GIB, 16 * GIB, 8 * GIB, 8 * GIB)
CONFIG = Config(threads=4, kv_memory=GIB)
REMOTE = Redis("redis://10.0.0.1:6380", version="7.2.4", role="master", password=True)


@pytest.mark.parametrize(("version", "level"), [((3, 10, 9), "error"), ((3, 13, 0), "ok"), ((3, 14, 0), "error")])
def test_python(version: tuple[int, int, int], level: str) -> None:
    assert checks.python(replace(MACHINE, python=version)).level == level


@pytest.mark.parametrize(("size", "level"), [(5, "ok"), (10, "warning"), (40, "error")])
def test_memory_is_counted_per_worker(size: int, level: str) -> None:
    assert checks.memory(CONFIG, MACHINE, ModelFiles("m", bytes=size * GIB)).level == level
    simulated = CONFIG.model_copy(update={"runner": "sim"})
    assert checks.memory(simulated, MACHINE, ModelFiles("m", bytes=size * GIB)).level == "ok"


def test_shared_memory_that_is_less_than_was_asked_for() -> None:
    finding = checks.shared_memory(Config(store_memory=9 * GIB), MACHINE)
    assert (finding.level, "--shm-size" in finding.advice) == ("warning", True)
    assert checks.shared_memory(Config(store_memory=GIB), MACHINE).level == "ok"


def test_cores() -> None:
    assert checks.cores(CONFIG, MACHINE).level == "ok"
    assert checks.cores(CONFIG, replace(MACHINE, cores=7)).level == "warning"


def test_a_disk_with_too_little_room() -> None:
    assert checks.disk(Config(disk="/d"), Disk("/d", free=GIB)).level == "warning"


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (Gpus(error="NVML Shared Library Not Found"), "ok", "none"),
        (Gpus(("NVIDIA H200, 140 GiB",), device_files=1), "ok", "NVIDIA H200"),
        (Gpus(error="Driver/library version mismatch", device_files=2), "error", "version mismatch"),
    ],
)
def test_gpus(facts: Gpus, level: str, words: str) -> None:
    finding = checks.gpus(facts)
    assert (finding.level, words in finding.found) == (level, True)


@pytest.mark.parametrize(
    ("facts", "nodes", "level", "words"),
    [
        (None, 1, "ok", "embedded"),
        (None, 3, "error", "3 nodes and no redis_url"),
        (REMOTE, 3, "ok", "7.2.4"),
        (replace(REMOTE, version=""), 0, "ok", "not told"),
        (replace(REMOTE, version="5.0.14"), 0, "error", "5.0.14"),
        (replace(REMOTE, role="slave"), 0, "error", "replica"),
        (replace(REMOTE, password=False), 0, "warning", "no password"),
        (replace(REMOTE, policy="allkeys-lru"), 0, "ok", ""),  # without a limit nothing is evicted
    ],
)
def test_redis(facts: Redis | None, nodes: int, level: str, words: str) -> None:
    finding = checks.redis(CONFIG, facts, nodes)
    assert (finding.level, words in finding.found) == (level, True)


def test_a_clock_that_nobody_keeps_matters_with_others_only() -> None:
    assert checks.clock(None, False).level == "ok"
    assert checks.clock(replace(REMOTE, local=True), False).level == "ok"
    assert checks.clock(Redis("redis://10.0.0.1:6380", "refused"), False).level == "ok"
    assert checks.clock(REMOTE, False).level == "warning"
    assert checks.clock(REMOTE, None).level == checks.clock(REMOTE, True).level == "ok"
    assert checks.clock(replace(REMOTE, skew_s=-3.0), True).level == "warning"


def test_ray() -> None:
    assert checks.ray(Ray("2.60.1")).level == "ok"
    assert checks.ray(Ray("2.61.0")).level == checks.ray(Ray("")).level == "error"
    joined = checks.ray(Ray("2.60.0", "10.0.0.1:6380", nodes=3, cpus=24))
    assert (joined.level, "3 nodes with 24 CPUs" in joined.found) == ("ok", True)
    assert checks.ray(Ray("2.60.0", "10.0.0.1:6380", "Version mismatch")).level == "error"


def test_a_model_that_is_yet_to_be_fetched() -> None:
    assert checks.model(ModelFiles("org/model", remote=True)).level == "warning"
