"""The workers of a deployment as Ray runs them: the only place that starts and stops their actors.

    placement group (pending for as long as a node takes) ─► its nodes' stores ─► the worker loads ─► serves ─► stops

A placement group per worker: what has no room yet is demand that Ray's autoscaler sees. `advance` takes everything that
is under way a step further and waits for nothing. It does as it is told: how many workers there should be, and when one
may go, is `cluster/plan.py`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import StartupError
from cluster.messages import Role, StoreInfo, WorkerInfo
from cluster.pools import State
from deploy import node_roles, placement
from deploy.actors import WorkerActor, runtime_environment
from deploy.hardware import Place
from deploy.node_stores import NodeStores
from deploy.process import Process, end
from deploy.store_sets import StoreSet
from workers.worker import WorkerSettings

PLACE_S = 60.0  # for the first workers, whose nodes are there
RENT_S = 1800.0  # for later ones: as long as a cloud may take to bring a node up
POLL_S = 0.1

Report = Callable[[str, float], None]  # (what is going on, how much of it is done 0..1)


@dataclass
class Post:
    """One worker from the order to start it to its end. Role and state are what was decided; its process may not know
    yet, or have forgotten."""

    role: Role
    settings: WorkerSettings  # with the role that it starts in
    shards: int
    group: PlacementGroup
    place_s: float  # how long finding room may take
    since_s: float  # monotonic: since when it has been in this role and state
    state: State = "starting"
    nodes: frozenset[str] = frozenset()  # Ray's ids; empty: there is no room yet
    process: Process | None = None
    drained: int = 0  # the incarnation that was told to drain
    stopping: bool = False
    wanted: str = ""  # the room that was asked for, in words

    def enter(self, role: Role, state: State) -> None:
        if (role, state) != (self.role, self.state):
            self.role, self.state, self.since_s = role, state, time.monotonic()

    @property
    def id(self) -> str:
        return self.settings.id

    @property
    def info(self) -> WorkerInfo | None:
        """What it said when it had started; None: it has not."""
        info = self.process and self.process.info
        return info if isinstance(info, WorkerInfo) else None


@dataclass(frozen=True, slots=True)
class Progress:
    """What has come of what was under way."""

    failed: tuple[StartupError, ...] = ()  # what did not start, and is forgotten
    ended: tuple[Post, ...] = ()  # workers whose processes are gone, as ordered


class Workforce:
    """`template`: the settings of every worker but for id and role. `sets`: the stores of a node. `places`: which GPUs
    a role wants; one that is not there wants none. For one thread at a time."""

    def __init__(
        self, template: WorkerSettings, model: Path, sets: Sequence[StoreSet], places: Mapping[Role, Place]
    ) -> None:
        self.stores = NodeStores(template.config, sets)
        self._template = template
        self._config = template.config
        self._model = model
        self._places = places
        self._posts: dict[str, Post] = {}
        self._number = 0  # of the next worker: ids are never used twice

    def start_first(self) -> None:
        """Those of the configuration; returns when all have a place and load. Raises StartupError."""
        # who may be on few types of GPU goes before who may be on many, and would take those
        for role, count in sorted(self._config.roles, key=lambda each: self._choice(each[0])):
            for index in range(count):
                self._start(f"{role}-{index}", role, first=True)
        while any(post.process is None for post in self.posts()):
            self._advance_or_raise()
            time.sleep(POLL_S)

    def start_worker(self, role: Role) -> str:
        """One more. Returns its id, which says no role: that may change."""
        return self._start(f"worker-{self._number}", role, first=False)

    def posts(self) -> list[Post]:
        return list(self._posts.values())

    def post(self, worker_id: str) -> Post | None:
        return self._posts.get(worker_id)

    def stop_worker(self, worker_id: str) -> None:
        """It is gone within 20 s, and with it what it still does."""
        post = self._posts[worker_id]
        post.stopping = True
        if post.process is not None:
            post.process.ask_to_stop()

    def advance(self) -> Progress:
        failed: list[StartupError] = []
        ended: list[Post] = []
        for post in self.posts():
            try:
                if not post.stopping:
                    self._advance(post)
                elif post.process is None or post.process.has_stopped():
                    ended.append(post)
                    self._remove(post)
            except StartupError as error:
                failed.append(error)
                self._remove(post)
        return Progress((*failed, *self.stores.advance()), tuple(ended))

    def await_ready(self, report: Report) -> tuple[list[WorkerInfo], list[StoreInfo]]:
        """Wait for all that is starting. Raises the first StartupError."""
        while True:
            self._advance_or_raise()
            posts, stores = self.posts(), self.stores.infos()
            loading = [post for post in posts if post.info is None]
            if not loading and None not in stores:
                workers = [post.info for post in posts if post.info is not None]
                return workers, [store for store in stores if store is not None]
            if loading:
                report(f"loading {loading[0].id}", _fraction_loaded(loading[0]))
            time.sleep(POLL_S)

    def restarted(self, worker_id: str) -> None:
        """Ray has started its process again, perhaps on other nodes: those need stores too."""
        post = self._posts[worker_id]
        post.nodes = _nodes(post.group) or post.nodes
        self.stores.furnish(post.nodes)

    def deserted(self) -> dict[str, list[StoreInfo]]:
        """Nodes that have stores and no worker any more -> their stores; never the first node."""
        return self.stores.deserted(node for post in self.posts() for node in post.nodes)

    def close(self) -> None:
        """End everything at once, started or not."""
        end([post.process for post in self.posts() if post.process is not None] + self.stores.processes())
        for post in self.posts():
            remove_placement_group(post.group)
        self._posts.clear()

    def _advance_or_raise(self) -> None:
        for error in self.advance().failed:
            raise error

    def _choice(self, role: Role) -> float:
        """Of how many types of GPU its first workers may be."""
        place = self._places.get(role)
        return len(place.types) if place and place.types else math.inf

    def _start(self, worker_id: str, role: Role, first: bool) -> str:
        """Ask for room for all its shards: each stage's tensor group on one node, the stages as close as may be."""
        pin, place = node_roles.pinned(role, _nodes_ever()), self._places.get(role)
        bundles = placement.bundles(self._config, role)
        selector = pin.selector | (place.selector(first) if place else {})
        group = placement_group(
            [{**bundle, **pin.resources} for bundle in bundles],
            strategy="PACK",
            name=worker_id,
            bundle_label_selector=[selector] * len(bundles) if selector else None,
        )
        each = " and ".join(f"{count:g} {what}s" for what, count in bundles[0].items())
        wanted = f"{len(bundles)} x {each}, each on one node{dataclasses.replace(pin, selector=selector).where}"
        settings = dataclasses.replace(self._template, id=worker_id, role=role)
        shards, place_s = math.prod(self._config.grid(role)), PLACE_S if first else RENT_S
        self._posts[worker_id] = Post(role, settings, shards, group, place_s, time.monotonic(), wanted=wanted)
        self._number += 1
        return worker_id

    def _advance(self, post: Post) -> None:
        """Raises StartupError when it will not start."""
        if post.process is not None:
            return post.process.poll()
        post.nodes = _nodes(post.group)
        if post.nodes:
            self.stores.furnish(post.nodes)
            post.process = Process.of(post.id, self._worker(post))
        elif time.monotonic() - post.since_s > post.place_s:
            raise StartupError(
                f"{post.id}: Ray found no room for {post.wanted} within {post.place_s:.0f} s; see `ray status`, free "
                "them or add nodes"
            )

    def _worker(self, post: Post) -> Any:
        """The rank of a worker that leads it. It starts the others itself, next to it in its placement group."""
        return (
            ray.remote(WorkerActor)
            .options(
                **placement.of_shard(self._config),
                max_restarts=-1,
                max_concurrency=4,
                runtime_env=runtime_environment(self._config),
                scheduling_strategy=PlacementGroupSchedulingStrategy(post.group, placement_group_bundle_index=0),
            )
            .remote(post.settings, self._model)
        )

    def _remove(self, post: Post) -> None:
        if post.process is not None:
            post.process.kill()
        remove_placement_group(post.group)
        del self._posts[post.id]


def _nodes_ever() -> list[node_roles.Node]:
    """Of the cluster, those that have left it included."""
    return [node_roles.Node.of(entry) for entry in ray.nodes()]


def _nodes(group: PlacementGroup) -> frozenset[str]:
    """Where Ray has made room; empty while it has not."""
    table = placement_group_table(group)
    return frozenset(table["bundles_to_node_id"].values()) if table.get("state") == "CREATED" else frozenset()


def _fraction_loaded(post: Post) -> float:
    if post.process is None:
        return 0.0
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # `advance` will see what is wrong
        return float(ray.get(post.process.actor.progress.remote(), timeout=1.0))
    return 0.0
