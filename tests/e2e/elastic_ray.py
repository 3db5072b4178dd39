"""A Ray cluster that gets its nodes from Ray's own autoscaler (v2), with processes for machines: Ray's fake provider.

The head has room for one shard, or none; every further one needs a node of its own, which is given back when it has
been idle. What nodes there are may be said as `ray up` is told it, with nodes that carry labels.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from deploy.environment import free_range
from tests.e2e.ray_head import ray_head
from tests.serving import called, marked

IDLE_MINUTES = 0.05
START_S = 60.0
MEMORY = 80_000_000  # of a node for Ray's objects: the least it takes
SHARDS = {"shard": {"resources": {"CPU": 1, "object_store_memory": MEMORY}, "node_config": {}, "min_workers": 0}}
LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


@dataclass(frozen=True, slots=True)
class ElasticRay:
    address: str
    mark: str

    def nodes(self) -> int:
        """How many there are, the head included."""
        return sum(called(process, "raylet") for process in marked(self.mark))


@contextmanager
def elastic_ray(
    most_nodes: int, node_types: dict[str, Any] | None = None, options: tuple[str, ...] = (), **more: str
) -> Iterator[ElasticRay]:
    """`node_types`: `available_node_types` without the head, which then has no CPU; by default shards of one CPU.
    `options`: more of them for the head's `ray start`. `more`: environment of all nodes."""
    head_cpus = 1 if node_types is None else 0
    mark, port = uuid.uuid4().hex, free_range(1)
    made = ElasticRay(f"127.0.0.1:{port}", mark)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(autoscaling(most_nodes, made.address, head_cpus, node_types or SHARDS)))
        fake = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        given = (
            *("--include-dashboard=false", f"--num-cpus={head_cpus}", f"--object-store-memory={MEMORY}"),
            *(f"--autoscaling-config={config}", *options),
        )
        with ray_head(mark, port, given, lambda: made.nodes() >= 1, START_S, **{**fake, **more}):
            yield made


def autoscaling(most_nodes: int, gcs_address: str, head_cpus: int, node_types: dict[str, Any]) -> dict[str, object]:
    """What `ray up` would read, with every key that Ray asks for."""
    provider = {
        "type": "external",  # the wheel has the fake provider and not its defaults
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}",
        "gcs_address": gcs_address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    workers = {name: {"max_workers": most_nodes, **kind} for name, kind in node_types.items()}
    head = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "elastic",
        "max_workers": most_nodes,
        "upscaling_speed": 20,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "available_node_types": {"ray.head.default": head, **workers},
        "head_node_type": "ray.head.default",
        **{name: [] for name in LISTS},
    }
