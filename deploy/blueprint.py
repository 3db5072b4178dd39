"""What one deployment consists of, worked out before anything is started: plain values that can be sent to any process.

Two compositions start what is written here: `deploy/launch.py` from a terminal, `deploy/serve_app.py` as a Ray Serve
application. Reads the model's metadata and the disk tier's secret; starts nothing and asks no network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cluster import telemetry
from cluster.config import Config
from cluster.identity import Identity
from cluster.scaling_policies import policy
from deploy import disk_tier, placement
from deploy.hardware import Needs
from deploy.models import ResolvedModel
from deploy.served_model import block_layout, gpu_needs, max_context, model_key, model_sizes
from deploy.store_sets import StoreSet, store_sets
from router.settings import RouterSettings
from workers.architecture import load_architecture
from workers.worker import WorkerSettings


@dataclass(frozen=True, slots=True)
class Blueprint:
    """`config` is resolved. Secrets are in it and are not shown."""

    config: Config
    model: Path
    identity: Identity
    template: WorkerSettings  # of every worker but for id and role
    stores: tuple[StoreSet, ...]  # of every node
    router: RouterSettings
    needs: Needs | None  # of GPUs; None: it computes on CPUs


def blueprint(config: Config, model: ResolvedModel, redis_url: str, host: str) -> Blueprint:
    """`config` is resolved. `host`: the address that internal servers bind; empty: their node's own.

    Raises StartupError or ModelError when this model cannot be served so.
    """
    architecture = load_architecture(model.directory)
    context = max_context(config, architecture)
    placement.check_model(config, model_sizes(config, architecture))
    policy(config.autoscaling)  # one that there is not should be found out now
    telemetry.check()
    disk = disk_tier.folder(config)
    secret = disk_tier.cluster_secret(config, disk)
    key = model_key(config, model.directory)
    # deployments with different secrets cannot talk, so they must not find each other in a shared Redis either
    namespace = hashlib.sha256(f"{key.namespace}/{secret}".encode()).hexdigest()[:16]
    identity = Identity(namespace, redis_url, secret, host)
    sets = store_sets(config, block_layout(config, architecture), identity, disk)
    return Blueprint(
        config=config,
        model=model.directory,
        identity=identity,
        template=WorkerSettings("", "both", key, context, identity, config),
        stores=tuple(sets),
        router=RouterSettings(
            model_directory=str(model.directory),
            served_model_name=config.served_model_name or model.name,
            namespace=namespace,
            cluster_secret=secret,
            redis_url=redis_url,
            max_context=context,
            vocab_size=architecture.vocab_size,
            eos_token_ids=architecture.eos_token_ids,
            model_key=key,
            store_namespaces=tuple(kind.identity.namespace for kind in sets),
        ),
        needs=gpu_needs(config, architecture, context),
    )
