"""How the shards of one worker are put together, whoever starts their processes: Ray's actors, or a test.

    rank 0     assemble ── starts the others ──► they join ──► all meet, load ──► Lead ──► the engine of a `Worker`
    a shard    follow   ── until rank 0 ends, then the process ends

Every rank builds its own stage: its part of the model or of the simulator, linked to the other parts. No Ray.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster.messages import Rates
from cluster.roofline import prior
from deploy.served_model import model_shape, model_sizes
from workers.architecture import load_architecture
from workers.assembly import join, load
from workers.control import ControlListener
from workers.follower import Follower
from workers.lead import Lead
from workers.links import Links
from workers.runner import Runner
from workers.shard import Shard, shards
from workers.shard_blocks import BlockServer
from workers.sim import SimRunner, Timings, sim_layout
from workers.stored_blocks import EncodedBlocks
from workers.worker import Worker, WorkerSettings

if TYPE_CHECKING:  # what computes with torch is imported where it is needed: a simulated worker starts without
    from workers.gpu_runner import GpuRunner
    from workers.model_runner import ModelRunner
    from workers.process_links import Rendezvous

JOIN_S = 60.0  # from a process that has started to one that has imported what it needs
LOAD_S = 600.0  # weights of a large model from a slow disk
SIM_SHARE = 4  # the sim runner's cache has room for this part of the longest sequences that may run at once

Progress = Callable[[float], None]  # how much of the weights is loaded, 0 to 1


@dataclass(frozen=True, slots=True)
class Assembled:
    """A worker whose rank 0 is this process."""

    runner: Runner
    shard_pids: tuple[int, ...]  # rank -> process
    rendezvous: Rendezvous | None = None  # of several shards; to be kept for as long as they are linked
    prior: Rates | None = None  # what its steps should take; None: nothing is known about where it computes

    def worker(self, settings: WorkerSettings, began: float | None = None) -> Worker:
        """The service around it, yet to be started. `began`: when this process did, if not now."""
        approximate = None
        if settings.config.kv_quantization == "int8":
            from workers.quantization import Int8Codec

            codec = Int8Codec(self.runner.shard.part(self.runner.layout))
            approximate = EncodedBlocks(self.runner, codec)
        return Worker(self.runner, settings, approximate, self.shard_pids, began, self.prior)


def assemble(
    settings: WorkerSettings,
    model: Path,
    start: Callable[[str], Sequence[int]],  # starts all other ranks, which follow this address; returns their pids
    progress: Progress | None = None,
) -> Assembled:
    """Raises what the first shard that cannot serve raised, or StartupError when one does not join or load in time."""
    tp, pp = settings.config.grid(settings.role)
    if tp * pp == 1:
        alone = build_stage(settings, model, 0, progress=progress)
        return Assembled(alone, (os.getpid(),), prior=_prior(settings, model))
    identity = settings.identity
    with contextlib.closing(ControlListener(identity.host, identity.secret)) as listener:
        pids = start(listener.address)
        controls = join(listener, tp * pp - 1, JOIN_S)
    from workers.process_links import Rendezvous

    rendezvous = Rendezvous(identity.host)
    build = partial(build_stage, settings, model, 0, progress=progress)
    stage, peers = load(controls, rendezvous.address, build, LOAD_S)
    lead = Lead(stage, controls, peers, settings.config.step_timeout)
    return Assembled(lead, (os.getpid(), *pids), rendezvous, _prior(settings, model))


def follow(settings: WorkerSettings, model: Path, rank: int, address: str) -> NoReturn:
    """Be one of the other ranks until rank 0, whose control listener is at `address`, ends."""
    identity, quantized = settings.identity, settings.config.kv_quantization == "int8"
    Follower(
        rank,
        address,
        identity.secret,
        lambda rendezvous: build_stage(settings, model, rank, rendezvous),
        lambda stage: BlockServer(stage, identity, quantized),
    ).run()


def build_stage(
    settings: WorkerSettings,
    model: Path,
    rank: int,
    rendezvous: str = "",  # its address, where there are several ranks
    progress: Progress | None = None,
) -> ModelRunner | GpuRunner | SimRunner:
    """Raises ModelError when the model cannot be served so, WorkerLost when another rank does not join."""
    config = settings.config
    tp, pp = config.grid(settings.role)
    shard = shards(model_sizes(config, load_architecture(model)), tp, pp)[rank]
    links: Links | None = None
    if tp * pp > 1:
        from workers.process_links import ProcessLinks

        device = "cuda" if config.runner == "cuda" else "cpu"
        links = ProcessLinks.join(rendezvous, shard, config.step_timeout, device)
    if config.runner == "sim":
        return _sim(settings, model, shard, links)
    if config.runner == "cuda":
        from workers.gpu_profile import Limits
        from workers.gpu_runner import GpuRunner

        limits = Limits(config.token_budget, config.max_sequences, settings.max_context)
        return GpuRunner.load(
            model,
            config.dtype,
            config.block_size,
            config.kv_memory,
            limits,
            progress,
            shard=shard,
            links=links,
            kv_dtype=config.kv_dtype,
        )
    from workers.model_runner import ModelRunner

    return ModelRunner.load(
        model,
        dtype=config.dtype,
        block_size=config.block_size,
        kv_memory_bytes=config.kv_memory,
        max_context=settings.max_context,
        progress=progress,
        shard=shard,
        links=links,
    )


def _prior(settings: WorkerSettings, model: Path) -> Rates | None:
    """Nothing is known of what a step takes on CPUs."""
    config = settings.config
    if config.runner != "cuda":
        return None
    import torch

    shape = model_shape(load_architecture(model), 1 if config.kv_dtype else 2)
    tp, pp = config.grid(settings.role)
    return prior(shape, torch.cuda.get_device_name(), tp, pp, config.dtype, config.token_budget)


def _sim(settings: WorkerSettings, model: Path, shard: Shard, links: Links | None) -> SimRunner:
    config = settings.config
    longest = -(-settings.max_context // config.block_size)
    num_blocks = longest * max(2, config.max_sequences // SIM_SHARE)
    timings = Timings(*(ms / 1000 for ms in config.sim_ms))
    vocab_size = load_architecture(model).vocab_size
    return SimRunner(sim_layout(config.block_size), num_blocks, vocab_size, timings, shard=shard, links=links)
