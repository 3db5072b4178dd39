"""The block stores of a deployment's nodes, as Ray runs them.

A node has stores while it has workers, and the first node always: a node with an actor never counts as idle, and Ray's
autoscaler would not give it back. The only place that starts and stops store actors; whether a deserted node's stores
still hold something for somebody is for others to find out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import Config
from cluster.errors import StartupError
from cluster.messages import StoreInfo
from deploy.actors import StoreActor
from deploy.process import Process
from deploy.store_sets import StoreSet


class NodeStores:
    """Nodes are Ray's node ids. `sets`: the stores of every node. For one thread at a time."""

    def __init__(self, config: Config, sets: Sequence[StoreSet]) -> None:
        self._config = config
        self._sets = sets
        self._home = str(ray.get_runtime_context().get_node_id())
        self._stores: dict[str, list[Process]] = {}  # node -> its stores
        self.furnish([self._home])

    def furnish(self, nodes: Iterable[str]) -> None:
        """Start the stores of those nodes that have none."""
        for node in sorted(set(nodes) - self._stores.keys()):
            places = [(kind, index) for kind in self._sets for index in range(self._config.stores)]
            self._stores[node] = [self._start(node, kind, index) for kind, index in places]

    def infos(self) -> list[StoreInfo | None]:
        """What each said when it had started; None: it has not."""
        infos = [store.info for stores in self._stores.values() for store in stores]
        return [info if isinstance(info, StoreInfo) else None for info in infos]

    def deserted(self, used: Iterable[str]) -> dict[str, list[StoreInfo]]:
        """Nodes with stores that are neither in `used` nor the first -> those of their stores that have started."""
        kept = {self._home, *used}
        return {
            node: [store.info for store in stores if isinstance(store.info, StoreInfo)]
            for node, stores in self._stores.items()
            if node not in kept and not stores[0].stopping_s
        }

    def clear(self, node: str) -> None:
        """Have that node's stores end."""
        for store in self._stores[node]:
            store.ask_to_stop()

    def advance(self) -> list[StartupError]:
        """Take what starts and ends a step further. Returns why stores did not start: those of a node are there
        together or not at all, and are tried again with its next worker."""
        failed: list[StartupError] = []
        for node, stores in list(self._stores.items()):
            if stores[0].stopping_s:
                over = all(store.has_stopped() for store in stores)
            else:
                errors = [error for error in map(_failure, stores) if error is not None]
                failed, over = failed + errors, bool(errors)
            if over:
                for store in stores:
                    store.kill()
                del self._stores[node]
        return failed

    def processes(self) -> list[Process]:
        return [store for stores in self._stores.values() for store in stores]

    def _start(self, node: str, kind: StoreSet, index: int) -> Process:
        """One of a node's block stores, with its part of the node's memory and disk."""
        name, disk = f"{kind.name}-{node[-8:]}-{index}", kind.disk_folders[index]
        on_that_node = NodeAffinitySchedulingStrategy(node, soft=False)  # soft affinity could move it
        actor: Any = (
            ray.remote(StoreActor)
            .options(num_cpus=0, max_restarts=-1, max_concurrency=4, scheduling_strategy=on_that_node)
            .remote(name, kind.layout, kind.memory, kind.identity, disk, kind.disk_memory, self._config.tenant_share)
        )
        return Process.of(name, actor)


def _failure(process: Process) -> StartupError | None:
    try:
        process.poll()
    except StartupError as error:
        return error
    return None
