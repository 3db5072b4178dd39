"""The stage that computes on a GPU, behind `workers.runner.Stage`: as `model_runner`, with kernels that walk block
tables, decode steps replayed from graphs, tokens chosen where the logits are, and a KV cache as large as memory allows.

A worker that is one shard is a step ahead (`workers.foresight`): tokens stay on the device for the step that follows.
Owns no policy and keeps no sequence but for what the last step was about. A step has ended, and all that it wrote can
be copied by whoever likes, when it was collected.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import ModelError
from kernels.sampling import sample_rows
from kvstore.layout import Layout
from workers.architecture import Architecture, layout, load_architecture, sizes
from workers.cache import KvCache
from workers.decode_graphs import DecodeGraphs, Staging, buckets
from workers.device import Cuda, Device, DeviceCache
from workers.device_batch import BlockTables, DeviceBatch, Plan, plan
from workers.gpu_profile import Limits, MemoryProfile
from workers.links import Links, NoLinks
from workers.model import Decoder
from workers.model_runner import blocks_in, context
from workers.rope import rope_table
from workers.runner import Alone, Chunk
from workers.sampling import sample
from workers.sequence import Sequence
from workers.shard import Shard, shards, whole
from workers.vocabulary import sample_slice
from workers.weights import load_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Computed:
    """Of one step, on the device."""

    logits: Tensor | None  # [R, V]; None: not the last stage, or nobody wants any
    tokens: Tensor | None  # [R] int64; None: also where ranks have parts of the vocabulary


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step in flight: what of it the host reads once it has ended."""

    step: Plan
    chunks: int
    tokens: Tensor | None  # [R] int64, pinned
    rows: list[int]  # of the samples, whose tokens the host chooses
    logits: Tensor | None  # [len(rows), V], pinned unless ranks have parts of the vocabulary
    wait: Callable[[], None]


