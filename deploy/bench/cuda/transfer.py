"""Rows of a handoff's way between the GPU and the host: the worker's own block copies, in batches.

The limit is a plain copy between pinned memory and the device, measured in the same row. By the wall clock: what the
host does between two batches is part of it. Blocks of Llama 3 8B, 2 MiB.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deploy.bench.cuda.limits import Limits
from deploy.bench.cuda.random_model import LLAMA
from deploy.bench.cuda.rows import SPREAD, Answer, Call
from kernels.block_copy import gather_blocks, scatter_blocks
from workers.architecture import layout, sizes
from workers.cache import KvCache
from workers.device import Cuda, DeviceCache
from workers.device_blocks import PROGRAMS, DeviceBlocks
from workers.shard import whole

BLOCK_SIZE = 16
GATE = 0.85
REPETITIONS = 11
POOL = 4  # times as many blocks: they come from all over the cache


@dataclass(frozen=True, slots=True)
class Transfer:
    to_host: bool
    blocks: int

    @property
    def name(self) -> str:
        return f"{'gather, device to host' if self.to_host else 'host to device, scatter'}: {self.blocks} blocks"

    @property
    def moved(self) -> float:
        """In device memory: read, packed, read again."""
        return 3.0 * self.blocks * layout(LLAMA, "bfloat16", BLOCK_SIZE).block_bytes

    @property
    def flop(self) -> float:
        return 0.0

    def compile(self) -> None:
        cache = _cache(POOL * self.blocks)
        packed = torch.empty(self.blocks, cache.blocks[0].numel(), dtype=torch.bfloat16, device="cuda")
        ids = torch.empty(self.blocks, dtype=torch.int32, device="cuda")
        (gather_blocks if self.to_host else scatter_blocks)(cache.blocks, ids, packed, PROGRAMS)

    def run(self, limits: Limits) -> Answer:
        cache = _cache(POOL * self.blocks)
        cache.blocks.normal_()
        block_layout, shard = layout(LLAMA, "bfloat16", BLOCK_SIZE), whole(sizes(LLAMA))
        wholes = DeviceBlocks(DeviceCache(cache.blocks, Cuda()), block_layout, shard)
        ids = torch.randperm(len(cache.blocks))[: self.blocks].tolist()
        batches = [ids[i : i + wholes.batch] for i in range(0, len(ids), wholes.batch)]
        host = [wholes.staging(len(batch)).random_() for batch in batches]
        on_device = [torch.empty_like(each, device="cuda") for each in host]
        ours = _moves(wholes, batches, host, self.to_host)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for repetition in range(REPETITIONS + 1):
            for name, call in (("ours", ours), ("plain", _plain(host, on_device, self.to_host))):
                us = _us(call)
                if repetition:  # the first warms up
                    times[name].append(us)
        us, limit = statistics.median(times["ours"]), statistics.median(times["plain"])
        spread = (max(times["ours"]) - min(times["ours"])) / us
        verdict = "met" if limit / us >= GATE else "missed"
        if not _same(wholes, cache, batches, host, self.to_host):
            verdict = "wrong"
        elif spread > 4 * SPREAD:
            verdict = "unsteady"
        return {
            "us": us,
            "floor_us": limit,
            "fraction": limit / us,
            "spread": spread,
            "detail": f"{sum(each.numel() for each in host) / us / 1e3:.1f} GB/s",
            "verdict": verdict,
        }


def _cache(blocks: int) -> KvCache:
    return KvCache(layout(LLAMA, "bfloat16", BLOCK_SIZE), blocks, torch.device("cuda"))


def _moves(wholes: DeviceBlocks, batches: list[list[int]], host: list[torch.Tensor], to_host: bool) -> Call:
    def move() -> None:
        for batch, each in zip(batches, host, strict=True):
            if to_host:
                wholes.gather(batch)
            else:
                wholes.scatter(batch, each)

    return move


def _plain(host: list[torch.Tensor], on_device: list[torch.Tensor], to_host: bool) -> Call:
    def move() -> None:
        for here, there in zip(host, on_device, strict=True):
            if to_host:
                here.copy_(there, non_blocking=True)
            else:
                there.copy_(here, non_blocking=True)

    return move


def _us(call: Call) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began)


def _same(
    wholes: DeviceBlocks, cache: KvCache, batches: list[list[int]], host: list[torch.Tensor], to_host: bool
) -> bool:
    """Ours gathers what the cache holds, or what was on the host is in the cache."""
    for batch, each in zip(batches, host, strict=True):
        held = cache.blocks[torch.tensor(batch, device="cuda")].view(len(batch), -1).view(torch.uint8).cpu()
        moved = torch.from_numpy(wholes.gather(batch)) if to_host else each
        if not torch.equal(held, moved):
            return False
    return True


def rows() -> Sequence[Transfer]:
    return [Transfer(to_host, blocks) for to_host in (True, False) for blocks in (8, 256)]
