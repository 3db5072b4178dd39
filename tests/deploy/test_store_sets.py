"""Which stores a node is to run, with and without int8."""

from pathlib import Path

from cluster.config import Config
from cluster.identity import Identity
from deploy.store_sets import store_sets
from kvstore.layout import Layout

LAYOUT = Layout(heads=2, layers=2, tokens=16, dim=8, dtype="bfloat16", itemsize=2)
IDENTITY = Identity("ns", "redis://", "secret", "")
MEMORY = {"store_memory": 1000, "disk_memory": 2**22, "stores": 2}


def test_exact_stores_have_everything() -> None:
    (only,) = store_sets(Config(**MEMORY), LAYOUT, IDENTITY, Path("/d"))
    assert (only.name, only.layout, only.identity) == ("store", LAYOUT, IDENTITY)
    assert (only.memory, only.disk_memory) == (500, 2**21)
    assert only.disk_folders == (Path("/d/0"), Path("/d/1"))


def test_with_int8_there_is_a_second_kind_and_nothing_but_the_sizes_is_shared() -> None:
    exact, approximate = store_sets(Config(kv_quantization="int8", **MEMORY), LAYOUT, IDENTITY, Path("/d"))
    assert (exact.memory, exact.disk_memory) == (approximate.memory, approximate.disk_memory) == (250, 2**20)
    assert (exact.layout, exact.identity) == (LAYOUT, IDENTITY)
    assert approximate.layout.block_bytes * 16 == LAYOUT.block_bytes * (8 + 4)
    assert approximate.identity.namespace != IDENTITY.namespace
    assert approximate.identity.secret == IDENTITY.secret
    assert len({*exact.disk_folders, *approximate.disk_folders}) == 4
    assert exact.name != approximate.name


def test_without_a_disk() -> None:
    assert [kind.disk_folders for kind in store_sets(Config(kv_quantization="int8"), LAYOUT, IDENTITY, None)] == [
        (None,),
        (None,),
    ]