class GpuRunner(Alone):
    def __init__(
        self,
        architecture: Architecture,
        shard: Shard,
        links: Links,
        decoder: Decoder,
        block_layout: Layout,  # of whole blocks
        limits: Limits,
        num_blocks: int,
        device: Device,
    ) -> None:
        self.layout = block_layout
        self.shard = shard
        self.num_blocks = num_blocks
        self.vocab_size = architecture.vocab_size
        self.max_context = limits.max_context
        self._links = links
        self._decoder = decoder
        self._cache = KvCache(shard.part(block_layout), num_blocks, device.place)
        self._device = device
        self.device_cache = DeviceCache(self._cache.blocks, device)
        self._tables = BlockTables()
        self._staging = Staging(device, block_layout.tokens)
        self._graphs: DecodeGraphs[_Computed] | None = None
        self._chosen = torch.zeros(limits.max_sequences, dtype=torch.int32, device=device.place)  # by the last step
        self._sampled: dict[Sequence, int] = {}  # where each sequence's is
        self._flight: deque[_Flight] = deque()
        if shard.tp == shard.pp == 1:
            self.depth, self.ahead = 2, True

    @classmethod
    def load(
        cls,
        directory: Path,
        dtype: str,  # float32 or bfloat16: weights, activations and, unless `kv_dtype` says otherwise, KV
        block_size: int,  # tokens
        kv_memory_bytes: int,  # of the worker: all its shards together; 0: what its GPUs have left
        limits: Limits,  # max_context 0: the model's own limit
        progress: Callable[[float], None] | None = None,
        device: Device | None = None,  # None: this process's GPU
        shard: Shard | None = None,  # None: the worker's only one
        links: Links | None = None,  # to its other shards
        kv_dtype: str = "",  # int8 or float8_e4m3fn: KV is kept in 8 bits, with scales; empty: in `dtype`
    ) -> GpuRunner:
        """Raises ModelError when the model cannot be served with these settings, saying which would do."""
        place = device or _gpu()
        architecture = load_architecture(directory)
        own, linked = shard or whole(sizes(architecture)), links or NoLinks()
        block_layout, torch_dtype = layout(architecture, dtype, block_size, kv_dtype), getattr(torch, dtype)
        check(architecture, block_layout, place)
        limits = replace(limits, max_context=context(architecture, limits.max_context))
        memory = None
        if not kv_memory_bytes:
            memory = MemoryProfile(place, architecture, own, block_layout, torch_dtype.itemsize, limits)
        with torch.inference_mode():
            weights = load_weights(directory, architecture, own, torch_dtype, place.place, progress)
            table = rope_table(architecture.rope, architecture.head_dim, limits.max_context, torch_dtype)
        decoder = Decoder(architecture, own, weights, table.to(place.place), linked)

        def made(num_blocks: int) -> GpuRunner:
            return cls(architecture, own, linked, decoder, block_layout, limits, num_blocks, place)

        if memory is None:
            parts = [each.part(block_layout) for each in shards(sizes(architecture), own.tp, own.pp)]
            whole_bytes = sum(part.block_bytes for part in parts)
            num_blocks = blocks_in(block_size, whole_bytes, kv_memory_bytes, limits.max_context)
        else:
            num_blocks = memory.blocks(made, linked)
        runner = made(num_blocks)
        runner.capture(limits)
        return runner

    def capture(self, limits: Limits) -> None:
        """Have decode steps replayed from graphs, from now on."""
        if self.shard.pp > 1:
            log.warning("decode steps are launched kernel by kernel: activations between stages are not captured")
            return
        captured = buckets(limits.max_sequences, limits.max_context, self.layout.tokens)
        try:
            with torch.inference_mode():
                self._graphs = DecodeGraphs(self._device, self._staging, captured, self._compute)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            log.warning("decode steps are launched kernel by kernel: they cannot be captured (%s)", reason)

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        self.submit(chunks)
        return self.collect()

    def submit(self, chunks: list[Chunk]) -> None:
        with torch.inference_mode():
            step = plan(chunks, self._tables, self.layout.tokens, self.shard.group, self._sampled)
            self._sampled = step.sampled
            computed = self._graphs.run(step, self._clear) if self._graphs is not None else None
            if computed is None:
                batch = DeviceBatch.over(self._staging.send(step, step.shape), step.shape)
                self._clear(step, batch)
                computed = self._compute(batch)
            self._flight.append(self._begun(step, computed, len(chunks)))

    def collect(self) -> list[int | None]:
        flight = self._flight.popleft()
        flight.wait()
        tokens: list[int | None] = [None] * flight.chunks
        for row, token in self._tokens(flight):
            tokens[flight.step.answers[row]] = token
        return tokens

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        return self._cache.bytes_of(index)

    def _clear(self, step: Plan, batch: DeviceBatch) -> None:
        if step.fresh:
            self._cache.clear(batch.fresh_blocks[: len(step.fresh)].long())

    def _compute(self, batch: DeviceBatch) -> _Computed:
        """All that a graph holds."""
        known = batch.sources < 0
        before = self._chosen.index_select(0, batch.sources.clamp(min=0))
        batch = replace(batch, token_ids=torch.where(known, batch.token_ids, before))
        logits = self._decoder.forward(batch, self._cache)
        if logits is None or self.shard.tp > 1:
            return _Computed(logits, None)
        tokens = sample_rows(logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.words)
        self._chosen[: len(tokens)].copy_(tokens)
        return _Computed(logits, tokens)

    def _begun(self, step: Plan, computed: _Computed, chunks: int) -> _Flight:
        """What the host wants of a step, on its way there: the next step writes over what is in a graph's memory."""
        tokens = None if computed.tokens is None else self._on_its_way(computed.tokens)
        # penalties and biases are of the whole sequence so far, which is on the host
        wanted = [(row, draw) for row, draw in enumerate(step.draws) if draw is not None]
        rows = [row for row, draw in wanted if tokens is None or draw.adjusted]
        logits = None
        if computed.logits is not None and rows:
            logits = torch.stack([computed.logits[row] for row in rows])  # a list of rows would be waited for
            logits = logits if tokens is None else self._on_its_way(logits)
        return _Flight(step, chunks, tokens, rows, logits, self._device.mark())

    def _on_its_way(self, x: Tensor) -> Tensor:
        """In pinned memory, once the step has ended."""
        host = self._device.staging(x.numel() * x.itemsize).view(x.dtype).view(x.shape)
        return host.copy_(x, non_blocking=True)

    def _tokens(self, flight: _Flight) -> list[tuple[int, int]]:
        """(row of the samples, token) of those that somebody wants."""
        found: dict[int, int] = {}
        if flight.tokens is not None:
            drawn: list[int] = flight.tokens.tolist()
            found = {row: drawn[row] for row, draw in enumerate(flight.step.draws) if draw is not None}
        if flight.logits is not None:
            draws = [draw for row in flight.rows if (draw := flight.step.draws[row]) is not None]
            with torch.inference_mode():
                if self.shard.tp == 1:
                    chosen = sample(flight.logits, draws)
                else:
                    chosen = sample_slice(flight.logits, draws, self.shard, self.vocab_size, self._links)
            found |= dict(zip(flight.rows, chosen, strict=True))
        return list(found.items())


def check(architecture: Architecture, block_layout: Layout, device: Device) -> None:
    """Raises ModelError, naming what is allowed, for what the kernels do not serve."""
    if block_layout.dtype == "float8_e4m3fn" and not device.e4m3:
        raise ModelError(
            "this GPU is too old for kernels of e4m3, which need compute capability 8.9 (Ada, Hopper or later); set "
            "kv_quantization to int8-cache"
        )
    if block_layout.tokens % 16 or block_layout.tokens > 128:
        raise ModelError(f"block_size {block_layout.tokens} is not for GPUs; use a multiple of 16 up to 128")
    if architecture.head_dim % 16 or architecture.head_dim > 256:
        raise ModelError(f"heads of {architecture.head_dim} are not for GPUs; use a model whose are 16, 32, ... 256")
    if architecture.num_heads > 16 * architecture.num_kv_heads:
        raise ModelError(
            f"{architecture.num_heads // architecture.num_kv_heads} query heads share keys, and GPU kernels serve up "
            "to 16; use a model with more key-value heads"
        )


def _gpu() -> Device:
    if not torch.cuda.is_available():
        raise ModelError(
            "runner cuda finds no GPU that torch can use; use runner torch, or see `tandem doctor` and `nvidia-smi`"
        )
    return Cuda()
