"""What Ray is asked for a worker's shards. Ray itself is not here: what it makes of it is tested in tests/e2e."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.identity import Identity
from cluster.messages import Role
from deploy import workforce
from deploy.hardware import Needs, Place
from deploy.node_roles import GPU_LABEL, NVLINK_LABEL, ROLE_LABEL, Node
from deploy.placement import places
from deploy.workforce import Workforce
from kvstore.hashing import ModelKey
from workers.worker import WorkerSettings

NEEDS = Needs(weights=16_060_000_000, kv_token=131_072, kv_heads=8, context=8192)
NODES = [
    {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}, "Labels": {GPU_LABEL: "H200", NVLINK_LABEL: "8"}},
    {"Alive": True, "Resources": {"CPU": 32.0, "GPU": 4.0}, "Labels": {GPU_LABEL: "H100", NVLINK_LABEL: "4"}},
    {"Alive": True, "Resources": {"CPU": 32.0, "GPU": 4.0}, "Labels": {GPU_LABEL: "H100", NVLINK_LABEL: "1"}},
]


class Asked:
    """In the place of Ray: keeps what placement groups were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]) -> None:
        self.groups: list[tuple[Any, Any]] = []
        monkeypatch.setattr(workforce, "placement_group", self._ask)
        monkeypatch.setattr(workforce, "NodeStores", lambda config, sets: None)
        monkeypatch.setattr(workforce.ray, "nodes", lambda: nodes)

    def _ask(self, bundles: Any, strategy: str, name: str, bundle_label_selector: Any) -> None:
        assert strategy == "PACK"
        self.groups.append((bundles, bundle_label_selector))


def made(config: Config, chosen: dict[Role, Place]) -> Workforce:
    key = ModelKey(b"model", b"tokenizer", "bfloat16", config.block_size)
    identity = Identity("n", "redis://127.0.0.1:1", "secret", "127.0.0.1")
    return Workforce(WorkerSettings("", "both", key, 256, identity, config), Path(), [], chosen)


def test_gpus_are_asked_for_by_role_and_later_by_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, NODES)
    config = Config(runner="cuda", prefill_tp=2, prefill_pp=2, decode_tp=2, threads=2)
    force = made(config, places(config, NEEDS, [Node.of(node) for node in NODES]))
    force._start("prefill-0", "prefill", first=True)
    force._start("decode-0", "decode", first=True)
    force.start_worker("decode")
    group = {"CPU": 4.0, "GPU": 2.0}
    assert asked.groups == [
        ([group] * 2, [{GPU_LABEL: "H100", NVLINK_LABEL: "4"}] * 2),
        ([group], [{GPU_LABEL: "H200"}]),
        ([group], None),
    ]
    assert force.posts()[0].wanted == (
        f"2 x 4 CPUs and 2 GPUs, each on one node labelled {GPU_LABEL}=H100 labelled {NVLINK_LABEL}=4"
    )


def test_roles_of_nodes_and_types_of_gpus_are_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [NODES[0], *({**node, "Labels": {**node["Labels"], ROLE_LABEL: "prefill"}} for node in NODES[1:])]
    asked = Asked(monkeypatch, nodes)
    config = Config(runner="cuda", prefill_tp=2, threads=2)
    force = made(config, places(config, NEEDS, [Node.of(node) for node in nodes]))
    force._start("prefill-0", "prefill", first=True)
    assert asked.groups == [([{"CPU": 4.0, "GPU": 2.0}], [{ROLE_LABEL: "prefill", NVLINK_LABEL: "4"}])]


def test_without_gpus_nothing_is_asked_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, NODES)
    made(Config(threads=2), {})._start("prefill-0", "prefill", first=True)
    assert asked.groups == [([{"CPU": 2.0}], None)]
