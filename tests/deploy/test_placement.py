"""What is refused before anything starts, and what Ray is asked for."""

import pytest

from cluster.config import Config
from cluster.errors import ModelError, StartupError
from cluster.messages import Role
from deploy.node_roles import Node
from deploy.placement import bundles, check_model, check_nodes, of_shard
from workers.shard import Sizes

SMOLLM2 = Sizes(heads=9, kv_heads=3, layers=30, intermediate=1536, vocabulary=49152)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_tp": 10}, "--prefill-tp 10 --prefill-pp 1: .*9 heads; use 1 to 9"),
        ({"decode_pp": 31}, "--decode-tp 1 --decode-pp 31: .*30 layers; use 1 to 30"),
        ({"prefill": 0, "decode_tp": 10}, "--decode-tp 10 .*use 1 to 9"),
    ],
)
def test_a_model_that_cannot_be_cut_so_finely(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_model(Config(**settings), SMOLLM2)


@pytest.mark.parametrize("settings", [{}, {"prefill_tp": 9, "decode_pp": 30}, {"prefill": 0, "decode_tp": 2}])
def test_a_model_that_can_be_cut(settings: dict[str, int]) -> None:
    check_model(Config(**settings), SMOLLM2)


@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ({"prefill_tp": 4, "threads": 4}, [8, 12], r"prefill workers need 16 CPUs on one node \(--prefill-tp 4 x 4 "
            r"threads\) and the largest has 12; use threads 1 to 3 or --prefill-tp 1 to 3"),
        ({"decode_tp": 4, "threads": 4}, [3], "prefill workers need 4 CPUs .* use threads 1 to 3"),
        ({"prefill": 0, "decode_tp": 4, "threads": 4}, [3], "use --decode-tp 1 and threads 1"),
        ({"prefill": 0, "decode_tp": 4, "threads": 1}, [3], "decode-tp 1 to 3"),
        ({"prefill": 0, "decode_pp": 5, "threads": 2}, [4, 4], "5 shards x 2 threads need 10 CPUs, 2 at a time on one "
            "node, and 2 node.s. have 8; start fewer"),
        ({"prefill": 0, "decode_pp": 3, "threads": 2}, [3, 3], "3 shards"),  # 6 CPUs, but only one pair on each
        ({"prefill_tp": 3, "decode": 2, "threads": 1}, [2, 3], None),
        ({"prefill_tp": 3, "decode": 3, "threads": 1}, [2, 3], "6 CPUs"),
        ({}, [], "no node of the Ray cluster has CPUs"),
        ({}, [0], "no node of the Ray cluster has CPUs"),
    ],
)  # fmt: skip
def test_nodes(settings: dict[str, int], nodes: list[float], message: str | None) -> None:
    config = Config(**{"threads": 1, **settings})
    if message is None:
        check_nodes(config, [Node(cpus) for cpus in nodes])
    else:
        with pytest.raises(StartupError, match=message):
            check_nodes(config, [Node(cpus) for cpus in nodes])


@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ({}, [Node(0), Node(1, "prefill"), Node(1, "decode")], None),
        ({}, [Node(8, "decode")], "no node is for prefill workers: all 1 with CPUs .* --labels tandem.role=prefill"),
        ({"decode": 2}, [Node(8, "prefill"), Node(1, "decode")],
            "2 shards x 1 threads need 2 CPUs, 1 at a time .*, and 1 node.s. labelled tandem.role=decode have 1"),
        ({"prefill_tp": 4}, [Node(2, "prefill"), Node(8)], "and the largest labelled tandem.role=prefill has 2"),
        ({"prefill": 0, "decode": 2}, [Node(1, "prefill"), Node(1, "decode")], None),
    ],
)  # fmt: skip
def test_nodes_with_roles(settings: dict[str, int], nodes: list[Node], message: str | None) -> None:
    config = Config(**{"threads": 1, **settings})
    if message is None:
        check_nodes(config, nodes)
    else:
        with pytest.raises(StartupError, match=message):
            check_nodes(config, nodes)


@pytest.mark.parametrize(
    ("role", "expected"),
    [("prefill", [{"CPU": 6.0}]), ("decode", [{"CPU": 2.0}] * 3), ("both", [{"CPU": 2.0}] * 3)],
)
def test_a_bundle_is_a_tensor_group(role: Role, expected: list[dict[str, float]]) -> None:
    assert bundles(Config(prefill_tp=3, decode_pp=3, threads=2), role) == expected


def test_a_shard_on_gpus_has_one_of_its_own() -> None:
    on_gpus = Config(runner="cuda", decode_tp=3, threads=2)
    assert bundles(on_gpus, "decode") == [{"CPU": 6.0, "GPU": 3.0}]
    assert of_shard(on_gpus) == {"num_cpus": 2, "num_gpus": 1}
    assert of_shard(Config(threads=2))["num_gpus"] == 0


def test_without_gpus_in_the_cluster_nobody_waits_for_them() -> None:
    on_gpus = Config(runner="cuda", threads=1)
    with pytest.raises(StartupError, match="no node of the Ray cluster has GPUs"):
        check_nodes(on_gpus, [Node(8), Node(8)])
    check_nodes(on_gpus, [Node(8), Node(8, resources=frozenset({"CPU", "GPU"}))])
    check_nodes(Config(threads=1), [Node(8)])
